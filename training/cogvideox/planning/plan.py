"""Chooses how the transformer's blocks are executed, from predictions of memory and time; touches no device.

The idea: for each block a plan decides where its weights live, which activations forward saves for backward (the rest
is recomputed), where these live, and where the optimizer state of host-trained weights lives. ``choose_plan`` predicts
the peak and the time of every mixture of at most two kinds of blocks (BlockPlan), and drops those that do not fit.
Among the plans whose time is within AS_FAST of the fastest it takes the one that copies least. The time includes each
step's share of compiling the blocks, because a plan with two levels compiles twice as many graphs, which a short run
does not gain back.

    Axes (what the flags allow) --> mixtures --> peak_bytes, host_bytes <= Machine? --> step_seconds --> ExecutionPlan

The memory model adds up weights, gradients and optimizer state on the device, and the larger need of two moments: the
start of backward, when all saved activations exist, and the optimizer step, when state passes through the device. The
time model adds, for each pass, the larger of arithmetic and of copies in one direction, because the two overlap.

Memory is in bytes, time in seconds, and rates are in FLOP or bytes per second. The letters of shapes are those of
blocks.py. A "unit" is the size of a block's input, samples * tokens * width * bytes per element.
benchmarks/one_block.py prints the measured WORKSPACE_UNITS and TRAINED_UNITS.

A mixture is a dictionary with the number of blocks of each kind. The functions that predict accept either a number or,
to predict all mixtures at once, an array with one number for each mixture, where kinds without a block have a zero.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from itertools import product
from typing import Any, TypeAlias

import numpy as np

from cogvideox.config.deepspeed import ZERO_BUCKET, sums_gradients
from cogvideox.memory.streaming import IN_FLIGHT, TRANSFER_SLOTS, WEIGHT_SLOTS
from cogvideox.optimizer.master_weights import CHUNK_BYTES, STATE_BYTES

GIB = 2**30
DEVICE, HOST = "device", "host"
AUTO = "auto"  # as a base precision: frozen weights stay in the compute type
LEVELS = ("input", "attention", "linear", "all")  # what forward saves, from least to most; defined in blocks.KEPT
UNITS_KEPT = {"input": 1, "attention": 2, "linear": 10, "all": 18}  # with LoRAs on all layers; blocks.kept_at
# By compiled and level: the units that a block's backward pass needs in addition to its saved activations.
WORKSPACE_UNITS = {
    True: {"input": 19.1, "attention": 17.2, "linear": 13.2, "all": 9.3},
    False: {"input": 38.2, "attention": 37.2, "linear": 28.2, "all": 25.2},
}
ENDS_UNITS = 1.8  # tensors before the first and after the last block
# By compiled and level: the units that backward needs in addition if all weights are trained, without their gradients.
TRAINED_UNITS = {
    True: {"input": 0.6, "attention": 1.5, "linear": 0.0, "all": 0.0},
    False: {"input": 7.5, "attention": 7.4, "linear": 6.4, "all": 1.4},
}
RECOMPUTED = {
    "input": (8 / 12, 1.0, 0.0),
    "attention": (8 / 12, 0.0, 0.0),
    "linear": (0.0, 0.0, 0.0),
    "all": (0.0, 0.0, -10.0),
}
"""By level: the shares of a block's linear layers and of its attention that backward recomputes, and the units of
memory traffic that it adds to TRAFFIC_UNITS."""
# By compiled: the units of memory traffic outside matrix products, in forward and in backward.
TRAFFIC_UNITS = {True: (43.0, 78.0), False: (133.0, 273.0)}
DEQUANTIZED_SHARE = {True: 0.1, False: 1.2}
"""By compiled: the share of a block's quantized matrices that is dequantized when memory is fullest. In a compiled
graph it is small (measured). Without one, the largest matrix, a third of them, is dequantized by way of fp32."""
LEVEL_SECONDS = 12.0  # to compile forward and backward of a block at one level (measured for 5b at 49x480x720)
HIDDEN_COPY = 0.01  # share of a copy's time by which it slows the arithmetic that it overlaps with
COPY_SHARE = 0.96  # share of the measured copy rate that is reached while the device computes
BOTH_WAYS = 0.7  # share of that rate if both directions are busy, as in the optimizer's pass
SHARDED_SHARE = 1.095  # measured time of a step whose weights are gathered block by block, relative to a copy's
AS_FAST = 1.01  # predictions are not more precise than this ratio, so plans within it count as equally fast
FRAGMENTS = 0.94  # share of free device memory that can be filled before fragmentation prevents it
HOST_SHARES = (0.6, 0.9)  # share of free host memory that plans may pin; the second if no plan fits the first
CONTEXT = 0.6 * GIB  # memory of CUDA itself on the card that --vram_budget describes


@dataclass(frozen=True)
class Sizes:
    """Holds the sizes of a run that memory and time depend on."""

    blocks: int
    block_bytes: int  # the weights of one block, without its LoRA
    rest_bytes: int  # frozen weights and buffers outside the blocks
    trained: int  # trained elements outside the blocks' own weights: of LoRAs, or of layers outside the blocks
    item_bytes: int  # of an element in the compute type
    samples: int  # in a micro-batch
    tokens: int  # of a sample in the largest bucket
    width: int  # D
    heads: int
    state_bytes: int = STATE_BYTES  # per trained element: master weight, moments, and the average if there is one
    average_bytes: int = 0  # the part of state_bytes for the average, which is stored where the master weight is
    ranks: int = 1  # processes on this host; one of them writes checkpoints, and all share frozen streamed weights
    mapped: bool = False  # loaded weights are pages of their file, so pinned copies take additional memory
    matrix_bytes: int = 0  # the size of a block's quantized matrices in the compute type
    units_kept: tuple[int, ...] = tuple(UNITS_KEPT.values())  # of one block, by LEVELS
    block_trained: int = 0  # elements of one block if all weights are trained, else 0
    sum_bytes: int = 4  # per element of the gradients that are summed on the host
    passes: int = 1  # forward and backward passes in an optimizer step
    steps: int = 0  # optimizer steps of the run, over which compilation is spread; 0 if compilation does not count
    shards: int = 1  # processes over which weights, gradients and optimizer state are sharded
    shards_on_host: bool = False  # whether each process stores its rows of them in host memory
    deepspeed: bool = (
        False  # whether ZeRO-2 shards only gradients and optimizer state, and each process has all weights
    )

    @property
    def all_trained(self) -> int:
        """Returns the number of all trained elements."""
        return self.trained + self.blocks * self.block_trained

    @property
    def rows_on_host(self) -> int:
        """Returns the trained elements of this process whose weights, gradients and state are stored on the host."""
        return self.all_trained // self.shards if self.shards_on_host else 0

    @property
    def moving_bytes(self) -> int:
        """Returns the bytes per trained element that pass through the device in an optimizer step."""
        return self.state_bytes - self.average_bytes

    @property
    def unit_bytes(self) -> int:
        """Returns the bytes of a block's input."""
        return self.samples * self.tokens * self.width * self.item_bytes

    def kept_bytes(self, level: str) -> int:
        """Returns the bytes that forward saves for one block at a level."""
        lse = 4 * self.samples * self.tokens * self.heads if level != "input" else 0
        return self.units_kept[LEVELS.index(level)] * self.unit_bytes + lse


