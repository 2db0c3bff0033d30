"""sampler.py: no sample is dropped or repeated, and the order is the same on any number of ranks."""

from __future__ import annotations

import random
from collections import Counter
from itertools import pairwise

import pytest

from cogvideox.data.sampler import BucketBatchSampler, Order, Visit

SIZES = {"9x64x96": 7, "9x96x64": 1, "49x64x96": 10, "1x64x96": 3}
IDS = [f"clip-{bucket}-{k}" for bucket, number in SIZES.items() for k in range(number)]
BUCKETS = [bucket for bucket, number in SIZES.items() for _ in range(number)]
BATCHES = [1, 2, 3, 4, 8, 25]


def order(global_batch: int = 4, seed: int = 0, permutation: list[int] | None = None) -> Order:
    positions = permutation or list(range(len(IDS)))
    return Order([IDS[i] for i in positions], [BUCKETS[i] for i in positions], global_batch, seed)


def steps(of: Order, first: int, last: int) -> list[list[tuple[str, int]]]:
    """Returns (id, visit) of each sample of each step."""
    return [[(of.sample_ids[v.index], v.times) for v in of.batch(step)] for step in range(first, last)]


def epoch(of: Order, number: int) -> list[list[tuple[str, int]]]:
    return steps(of, of.steps_through(number - 1), of.steps_through(number))


@pytest.mark.parametrize("global_batch", BATCHES)
@pytest.mark.parametrize("epochs", [1, 2, 5])
def test_every_sample_e_times_after_e_epochs(global_batch: int, epochs: int) -> None:
    of = order(global_batch)
    seen = [visit for batch in steps(of, 0, of.steps_through(epochs - 1)) for visit in batch]
    assert len(seen) == len(set(seen))
    assert {(name, visit) for name in IDS for visit in range(epochs)} <= set(seen)
    fill = [visit for _, visit in seen if visit >= epochs]
    assert len(fill) == of.num_fill_samples(epochs)
    assert 0 <= of.num_fill_samples(epochs) < global_batch * len(SIZES)


@pytest.mark.parametrize("global_batch", BATCHES)
def test_visits_of_a_sample_are_numbered_in_order(global_batch: int) -> None:
    """The k-th time that a sample is drawn is its visit k, within each bucket's own stream."""
    of = order(global_batch)
    total = of.steps_through(4)
    counts = Counter(visit for batch in steps(of, 0, total) for visit in batch)
    assert set(counts.values()) == {1}
    for name in IDS:
        visits = {visit for (id, visit) in counts if id == name}
        assert visits == set(range(len(visits)))


def test_without_a_partial_batch_there_is_no_fill() -> None:
    of = Order([f"{k}" for k in range(12)], ["a"] * 8 + ["b"] * 4, 4, 0)
    assert (of.steps_through(0), of.num_fill_samples(1), of.num_fill_samples(3)) == (3, 0, 0)


@pytest.mark.parametrize("global_batch", BATCHES)
def test_every_batch_is_full_and_of_one_bucket(global_batch: int) -> None:
    of = order(global_batch)
    buckets = dict(zip(IDS, BUCKETS, strict=True))
    for batch in steps(of, 0, 40):
        assert len(batch) == global_batch
        assert len({buckets[name] for name, _ in batch}) == 1


def test_order_differs_between_epochs_and_seeds() -> None:
    of = order(1)
    orders = [[name for ((name, _),) in epoch(of, number)] for number in range(4)]
    orders += [[name for ((name, _),) in epoch(order(1, seed), 0)] for seed in (1, 2)]
    assert len({tuple(names) for names in orders}) == 6
    assert {tuple(sorted(names)) for names in orders} == {tuple(sorted(IDS))}
    assert orders[0] != IDS


def test_batches_mix_differently_in_each_epoch() -> None:
    of = Order([str(k) for k in range(20)], ["a"] * 20, 4, 0)
    sets = [{frozenset(name for name, _ in batch) for batch in epoch(of, number)} for number in range(3)]
    assert sets[0] != sets[1] != sets[2] != sets[0]


def test_buckets_are_mixed_within_an_epoch() -> None:
    of = Order([str(k) for k in range(40)], ["a"] * 20 + ["b"] * 20, 2, 0)
    firsts = [int(batch[0][0]) < 20 for batch in epoch(of, 0)]
    changes = sum(one != other for one, other in pairwise(firsts))
    assert changes > 4


def test_the_position_in_the_list_has_no_effect() -> None:
    positions = list(range(len(IDS)))
    random.Random(0).shuffle(positions)
    assert steps(order(), 0, 50) == steps(order(permutation=positions), 0, 50)


