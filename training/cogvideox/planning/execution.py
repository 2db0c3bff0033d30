"""Makes the plan of a run and sets the transformer up for it: sizes read, the machine measured, blocks placed.

make_plan(run, options, tensors, transformer) -> ExecutionPlan or ModulePlan; place(transformer, it, device) moves
everything to where the plan wants it. The reference, ModulePlan, serves what a Stack does not: DoRA, LoRAs elsewhere
than in attention and feed-forward layers, DeepSpeed, fp32 on a GPU; and, unless asked, a CPU.
"""

import os
import time
from collections.abc import Callable, Iterator
from dataclasses import astuple, replace
from functools import partial
from typing import Any

import torch

from cogvideox.config.buckets import Bucket
from cogvideox.config.geometry import Geometry
from cogvideox.config.optimizers import host_state_problems, make_optimizer
from cogvideox.config.options import LoraOptions, TrainOptions
from cogvideox.errors import UsageError, first_line
from cogvideox.host_memory import free_host_bytes
from cogvideox.memory.graphs import allowing_graphs
from cogvideox.memory.streaming import HostTrainedBlocks, pinned
from cogvideox.model.attention import CPU, attend, attend_backward, choose_backend
from cogvideox.model.blocks import UNITS, kept_at
from cogvideox.model.models import DTYPES, free_device_bytes, stored_dtype
from cogvideox.optimizer.master_weights import state_bytes
from cogvideox.planning import plan
from cogvideox.planning.plan import AUTO, LEVELS, Axes, ExecutionPlan, Machine, ModulePlan, NoPlanError, Sizes
from cogvideox.planning.stack import (
    Stack,
    active_lora,
    base_bytes,
    base_parameters,
    block_weights,
    gradient_cosine,
    is_supported,
    lora_target_layers,
    unquantized_matrix_bytes,
)
from cogvideox.preparation.tensors import Tensors
from cogvideox.runtime.run import Run, with_peaks

Plan = ExecutionPlan | ModulePlan
AVERAGE_BYTES = 4  # of a trained number, with --use_ema
PROBE_SECONDS = 0.2  # long enough for a card to meet its power limit, as it does in a run
COPY_BYTES = 64 * 2**20
LOW_COSINE = 0.999


def make_plan(run: Run, options: TrainOptions, tensors: Tensors, transformer: Any) -> Plan:
    """How this run executes the transformer, which lies on the CPU with its adapters.

    Raises:
        UsageError: what was asked for cannot be done or does not fit.
    """
    reference = ModulePlan(recompute=options.train.gradient_checkpointing, compiled=run.compiled)
    asked = options.plan.asked
    obstacle = _obstacle(run, options, transformer)
    if obstacle and asked:
        raise UsageError(f"{', '.join(asked)}: {obstacle}; leave it out")
    if options.plan.plan == "off" or obstacle or (not asked and run.device.type == "cpu"):
        return reference
    try:
        backend, reason = choose_backend(run.device, run.dtype, options.plan.attention_backend)
    except ValueError as error:
        if not asked:
            run.say(f"no plan: {error}")
            return reference
        raise UsageError(f"--attention_backend {options.plan.attention_backend}: {error}") from None
    run.say(f"attention by {backend}: {reason}")
    buckets, precision = buckets_of(tensors), base_precision(options)
    sizes = sizes_of_run(run, options, tensors.geometry, buckets, transformer)
    drops = isinstance(options, LoraOptions) and options.lora.lora_dropout > 0
    compiled = compiles(run, options.plan.compile_blocks, drops)
    try:
        machine = measure_all(run, backend, sizes, options.plan.vram_budget)
        chosen = plan.choose(axes_of(options, run.world), sizes, machine, compiled, backend)
    except (NoPlanError, torch.OutOfMemoryError) as error:
        fix = _smaller(options, sizes, run.world)
        raise UsageError(f"{', '.join(asked) or '--plan auto'}: {error}; {fix}") from None
    if precision != AUTO:
        run.say(quantization_report(transformer, precision, run.device, backend))
    predicted = chosen.seconds if run.device.type == "cuda" else 0.0  # no rates of a CPU
    any_length = compiled and len(buckets) > 1
    return replace(chosen, seconds=predicted, any_length=any_length, base_precision=precision)


