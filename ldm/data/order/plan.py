"""The order of samples as a pure function of (samples, weights, global batch, seed, window, position).

Each bucket of each source is an endless stream of its own epochs: place p belongs to epoch p // samples, every
epoch holds every sample exactly once and nothing is dropped. `BucketSchedule` says which bucket a global step serves,
`MixtureSchedule` how its positions are shared among sources; the streams' places follow in closed form, so that any
step costs the same and the state of a run is one integer.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ldm.data.order.bucket_schedule import BucketSchedule
from ldm.data.order.mixing import MixtureSchedule
from ldm.data.order.permutation import Ints, fold, permute, word
from ldm.errors import UserError
from ldm.randomness import key

STRETCHES = 64  # a window is this many stretches of consecutive samples, or more:
LONGEST = 1024  # samples of a stretch
CHUNK = 1 << 15  # places that are mixed at once; their words fit into a processor's cache


class Stream:
    """Endless epochs of `samples` samples, each mixed again, with a window as `Plan` describes it."""

    def __init__(self, samples: int, window: int | None, key: int) -> None:
        self.samples = samples
        self.windows = max(1, round(samples / min(window or samples, samples)))
        share = samples // self.windows
        if self.windows == 1:
            self.stretch, self.stretches = 1, samples
        else:
            self.stretches = min(share, max(STRETCHES, -(-share // LONGEST)))
            self.stretch = share // self.stretches
        self.window = share  # its stretches, and what is left of the share from the end of all
        self._key = word(key)

    def at(self, places: Ints) -> tuple[Ints, Ints]:
        """(sample, epoch), each [P] int64, at places [P] of the stream."""
        epochs, k = np.divmod(places, self.samples)
        index = np.empty_like(k)
        for start in range(0, len(k), CHUNK):
            part = slice(start, start + CHUNK)
            index[part] = self._index(k[part], _shared(epochs[part]))
        return index, epochs

    def _index(self, k: Ints, epochs: Ints) -> Ints:
        """The sample at place k of an epoch; `epochs` as `k`, or [1].

        The place is mixed within its window. Of S stretches in a window the i-th lies in the i-th of S equal parts
        of the samples, so that each window holds what all of them hold. What makes no stretch is shared out one
        by one, and fewer than one for each window stay last, so the samples are numbered from another one in each
        epoch.
        """
        keys = fold(self._key, epochs)
        number, place = np.divmod(k, self.window)
        number = _shared(number)
        sizes = _shared(np.minimum(self.window, self.samples - number * self.window))
        slot = permute(place, sizes, fold(keys, number + 2))
        if self.windows == 1:
            return slot
        windows, core = np.array([self.windows]), self.stretches * self.stretch
        mixed = permute(np.minimum(number, windows - 1), windows, fold(keys, 0))
        part, inside = np.divmod(slot, self.stretch)
        turned = (mixed + (fold(fold(keys, 2), part) >> np.uint64(1)).astype(np.int64)) % windows
        in_stretches = (part * windows + turned) * self.stretch + inside
        single = windows * core + (slot - core) * windows + mixed
        index = np.where(slot < core, in_stretches, single)
        index = np.where(number < windows, index, number * self.window + slot)
        start = (fold(keys, 1) % np.uint64(self.samples)).astype(np.int64)
        shifted: Ints = (index + start) % self.samples
        return shifted


def _shared(values: Ints) -> Ints:
    """[1] where all values are one, which the permutation is faster with."""
    return values[:1] if len(values) and (values == values[0]).all() else values


class Plan:
    """Which sample stands at which position of which global step.

    samples       how many there are, or [D, B]: of each of D sources in each of B buckets; a sample's index counts
                  through the first source's buckets, then the second's, ...
    global_batch  samples of one optimizer step, over all ranks and accumulated micro-steps; all of one bucket
    window        about how many samples are mixed with each other; None mixes the whole epoch. A window is 64 or more
                  stretches of at most 1024 consecutive samples, from equal parts of all samples, so that reads stay
                  near each other.
    weights       of the sources; None: as many as they have samples. A source's share of a bucket's batches is
                  such that all samples of a source are visited equally often.
    """

    def __init__(
        self,
        samples: int | Sequence[Sequence[int]] | Ints,
        global_batch: int,
        seed: int,
        window: int | None = None,
        weights: Sequence[float] | None = None,
    ) -> None:
        self.samples = np.atleast_2d(np.asarray(samples, dtype=np.int64))  # [D, B]
        self.global_batch, self.seed, self.window = global_batch, seed, window
        for name, value in (("samples", self.samples.sum(1).min()), ("global_batch", global_batch), ("window", window)):
            if value is not None and value < 1:
                raise UserError(f"{name} must be at least 1, got {value}")
        masses = bucket_masses(self.samples, weights)
        if len(masses) > 1 and masses.min() < global_batch:
            raise UserError(
                f"a bucket has {masses.min()} samples, fewer than the {global_batch} of a global batch; "
                "leave it out, or make the global batch smaller"
            )
        self.turns = BucketSchedule(masses, global_batch, seed)
        self._shares = [
            MixtureSchedule(r, global_batch, seed, b) for b, r in enumerate(source_shares(self.samples, weights).T)
        ]
        ends = np.cumsum(self.samples.ravel())
        self._starts = ends - self.samples.ravel()  # of each lane (source, bucket), in the samples' index
        self._streams = [  # one without samples is never read
            Stream(max(1, n), window, key(seed, "order", lane) if lane else key(seed, "order"))
            for lane, n in enumerate(self.samples.ravel().tolist())
        ]

    def step(self, step: int) -> tuple[Ints, Ints]:
        """(indices, epochs), each [global_batch] int64, of a global step."""
        return self.at(step, np.arange(self.global_batch, dtype=np.int64))

    def at(self, step: int, positions: Ints) -> tuple[Ints, Ints]:
        """(indices, epochs), each [P] int64, at positions [P] of the global batch of a step."""
        indices, epochs = self.at_many(np.array([step], dtype=np.int64), positions)
        return indices[0], epochs[0]

    def at_many(self, steps: Ints, positions: Ints) -> tuple[Ints, Ints]:
        """(indices, epochs), each [S, P] int64, at positions [P] of the global batches of steps [S].

        Hundreds of steps at once cost a few microseconds each, one alone some hundreds.
        """
        buckets, batches = self.turns.at(steps)
        if len(self.samples) == 1:
            places = batches[:, None] * self.global_batch + positions
            lanes = np.broadcast_to(buckets[:, None], places.shape)
        else:
            pairs = zip(buckets.tolist(), batches.tolist(), strict=True)
            sources = [self._shares[bucket].at(batch, positions) for bucket, batch in pairs]
            places = np.stack([place for _, place in sources])
            lanes = np.stack([source for source, _ in sources]) * self.samples.shape[1] + buckets[:, None]
        indices, epochs = np.empty_like(places), np.empty_like(places)
        for lane in np.unique(lanes):
            here: Any = lanes == lane if self.samples.size > 1 else slice(None)
            index, epoch = self._streams[lane].at(places[here].ravel())
            indices[here] = (index + self._starts[lane]).reshape(indices[here].shape)
            epochs[here] = epoch.reshape(epochs[here].shape)
        return indices, epochs

    def bucket(self, step: int) -> int:
        """The bucket that all of a global step's samples are of."""
        return int(self.turns.at(np.array([step], dtype=np.int64))[0][0])

    def lane(self, source: int, bucket: int) -> range:
        """The indices of a source's samples in a bucket."""
        start = int(self._starts[source * self.samples.shape[1] + bucket])
        return range(start, start + int(self.samples[source, bucket]))

    def rank_slice(self, rank: int, world: int, micro: int, accumulation: int = 1) -> Ints:
        """Positions [accumulation, micro] of the global batch that a rank takes, the same in every step.

        Micro-step a of rank r takes `micro` positions from (a world + r) micro on. Raises UserError unless
        global_batch = world micro accumulation.
        """
        if world * micro * accumulation != self.global_batch or not 0 <= rank < world:
            raise UserError(
                f"global_batch {self.global_batch} is not {world} ranks x {micro} samples x "
                f"{accumulation} accumulated micro-steps (rank {rank}); change one of them"
            )
        return np.arange(self.global_batch, dtype=np.int64).reshape(accumulation, world, micro)[:, rank]