@dataclass(frozen=True)
class Machine:
    """Holds the free memory and the measured rates of a machine."""

    device_bytes: int  # device memory that may be filled
    host_bytes: int  # free host memory
    matmul: float = 5e11  # FLOP per second of matrix products
    attention: float = 2e11  # FLOP per second of attention in forward
    attention_backward: float = 2e11  # FLOP per second of attention in backward
    memory: float = 2e10  # bytes per second, of the device
    copies: float = 1e10  # bytes per second between host and device, one way


@dataclass(frozen=True)
class BlockPlan:
    """Describes one block: where its weights are, which activations forward saves (blocks.KEPT), and where."""

    weights: str = DEVICE  # where the weights are, and their gradients if they are trained
    keep: str = "input"  # one of LEVELS
    kept: str = DEVICE  # where the saved activations are
    state: str | None = None  # where the optimizer state of host-trained weights is; None: as ExecutionPlan.state says


@dataclass(frozen=True)
class Axes:
    """Lists, for each axis of a plan, the values that the flags allow."""

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
    """Describes how a Stack runs the blocks. The plan is chosen and printed before the first step."""

    blocks: tuple[BlockPlan, ...]
    compiled: bool
    attention: str  # attention.BACKENDS, or cpu
    state: str = DEVICE  # where fp32 master weights and moments are stored
    any_length: bool = False  # whether one compiled graph serves all buckets; otherwise each length has its own
    base_precision: str = AUTO  # of the blocks' frozen matrices: quant.KINDS, or as they were loaded
    peak: int = 0  # predicted peak of device memory, in bytes
    pinned: int = 0  # pinned host memory, in bytes: this process's share
    seconds: float = 0.0  # predicted time of a step; 0 if the machine was not measured
    shards: int = 1  # processes over which weights, gradients and optimizer state are sharded
    deepspeed: bool = False  # whether DeepSpeed shards gradients and optimizer state, and each process has all weights

    @property
    def sharded(self) -> bool:
        """Returns whether FSDP2 shards the weights."""
        return self.shards > 1 and not self.deepspeed

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
            f"{count} blocks {how}, "
            + (f"sharded over {self.shards} processes" if self.sharded else f"{count - streamed} on the device")
            + (f" and {streamed} streamed from the host" if streamed else ""),
            f"kept for backward: {', '.join(levels)}",
            f"attention by {self.attention}",
            "optimizer state " + ("sharded by DeepSpeed" if self.deepspeed else f"on the {self.state}") + elsewhere,
        ]
        if self.base_precision != AUTO:
            parts.append(f"base in {self.base_precision}")
        if self.seconds:
            host = f", {self.pinned / GIB:.1f} GiB of host memory" if self.pinned else ""
            parts.append(f"predicted: peak {self.peak / GIB:.2f} GiB{host}, {self.seconds:.2f} s a step")
        return "; ".join(parts)


