"""How the transformer's blocks are executed: where weights lie, what forward keeps and where, compiled or not.

Sizes (of model, data and what is trained) and Machine (free memory, measured rates) -> choose() -> ExecutionPlan, with
the peak of the device's memory and the time of a step that it predicts. Nothing here touches a device.
Bytes, seconds, FLOP a second. Shapes as in blocks.py; a unit is the size of a block's input.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import combinations_with_replacement, product

from cogvideox.memory.streaming import IN_FLIGHT, TRANSFER_SLOTS, WEIGHT_SLOTS
from cogvideox.optimizer.master_weights import CHUNK_BYTES, STATE_BYTES

GIB = 2**30
DEVICE, HOST = "device", "host"
AUTO = "auto"  # of a base precision: the compute type
LEVELS = ("input", "attention", "linear", "all")  # of keeping, from least to most; blocks.KEPT says what each is
UNITS_KEPT = {"input": 1, "attention": 2, "linear": 10, "all": 18}  # with LoRAs on all layers; blocks.kept_at
WORKSPACE_UNITS = {  # what a block's backward pass needs beside what was kept; benchmarks/one_block.py prints it
    True: {"input": 19.1, "attention": 17.2, "linear": 13.2, "all": 9.3},
    False: {"input": 38.2, "attention": 37.2, "linear": 28.2, "all": 25.2},
}
ENDS_UNITS = 1.8  # tensors in front of and behind the blocks
TRAINED_UNITS = {  # what that needs more where all weights are trained, their gradients not counted; printed there too
    True: {"input": 0.6, "attention": 1.5, "linear": 0.0, "all": 0.0},
    False: {"input": 7.5, "attention": 7.4, "linear": 6.4, "all": 1.4},
}
RECOMPUTED = {"input": (8 / 12, 1.0, 0.0), "attention": (8 / 12, 0.0, 0.0), "linear": (0.0, 0.0, 0.0)}
RECOMPUTED["all"] = (0.0, 0.0, -10.0)
"""Shares of a block's forward linear layers and attention that backward computes again; units that it has less to read
and write than TRAFFIC_UNITS says."""
TRAFFIC_UNITS = {True: (43.0, 78.0), False: (133.0, 273.0)}  # read and written outside frozen products, by pass
WHOLE_MATRICES = {True: 0.1, False: 1.2}
"""Share of a block's quantized matrices that is whole where memory is fullest: in a graph hardly any, measured; without
one the largest, a third of them, is made by way of fp32."""
HIDDEN_COPY = 0.01  # of a copy's time: what it costs the arithmetic beside it
COPY_SHARE = 0.96  # of the measured rate, which the copies beside arithmetic reach
BOTH_WAYS = 0.7  # of that, where both directions are full: in the optimizer's pass
AS_FAST = 1.01  # plans whose predicted times are nearer than predictions are good count as equally fast
FRAGMENTS = 0.94  # the share of free memory that can be filled
HOST_SHARES = (0.6, 0.9)  # of the free host memory that plans may pin; the second if nothing fits the first
CONTEXT = 0.6 * GIB  # of CUDA itself, on a card that --vram_budget describes


@dataclass(frozen=True)
class Sizes:
    """What memory and time follow from."""

    blocks: int
    block_bytes: int  # the weights of one block, without its LoRA
    rest_bytes: int  # frozen weights and buffers outside the blocks
    trained: int  # numbers outside of a block's own weights: in the LoRA, or in front of and behind the blocks
    item_bytes: int  # of a number in the compute type
    samples: int  # in a micro-batch
    tokens: int  # of a sample in the largest bucket
    width: int  # D
    heads: int
    state_bytes: int = STATE_BYTES  # of a trained number: master, moments, its average if there is one
    average_bytes: int = 0  # of these the average, which is where the master is, and is updated there
    ranks: int = 1  # on this host; one of them writes
    mapped: bool = False  # weights are pages of their file: pinned, they take memory of their own
    matrix_bytes: int = 0  # what a block's quantized matrices take in the compute type
    units_kept: tuple[int, ...] = tuple(UNITS_KEPT.values())  # of one block, by LEVELS
    block_trained: int = 0  # numbers in one block, if all its weights are trained
    sum_bytes: int = 4  # of a number in gradients that are summed on the host
    passes: int = 1  # forward and backward, in an optimizer step

    @property
    def all_trained(self) -> int:
        """Numbers that are trained."""
        return self.trained + self.blocks * self.block_trained

    @property
    def moving_bytes(self) -> int:
        """What an optimizer step works on, of a trained number."""
        return self.state_bytes - self.average_bytes

    @property
    def unit(self) -> int:
        """Bytes of a block's input."""
        return self.samples * self.tokens * self.width * self.item_bytes

    def kept_bytes(self, level: str) -> int:
        """Bytes that forward keeps of one block."""
        lse = 4 * self.samples * self.tokens * self.heads if level != "input" else 0
        return self.units_kept[LEVELS.index(level)] * self.unit + lse