def test_an_order_is_a_pure_function_of_the_step() -> None:
    whole = steps(order(), 0, 50)
    of = order()
    backwards = {step: steps(of, step, step + 1)[0] for step in reversed(range(50))}
    assert [backwards[step] for step in range(50)] == whole


@pytest.mark.parametrize("global_batch", BATCHES)
def test_epoch_of_and_steps_through_agree(global_batch: int) -> None:
    of = order(global_batch)
    assert of.steps_through(-1) == 0
    bounds = [of.steps_through(number) for number in range(-1, 8)]
    assert bounds == sorted(bounds)
    for number, (first, last) in enumerate(pairwise(bounds)):
        assert {of.epoch_of(step) for step in range(first, last)} <= {number}


@pytest.mark.parametrize("samples", [1, 2, 3])
@pytest.mark.fault("data: fewer samples than a batch")
def test_fewer_samples_than_a_batch(samples: int) -> None:
    of = Order([str(k) for k in range(samples)], ["a"] * samples, 8, 0)
    first = [visit for batch in steps(of, 0, 3) for visit in batch]
    assert len(set(first)) == 24
    counts = Counter(name for name, _ in first)
    assert max(counts.values()) - min(counts.values()) <= 1
    assert len(counts) == samples


def micro_batches(
    ranks: int, accumulation: int, batch_size: int, first: int, last: int
) -> list[list[list[list[Visit]]]]:
    """Returns the micro-batches as nested lists: [step][accumulation step][rank]."""
    of = order(ranks * accumulation * batch_size)
    samplers = [BucketBatchSampler(of, batch_size, accumulation, rank, ranks, first, last) for rank in range(ranks)]
    streams = [list(sampler) for sampler in samplers]
    assert all(len(stream) == len(sampler) for stream, sampler in zip(streams, samplers, strict=True))
    return [
        [[stream[step * accumulation + micro] for stream in streams] for micro in range(accumulation)]
        for step in range(last - first)
    ]


@pytest.mark.parametrize(
    ("ranks", "accumulation", "batch_size"), [(2, 2, 1), (4, 1, 1), (1, 1, 4), (1, 2, 2), (2, 1, 2)]
)
def test_ranks_accumulation_and_batch_size_are_interchangeable(ranks: int, accumulation: int, batch_size: int) -> None:
    def flat(steps: list[list[list[list[Visit]]]]) -> list[list[Visit]]:
        return [[visit for micro in step for rank in micro for visit in rank] for step in steps]

    reference = flat(micro_batches(1, 4, 1, 0, 30))
    found = micro_batches(ranks, accumulation, batch_size, 0, 30)
    assert {len(rank) for step in found for micro in step for rank in micro} == {batch_size}
    assert flat(found) == reference
    assert reference == [order(4).batch(step) for step in range(30)]


@pytest.mark.parametrize("first", [0, 1, 5, 6, 7, 13, 29])
@pytest.mark.fault("checkpoints: a run is resumed at any step, for the order of samples")
def test_resuming_gives_the_tail(first: int) -> None:
    whole = micro_batches(2, 2, 1, 0, 30)
    assert micro_batches(2, 2, 1, first, 30) == whole[first:]


@pytest.mark.parametrize("global_batch", [1, 4, 25])
def test_strata_follow_the_positions_in_the_global_batch(global_batch: int) -> None:
    """Strata change nothing else about the order."""
    plain, stratified = order(global_batch), Order(IDS, BUCKETS, global_batch, 0, stratified=True)
    for step in range(20):
        assert [visit.stratum for visit in stratified.batch(step)] == [(k, global_batch) for k in range(global_batch)]
        assert {visit.stratum for visit in plain.batch(step)} == {(0, 1)}
        assert steps(plain, step, step + 1) == steps(stratified, step, step + 1)


@pytest.mark.parametrize(("ranks", "accumulation"), [(1, 4), (2, 2), (4, 1)])
def test_ranks_and_accumulation_divide_the_strata(ranks: int, accumulation: int) -> None:
    of = Order(IDS, BUCKETS, 4, 0, stratified=True)
    samplers = [BucketBatchSampler(of, 1, accumulation, rank, ranks, 3, 4) for rank in range(ranks)]
    found = [visit for micro in zip(*samplers, strict=True) for batch in micro for visit in batch]
    assert found == of.batch(3)


def test_a_batch_that_does_not_divide_is_refused() -> None:
    with pytest.raises(ValueError, match="global batch 4 is not 1 \\* 3 \\* 1"):
        BucketBatchSampler(order(4), 1, 3, 0, 1, 0, 1)
