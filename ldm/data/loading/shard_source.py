"""Where the samples of a run come from."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from ldm.data.loading.caption_choice import CaptionChoice
from ldm.data.loading.decode import decoder
from ldm.data.loading.fetch import Fetcher, View
from ldm.data.order.selection import Selection
from ldm.data.shards.index import Manifest, load_manifest
from ldm.data.shards.picture import Size
from ldm.data.shards.remote import Remote
from ldm.data.shards.shards import Shards


@dataclass(frozen=True)
class Source(ABC):
    """Shards to train from: of pictures, or of latents that a first stage computed from them.

    shards           a brace pattern, a folder or a list
    require_caption  a sample without caption is bad; false gives it the empty caption (first stages)
    index            folder for the manifest; None: `.index` next to the shards
    where            which samples are used, see Filter; None: all
    captions         weights of the caption's fields, see CaptionChoice; None: the text, else the JSON's caption
    weight           share of the samples that are trained on, where data sets are mixed; None: by their sizes
    """

    shards: Shards
    require_caption: bool = True
    index: str | None = None
    where: str | None = None
    captions: Mapping[str, float] | None = None
    weight: float | None = None
    fetcher_type: ClassVar[type[Fetcher]] = Fetcher

    @property
    def remote(self) -> Remote | None:
        """How shards behind a URL are read; None: see Remote."""
        return None

    @property
    def first_stage(self) -> str | None:
        """The fingerprint of the first stage that computed the latents; None for pictures."""
        return None

    @abstractmethod
    def manifest(self) -> Manifest:
        """The manifest. Raises UserError for missing, damaged or empty shards."""

    def fetcher(
        self,
        manifest: Manifest,
        sizes: Sequence[Size],
        seed: int,
        cache_bytes: int = 0,
        decode: str = "exact",
        selection: Selection | None = None,
    ) -> Fetcher:
        """Reads samples of `manifest` at any of `sizes` (height, width), the first by default.

        `selection` are the samples that are used (None: all); up to `cache_bytes` of pictures are kept decoded.
        Raises UserError for captions or sizes that are not there.
        """
        captions = CaptionChoice(self.captions, self.require_caption)
        view = self._view(sizes)
        fetcher = self.fetcher_type(manifest, view, seed, cache_bytes, decoder(decode), captions, selection)
        fetcher.check_captions()
        return fetcher

    @abstractmethod
    def _view(self, sizes: Sequence[Size]) -> View:
        """How samples become training images, at the first of `sizes`."""


@dataclass(frozen=True)
class ShardSource(Source):
    """Shards of pictures, and how they are cropped; see Source.

    random_crop      crop anywhere, not at the centre
    flip             mirror half of the samples (captions that distinguish left from right become wrong)
    allow_damaged    train on the whole samples of damaged shards
    remote           how shards behind a URL are read; None: see Remote
    """

    random_crop: bool = False
    flip: bool = False
    allow_damaged: bool = False
    remote: Remote | None = None

    def manifest(self) -> Manifest:
        """The manifest. Raises UserError for missing, damaged or empty shards."""
        return load_manifest(self.shards, self.allow_damaged, self.index, self.remote)

    def _view(self, sizes: Sequence[Size]) -> View:
        return View(sizes[0], self.random_crop, self.flip)
