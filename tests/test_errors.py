"""The nearest names."""

from ldm.errors import UserError, nearest


def test_a_user_error_is_a_value_error():
    assert issubclass(UserError, ValueError)


def test_close_names_are_offered_closest_first():
    assert nearest("ddmi", ["ddim", "euler", "heun"]) == "did you mean ddim?"
    assert nearest("eular", ["euler", "euler_a", "ddim"]).startswith("did you mean euler, euler_a")


def test_all_names_are_listed_where_none_is_close():
    assert nearest("xyz", ["ddim", "euler"]) == "allowed: ddim, euler"
    assert nearest("xyz", []) == "nothing is allowed here"