def base_precision(options: TrainOptions) -> str:
    """In which type frozen matrices are stored."""
    return options.plan.base_precision if isinstance(options, LoraOptions) else AUTO


def sizes_of_run(run: Run, options: TrainOptions, geometry: Geometry, buckets: list[Bucket], transformer: Any) -> Sizes:
    """``sizes_of`` with what the flags add.

    Raises:
        UsageError: the base cannot be quantized so.
    """
    precision = base_precision(options)
    try:
        sizes = sizes_of(transformer, geometry, buckets, options.train.train_batch_size, run.dtype, precision)
    except ValueError as error:
        raise UsageError(f"--base_precision {precision}: {error}; give int8") from None
    averages = AVERAGE_BYTES if options.loss.use_ema else 0
    mapped = run.dtype == DTYPES[stored_dtype(options.model, "transformer")]
    passes = options.train.gradient_accumulation_steps
    sum_bytes = 4 if passes > 1 else sizes.sum_bytes
    state = state_bytes(partial(make_optimizer, options.optimizer), run.device) + averages
    sizes = replace(sizes, state_bytes=state, average_bytes=averages, ranks=ranks_here())
    return replace(sizes, mapped=mapped, sum_bytes=sum_bytes, passes=passes)


def compiles(run: Run, wanted: str, drops: bool) -> bool:
    """Whether blocks are compiled. Dropout has other masks in each step, each of which would be a graph.

    Raises:
        UsageError: they shall be, and drop.
    """
    if drops:
        if wanted == "yes":
            raise UsageError("--compile_blocks yes: dropout cannot be compiled; give --lora_dropout 0, or leave it out")
        return False
    return wanted == "yes" or (wanted == "auto" and (run.compiled or run.device.type == "cuda"))


def _obstacle(run: Run, options: TrainOptions, transformer: Any) -> str | None:
    """Why a Stack does not run this model, if it does not."""
    if options.optimizer.use_cpu_offload_optimizer and not isinstance(options, LoraOptions):
        return "--use_cpu_offload_optimizer places what all weights need itself"
    if run.accelerator.state.deepspeed_plugin is not None:
        return "DeepSpeed places the weights itself"
    if not is_supported(transformer):
        return "is for LoRAs without DoRA, on the blocks' attention and feed-forward layers"
    if run.device.type == "cuda" and run.dtype == torch.float32:
        return "is for --mixed_precision bf16 and fp16"
    return None


def _smaller(options: TrainOptions, sizes: Sizes, world: int) -> str:
    """What makes a plan fit."""
    is_lora = isinstance(options, LoraOptions)
    ways = [f"--train_batch_size below {sizes.samples}"] if sizes.samples > 1 else []
    ways += [] if options.plan.asked else ["--plan off, with --gradient_checkpointing"]
    ways += ["a smaller bucket or --rank" if is_lora else "a smaller bucket"]
    stays = [] if is_lora else [f"; what stays on the device: {reason}" for reason in host_restrictions(options, world)]
    return f"give {', '.join(ways)}, or free memory{''.join(stays)}"


def buckets_of(tensors: Tensors) -> list[Bucket]:
    """The buckets of a run."""
    return sorted({sample.bucket for sample in tensors.index.samples})


def host_restrictions(options: TrainOptions, world: int) -> Iterator[str]:
    """Why weights and state stay on the device, beside the flags of the plan: all that host_state_problems says."""
    yield from host_state_problems(options.optimizer, deepspeed=False, name="masters and moments")
    if world > 1 and not isinstance(options, LoraOptions):
        yield "weights are trained on the host on one GPU only"


