"""Where the samples of a run come from."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from ldm.data.loading.caption_choice import CaptionChoice
from ldm.data.loading.decode import decoder
from ldm.data.loading.fetch import Fetcher, View
from ldm.data.order.selection import Selection
from ldm.data.shards.index import Manifest, load_manifest
from ldm.data.shards.remote import Remote
from ldm.data.shards.shards import Shards


class Source(Protocol):
    """Shards to train from: of pictures, or of latents that a first stage made of them beforehand."""

    @property
    def shards(self) -> Shards:
        """The shards, as `expand` takes them."""

    @property
    def index(self) -> str | None:
        """Folder for the manifest; None: `.index` beside the shards."""

    @property
    def remote(self) -> Remote | None:
        """How shards behind a URL are read."""

    @property
    def where(self) -> str | None:
        """Which samples are used, see Filter; None: all."""

    @property
    def weight(self) -> float | None:
        """Share of the samples that are trained on, where data sets are mixed; None: by their sizes."""

    @property
    def first_stage(self) -> str | None:
        """The fingerprint of the first stage that the latents were made by; None where they are pictures."""

    def manifest(self) -> Manifest:
        """The manifest. Raises UserError for missing, damaged or empty shards."""

    def fetcher(
        self,
        manifest: Manifest,
        sizes: Sequence[tuple[int, int]],
        seed: int,
        cache_bytes: int = 0,
        decode: str = "exact",
        chosen: Selection | None = None,
    ) -> Fetcher:
        """Reads samples of `manifest` at any of `sizes` (height, width), at the first where none is asked for.

        `chosen` are those that are used (None: all); up to `cache_bytes` of pictures are kept decoded.
        """


@dataclass(frozen=True)
class ShardSource:
    """A list of shards, and how its pictures are taken.

    shards           a brace pattern, a folder or a list
    random_crop      crop anywhere, not at the centre
    flip             mirror half of the samples (captions that tell left from right become wrong)
    require_caption  a sample without caption is bad; false gives it the empty caption (first stages)
    allow_damaged    train on the whole samples of damaged shards
    index            folder for the manifest; None: `.index` beside the shards
    remote           how shards behind a URL are read; None: see Remote
    where            which samples are used, see Filter; None: all
    captions         weights of the caption's fields, see CaptionChoice; None: the text, else the JSON's caption
    weight           share of the samples that are trained on, where data sets are mixed; None: by their sizes
    """

    shards: Shards
    random_crop: bool = False
    flip: bool = False
    require_caption: bool = True
    allow_damaged: bool = False
    index: str | None = None
    remote: Remote | None = None
    where: str | None = None
    captions: Mapping[str, float] | None = None
    weight: float | None = None

    @property
    def first_stage(self) -> None:
        """None: they are pictures."""
        return None

    def manifest(self) -> Manifest:
        """The manifest. Raises UserError for missing, damaged or empty shards."""
        return load_manifest(self.shards, self.allow_damaged, self.index, self.remote)

    def fetcher(
        self,
        manifest: Manifest,
        sizes: Sequence[tuple[int, int]],
        seed: int,
        cache_bytes: int = 0,
        decode: str = "exact",
        chosen: Selection | None = None,
    ) -> Fetcher:
        """Reads pictures that cover one of `sizes`, see Source. Raises UserError for captions that are not there."""
        view = View(sizes[0], self.random_crop, self.flip)
        captions = CaptionChoice(self.captions, self.require_caption)
        fetcher = Fetcher(manifest, view, seed, cache_bytes, decoder(decode), captions, chosen)
        fetcher.check_captions()
        return fetcher
