"""The account of bad samples: how many, where and why; it ends the run when they are too many."""

from collections import Counter

from ldm.data.batch import Batch
from ldm.data.index import Manifest
from ldm.errors import UserError


class Quarantine:
    """Counts the replaced samples of the batches that a process trains on.

    Raises UserError when more than `limit` of the samples seen, and more than `minimum`, were bad.
    """

    def __init__(self, manifest: Manifest, limit: float = 0.01, minimum: int = 10) -> None:
        self.manifest = manifest
        self.limit = limit
        self.minimum = minimum
        self.seen = 0
        self.counts: Counter[tuple[str, str]] = Counter()  # (shard, reason)

    @property
    def bad(self) -> int:
        """Samples that were replaced so far."""
        return self.counts.total()

    def add(self, batch: Batch) -> None:
        """Takes a batch into account."""
        self.seen += len(batch.samples)
        if not batch.bad:
            return
        self.counts.update((self.manifest.shard_of(index), reason) for index, reason in batch.bad)
        if self.bad > max(self.minimum, self.limit * self.seen):
            raise UserError(
                f"{self.bad} of {self.seen} samples could not be used, more than {self.limit:.1%}:\n"
                f"{self.report()}\n"
                "mend or leave out these shards, or allow more with max_bad"
            )

    def report(self, n: int = 10) -> str:
        """The n largest counts, one a line."""
        return "\n".join(f"  {shard}: {count} x {why}" for (shard, why), count in self.counts.most_common(n))
