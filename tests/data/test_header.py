"""Sizes from headers are those that decoding finds."""

import struct
from io import BytesIO

import pytest
from PIL import Image

from ldm.data.shards.header import picture_size
from ldm.data.shards.picture import decode
from tests.data.make import picture


def found(data: bytes) -> tuple[int, int] | None:
    return picture_size(lambda offset, size: data[offset : offset + size])


def stored(size: tuple[int, int], kind: str, mode: str = "RGB", **options: object) -> bytes:
    file = BytesIO()
    Image.open(BytesIO(picture(0, size))).convert(mode).save(file, kind, **options)
    return file.getvalue()


KINDS = [
    ("JPEG", "RGB", {}),
    ("JPEG", "L", {"progressive": True}),
    ("JPEG", "CMYK", {"icc_profile": bytes(70_000)}),  # in two segments before the frame
    ("PNG", "RGB", {}),
    ("PNG", "RGBA", {}),
    ("WEBP", "RGB", {"quality": 80}),
    ("WEBP", "RGB", {"lossless": True}),
    ("WEBP", "RGBA", {"quality": 80}),
    ("WEBP", "RGB", {"icc_profile": b"profile"}),
]


@pytest.mark.parametrize(("kind", "mode", "options"), KINDS)
@pytest.mark.parametrize("size", [(2, 3), (37, 301), (300, 7)])
def test_the_size_is_the_pictures(kind: str, mode: str, options: dict[str, object], size: tuple[int, int]) -> None:
    assert found(stored(size, kind, mode, **options)) == size


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("order", ["<", ">"])
def test_exif_turns_a_jpeg_as_decoding_does(orientation: int, order: str) -> None:
    exif = Image.Exif()
    exif.endian = order
    exif[0x010F] = "a maker"
    exif[0x0112] = orientation
    data = stored((30, 20), "JPEG", exif=exif)
    height, width = decode(data, (4, 4))[1]
    assert found(data) == (width, height) == ((30, 20) if orientation < 5 else (20, 30))


def test_what_is_no_picture_has_no_size() -> None:
    whole = stored((30, 20), "JPEG")
    assert found(b"") is None and found(b"no picture at all, but long enough for it") is None
    assert found(stored((8, 8), "GIF")) is None
    assert found(whole[:100]) is None and found(whole[:2] + b"\xff\xd9") is None
    assert found(stored((8, 8), "PNG")[:20]) is None and found(stored((8, 8), "WEBP")[:22]) is None
    assert found(b"\xff\xd8" + b"\xff\xe0\x00\x02" * 3000) is None
    assert found(b"\xff\xd8" + b"\xff" * 40 + whole[2:]) == (30, 20)  # fill bytes


def test_only_the_needed_bytes_are_read() -> None:
    data = stored((37, 21), "JPEG", icc_profile=bytes(60_000))
    read: list[int] = []

    def part(offset: int, size: int) -> bytes:
        read.append(size)
        return data[offset : offset + size]

    assert picture_size(part) == (37, 21) and sum(read) < 300


def test_a_gigapixel_header_is_a_number() -> None:
    data = bytearray(stored((8, 8), "PNG"))
    data[16:24] = struct.pack(">II", 100_000, 20_000)
    assert found(bytes(data)) == (100_000, 20_000)
