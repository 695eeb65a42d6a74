"""The captions of shards, in order, for a tokenizer."""

from collections.abc import Iterator

from ldm.data.loading.caption_choice import CaptionChoice
from ldm.data.loading.fetch import Fetcher, View
from ldm.data.shards.index import load_manifest
from ldm.data.shards.shards import Shards


class Captions:
    """Iterates over the captions of shards in their order; they are opened when the iteration starts."""

    def __init__(self, shards: Shards) -> None:
        self.shards = shards

    def __iter__(self) -> Iterator[str]:
        manifest = load_manifest(self.shards)
        fetcher = Fetcher(manifest, View.of(1), captions=CaptionChoice(required=False))
        return (fetcher.caption(index) for index in range(len(manifest)))