@dataclass(frozen=True)
class Machine:
    """What there is to run on."""

    device_bytes: int  # that may be filled
    host_bytes: int  # free
    matmul: float = 5e11
    attention: float = 2e11  # forward
    attention_backward: float = 2e11
    memory: float = 2e10  # bytes a second, of the device
    copies: float = 1e10  # bytes a second between host and device, one way


@dataclass(frozen=True)
class BlockPlan:
    """One block: where its weights lie, with their gradients, what forward keeps (blocks.KEPT), and where."""

    weights: str = DEVICE
    keep: str = "input"
    kept: str = DEVICE
    state: str | None = None  # of weights that are trained on the host; else, and if none, where the plan has it


@dataclass(frozen=True)
class Axes:
    """What the user wants of a plan; of each axis the values that are allowed."""

    weights: Sequence[str] = (DEVICE, HOST)
    keep: Sequence[str] = LEVELS
    kept: Sequence[str] = (DEVICE, HOST)
    state: Sequence[str] = (DEVICE, HOST)


PRESETS = {  # of --plan
    "auto": Axes(),
    "fast": Axes(weights=(DEVICE,), kept=(DEVICE,), state=(DEVICE,)),
    "balanced": Axes(weights=(DEVICE,), keep=("attention",), kept=(DEVICE,), state=(DEVICE,)),
    "lean": Axes(weights=(HOST,), keep=("attention",), kept=(HOST,), state=(HOST,)),
}


@dataclass(frozen=True)
class ExecutionPlan:
    """One way to run the blocks, chosen before the first step and printed."""

    blocks: tuple[BlockPlan, ...]
    compiled: bool
    attention: str  # attention.BACKENDS, or cpu
    state: str = DEVICE  # where fp32 masters and moments lie
    any_length: bool = False  # compiled once for all buckets, in place of once for each
    base_precision: str = AUTO  # of the blocks' frozen matrices: quant.KINDS, or as they were loaded
    peak: int = 0  # predicted, bytes of the device
    pinned: int = 0  # bytes of the host
    seconds: float = 0.0  # predicted, of a step; 0 where the machine was not measured

    def __str__(self) -> str:
        count = len(self.blocks)
        streamed = sum(block.weights == HOST for block in self.blocks)
        levels = [
            f"{level} of {n} on the {place}"
            for level, place in product(LEVELS, (DEVICE, HOST))
            if (n := sum((b.keep, b.kept) == (level, place) for b in self.blocks))
        ]
        elsewhere = "".join(
            f", of {n} blocks on the {place}"
            for place in (DEVICE, HOST)
            if place != self.state and (n := sum(block.state == place for block in self.blocks))
        )
        how = "compiled" + " for any length" * self.any_length if self.compiled else "eager"
        parts = [
            f"{count} blocks {how}, {count - streamed} on the device"
            + (f" and {streamed} streamed from the host" if streamed else ""),
            f"kept for backward: {', '.join(levels)}",
            f"attention by {self.attention}",
            f"optimizer state on the {self.state}" + elsewhere,
        ]
        if self.base_precision != AUTO:
            parts.append(f"base in {self.base_precision}")
        if self.seconds:
            host = f", {self.pinned / GIB:.1f} GiB of host memory" if self.pinned else ""
            parts.append(f"predicted: peak {self.peak / GIB:.2f} GiB{host}, {self.seconds:.2f} s a step")
        return "; ".join(parts)


