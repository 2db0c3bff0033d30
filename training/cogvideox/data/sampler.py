"""Decides which samples make up each optimizer step. It handles indices only, as a function of (seed, step).

Each bucket is an endless stream of its samples, one permutation after another. A step takes the next global batch from
the stream of one bucket. Epoch e ends when every bucket has finished its permutation e. So the last batch of a bucket
is filled from the next permutation, and no sample is ever dropped. The steps of an epoch are shuffled over the buckets.
For example, epoch 0 has three steps with a global batch of 4, shown as [ ], where | ends a permutation:

    bucket A, 6 samples:  [a3 a0 a5 a1] [a4 a2 | a2 a5] ...
    bucket B, 4 samples:  [b1 b3 b0 b2] | ...

``Order`` is the same on all ranks, and ``BucketBatchSampler`` cuts it into the micro-batches of one rank. Since a step
is computed from its number, resuming needs no state.
"""

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

from cogvideox.rng import key_of


@dataclass(frozen=True)
class Visit:
    """Names one use of a sample.

    Attributes:
        index: Position of the sample in the index.
        times: How often the sample was drawn before.
        stratum: (k, n): the timestep is drawn from the k-th of n equal parts of the range.
    """

    index: int
    times: int
    stratum: tuple[int, int] = (0, 1)


class Order:
    """Holds the order of the samples over all steps of a run; it is the same on every rank.

    Args:
        sample_ids: Names of the samples. The order depends on the names, not on their positions in the list.
        buckets: The bucket of each sample.
        global_batch: Number of samples in one optimizer step, over all ranks and accumulation steps.
        seed: Seed of the run.
        stratified: Whether the samples of a step draw their timesteps from different equal parts of the range, by
            their position in the global batch.
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
        """Returns the number of optimizer steps up to the end of an epoch, counted from 0; 0 for epoch -1."""
        return sum(self._batches_through(name, epoch) for name in self.members)

    def total_steps(self, max_steps: int | None, epochs: int) -> int:
        """Returns the number of optimizer steps of a run: --max_train_steps, or else those of its epochs."""
        return max_steps or self.steps_through(epochs - 1)

    def epoch_of(self, step: int) -> int:
        """Returns the epoch that a step belongs to; both count from 0."""
        # Doubling finds an upper bound, then bisection finds the first epoch that ends after the step.
        low, high = 0, 1
        while self.steps_through(high) <= step:
            high *= 2
        while low < high:
            middle = (low + high) // 2
            low, high = (low, middle) if self.steps_through(middle) > step else (middle + 1, high)
        return low

    def batch(self, step: int) -> list[Visit]:
        """Returns the ``global_batch`` samples of an optimizer step, all of one bucket."""
        epoch = self.epoch_of(step)
        name, number = self._epoch_plan(epoch)[step - self.steps_through(epoch - 1)]
        size = len(self.members[name])
        positions = range(number * self.global_batch, (number + 1) * self.global_batch)
        return [
            Visit(self._permutation(name, p // size)[p % size], p // size, stratum)
            for p, stratum in zip(positions, self.strata, strict=True)
        ]

    def num_fill_samples(self, epochs: int) -> int:
        """Returns how many samples the first epochs take from later permutations to fill their last batches."""
        return self.steps_through(epochs - 1) * self.global_batch - epochs * len(self.sample_ids)

    def _batches_through(self, name: str, epoch: int) -> int:
        """Returns how many batches of a bucket end its permutations 0 to ``epoch``, rounded up."""
        return -(-(epoch + 1) * len(self.members[name]) // self.global_batch)

    @lru_cache(maxsize=2)  # noqa: B019 - one Order lives as long as the run
    def _epoch_plan(self, epoch: int) -> list[tuple[str, int]]:
        """Returns the steps of an epoch in order, each as (bucket, number of the batch in the bucket's stream)."""
        batches = [
            (name, number)
            for name in self.members
            for number in range(self._batches_through(name, epoch - 1), self._batches_through(name, epoch))
        ]
        return sorted(batches, key=lambda batch: key_of(self.seed, "order", epoch, *batch))

    @lru_cache(maxsize=64)  # noqa: B019
    def _permutation(self, name: str, visit: int) -> list[int]:
        """Returns the samples of a bucket in the order of their ``visit``-th pass."""
        return sorted(self.members[name], key=lambda i: key_of(self.seed, "permutation", visit, self.sample_ids[i]))


class BucketBatchSampler:
    """Yields the micro-batches of one rank, for a DataLoader.

    The global batch is cut by accumulation step, then by rank, then by the position in the micro-batch. So the same
    samples make up a step, however the global batch is divided into ranks and accumulation steps.
    """

    def __init__(
        self, order: Order, batch_size: int, accumulation: int, rank: int, world: int, first_step: int, last_step: int
    ) -> None:
        """Checks that the parts make up the global batch of the order.

        Args:
            order: The order of the run.
            batch_size: Samples in one micro-batch.
            accumulation: Micro-batches of a rank in one optimizer step.
            rank: Number of this process.
            world: Number of processes.
            first_step: First optimizer step.
            last_step: Step at which to stop; it is not included.

        Raises:
            ValueError: The global batch is not batch_size * accumulation * world.
        """
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
