import pytest

from ldm.examples.emoji import caption


@pytest.mark.parametrize(
    ("name", "phrase"),
    [
        ("1f355", "pizza"),
        ("1f1ef-1f1f5", "flag: Japan"),
        ("1f1e8-1f1ee", "flag: C\u00f4te d'Ivoire"),
        ("1f3f4-e0067_e0062_e0073_e0063_e0074", "flag: Scotland"),
        ("1f3f4-200d-2620-fe0f", "pirate flag"),
        ("35-fe0f-20e3", "keycap 5"),
        ("1f55c", "clock face: one-thirty"),
        ("1f468-1f3ff-200d-1f9b2", "man, dark skin tone, bald"),
        ("1f468-200d-1f9b0", "man, red hair"),
        ("1f468-200d-1f469-200d-1f466", "family: man, woman, boy"),
        ("1f469-200d-2764-fe0f-200d-1f48b-200d-1f468", "kiss: woman, man"),
        ("1f1ef-1f1f5.webp", "flag: Japan"),
    ],
)
def test_names_read_as_phrases(name: str, phrase: str) -> None:
    assert caption(f"some/folder/{name}.webp".replace(".webp.webp", ".webp")) == phrase


@pytest.mark.parametrize(
    ("name", "phrase"),
    [
        ("1f6b4-1f3fc-200d-2640-fe0f", "woman biking, medium skin tone"),
        ("1f44d-1f3fd", "thumbs up, medium-light skin tone"),
        ("1f44d-1f3fe", "thumbs up, medium-dark skin tone"),
        ("1f468-1f3fd-200d-1f4bb", "man technologist, medium skin tone"),
        ("1f46b-1f3fc", "woman and man holding hands, medium-light skin tone"),
        ("1f491-1f3fd", "couple with heart, medium skin tone"),
    ],
)
def test_tones_are_those_to_be_seen(name: str, phrase: str) -> None:
    assert caption(f"{name}.webp") == phrase


@pytest.mark.parametrize("name", ["readme", "1f6b5-1f3fb", "0035-fe0f-20e3", "ffffff", "1", "1f355-1f355"])
def test_other_pictures_are_left_out(name: str) -> None:
    assert caption(f"{name}.webp") is None
