"""Width and height of an encoded picture from its first bytes, without decoding.

JPEG: the frame header SOFn (ITU-T T.81, B.2.2), turned by EXIF's orientation (CIPA DC-008, tag 0x0112) like the
pixels. PNG: the IHDR chunk (ISO/IEC 15948, 11.2.2). WebP: the first VP8, VP8L or VP8X chunk (RFC 9649).
"""

import struct
from collections.abc import Callable

Read = Callable[[int, int], bytes]  # (offset in the picture, size in bytes) -> bytes, fewer at the end

FRAMES = frozenset({*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC})  # SOF0 to SOF15; the three others are tables
SEGMENTS = 1000  # a picture with more before its frame has no known size
EXIF_bytes = 1024  # orientation is in the first directory, near the beginning


def picture_size(read: Read) -> tuple[int, int] | None:
    """(width, height) in pixels; None for other formats and broken headers."""
    head = read(0, 32)
    try:
        if head[:2] == b"\xff\xd8":
            return _jpeg(read)
        if head[:8] == b"\x89PNG\r\n\x1a\n" and head[12:16] == b"IHDR":
            return _positive(*struct.unpack(">II", head[16:24]))
        if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
            return _webp(head)
    except (struct.error, IndexError):  # it ends too early
        pass
    return None


def _positive(width: int, height: int) -> tuple[int, int] | None:
    return (width, height) if width > 0 and height > 0 else None


def _jpeg(read: Read) -> tuple[int, int] | None:
    offset, turned = 2, False
    for _ in range(SEGMENTS):
        head = read(offset, 9)
        if len(head) < 4 or head[0] != 0xFF:
            return None
        mark = head[1]
        if mark == 0xFF:  # a fill byte
            offset += 1
            continue
        if mark in FRAMES:
            height, width = struct.unpack(">HH", head[5:9])
            return _positive(*((height, width) if turned else (width, height)))
        if mark == 0xDA or mark == 0xD9:  # the scan or the end, before any frame
            return None
        size = struct.unpack(">H", head[2:4])[0]
        if mark == 0xE1 and size > 16:
            turned = turned or _orientation(read(offset + 4, min(size - 2, EXIF_bytes))) >= 5
        offset += 2 + size
    return None


def _orientation(exif: bytes) -> int:
    """EXIF's orientation, 1 to 8; 1 where there is none."""
    if exif[:6] != b"Exif\0\0" or exif[6:8] not in (b"II", b"MM"):
        return 1
    order = "<" if exif[6:8] == b"II" else ">"
    try:
        directory = 6 + struct.unpack(order + "I", exif[10:14])[0]
        for entry in range(struct.unpack(order + "H", exif[directory : directory + 2])[0]):
            at = directory + 2 + 12 * entry
            tag, kind = struct.unpack(order + "HH", exif[at : at + 4])
            if tag == 0x0112 and kind == 3:
                return int(struct.unpack(order + "H", exif[at + 8 : at + 10])[0])
    except struct.error:  # beyond the bytes that were read
        pass
    return 1


def _webp(head: bytes) -> tuple[int, int] | None:
    kind = head[12:16]
    if kind == b"VP8X":
        return 1 + int.from_bytes(head[24:27], "little"), 1 + int.from_bytes(head[27:30], "little")
    if kind == b"VP8L" and head[20] == 0x2F:
        bits = int.from_bytes(head[21:25], "little")
        return 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
    if kind == b"VP8 " and head[23:26] == b"\x9d\x01\x2a":
        width, height = struct.unpack("<HH", head[26:30])
        return _positive(width & 0x3FFF, height & 0x3FFF)
    return None
