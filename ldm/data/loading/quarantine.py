"""Counts of bad samples: how many, where and why; too many end the run."""

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from ldm.data.loading.batch import Batch
from ldm.data.shards.index import Manifest
from ldm.errors import UserError


class BadSamples:
    """Counts bad samples by shard and reason. Raises UserError above a limit.

    limit      the share of the samples seen that may be bad
    minimum    number that may be bad in any case
    """

    def __init__(self, limit: float = 0.01, minimum: int = 10) -> None:
        self.limit, self.minimum = limit, minimum
        self.seen = 0
        self.counts: Counter[tuple[str, str]] = Counter()  # (shard, reason), of every visit

    @property
    def bad(self) -> int:
        """Bad samples so far, at every visit."""
        return self.counts.total()

    def report(self, n: int = 10) -> str:
        """The n largest counts, one a line."""
        return "\n".join(f"  {shard}: {count} x {why}" for (shard, why), count in self.counts.most_common(n))

    def check_total(self) -> None:
        """Raises UserError where too many of the samples seen are bad."""
        if self.bad > max(self.minimum, self.limit * self.seen):
            raise self._error(
                f"{self.bad} of {self.seen} samples could not be used, more than {self.limit:.1%}", "max_bad"
            )

    def _error(self, finding: str, knob: str) -> UserError:
        return UserError(f"{finding}:\n{self.report()}\nfix or leave out these shards, or allow more with {knob}")


class Skipped(BadSamples):
    """Counts the samples that a stream of the shards at `paths` left out; see BadSamples."""

    def __init__(self, paths: Sequence[str], limit: float = 0.01, minimum: int = 10) -> None:
        super().__init__(limit, minimum)
        self.paths = paths

    def add(self, batch: Batch) -> None:
        """Counts a batch, whose `bad` are (place of the shard, reason)."""
        self.seen += len(batch.samples) + len(batch.bad)
        self.counts.update((self.paths[place], reason) for place, reason in batch.bad)
        if batch.bad:
            self.check_total()


class Quarantine(BadSamples):
    """Counts the replaced samples of the batches that a process trains on; see BadSamples.

    manifest   of the samples, or those of several sources, whose samples are numbered one after the other
    of_shard   the share of a shard's samples that may be bad, above `minimum`
    file       where each bad sample is listed once, a JSON object a line: shard, key, reason, step; None: nowhere.
               An existing file is continued
    """

    def __init__(
        self,
        manifest: Manifest | Sequence[Manifest],
        limit: float = 0.01,
        minimum: int = 10,
        of_shard: float = 0.05,
        file: Path | None = None,
    ) -> None:
        super().__init__(limit, minimum)
        self.manifests = [manifest] if isinstance(manifest, Manifest) else list(manifest)
        self.of_shard, self.file = of_shard, file
        lines = file.read_text().splitlines() if file is not None and file.is_file() else []
        self._entries = {entry for entry in map(_parse, lines) if entry is not None}  # (shard, key)
        self._of_shard = Counter(shard for shard, _ in self._entries)  # distinct samples

    def add(self, batch: Batch) -> None:
        """Counts a batch, whose `bad` are (number of the sample, reason)."""
        self.seen += len(batch.samples)
        for sample, reason in batch.bad:
            manifest, index = self._locate(sample)
            shard = manifest.shard_of(index)
            self.counts[shard, reason] += 1
            self._list(shard, manifest.key(index), reason, batch.step)
            samples = int(manifest.shards[int(manifest.shard[index])]["samples"])
            if self._of_shard[shard] > max(self.minimum, self.of_shard * samples):
                raise self._error(
                    f"{self._of_shard[shard]} of the {samples} samples of {shard} could not be used, "
                    f"more than {self.of_shard:.1%}",
                    "max_bad_of_shard",
                )
        if batch.bad:
            self.check_total()

    def _locate(self, sample: int) -> tuple[Manifest, int]:
        """The manifest of a sample, and its number there."""
        for manifest in self.manifests:
            if sample < len(manifest):
                return manifest, sample
            sample -= len(manifest)
        raise AssertionError("a sample of no manifest")

    def _list(self, shard: str, key: str, reason: str, step: int) -> None:
        if (shard, key) in self._entries:
            return
        self._entries.add((shard, key))
        self._of_shard[shard] += 1
        if self.file is not None:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            with self.file.open("a") as file:
                file.write(json.dumps({"shard": shard, "key": key, "reason": reason, "step": step}) + "\n")


def _parse(line: str) -> tuple[str, str] | None:
    """(shard, key) of a line; None for one that was cut when the process was killed."""
    try:
        facts = json.loads(line)
        return str(facts["shard"]), str(facts["key"])
    except (ValueError, KeyError, TypeError):
        return None