def _visits(samples: Ints, weights: Sequence[float] | None) -> NDArray[np.float64]:
    """The share of each source's part of each bucket [D, B] in all visits; sums to one."""
    totals = samples.sum(1)
    rates = totals.astype(np.float64) if weights is None else np.asarray(weights, dtype=np.float64)
    visits: NDArray[np.float64] = (rates / rates.sum() / totals)[:, None] * samples
    return visits


def bucket_masses(samples: Ints, weights: Sequence[float] | None = None) -> Ints:
    """The samples of each bucket [B] in an epoch, which has one visit per sample [D, B] on average."""
    if weights is None or len(samples) == 1:
        counts: Ints = samples.sum(0)
        return counts
    masses: Ints = np.rint(_visits(samples, weights).sum(0) * samples.sum()).astype(np.int64)
    return masses


def source_shares(samples: Ints, weights: Sequence[float] | None = None) -> NDArray[np.float64]:
    """The share of each source in each bucket's batches [D, B]; columns sum to one."""
    visits = _visits(samples, weights)
    shares: NDArray[np.float64] = visits / np.maximum(visits.sum(0), np.finfo(np.float64).tiny)
    return shares


def micro_batch(global_batch: int, world: int, accumulation: int) -> int:
    """The samples of one micro-step of one rank. Raises UserError where it is not a whole number."""
    shares = world * accumulation
    if global_batch < 1 or global_batch % shares:
        near = max(1, round(global_batch / shares)) * shares
        raise UserError(
            f"global_batch {global_batch} cannot be shared by {world} ranks x {accumulation} accumulated "
            f"micro-steps; make it a multiple of {shares}, such as {near}"
        )
    return global_batch // shares