@dataclass(frozen=True)
class ModulePlan:
    """The blocks as diffusers runs them: the reference, and what any method can be trained with."""

    recompute: bool  # a block's activations are computed again in the backward pass
    compiled: bool  # each block by torch.compile, one graph for all

    def __str__(self) -> str:
        blocks = "compiled" if self.compiled else "eager"
        return f"blocks {blocks}, as diffusers runs them; activations {'recomputed' if self.recompute else 'kept'}"


class NoPlanError(ValueError):
    """No plan that is allowed fits; the text has the smallest one's sizes."""


# -- prediction --------------------------------------------------------------------------------------------------------


def mixture(first: BlockPlan, second: BlockPlan, count: int, total: int) -> tuple[BlockPlan, ...]:
    """``count`` blocks of the first kind among ``total``, evenly spread, so that copies have time between them."""
    return tuple(first if (i + 1) * count // total > i * count // total else second for i in range(total))


def peak_bytes(kinds: dict[BlockPlan, int], state: str, compiled: bool, sizes: Sizes) -> int:
    """The device's memory at its fullest: as backward begins, with all that was kept, or in the optimizer's step."""
    streamed = streamed_blocks(kinds)
    total = sizes.rest_bytes + (sizes.blocks - streamed + min(WEIGHT_SLOTS, streamed)) * sizes.block_bytes
    total += sizes.trained * (sizes.item_bytes + 4)  # weights, and the flat fp32 gradients
    total += (sizes.blocks - streamed) * sizes.block_trained * 4
    total += state_on_device(kinds, state, sizes) * sizes.state_bytes
    here = {kind: n for kind, n in kinds.items() if kind.kept == DEVICE}
    passes = sum(n * sizes.kept_bytes(kind.keep) for kind, n in here.items()) + in_flight_bytes(kinds, sizes)
    passes += round(sizes.matrix_bytes * WHOLE_MATRICES[compiled]) + gradient_bytes(streamed, sizes)
    more = TRAINED_UNITS[compiled] if sizes.block_trained else dict.fromkeys(LEVELS, 0.0)
    work = max(WORKSPACE_UNITS[compiled][kind.keep] + more[kind.keep] for kind in kinds)
    passes += round((work + ENDS_UNITS) * sizes.unit)
    return total + max(passes, load_bytes(streamed, sizes) if copied_bytes(kinds, state, sizes)[3] else 0)


def load_bytes(streamed: int, sizes: Sizes) -> int:
    """The optimizer's state on its way through the device."""
    numbers = min(sizes.all_trained, CHUNK_BYTES // STATE_BYTES)
    with_weights = streamed and sizes.block_trained  # these come with gradients, which become fp32, and leave
    load = sizes.moving_bytes + (sizes.sum_bytes + sizes.item_bytes if with_weights else 0)
    return numbers * (TRANSFER_SLOTS * load + (4 if with_weights else 0))


def gradient_bytes(streamed: int, sizes: Sizes) -> int:
    """What there is of gradients of whole blocks, outside the sums: one block's, and those on their way to the host."""
    sums = sizes.sum_bytes * min(IN_FLIGHT, streamed)
    if streamed and sizes.sum_bytes > sizes.item_bytes:
        sums += 2 * sizes.sum_bytes  # the sums of earlier passes come back, one block ahead
    return sizes.block_trained * (sizes.item_bytes + sums)


def in_flight_bytes(kinds: dict[BlockPlan, int], sizes: Sizes) -> int:
    """What leaves for the host, or comes back: of the last blocks that keep there, however far apart they are."""
    away = {kind: n for kind, n in kinds.items() if kind.kept == HOST}
    total, left = 0, min(IN_FLIGHT, sum(away.values()))
    for kind, n in sorted(away.items(), key=lambda item: -sizes.kept_bytes(item[0].keep)):
        count = min(left, -(-IN_FLIGHT * n // sum(away.values())))  # they take turns
        total, left = total + count * sizes.kept_bytes(kind.keep), left - count
    return total


def host_bytes(kinds: dict[BlockPlan, int], state: str, sizes: Sizes) -> int:
    """Host memory beside what was loaded there already, of which streamed blocks take over their share."""
    weights = streamed_blocks(kinds) * sizes.block_bytes
    loaded = 0 if sizes.mapped else max(0, weights - sizes.block_bytes)
    written = 0
    if sizes.block_trained:  # state that is on the device is copied for a checkpoint; the end has all weights again
        again = 0 if sizes.mapped else sizes.blocks * sizes.block_bytes
        written = max(again, state_on_device(kinds, state, sizes) * sizes.state_bytes) // sizes.ranks
    return pinned_bytes(kinds, state, sizes) - loaded + written


def pinned_bytes(kinds: dict[BlockPlan, int], state: str, sizes: Sizes) -> int:
    """Host memory that the device copies from and to: weights, what was kept, gradients, the optimizer's state."""
    weights, kept, gradients, _ = copied_bytes(kinds, state, sizes)
    on_host = sizes.all_trained - state_on_device(kinds, state, sizes)
    return weights + kept + gradients + on_host * sizes.state_bytes


def streamed_blocks(kinds: dict[BlockPlan, int]) -> int:
    """How many have their weights on the host."""
    return sum(n for kind, n in kinds.items() if kind.weights == HOST)


def state_on_device(kinds: dict[BlockPlan, int], state: str, sizes: Sizes) -> int:
    """How many trained numbers have masters and moments there."""
    blocks = sum(n for kind, n in kinds.items() if kind.weights == HOST and (kind.state or state) == DEVICE)
    return blocks * sizes.block_trained + (others(kinds, sizes) if state == DEVICE else 0)


def others(kinds: dict[BlockPlan, int], sizes: Sizes) -> int:
    """How many numbers are trained, but not on the host."""
    return sizes.trained + (sizes.blocks - streamed_blocks(kinds)) * sizes.block_trained


def copied_bytes(kinds: dict[BlockPlan, int], state: str, sizes: Sizes) -> tuple[int, int, int, int]:
    """What is copied between host and device: weights in each pass, what was kept each way, gradients, and each way
    what an optimizer step works on.
    """
    streamed = streamed_blocks(kinds)
    kept = sum(n * sizes.kept_bytes(kind.keep) for kind, n in kinds.items() if kind.kept == HOST)
    gradients = streamed * sizes.block_trained * sizes.sum_bytes
    on_host = sizes.all_trained - state_on_device(kinds, state, sizes)
    moved = on_host * sizes.moving_bytes + gradients  # as many weights leave as gradients come, or fewer
    return streamed * sizes.block_bytes, kept, gradients, moved


def step_seconds(kinds: dict[BlockPlan, int], state: str, compiled: bool, sizes: Sizes, machine: Machine) -> float:
    """Seconds of a step: each pass takes as long as its arithmetic or its copies of one direction, whichever is more.

    Of the whole pass, not of each block: blocks of different kinds take turns, and copies start ahead.
    """
    linear = 24 * sizes.samples * sizes.tokens * sizes.width**2 / machine.matmul
    scores = 4 * sizes.samples * sizes.tokens**2 * sizes.width
    attend, attend_backward = scores / machine.attention, 2.5 * scores / machine.attention_backward
    unit = sizes.unit / machine.memory
    forward_traffic, backward_traffic = (n * unit for n in TRAFFIC_UNITS[compiled])
    copies = COPY_SHARE * machine.copies
    weights, kept, gradients, moved = (number / copies for number in copied_bytes(kinds, state, sizes))
    trains_all = sizes.block_trained > 0
    again = 0.0
    for kind, n in kinds.items():
        linears, attentions, units = RECOMPUTED[kind.keep]
        linears = 1.0 if linears and trains_all else linears  # gates too need what their layers gave
        again += n * (linears * linear + attentions * attend + units * unit)
    forward = sizes.blocks * (linear + attend + forward_traffic)
    backward = sizes.blocks * ((2 if trains_all else 1) * linear + attend_backward + backward_traffic) + again
    earlier = gradients * (1 - 1 / sizes.passes)  # sums come back for all passes of a step but the first
    total = max(forward, weights, kept) + max(backward, weights + kept + earlier, gradients)
    total += HIDDEN_COPY * (2 * (weights + kept) + gradients + earlier)
    on_device = 2 * sizes.state_bytes * state_on_device(kinds, state, sizes) / machine.memory
    # what belongs to weights that are trained on the host passes while the next forward pass begins, all else before it
    before = others(kinds, sizes) * sizes.moving_bytes / copies if state == HOST else 0.0
    before, behind = before / BOTH_WAYS, (moved - before) / BOTH_WAYS
    hidden = max(forward, weights, kept) + behind - max(forward, weights + behind, kept + behind)
    if sizes.average_bytes and moved:
        hidden = 0.0  # the average on the host waits for all
    return sizes.passes * total + before + behind - hidden + on_device


# -- choice ------------------------------------------------------------------------------------------------------------


def candidates(axes: Axes, sizes: Sizes) -> Iterator[tuple[BlockPlan, BlockPlan, int, str]]:
    """(kind, other kind, how many of the first, where the state is): all plans of at most two kinds of blocks.

    Where weights are trained on the host, the state of each such block is here or there, whatever all others have.
    """
    blocks = sizes.blocks
    kinds = [
        BlockPlan(weights, keep, kept, state)
        for weights, keep, kept in product(axes.weights, axes.keep, axes.kept)
        for state in (axes.state if weights == HOST and sizes.block_trained else (None,))
    ]
    for first, second in combinations_with_replacement(kinds, 2):
        for count in range(1, blocks + 1) if first == second else range(1, blocks):
            if first != second or count == blocks:
                for state in axes.state:
                    yield first, second, count, state


def choose(axes: Axes, sizes: Sizes, machine: Machine, compiled: bool, attention: str) -> ExecutionPlan:
    """Of the plans that fit and are as fast as the fastest, the one that copies least between host and device.

    Raises:
        NoPlanError: none fits.
    """
    comfortable, all_of_it = (replace(machine, host_bytes=int(machine.host_bytes * share)) for share in HOST_SHARES)
    try:
        return fastest(axes, sizes, comfortable, compiled, attention)
    except NoPlanError:
        return fastest(axes, sizes, all_of_it, compiled, attention)


def fastest(axes: Axes, sizes: Sizes, machine: Machine, compiled: bool, attention: str) -> ExecutionPlan:
    """``choose``, where all of the machine's host memory may be pinned."""
    found, least = [], None
    for first, second, count, state in candidates(axes, sizes):
        kinds = {first: count} if first == second else {first: count, second: sizes.blocks - count}
        peak, host = peak_bytes(kinds, state, compiled, sizes), host_bytes(kinds, state, sizes)
        least = min(least or (peak, host), (peak, host))
        if peak > machine.device_bytes or host > machine.host_bytes:
            continue
        seconds = step_seconds(kinds, state, compiled, sizes, machine)
        found.append((seconds, sum(copied_bytes(kinds, state, sizes)), peak, (first, second, count, state)))
    if not found:
        assert least is not None
        gibs = [f"{size / GIB:.1f}" for size in (*least, machine.device_bytes, machine.host_bytes)]
        raise NoPlanError(
            "the smallest allowed plan needs {} GiB of the device and {} GiB of the host beside the weights; {} and {} "
            "may be filled".format(*gibs)
        )
    enough = AS_FAST * min(seconds for seconds, *_ in found)
    seconds, _, peak, (first, second, count, state) = min(
        (plan for plan in found if plan[0] <= enough), key=lambda plan: (plan[1], float(f"{plan[0]:.4g}"), plan[2])
    )
    blocks = mixture(first, second, count, sizes.blocks)
    pinned = pinned_bytes({kind: blocks.count(kind) for kind in blocks}, state, sizes)
    return ExecutionPlan(blocks, compiled, attention, state, peak=peak, pinned=pinned, seconds=seconds)