def axes_of(options: TrainOptions, world: int = 1) -> Axes:
    """What the flags leave open."""
    flags, axes = options.plan, plan.PRESETS[options.plan.plan]
    given = {"weights": flags.weights_on, "keep": flags.keep, "kept": flags.kept_on, "state": flags.optimizer_state_on}
    if list(host_state_problems(options.optimizer, deepspeed=False)):
        axes = replace(axes, state=(plan.DEVICE,))
    if not isinstance(options, LoraOptions) and any(host_restrictions(options, world)):
        axes = replace(axes, weights=(plan.DEVICE,))  # weights that are trained have their state where they lie
    axes = replace(axes, **{name: (value,) for name, value in given.items() if value != "auto"})
    if options.train.gradient_checkpointing and flags.keep == "auto":
        axes = replace(axes, keep=tuple(level for level in axes.keep if level in ("input", "attention")))
    return axes


def quantization_report(transformer: Any, precision: str, device: torch.device, backend: str) -> str:
    """What a quantized base does to the LoRA's gradients, of the first, the middle and the last block that has one."""
    trained = [
        block for block in transformer.transformer_blocks if any(map(active_lora, lora_target_layers(block).values()))
    ]
    sample = {id(trained[i]): trained[i] for i in (0, len(trained) // 2, -1)}.values()
    cosine = min(gradient_cosine(block, precision, device, backend) for block in sample)
    exact = str(trained[0].norm1.linear.weight.dtype).removeprefix("torch.")
    low = f"; that is low (below {LOW_COSINE}): the LoRA learns for another base; int8 is nearer"
    text = f"base in {precision}: gradients of {len(sample)} sample blocks: cosine {cosine:.4f} against {exact}"
    return text if cosine >= LOW_COSINE else text + low


def sizes_of(
    transformer: Any,
    geometry: Geometry,
    buckets: list[Bucket],
    samples: int,
    dtype: torch.dtype,
    precision: str = AUTO,
) -> Sizes:
    """The sizes of a run."""
    blocks = transformer.transformer_blocks
    trained = [p for p in transformer.parameters() if p.requires_grad]
    elsewhere = {id(p) for p in (*trained, *(p for block in blocks for p in block.parameters()))}
    rest = [t for t in (*transformer.parameters(), *transformer.buffers()) if id(t) not in elsewhere]
    block_trained = sum(p.numel() for p in base_parameters(blocks[0]) if p.requires_grad)
    kept = [[sum(UNITS[name] for name in kept_at(level, p)) for level in LEVELS] for p in map(block_weights, blocks)]
    return Sizes(
        blocks=len(blocks),
        block_bytes=base_bytes(blocks[0], precision),
        rest_bytes=sum(t.numel() * t.element_size() for t in rest),
        trained=sum(p.numel() for p in trained) - len(blocks) * block_trained,
        item_bytes=dtype.itemsize,
        samples=samples,
        tokens=max(map(geometry.tokens, buckets)),
        width=blocks[0].attn1.inner_dim,
        heads=blocks[0].attn1.heads,
        matrix_bytes=unquantized_matrix_bytes(blocks[0]) if precision != AUTO else 0,
        units_kept=tuple(map(max, zip(*kept, strict=True))),
        block_trained=block_trained,
        sum_bytes=dtype.itemsize,
    )


# -- the machine -------------------------------------------------------------------------------------------------------


def measure(device: torch.device, dtype: torch.dtype, backend: str, sizes: Sizes, budget: float | None) -> Machine:
    """Free memory, and rates by probes of about a second in all; on a CPU nominal rates."""
    host = free_host_bytes() // ranks_here()  # all of them measure now, and pin later
    fits = free_device_bytes(device) if device.type == "cuda" else float(host)
    if budget is not None and device.type != "cuda":
        fits = min(fits, allowed_bytes(budget))
    machine = Machine(int(fits * plan.FRAGMENTS), host)
    return with_rates(machine, device, dtype, backend, sizes) if device.type == "cuda" else machine


def measure_all(run: Run, backend: str, sizes: Sizes, budget: float | None) -> Machine:
    """What all processes have; each measures its own device.

    Raises:
        torch.OutOfMemoryError: on all of them, where one device has no room even for the probes.
    """
    run.barrier()  # processes of one host share its memory and its copies
    own: Machine | str
    try:
        own = measure(run.device, run.dtype, backend, sizes, budget)
    except torch.OutOfMemoryError as error:  # told to the others, who would wait for this one
        own = first_line(error)
    found = run.ranks.gather([own])
    for number, one in enumerate(found):
        if isinstance(one, str):
            raise torch.OutOfMemoryError(f"process {number}: {one}")
    return agreed(found)


def ranks_here() -> int:
    """How many processes of this run are on this host."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def agreed(machines: list[Machine]) -> Machine:
    """The least of each figure, for all ranks to plan alike: what fits it fits everywhere."""
    return Machine(*map(min, zip(*map(astuple, machines), strict=True)))


def allowed_bytes(budget: float) -> float:
    """What tensors may take on a card of so many GiB."""
    return budget * plan.GIB - plan.CONTEXT


def keep_to_budget(run: Run, options: TrainOptions) -> None:
    """Holds everything from now on, T5 and validation too, to --vram_budget: more is out of memory, as on that card."""
    budget = options.plan.vram_budget
    if budget is not None and run.device.type == "cuda":
        hold_to(budget)


def hold_to(budget: float) -> None:
    """Makes the current GPU one of so many GiB for this process."""
    total = torch.cuda.mem_get_info()[1]
    torch.cuda.set_per_process_memory_fraction(min(1.0, allowed_bytes(budget) / total))


def with_rates(machine: Machine, device: torch.device, dtype: torch.dtype, backend: str, sizes: Sizes) -> Machine:
    """The machine with measured rates: FLOP a second of matrix products and attention, bytes a second of copies.

    Of the shapes of one sample: what it takes is less than a block's backward pass needs.
    """
    assert backend != CPU
    tokens, width, heads = sizes.tokens, sizes.width, sizes.heads
    x = torch.randn(tokens, width, device=device, dtype=dtype)
    w = torch.randn(4 * width, width, device=device, dtype=dtype)
    q = x.view(1, tokens, heads, width // heads)
    o, lse = attend(q, q, q, backend)
    host, here = pinned(COPY_BYTES), torch.empty(COPY_BYTES, dtype=torch.uint8, device=device)
    scores = 4 * tokens**2 * width
    return replace(
        machine,
        matmul=8 * tokens * width**2 / seconds(lambda: x @ w.mT),
        attention=scores / seconds(lambda: attend(q, q, q, backend)),
        attention_backward=2.5 * scores / seconds(lambda: attend_backward(o, q, q, q, o, lse, backend)),
        memory=2 * here.numel() / seconds(lambda: here.clone()),
        copies=host.numel() / seconds(lambda: here.copy_(host, non_blocking=True)),
    )


def seconds(run: Callable[[], Any]) -> float:
    """Of one call on the device, in a row of them that takes PROBE_SECONDS."""

    def row(calls: int) -> float:
        torch.cuda.synchronize()
        started = time.perf_counter()
        for _ in range(calls):
            run()
        torch.cuda.synchronize()
        return time.perf_counter() - started

    row(1)  # kernels are chosen and compiled
    calls = max(1, round(PROBE_SECONDS / row(1)))
    return row(calls) / calls


# -- setting up --------------------------------------------------------------------------------------------------------


def place(transformer: Any, chosen: Plan, device: torch.device) -> HostTrainedBlocks | None:
    """Moves the transformer, which lies on the CPU, to where the plan wants it, and makes it run so.

    Returns what is trained on the host, if anything is.
    """
    if isinstance(chosen, ExecutionPlan):
        stack = Stack(transformer, chosen, device)
        stack.install()
        return stack.host_trained
    transformer.to(device)
    if chosen.recompute:
        transformer.enable_gradient_checkpointing()
    if chosen.compiled:
        for block in transformer.transformer_blocks:
            compile_block(block)
    return None


def compile_block(block: Any) -> None:
    """Compiles what diffusers computes with a block, in place: one graph serves all blocks of a shape."""
    block.compile(dynamic=False)
    block._compiled_call_impl = allowing_graphs(block._compiled_call_impl)


def measured(step_seconds: float) -> str:
    """What steps take and have taken up to now, for a comparison with what the plan predicted."""
    return with_peaks(f"measured: {step_seconds:.2f} s a step")
