"""Chooses how the transformer's blocks are executed, from predictions of memory and time; touches no device.

``choose_plan`` predicts the peak and the time of every mixture of at most two kinds of blocks (BlockPlan), and drops
those that do not fit. Among the plans whose time is within AS_FAST of the fastest it takes the one that copies least.
The time includes each step's share of compiling the blocks, because a plan with two levels compiles twice as many
graphs, which a short run does not gain back.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import product

import numpy as np

from cogvideox.planning.costs import Array, Costs, Kinds, Numbers, order
from cogvideox.planning.plan import GIB, LEVELS, Axes, BlockPlan, ExecutionPlan, Machine, NoPlanError, Sizes
from cogvideox.planning.timeline import Timeline, exchange_seconds

LEVEL_SECONDS = 12.0  # to compile forward and backward of a block at one level (measured for 5b at 49x480x720)
AS_FAST = 1.01  # predictions are not more precise than this ratio, so plans within it count as equally fast
HOST_SHARES = (0.6, 0.9)  # share of free host memory that plans may pin; the second if no plan fits the first


def mixture(kinds: Mapping[BlockPlan, int]) -> tuple[BlockPlan, ...]:
    """Returns the blocks of a mixture in the order in which a plan has them."""
    listed = list(kinds)
    return tuple(listed[position] for position in order(kinds, sum(kinds.values()))[:, 0])


def compile_seconds(kinds: Kinds, compiled: bool, sizes: Sizes) -> Numbers:
    """Returns the seconds of compilation, if nothing has been compiled before."""
    levels = sum(sum(n for kind, n in kinds.items() if kind.keep == level) > 0 for level in LEVELS)
    # Where attention is divided, graphs have the number of all tokens as a constant; otherwise one serves all buckets.
    graphs = levels * (sizes.lengths if sizes.sequence_parallel > 1 else 1)
    return LEVEL_SECONDS * graphs if compiled else 0.0


def mixtures(axes: Axes, sizes: Sizes) -> dict[BlockPlan, Array]:
    """Returns all mixtures of at most two kinds of blocks, as an array (mixtures,) of numbers of blocks for each kind.

    Each kind has an additional choice of where its optimizer state is stored if all weights are trained.
    """
    kinds = [
        BlockPlan(weights, keep, kept, state)
        for weights, keep, kept in product(axes.weights, axes.keep, axes.kept)
        for state in (axes.state if sizes.block_trained else (None,))
    ]
    pairs = np.stack(np.triu_indices(len(kinds)), axis=1)  # (pairs, 2) positions in kinds; some have one kind twice
    first, second = np.repeat(pairs, sizes.blocks, axis=0).T
    count = np.tile(np.arange(1, sizes.blocks + 1), len(pairs))
    chosen = (count == sizes.blocks) == (first == second)
    first, second, count = first[chosen], second[chosen], count[chosen]
    position = np.arange(len(kinds))[:, None]
    numbers = np.where(position == first, count, np.where(position == second, sizes.blocks - count, 0))
    return dict(zip(kinds, numbers, strict=True))


def choose_plan(axes: Axes, sizes: Sizes, machine: Machine, compiled: bool, attention: str) -> ExecutionPlan:
    """Chooses, among the plans that fit and are about as fast as the fastest, the one that copies least.

    Raises:
        NoPlanError: No allowed plan fits.
    """
    kinds = mixtures(axes, sizes)
    costs = [Costs(kinds, state, compiled, sizes) for state in axes.state]
    peaks, hosts = (
        of_all(kinds, numbers) for numbers in ([c.peak_bytes for c in costs], [c.host_bytes for c in costs])
    )
    fitting = fitting_plans(peaks, hosts, machine)
    seconds = np.full(peaks.shape, np.inf)
    for one, fits, times in zip(costs, fitting, seconds, strict=True):
        times[fits] = Timeline(one.only(fits), machine).seconds()
    spread = seconds + (compile_seconds(kinds, compiled, sizes) / sizes.steps if sizes.steps else 0.0)
    copied = of_all(kinds, [c.all_copied_bytes for c in costs])
    fast = np.argwhere(spread <= AS_FAST * spread.min())
    place, index = min(map(tuple, fast), key=lambda plan: (copied[plan], float(f"{spread[plan]:.4g}"), peaks[plan]))
    chosen = {kind: int(numbers[index]) for kind, numbers in kinds.items() if numbers[index]}
    return ExecutionPlan(
        mixture(chosen),
        compiled,
        attention,
        axes.state[place],
        any_length=compiled and sizes.lengths > 1 and sizes.sequence_parallel == 1,
        peak=int(peaks[place, index]),
        pinned=int(Costs(chosen, axes.state[place], compiled, sizes).pinned_bytes),
        spare_host=int(machine.host_bytes - hosts[place, index]),
        seconds=float(seconds[place, index]),
        compilation=float(compile_seconds(chosen, compiled, sizes)),
        shards=sizes.shards,
        deepspeed=sizes.deepspeed,
        shards_on_host=sizes.shards_on_host,
        sequence_parallel=sizes.sequence_parallel,
        exchanging=sizes.passes * sum(n * sum(exchange_seconds(k.keep, sizes, machine)) for k, n in chosen.items()),
    )


def step_seconds(plan: ExecutionPlan, sizes: Sizes, machine: Machine) -> float:
    """Returns the predicted seconds of a step under a plan, with other samples than those that it was chosen for."""
    costs = Costs(Counter(plan.blocks), plan.state, plan.compiled, sizes)
    return float(Timeline(costs, machine).seconds()[0])


def of_all(kinds: Kinds, numbers: Sequence[Numbers]) -> Array:
    """Returns a prediction for every plan, (places of the optimizer state, mixtures)."""
    count = len(next(iter(kinds.values())))
    return np.stack([np.broadcast_to(number, count) for number in numbers])


def fitting_plans(peaks: Array, hosts: Array, machine: Machine) -> Array:
    """Returns which plans fit into the smallest of HOST_SHARES with which any does.

    Args:
        peaks: The peak of device memory of each plan, in bytes.
        hosts: The host memory of each plan, in bytes, of the same shape.
        machine: The machine with its free memory.

    Raises:
        NoPlanError: No plan fits.
    """
    for share in HOST_SHARES:
        available = int(machine.host_bytes * share)
        fitting = (peaks <= machine.device_bytes) & (hosts <= available)
        if fitting.any():
            return fitting
    least = min(zip(peaks.flat, hosts.flat, strict=True))
    gibs = [f"{size / GIB:.1f}" for size in (*least, machine.device_bytes, available)]
    raise NoPlanError(
        "the smallest allowed plan needs {} GiB of device memory, and {} GiB of host memory in addition to the "
        "loaded weights; {} and {} GiB are available".format(*gibs)
    )
