"""What a user can cause: one error type, the nearest names to offer, and lists that stay short."""

from collections.abc import Iterable, Sequence
from difflib import get_close_matches


class UserError(ValueError):
    """An error that the user can mend; its message says what was given, what is allowed, what to do.

    The commands print the message alone and end with exit status 1; a library caller sees a ValueError.
    """


def nearest(name: str, allowed: Iterable[str], n: int = 3, always: bool = False) -> str:
    """The allowed names closest to `name`, as a sentence: "did you mean a, b?", or the whole list.

    With `always` the closest are named however far they are.
    """
    names = sorted(set(allowed))
    close = get_close_matches(name, names, n=n, cutoff=0.0 if always else 0.5)
    if close:
        return f"did you mean {', '.join(close)}?"
    return f"allowed: {', '.join(names)}" if names else "nothing is allowed here"


def listed(items: Sequence[str], separator: str = "; ", most: int = 8) -> str:
    """The first items, and how many more there are."""
    more = f" and {len(items) - most} more" if len(items) > most else ""
    return separator.join(items[:most]) + more


class Interrupted(Exception):
    """A run that was asked to stop and has saved its state; `exit_status` is 128 + the signal's number."""

    def __init__(self, message: str, signal_number: int) -> None:
        super().__init__(message)
        self.exit_status = 128 + signal_number
