"""Which bucket each global step serves, and how often that bucket was served before.

An epoch e takes floor((e + 1) n / G) - floor(e n / G) batches of a bucket with n samples, G the global batch: the
rest is carried over to a batch at the start of the next epoch. So the visits of any two samples differ by at most one
at every step of a run, whatever their buckets. Only in the first steps of an epoch, one for each bucket, which use the
carried samples, may they differ by two, since no batch holds two buckets.
"""

import numpy as np

from ldm.data.order.permutation import Ints, fold, uniform, word
from ldm.randomness import key


class BucketSchedule:
    """The order of the buckets' batches as a function of (samples of each bucket, global batch, seed, step).

    After the first batch of each bucket, in a random order, a bucket's other batches come spread over the epoch: the
    i-th of m falls into the i-th of m equal spans of it, anywhere there (stratified jitter). A bucket's own
    batches stay in their order. The orders of two epochs are kept, 16 bytes a step.
    """

    def __init__(self, samples: Ints, global_batch: int, seed: int) -> None:
        self.samples = samples  # [B]
        self.global_batch = global_batch
        self._key = word(key(seed, "buckets"))
        self._orders: dict[int, tuple[Ints, Ints]] = {}

    def at(self, steps: Ints) -> tuple[Ints, Ints]:
        """(bucket, batches of that bucket before), each [S] int64, of global steps [S]."""
        if len(self.samples) == 1:
            return np.zeros_like(steps), steps
        buckets, turns = np.empty_like(steps), np.empty_like(steps)
        left = np.arange(len(steps))
        while len(left):
            epoch = self.epoch(int(steps[left[0]]))
            start, end = self.before(epoch).sum(), self.before(epoch + 1).sum()
            here = left[(steps[left] >= start) & (steps[left] < end)]
            order, turn = self._order(epoch)
            buckets[here], turns[here] = order[steps[here] - start], turn[steps[here] - start]
            left = left[(steps[left] < start) | (steps[left] >= end)]
        return buckets, turns

    def before(self, epoch: int) -> Ints:
        """How many batches of each bucket [B] come before an epoch."""
        batches: Ints = epoch * self.samples // self.global_batch
        return batches

    def epoch(self, step: int) -> int:
        """The epoch that a global step belongs to."""
        epoch = step * self.global_batch // int(self.samples.sum())
        while self.before(epoch + 1).sum() <= step:  # each bucket's share was rounded down
            epoch += 1
        return epoch

    def _order(self, epoch: int) -> tuple[Ints, Ints]:
        """(bucket, batches of it before) of each step of an epoch."""
        if epoch in self._orders:
            return self._orders[epoch]
        before = self.before(epoch)
        batches = self.before(epoch + 1) - before
        bucket = np.repeat(np.arange(len(batches)), batches)
        number = np.arange(len(bucket)) - np.repeat(np.cumsum(batches) - batches, batches)
        jitter = uniform(fold(fold(self._key, epoch), np.arange(len(bucket))))
        time = np.where(number == 0, jitter - 1, (number + jitter) / batches[bucket])
        order = np.argsort(time, kind="stable")
        while len(self._orders) > 1:
            self._orders.pop(next(iter(self._orders)))
        self._orders[epoch] = (bucket[order], (before[bucket] + number)[order])
        return self._orders[epoch]
