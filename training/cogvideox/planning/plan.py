"""Describes plans: how each transformer block is executed, and the sizes and the machine that a plan is chosen for.

For each block a plan decides where its weights live, which activations forward saves for backward (the rest is
recomputed), where these live, and where its optimizer state lives. costs.py and timeline.py predict memory and time of
plans, and choice.py chooses one:

    Axes (what the flags allow) --> mixtures --> Costs: bytes --> they fit into Machine? --> Timeline --> ExecutionPlan

Memory is in bytes, time in seconds, and rates are in FLOP or bytes per second. The letters of shapes are those of
blocks.py. This module touches no device.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

from cogvideox.config.cards import NVLINK_4
from cogvideox.errors import plural

GIB = 2**30
DEVICE, HOST = "device", "host"
AUTO = "auto"  # as a base precision: frozen weights stay in the compute type
LEVELS = ("input", "attention", "linear", "all")  # what forward saves, from least to most; defined in blocks.KEPT
UNITS_KEPT = {"input": 1, "attention": 2, "linear": 10, "all": 18}  # with LoRAs on all layers; blocks.kept_at
FRAGMENTS = 0.94  # share of free device memory that can be filled before fragmentation prevents it
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
    tokens: int  # of a sample in the largest bucket: those of one process, if several divide them
    width: int  # D
    heads: int
    state_bytes: float = 10.0  # per trained element: what the master has beside the weight, and moments
    average_bytes: int = 0  # per trained element: the fp32 average, if there is one
    average_follows_weight: bool = False  # else it is where the state is, as the master is
    lengths: int = 1  # different numbers of tokens that the samples of the buckets have
    processes: int = 1  # of the run; they sum their gradients
    ranks: int = 1  # processes on this host, which share frozen streamed weights
    matrix_bytes: int = 0  # the size of a block's quantized matrices in the compute type
    units_kept: tuple[int, ...] = tuple(UNITS_KEPT.values())  # of one block, by LEVELS
    block_trained: int = 0  # elements of one block if all weights are trained, else 0
    device_gradient_bytes: int = 2  # per element of gradients on the device
    passes: int = 1  # forward and backward passes in an optimizer step
    steps: int = 0  # optimizer steps of the run, over which compilation is spread; 0 if compilation does not count
    shards: int = 1  # processes over which weights, gradients and optimizer state are sharded
    shards_on_host: bool = False  # whether each process stores its rows of them in host memory
    deepspeed: bool = False  # whether DeepSpeed shards gradients and optimizer state, and each process has all weights
    sequence_parallel: int = 1  # processes that divide the tokens of a sample

    @property
    def all_trained(self) -> int:
        """Returns the number of all trained elements."""
        return self.trained + self.blocks * self.block_trained

    @property
    def rows_on_host(self) -> int:
        """Returns the trained elements of this process whose weights, gradients and state are stored on the host."""
        return self.all_trained // self.shards if self.shards_on_host else 0

    @property
    def sum_bytes(self) -> int:
        """Returns the bytes per element of gradients on the host: sums of several passes are in fp32."""
        return 4 if self.passes > 1 else self.item_bytes

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
    both_ways: float = 1.5e10  # bytes per second in both directions together, if both are busy
    exchange: float = NVLINK_4  # bytes per second of tensors that two GPUs exchange; NVLink if it was not measured


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
    spare_host: int = 0  # predicted bytes of this process's share of host memory that stay free while training
    seconds: float = 0.0  # predicted time of a step of the largest bucket; 0 if the machine was not measured
    mean_seconds: float = 0.0  # the same, of all buckets
    compilation: float = 0.0  # predicted seconds until all blocks are compiled, if nothing has been compiled before
    shards: int = 1  # processes over which weights, gradients and optimizer state are sharded
    deepspeed: bool = False  # whether DeepSpeed shards gradients and optimizer state, and each process has all weights
    shards_on_host: bool = False  # whether each process stores its shards in host memory
    sequence_parallel: int = 1  # processes that divide the tokens of a sample
    exchanging: float = 0.0  # predicted seconds of a step in which these processes exchange tensors

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
            f", of {plural(n, 'block')} on the {place}"
            for place in (DEVICE, HOST)
            if place != self.state and (n := sum(block.state == place for block in self.blocks))
        )
        where = HOST if self.shards_on_host else self.state
        how = "compiled" + " for any length" * self.any_length if self.compiled else "eager"
        parts = [
            f"{plural(count, 'block')} {how}, "
            + (f"sharded over {self.shards} processes" if self.sharded else f"{count - streamed} on the device")
            + (" in host memory" if self.sharded and self.shards_on_host else "")
            + (f" and {streamed} streamed from the host" if streamed else ""),
            f"kept for backward: {', '.join(levels)}",
            f"attention by {self.attention}",
            f"optimizer state {'sharded by DeepSpeed ' if self.deepspeed else ''}on the {where}{elsewhere}",
        ]
        if self.sequence_parallel > 1:
            parts.append(f"tokens divided between {self.sequence_parallel} processes")
        if self.base_precision != AUTO:
            parts.append(f"base in {self.base_precision}")
        if self.seconds:
            host = f", {self.pinned / GIB:.1f} GiB of host memory" if self.pinned else ""
            waits = f", {self.exchanging:.3f} s of it communication" if self.exchanging else ""
            parts.append(f"predicted: peak {self.peak / GIB:.2f} GiB{host}, {self.seconds:.2f} s a step{waits}")
        return "; ".join(parts)


@dataclass(frozen=True)
class ModulePlan:
    """Lets diffusers' own modules run the blocks, which supports every training method."""

    recompute: bool  # whether a block's activations are recomputed in the backward pass
    compiled: bool  # whether torch.compile compiles the blocks, one graph for all of them

    def __str__(self) -> str:
        blocks = "compiled" if self.compiled else "eager"
        return f"blocks {blocks}, as diffusers runs them; activations {'recomputed' if self.recompute else 'kept'}"


class NoPlanError(ValueError):
    """Reports that no allowed plan fits; the message has the sizes of the smallest one."""
