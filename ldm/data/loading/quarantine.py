"""The account of bad samples: how many, where and why; it ends the run when they are too many."""

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from ldm.data.loading.batch import Batch
from ldm.data.shards.index import Manifest
from ldm.errors import UserError


class Quarantine:
    """Counts the replaced samples of the batches that a process trains on.

    manifest   of the samples, or those of several sources, whose samples are numbered one after the other
    limit      the share of the samples seen that may be bad
    of_shard   the share of a shard's samples that may be bad
    minimum    as many may be bad in any case, of all and of a shard
    file       where each bad sample is listed once, a JSON object a line: shard, key, reason, step; None: nowhere

    Raises UserError above a limit. A file that is there already is gone on with.
    """

    def __init__(
        self,
        manifest: Manifest | Sequence[Manifest],
        limit: float = 0.01,
        minimum: int = 10,
        of_shard: float = 0.05,
        file: Path | None = None,
    ) -> None:
        self.manifests = [manifest] if isinstance(manifest, Manifest) else list(manifest)
        self.limit, self.of_shard, self.minimum = limit, of_shard, minimum
        self.file = file
        self.seen = 0
        self.counts: Counter[tuple[str, str]] = Counter()  # (shard, reason), of every visit
        self._known: set[tuple[str, str]] = set()  # (shard, key)
        self._in_shard: Counter[str] = Counter()  # different samples
        if file is not None and file.is_file():
            for line in file.read_text().splitlines():
                told = _parsed(line)
                if told is not None and told not in self._known:
                    self._known.add(told)
                    self._in_shard[told[0]] += 1

    @property
    def bad(self) -> int:
        """Samples that were replaced so far, at every visit."""
        return self.counts.total()

    def add(self, batch: Batch) -> None:
        """Takes a batch into account."""
        self.seen += len(batch.samples)
        for sample, reason in batch.bad:
            manifest, index = self._place(sample)
            shard = manifest.shard_of(index)
            self.counts[shard, reason] += 1
            self._list(shard, manifest.key(index), reason, batch.step)
            held = int(manifest.shards[int(manifest.shard[index])]["samples"])
            if self._in_shard[shard] > max(self.minimum, self.of_shard * held):
                raise self._too_many(
                    f"{self._in_shard[shard]} of the {held} samples of {shard} could not be used, "
                    f"more than {self.of_shard:.1%}",
                    "max_bad_of_shard",
                )
        if batch.bad and self.bad > max(self.minimum, self.limit * self.seen):
            told = f"{self.bad} of {self.seen} samples could not be used, more than {self.limit:.1%}"
            raise self._too_many(told, "max_bad")

    def report(self, n: int = 10) -> str:
        """The n largest counts, one a line."""
        return "\n".join(f"  {shard}: {count} x {why}" for (shard, why), count in self.counts.most_common(n))

    def _too_many(self, told: str, knob: str) -> UserError:
        return UserError(f"{told}:\n{self.report()}\nmend or leave out these shards, or allow more with {knob}")

    def _place(self, sample: int) -> tuple[Manifest, int]:
        """The manifest of a sample, and its number there."""
        for manifest in self.manifests:
            if sample < len(manifest):
                return manifest, sample
            sample -= len(manifest)
        raise AssertionError("a sample of no manifest")

    def _list(self, shard: str, key: str, reason: str, step: int) -> None:
        if (shard, key) in self._known:
            return
        self._known.add((shard, key))
        self._in_shard[shard] += 1
        if self.file is not None:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            with self.file.open("a") as file:
                file.write(json.dumps({"shard": shard, "key": key, "reason": reason, "step": step}) + "\n")


def _parsed(line: str) -> tuple[str, str] | None:
    """(shard, key) of a line; None for one that was cut when the process was killed."""
    try:
        told = json.loads(line)
        return str(told["shard"]), str(told["key"])
    except (ValueError, KeyError, TypeError):
        return None