@dataclass(frozen=True)
class ModulePlan:
    """Lets diffusers' own modules run the blocks, which supports every training method."""

    recompute: bool  # whether a block's activations are recomputed in the backward pass
    compiled: bool  # whether torch.compile compiles the blocks, one graph for all of them

    def __str__(self) -> str:
        blocks = "compiled" if self.compiled else "eager"
        return f"blocks {blocks}, as diffusers runs them; activations {'recomputed' if self.recompute else 'kept'}"


Numbers: TypeAlias = Any  # an int or a float, or an array (mixtures,) of them
Kinds: TypeAlias = Mapping[BlockPlan, Numbers]  # a mixture, or an array of mixtures: the number of blocks of each kind


class NoPlanError(ValueError):
    """Reports that no allowed plan fits; the message has the sizes of the smallest one."""


# -- prediction --------------------------------------------------------------------------------------------------------


def mixture(first: BlockPlan, second: BlockPlan, count: int, total: int) -> tuple[BlockPlan, ...]:
    """Spreads ``count`` blocks of the first kind evenly over ``total``, so that their copies have time to overlap."""
    return tuple(first if (i + 1) * count // total > i * count // total else second for i in range(total))


def largest(*numbers: Numbers) -> Numbers:
    """Returns the largest of several numbers, for each mixture if some of them are arrays."""
    return reduce(np.maximum, numbers)


def peak_bytes(kinds: Kinds, state: str, compiled: bool, sizes: Sizes) -> Numbers:
    """Predicts the peak of device memory: at the start of backward or in the optimizer step, whichever is larger.

    Args:
        kinds: The number of blocks for each kind of block plan.
        state: Where optimizer state is stored unless a block's plan says otherwise.
        compiled: Whether blocks are compiled.
        sizes: The sizes of the run.
    """
    if sizes.deepspeed:
        return zero2_peak_bytes(kinds, compiled, sizes)
    if sizes.shards > 1:
        return sharded_peak_bytes(kinds, compiled, sizes)
    streamed = streamed_blocks(kinds)
    total = sizes.rest_bytes + (sizes.blocks - streamed + np.minimum(WEIGHT_SLOTS, streamed)) * sizes.block_bytes
    total += sizes.trained * (sizes.item_bytes + 4)  # weights, and the flat fp32 gradients
    total += (sizes.blocks - streamed) * sizes.block_trained * 4
    total += state_on_device(kinds, state, sizes) * sizes.state_bytes
    passes = activation_bytes(kinds, compiled, sizes)
    passes += round(sizes.matrix_bytes * DEQUANTIZED_SHARE[compiled]) + gradient_bytes(streamed, sizes)
    passes_through = copied_bytes(kinds, state, sizes)[3] > 0
    return total + np.maximum(passes, passes_through * transfer_slot_bytes(streamed, sizes))


def activation_bytes(kinds: Kinds, compiled: bool, sizes: Sizes) -> Numbers:
    """Returns the device bytes of saved activations, and of those that a backward pass computes."""
    more = TRAINED_UNITS[compiled] if sizes.block_trained else dict.fromkeys(LEVELS, 0.0)
    work = largest(*((n > 0) * (WORKSPACE_UNITS[compiled][kind.keep] + more[kind.keep]) for kind, n in kinds.items()))
    return saved_bytes(kinds, sizes) + np.rint((work + ENDS_UNITS) * sizes.unit_bytes).astype(int)


def saved_bytes(kinds: Kinds, sizes: Sizes) -> Numbers:
    """Returns the device bytes of saved activations, including those on their way to or from the host."""
    here = {kind: n for kind, n in kinds.items() if kind.kept == DEVICE}
    return sum(n * sizes.kept_bytes(kind.keep) for kind, n in here.items()) + in_flight_bytes(kinds, sizes)


def sharded_peak_bytes(kinds: Kinds, compiled: bool, sizes: Sizes) -> Numbers:
    """Predicts the peak of device memory of weights that are sharded: when backward starts or ends, or in evaluation.

    Each process keeps fp32 rows of weights, moments and, from the first backward pass on, gradients, unless they are
    stored on the host. Two blocks are gathered at a time; the gradients of one are in the compute type, and become fp32
    before they are summed. To sample and to export, each process gathers all weights.
    """
    rows = sizes.all_trained // sizes.shards - sizes.rows_on_host
    gathered = sizes.trained * sizes.item_bytes
    kept = sizes.rest_bytes + rows * sizes.state_bytes + gathered
    blocks = 2 * sizes.block_bytes + sizes.block_trained * (sizes.item_bytes + 4)
    start = activation_bytes(kinds, compiled, sizes) + (4 * rows if sizes.passes > 1 else 0)
    work = round((WORKSPACE_UNITS[compiled]["attention"] + ENDS_UNITS) * sizes.unit_bytes)
    return kept + largest(blocks + start, blocks + work + 4 * rows, sizes.blocks * sizes.block_bytes + work)


def zero2_peak_bytes(kinds: Kinds, compiled: bool, sizes: Sizes) -> Numbers:
    """Predicts the peak of device memory under DeepSpeed ZeRO-2: at the start of backward or at its first full bucket.

    Each process has all weights in the compute type, and a share of fp32 masters and moments unless these are stored on
    the host. Backward collects gradients in a bucket. When it is full, DeepSpeed copies it, converts the copy to fp32,
    sums it over the processes, and adds this process's part to its share of the gradients. That is an fp32 tensor on
    the device, also if the optimizer is on the host, and it is allocated as a whole at the first full bucket. Then the
    activations of the blocks in this bucket are gone. The first bucket is the last process's, so this is its peak.
    """
    share = sizes.all_trained // sizes.shards
    weights = sizes.rest_bytes + sizes.blocks * sizes.block_bytes + sizes.trained * sizes.item_bytes
    bucket = min(ZERO_BUCKET, sizes.all_trained)
    stored = weights + (share - sizes.rows_on_host) * sizes.state_bytes + bucket * sizes.item_bytes
    backward, saved = activation_bytes(kinds, compiled, sizes), saved_bytes(kinds, sizes)
    if not sums_gradients(sizes.shards, sizes.passes, sizes.shards_on_host):
        return stored + backward  # each gradient is copied to the host in the compute type
    done = min(1.0, (bucket // sizes.block_trained + 1) / sizes.blocks) if sizes.block_trained else 1.0
    left = np.rint(saved_bytes({kind: n * (1 - done) for kind, n in kinds.items()}, sizes)).astype(int)
    copies = round(ENDS_UNITS * sizes.unit_bytes) + bucket * (sizes.item_bytes + 4)
    full = left + sizes.block_trained * sizes.item_bytes + largest(copies, backward - saved) + 4 * share
    return stored + largest(full, backward + (4 * share if sizes.passes > 1 else 0))


def transfer_slot_bytes(streamed: Numbers, sizes: Sizes) -> Numbers:
    """Returns the device bytes of the optimizer's transfer slots."""
    numbers = min(sizes.all_trained, CHUNK_BYTES // STATE_BYTES)
    # Host-trained weights are copied out, and their gradients are copied in and converted to fp32 on the device.
    with_weights = (streamed > 0) & (sizes.block_trained > 0)
    load = sizes.moving_bytes + with_weights * (sizes.sum_bytes + sizes.item_bytes)
    return numbers * (TRANSFER_SLOTS * load + 4 * with_weights)


def gradient_bytes(streamed: Numbers, sizes: Sizes) -> Numbers:
    """Returns the device bytes of block gradients: those of the current block, and those on their way to the host."""
    sums = sizes.sum_bytes * np.minimum(IN_FLIGHT, streamed)
    if sizes.sum_bytes > sizes.item_bytes:
        sums = sums + (streamed > 0) * 2 * sizes.sum_bytes  # earlier sums are copied back, one block ahead
    return sizes.block_trained * (sizes.item_bytes + sums)


def in_flight_bytes(kinds: Kinds, sizes: Sizes) -> Numbers:
    """Returns the device bytes of saved activations that are on their way to or from the host."""
    away = {kind: n for kind, n in kinds.items() if kind.kept == HOST}
    blocks = sum(away.values())
    total, left = 0, np.minimum(IN_FLIGHT, blocks)
    for kind, n in sorted(away.items(), key=lambda item: -sizes.kept_bytes(item[0].keep)):
        # Blocks of different kinds alternate, so each kind has its share of the blocks in flight, rounded up.
        count = np.minimum(left, -(-IN_FLIGHT * n // np.maximum(1, blocks)))
        total, left = total + count * sizes.kept_bytes(kind.keep), left - count
    return total


def host_bytes(kinds: Kinds, state: str, sizes: Sizes) -> Numbers:
    """Predicts the additional host memory; the pinned weights of streamed blocks replace the loaded ones."""
    weights = streamed_bytes(kinds, sizes)
    loaded = 0 if sizes.mapped else np.maximum(0, weights - sizes.block_bytes)
    written = 0
    if sizes.block_trained:
        # A checkpoint first copies all optimizer state on the device to the host; the export copies all weights.
        again = 0 if sizes.mapped else sizes.blocks * sizes.block_bytes
        # Rows of sharded state are copied to the host one tensor at a time.
        in_rows = sizes.shards > 1 or sizes.deepspeed
        copied = 0 if in_rows else state_on_device(kinds, state, sizes) * sizes.state_bytes
        written = np.maximum(again, copied) // sizes.ranks
    moments = sizes.rows_on_host * (sizes.state_bytes - 4)
    return pinned_bytes(kinds, state, sizes) + moments - loaded + written


def pinned_bytes(kinds: Kinds, state: str, sizes: Sizes) -> Numbers:
    """Predicts this process's pinned host memory: weights, saved activations, gradients and optimizer state."""
    _, kept, gradients, _ = copied_bytes(kinds, state, sizes)
    on_host = sizes.all_trained - state_on_device(kinds, state, sizes)
    rows = 8 * sizes.rows_on_host  # FSDP2 pins fp32 weights and gradients
    return streamed_bytes(kinds, sizes) + kept + gradients + on_host * sizes.state_bytes + rows


def streamed_blocks(kinds: Kinds) -> Numbers:
    """Returns how many blocks have their weights on the host."""
    return sum(n for kind, n in kinds.items() if kind.weights == HOST)


def streamed_bytes(kinds: Kinds, sizes: Sizes) -> Numbers:
    """Returns the host bytes of streamed weights: this process's share if the processes of a machine share them."""
    return streamed_blocks(kinds) * sizes.block_bytes // (1 if sizes.block_trained else sizes.ranks)


def state_on_device(kinds: Kinds, state: str, sizes: Sizes) -> Numbers:
    """Returns how many trained elements have their master weights and moments on the device."""
    blocks = sum(n for kind, n in kinds.items() if kind.weights == HOST and (kind.state or state) == DEVICE)
    return blocks * sizes.block_trained + (trained_on_device(kinds, sizes) if state == DEVICE else 0)


def trained_on_device(kinds: Kinds, sizes: Sizes) -> Numbers:
    """Returns how many trained elements have their weights on the device."""
    return sizes.trained + (sizes.blocks - streamed_blocks(kinds)) * sizes.block_trained


def copied_bytes(kinds: Kinds, state: str, sizes: Sizes) -> tuple[Numbers, Numbers, Numbers, Numbers]:
    """Returns the bytes copied between host and device.

    Returns:
        The bytes of weights per pass, of saved activations per direction, of gradients, and of optimizer state with
        gradients per direction.
    """
    streamed = streamed_blocks(kinds)
    kept = sum(n * sizes.kept_bytes(kind.keep) for kind, n in kinds.items() if kind.kept == HOST)
    gradients = streamed * sizes.block_trained * sizes.sum_bytes
    on_host = sizes.all_trained - state_on_device(kinds, state, sizes)
    # Weights are copied out where gradients are copied in, and they do not take more bytes than the gradients.
    moved = on_host * sizes.moving_bytes + gradients
    return streamed * sizes.block_bytes, kept, gradients, moved


def all_copied_bytes(kinds: Kinds, state: str, sizes: Sizes) -> Numbers:
    """Returns the sum of ``copied_bytes``, by which equally fast plans are compared."""
    return sum(copied_bytes(kinds, state, sizes))


def step_seconds(kinds: Kinds, state: str, compiled: bool, sizes: Sizes, machine: Machine) -> Numbers:
    """Predicts the seconds of a step: each pass takes the larger of its arithmetic and its copies in one direction.

    The maximum is taken over a complete pass and not for each block, because blocks of different kinds take turns and
    copies start ahead of time. The arguments are those of ``peak_bytes``, and the machine, which has the rates.
    """
    # One block: 12 D^2 weights in linear layers, 2 FLOP each per token, and two products of S x S x D per sample.
    linear = 24 * sizes.samples * sizes.tokens * sizes.width**2 / machine.matmul
    scores = 4 * sizes.samples * sizes.tokens**2 * sizes.width
    attend, attend_backward = scores / machine.attention, 2.5 * scores / machine.attention_backward
    unit = sizes.unit_bytes / machine.memory
    forward_traffic, backward_traffic = (n * unit for n in TRAFFIC_UNITS[compiled])
    copies = COPY_SHARE * machine.copies
    weights, kept, gradients, moved = (number / copies for number in copied_bytes(kinds, state, sizes))
    trains_all = sizes.block_trained > 0
    again = 0.0
    for kind, n in kinds.items():
        linears, attentions, units = RECOMPUTED[kind.keep]
        # Gradients of the gates need the outputs of all linear layers, so all of these are recomputed.
        linears = 1.0 if linears and trains_all else linears
        again += n * (linears * linear + attentions * attend + units * unit)
    forward = sizes.blocks * (linear + attend + forward_traffic)
    backward = sizes.blocks * ((2 if trains_all else 1) * linear + attend_backward + backward_traffic) + again
    earlier = gradients * (1 - 1 / sizes.passes)  # the sums are copied back to the device in all passes but the first
    total = largest(forward, weights, kept) + largest(backward, weights + kept + earlier, gradients)
    total += HIDDEN_COPY * (2 * (weights + kept) + gradients + earlier)
    on_device = 2 * sizes.state_bytes * state_on_device(kinds, state, sizes) / sizes.shards / machine.memory
    # Optimizer state of host-trained weights passes through the device while the next forward pass runs, and the other
    # state before it. ``hidden`` is the time by which the former overlaps with that forward pass.
    before = trained_on_device(kinds, sizes) * sizes.moving_bytes / copies if state == HOST else 0.0
    before, behind = before / BOTH_WAYS, (moved - before) / BOTH_WAYS
    hidden = largest(forward, weights, kept) + behind - largest(forward, weights + behind, kept + behind)
    if sizes.average_bytes:
        hidden = hidden * (moved == 0)  # the average is updated by the host, which waits for all transfers
    shared = SHARDED_SHARE if sizes.shards > 1 else 1.0
    return shared * (sizes.passes * total + before + behind - hidden + on_device)


def compile_seconds(kinds: Kinds, compiled: bool, sizes: Sizes) -> Numbers:
    """Returns the seconds of compilation per optimizer step of the run, if nothing has been compiled before."""
    levels = sum(sum(n for kind, n in kinds.items() if kind.keep == level) > 0 for level in LEVELS)
    return LEVEL_SECONDS * levels / sizes.steps if compiled and sizes.steps else 0.0


# -- choice ------------------------------------------------------------------------------------------------------------


def mixtures(axes: Axes, sizes: Sizes) -> dict[BlockPlan, np.ndarray]:
    """Returns all mixtures of at most two kinds of blocks, as an array (mixtures,) of numbers of blocks for each kind.

    Each kind of host-trained blocks has an additional choice of where its optimizer state is stored.
    """
    kinds = [
        BlockPlan(weights, keep, kept, state)
        for weights, keep, kept in product(axes.weights, axes.keep, axes.kept)
        for state in (axes.state if weights == HOST and sizes.block_trained else (None,))
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

    def of_all(predict: Callable[..., Numbers], *arguments: Any) -> np.ndarray:
        """Returns a prediction for every plan, (mixtures, places of the optimizer state)."""
        shape = next(iter(kinds.values())).shape
        return np.stack([np.broadcast_to(predict(kinds, state, *arguments), shape) for state in axes.state], axis=1)

    peaks, hosts = of_all(peak_bytes, compiled, sizes), of_all(host_bytes, sizes)
    fitting = fitting_plans(peaks, hosts, machine)
    seconds, copied = of_all(step_seconds, compiled, sizes, machine), of_all(all_copied_bytes, sizes)
    spread = seconds + np.reshape(compile_seconds(kinds, compiled, sizes), (-1, 1))
    fast = np.argwhere(fitting & (spread <= AS_FAST * spread[fitting].min()))
    index, place = min(map(tuple, fast), key=lambda plan: (copied[plan], float(f"{spread[plan]:.4g}"), peaks[plan]))
    chosen = {kind: int(numbers[index]) for kind, numbers in kinds.items() if numbers[index]}
    (first, count), *others = chosen.items()
    second = others[0][0] if others else first
    return ExecutionPlan(
        mixture(first, second, count, sizes.blocks),
        compiled,
        attention,
        axes.state[place],
        peak=int(peaks[index, place]),
        pinned=int(pinned_bytes(chosen, axes.state[place], sizes)),
        seconds=float(seconds[index, place]),
        shards=sizes.shards,
        deepspeed=sizes.deepspeed,
    )


def fitting_plans(peaks: np.ndarray, hosts: np.ndarray, machine: Machine) -> np.ndarray:
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
