"""Which samples make up each optimizer step: indices only, a function of (seed, step).

Every bucket is an endless stream of its samples, one permutation after another. A step takes the next global batch of
one bucket's stream; epoch e ends when every bucket has finished permutation e, so a last partial batch is filled from
the next permutation and nothing is ever dropped. The steps of an epoch are shuffled over the buckets.
"""

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

from cogvideox.rng import key_of


@dataclass(frozen=True)
class Visit:
    """Sample ``index``, drawn for the ``visit``-th time (from 0)."""

    index: int
    visit: int
    stratum: tuple[int, int] = (0, 1)  # (k, n): its timestep comes from the k-th of n equal parts of the range


class Order:
    """The global order of a run, the same on every rank.

    Args:
        sample_ids: names of the samples; the order depends on them, not on their place in the list.
        buckets: the bucket of each sample.
        global_batch: samples in one optimizer step, over all ranks and accumulation steps.
        seed: of the run.
        stratified: each sample of a step has a stratum of its own, by its place in the global batch.
    """

    def __init__(
        self,
        sample_ids: Sequence[str],
        buckets: Sequence[Hashable],
        global_batch: int,
        seed: int,
        stratified: bool = False,
    ) -> None:
        self.sample_ids = sample_ids
        self.global_batch = global_batch
        self.seed = seed
        self.strata = [(k, global_batch) if stratified else (0, 1) for k in range(global_batch)]
        members: dict[Hashable, list[int]] = {}
        for index, bucket in enumerate(buckets):
            members.setdefault(bucket, []).append(index)
        self.members = dict(sorted((str(bucket), indices) for bucket, indices in members.items()))

    def steps_through(self, epoch: int) -> int:
        """Optimizer steps up to the end of an epoch (from 0); -1 gives 0."""
        return sum(self._batches_through(name, epoch) for name in self.members)

    def epoch_of(self, step: int) -> int:
        """The epoch of a step (both from 0)."""
        low, high = 0, 1
        while self.steps_through(high) <= step:
            high *= 2
        while low < high:
            middle = (low + high) // 2
            low, high = (low, middle) if self.steps_through(middle) > step else (middle + 1, high)
        return low

    def batch(self, step: int) -> list[Visit]:
        """The samples of an optimizer step, ``global_batch`` of them, all of one bucket."""
        epoch = self.epoch_of(step)
        name, number = self._epoch_plan(epoch)[step - self.steps_through(epoch - 1)]
        size = len(self.members[name])
        positions = range(number * self.global_batch, (number + 1) * self.global_batch)
        return [
            Visit(self._permutation(name, p // size)[p % size], p // size, stratum)
            for p, stratum in zip(positions, self.strata, strict=True)
        ]

    def filled(self, epochs: int) -> int:
        """Samples that the first epochs take from later permutations to fill their last batches."""
        return self.steps_through(epochs - 1) * self.global_batch - epochs * len(self.sample_ids)

    def _batches_through(self, name: str, epoch: int) -> int:
        return -(-(epoch + 1) * len(self.members[name]) // self.global_batch)

    @lru_cache(maxsize=2)  # noqa: B019 - one Order lives as long as the run
    def _epoch_plan(self, epoch: int) -> list[tuple[str, int]]:
        """(bucket, number of the batch in its stream) of the epoch's steps, in order."""
        batches = [
            (name, number)
            for name in self.members
            for number in range(self._batches_through(name, epoch - 1), self._batches_through(name, epoch))
        ]
        return sorted(batches, key=lambda batch: key_of(self.seed, "order", epoch, *batch))

    @lru_cache(maxsize=64)  # noqa: B019
    def _permutation(self, name: str, visit: int) -> list[int]:
        return sorted(self.members[name], key=lambda i: key_of(self.seed, "permutation", visit, self.sample_ids[i]))


class BucketBatchSampler:
    """The micro-batches of one rank from ``first_step`` to ``last_step`` (excluded), for a DataLoader.

    The global batch is cut as (accumulation step, rank, place), so ranks and accumulation are interchangeable.
    """

    def __init__(
        self, order: Order, batch_size: int, accumulation: int, rank: int, world: int, first_step: int, last_step: int
    ) -> None:
        if order.global_batch != batch_size * accumulation * world:
            raise ValueError(f"global batch {order.global_batch} is not {batch_size} * {accumulation} * {world}")
        self.order = order
        self.batch_size = batch_size
        self.accumulation = accumulation
        self.rank = rank
        self.world = world
        self.steps = range(first_step, last_step)

    def __len__(self) -> int:
        return len(self.steps) * self.accumulation

    def __iter__(self) -> Iterator[list[Visit]]:
        for step in self.steps:
            batch = self.order.batch(step)
            for micro in range(self.accumulation):
                start = (micro * self.world + self.rank) * self.batch_size
                yield batch[start : start + self.batch_size]
