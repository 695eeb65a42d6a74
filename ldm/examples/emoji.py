"""Captions of emoji pictures whose file names are code points, such as `1f6b4-1f3fd-200d-2640-fe0f.webp`.

For Microsoft's Fluent 3D emoji as the npm package `@lobehub/fluent-emoji-3d` ships them (MIT, 256 px). The
names are Unicode's (CLDR), as the PyPI package `emoji` lists them.

That package (version 1.1.0) names most pictures of medium and medium-light skin by each other's code point,
as their colours show: of 304 sets of five tones only the 14 of couples and technologists are named rightly,
and the person mountain biking is in no order. The captions say what is to be seen.
"""

import re
from pathlib import Path

from ldm.errors import UserError

_CANCEL_TAG = chr(0xE007F)
_TONE = re.compile(r" ((?:medium-)?(?:light|dark)|medium) skin tone\b")
_PEOPLE = re.compile(r"^(couple with heart|kiss|family)((?: (?:man|woman|girl|boy|adult|child|person))+)")
_HAIR = re.compile(r"^(man|woman|person)(,.* skin tone)? ((?:[a-z]+ hair|beard|bald)$)")
_NAMED_RIGHTLY = re.compile(r"(1f46[bcd]|1f48f|1f491)-|.*-(2764|1f91d)-|.*-1f4bb$")
_OTHER_TONE = {0x1F3FC: 0x1F3FD, 0x1F3FD: 0x1F3FC}
_REPEATED = re.compile(r"00[0-9a-f]{2}-fe0f-20e3$")
_MIXED_UP = re.compile(r"1f6b5-1f3f[b-f]$")


def caption(path: str | Path) -> str | None:
    """The phrase for a picture, e.g. "woman biking, medium skin tone"; None where the name is no emoji's.

    None also for the zero-padded keycaps (`0032-fe0f-20e3`), which are there without the zeros as well, and
    for the mountain bikers whose tones are mixed up. Raises UserError without the package `emoji`.
    """
    try:
        from emoji import EMOJI_DATA
    except ImportError as error:
        raise UserError("captions of emoji need the package emoji: pip install emoji") from error
    stem = Path(path).stem
    if _REPEATED.match(stem) or _MIXED_UP.match(stem) or not re.fullmatch(r"[0-9a-f]+([-_][0-9a-f]+)*", stem):
        return None
    numbers = [int(part, 16) for part in re.split("[-_]", stem)]
    if max(numbers) > 0x10FFFF:
        return None
    if not _NAMED_RIGHTLY.match(stem):
        numbers = [_OTHER_TONE.get(number, number) for number in numbers]
    text = "".join(map(chr, numbers))
    for spelled in (text, text.replace("\ufe0f", ""), text + _CANCEL_TAG):
        if spelled in EMOJI_DATA:
            return _phrase(EMOJI_DATA[spelled]["en"].strip(":"), numbers)
    return None


def _phrase(name: str, numbers: list[int]) -> str:
    """CLDR's short name as one writes it, from the package's identifier."""
    phrase = name.replace("_", " ").replace("\u2019", "'")
    if _is_flag(numbers):
        return f"flag: {phrase}"
    if 0x1F550 <= numbers[0] <= 0x1F567:
        return f"clock face: {phrase}"
    phrase = _TONE.sub(r", \1 skin tone", phrase)
    phrase = _HAIR.sub(lambda m: f"{m[1]}{m[2] or ''}, {m[3]}", phrase)
    return _PEOPLE.sub(lambda m: f"{m[1]}: {', '.join(m[2].split())}", phrase)


def _is_flag(numbers: list[int]) -> bool:
    """Two regional indicators, or a black flag followed by tags."""
    regional = all(0x1F1E6 <= number <= 0x1F1FF for number in numbers)
    return regional or (numbers[0] == 0x1F3F4 and len(numbers) > 1 and numbers[1] >= 0xE0020)
