"""Which of a sample's captions a visit uses: fields with weights, drawn from (seed, epoch, sample)."""

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ldm.data.shards.index import Manifest
from ldm.data.shards.picture import BadSample
from ldm.data.shards.tar import JSON_CAPTION, NO_CAPTION, MAX_text_bytes, json_object
from ldm.errors import UserError, nearest
from ldm.randomness import key

TEXT, JSON, EMPTY = "txt", "json.", "empty"
MAX_caption_bytes = 1 << 16
PROBES = 64  # samples in which the fields are looked for

Read = Callable[[int, int, int], bytes]  # (sample, offset, size) -> bytes


class CaptionChoice:
    """Captions of a manifest's samples.

    weights   of the fields `txt`, `json.NAME` and `empty`; None: the text, else the JSON's `caption`
    required  a sample without caption is bad; else it has the empty one

    A visit draws a field by the weights. Where the sample lacks it, another is drawn from the rest without `empty`;
    without any field the sample has no caption. A JSON field that is a list of texts gives one of them.
    """

    def __init__(self, weights: Mapping[str, float] | None = None, required: bool = True) -> None:
        self.required = required
        self.weights = dict(weights) if weights is not None else None
        if self.weights is None:
            return
        for name, weight in self.weights.items():
            if name not in (TEXT, EMPTY) and not (name.startswith(JSON) and len(name) > len(JSON)):
                raise UserError(f"captions: unknown field {name!r}; the fields are txt, json.NAME and empty")
            if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 <= weight < float("inf"):
                raise UserError(f"captions: the weight of {name} is {weight}; it has to be a number of 0 or more")
        if not sum(self.weights.values()) > 0:
            raise UserError("captions: all weights are 0; give a field a weight above 0")

    def __call__(self, manifest: Manifest, read: Read, index: int, seed: int, epoch: int) -> str:
        """The caption of a visit. Raises BadSample where there is none and one is required, or it is too long."""
        if self.weights is None:
            return self._first(manifest, read, index)
        fields = {name: weight for name, weight in self.weights.items() if weight > 0}
        facts: dict[str, Any] | None = None
        while fields:
            draw = key(seed, "caption", epoch, index, len(fields)) % (1 << 64) / 2.0**64
            name = _pick(fields, draw)
            if name == EMPTY:
                return ""
            if name == TEXT:
                text = self._text(manifest, read, index)
            else:
                facts = json_part(manifest, read, index) if facts is None else facts
                text = _one(facts.get(name.removeprefix(JSON)), key(seed, "caption", epoch, index, name))
            if text:
                return text
            fields = {other: weight for other, weight in fields.items() if other not in (name, EMPTY)}
        return self._none()

    def alternatives(self, manifest: Manifest, read: Read, index: int) -> list[str]:
        """All captions that a visit may draw. Raises BadSample as a visit does."""
        if self.weights is None:
            return [self._first(manifest, read, index)]
        fields = [name for name, weight in self.weights.items() if weight > 0]
        if fields == [EMPTY]:
            return [""]
        texts = [self._text(manifest, read, index)] if TEXT in fields else []
        facts = json_part(manifest, read, index) if any(name.startswith(JSON) for name in fields) else {}
        for name in fields:
            if name.startswith(JSON):
                texts += _texts(facts.get(name.removeprefix(JSON)))
        texts = [text for text in dict.fromkeys(texts) if text]
        return [*(texts or [self._none()]), *([""] if EMPTY in fields and texts else [])]

    def _first(self, manifest: Manifest, read: Read, index: int) -> str:
        """The text, else the JSON's caption."""
        kind = manifest.caption[index]
        if kind == NO_CAPTION:
            return self._none()
        if kind == JSON_CAPTION:
            return _one(json_part(manifest, read, index).get("caption"), 0) or self._none()
        return self._text(manifest, read, index) or self._none()

    def _none(self) -> str:
        if self.required:
            raise BadSample("no caption")
        return ""

    def _text(self, manifest: Manifest, read: Read, index: int) -> str:
        size = int(manifest.text_size[index])
        if size > MAX_caption_bytes:
            raise BadSample("caption too long")
        data = read(index, int(manifest.text_offset[index]), size) if size > 0 else b""
        return data.decode("utf-8", "replace").strip()

    def check(self, manifest: Manifest, read: Read) -> None:
        """Raises UserError for a field that none of a few samples, spread over the manifest, has."""
        names = [n.removeprefix(JSON) for n, w in (self.weights or {}).items() if n.startswith(JSON) and w > 0]
        if not names:
            return
        present: set[str] = set()
        for index in range(0, len(manifest), max(1, len(manifest) // PROBES)):
            try:
                facts = json_part(manifest, read, index)
            except BadSample:
                continue
            present |= {name for name, value in facts.items() if isinstance(value, str | list)}
        for name in names:
            if name not in present:
                raise UserError(f"captions: no sample's JSON has a text {name!r}; {nearest(name, present)}")


def json_part(manifest: Manifest, read: Read, index: int) -> dict[str, Any]:
    """A sample's JSON part; empty where it has none, or no object. Raises BadSample where it is too long or corrupt."""
    size = int(manifest.json_size[index])
    if size > MAX_text_bytes:
        raise BadSample("caption too long")
    try:
        facts = json.loads(read(index, int(manifest.json_offset[index]), size)) if size > 0 else {}
    except (ValueError, RecursionError) as error:
        raise BadSample("corrupt JSON") from error
    return facts if isinstance(facts, dict) else {}


def json_caption(data: bytes) -> str:
    """The caption in a JSON part; empty where it has none or is corrupt."""
    return "".join(_texts(json_object(data).get("caption"))[:1])


def _pick(weights: Mapping[str, float], draw: float) -> str:
    """The field at a place in [0, 1) of the weights laid end to end."""
    place = draw * sum(weights.values())
    for name, weight in weights.items():
        place -= weight
        if place < 0:
            return name
    return list(weights)[-1]


def _one(value: object, draw: int) -> str:
    """A JSON value's text, or the drawn one of its texts; empty where it is none."""
    texts = _texts(value)
    text = texts[draw % len(texts)] if texts else ""
    if len(text) > MAX_caption_bytes:
        raise BadSample("caption too long")
    return text


def _texts(value: object) -> list[str]:
    """A JSON value's text or texts, without empty ones."""
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [text.strip() for text in value if isinstance(text, str) and text.strip()]
    return [value.strip()] if isinstance(value, str) and value.strip() else []
