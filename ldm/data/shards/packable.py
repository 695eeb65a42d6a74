"""What can be packed: a sample that gives the members that it has in a shard."""

import hashlib
import json
from collections.abc import Callable
from typing import Any, Protocol

Encode = Callable[[bytes], tuple[bytes, str, tuple[int, int]]]  # (bytes, extension, (width, height)) as stored


class Packable(Protocol):
    """A sample to pack: its key in the shard, and where it comes from, for messages."""

    @property
    def key(self) -> str: ...

    @property
    def path(self) -> str: ...

    @property
    def tar_bytes(self) -> int:
        """What it takes in a shard with its picture as it is, or a little less."""

    def identity(self) -> list[Any]:
        """What tells it from other samples, for JSON."""

    def parts(self, encode: Encode, touched: bool) -> dict[str, bytes]:
        """Its members by extension; `touched`: its picture may not be stored as it is.

        Raises OSError or ValueError where the picture cannot be read.
        """


def picture_facts(stored: bytes, size: tuple[int, int]) -> dict[str, Any]:
    """What the JSON says of a picture: width and height in pixels, sha256 of the bytes that are stored."""
    return {"width": size[0], "height": size[1], "sha256": hashlib.sha256(stored).hexdigest()}


def as_json(facts: dict[str, Any]) -> bytes:
    """The same bytes for the same facts; what JSON does not know (dates, decimals) becomes text."""
    return json.dumps(facts, ensure_ascii=False, sort_keys=True, default=str).encode()


def member_bytes(name: str, size: int) -> int:
    """What a member of `size` bytes takes in a tar file, header and padding included."""
    extended = 0 if len(name.encode()) < 90 and name.isascii() else 1024 + -(-len(name.encode()) // 512) * 512
    return extended + 512 + -(-size // 512) * 512
