"""Makes the execution plan of a run and sets the transformer up for it.

The idea: whether a run fits in memory, and which way of running it is fastest, depends on the model, the largest
bucket, the flags and the machine. So before the first step this module reads the sizes (``sizes_from_options``),
measures free memory and rates (``measure_all_ranks``), finds the choices that the flags leave open (``axes_of``), and
lets choice.choose_plan compare all plans that the flags allow:

    options, buckets, transformer --> sizes_from_options --> Sizes   --.
    probes of two seconds         --> measure_all_ranks  --> Machine ---+--> choose_plan --> ExecutionPlan
    --plan and its flags          --> axes_of            --> Axes    --'

``make_plan`` returns the plan, and ``apply_plan`` moves the transformer to where the plan wants it. A ModulePlan runs
diffusers' own blocks. It is used for everything that a Stack does not support: DoRA, LoRAs on other layers than
attention and feed-forward, DeepSpeed ZeRO-3, fp32 on a GPU, and a CPU unless a flag of the plan is given. All processes
of a run must choose the same plan, so they exchange their measurements and each takes the minimum.
"""

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import astuple, replace
from itertools import groupby
from typing import Any, Protocol

import torch
from torch import nn

from cogvideox.config.buckets import Bucket
from cogvideox.config.deepspeed import offload_device, zero_stage
from cogvideox.config.flags import PlanFlags
from cogvideox.config.geometry import Geometry
from cogvideox.config.optimizers import flag_of, host_state_problems, steps_on_device
from cogvideox.config.options import (
    LoraOptions,
    TrainOptions,
    asked_of_plan,
    copies_and_shards,
    fsdp_offloads,
    local_processes,
    under_deepspeed,
    under_fsdp,
    wanted_places,
)
from cogvideox.errors import UsageError, first_line, plural
from cogvideox.files import machine_id
from cogvideox.host_memory import free_host_bytes
from cogvideox.memory.graphs import allowing_graphs
from cogvideox.memory.shared import Neighbors
from cogvideox.memory.streaming import TrainedBlocks
from cogvideox.model.attention import choose_backend
from cogvideox.model.blocks import UNITS, kept_at
from cogvideox.model.models import free_device_bytes
from cogvideox.optimizer.adam import Adam
from cogvideox.optimizer.adam_weights import gradients_are_sums
from cogvideox.optimizer.rule import rule_of, state_bytes
from cogvideox.planning import choice, plan
from cogvideox.planning.plan import AUTO, LEVELS, Axes, ExecutionPlan, Machine, ModulePlan, NoPlanError, Sizes
from cogvideox.planning.probes import exchange_rate, with_rates
from cogvideox.planning.sharded import ShardedStack, sharding_mesh
from cogvideox.planning.stack import (
    ModuleStack,
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
from cogvideox.runtime.ranks import Ranks
from cogvideox.runtime.run import Run, with_peaks

Plan = ExecutionPlan | ModulePlan
SHARDED_STATE_BYTES = 12  # per trained element: master and moments in fp32
AVERAGE_BYTES = 4  # per trained element, with --use_ema
SHARED = "streamed weights: one copy in host memory for the {} processes of this machine"
NOT_SHARED = (
    "streamed weights: each of the {} processes of this machine has a copy in host memory, {:.1f} GiB more than "
    "planned, because they cannot map the memory of another"
)
LOW_COSINE = 0.999  # below this, the report on a quantized base contains a warning


class Target(Protocol):
    """What a plan is made for. A ``Run`` is one; a dry run may describe a machine that does not exist here."""

    @property
    def device(self) -> torch.device:
        """The device of one process."""

    @property
    def dtype(self) -> torch.dtype:
        """The compute type."""

    @property
    def world(self) -> int:
        """The number of processes."""

    @property
    def compiled(self) -> bool:
        """Whether accelerate's configuration asks for torch.compile."""


def make_plan(
    run: Run, options: TrainOptions, tensors: Tensors, transformer: nn.Module, steps: int, resumes: bool = False
) -> Plan:
    """Chooses how this run executes the transformer.

    Args:
        run: The run.
        options: The flags of the script.
        tensors: The prepared data.
        transformer: The transformer with its adapters, on the CPU.
        steps: The number of optimizer steps of the complete run. It does not depend on where a process resumes, so that
            a resumed run has the same plan.
        resumes: Whether this process continues from a checkpoint, whose rank and buckets the run must keep.

    Raises:
        UsageError: A flag of the plan cannot be followed, or no allowed plan fits.
    """
    reference = ModulePlan(recompute=options.train.gradient_checkpointing, compiled=run.compiled)
    asked = asked_of_plan(options)
    reason = no_plan_reason(run, options, transformer)
    if reason or (not asked and run.device.type == "cpu" and not under_fsdp()):
        return reference
    try:
        backend, why = choose_backend(run.device, run.dtype, options.plan.attention_backend)
    except ValueError as error:
        if not asked and not under_fsdp():
            run.say(f"no plan: {error}")
            return reference
        raise UsageError(f"--attention_backend {options.plan.attention_backend}: {error}") from None
    run.say(f"attention by {backend}: {why}")
    buckets, precision = buckets_of(tensors), base_precision(options)
    sizes = sizes_from_options(run, options, tensors.geometry, buckets, transformer)
    # Machines may have different numbers of ranks, but all ranks must choose the same plan.
    neighbors = neighbors_of(run.ranks)
    sharing = 1 if neighbors is None else neighbors.number
    sizes = replace(sizes, ranks=min(run.ranks.gather([sharing])), steps=steps)
    compiled = compiles(run, options.plan.compile_blocks, drops_out(options))
    try:
        machine = measure_all_ranks(run, backend, sizes, options.plan)
        chosen = choose(run, options, sizes, machine, compiled, backend)
    except (NoPlanError, torch.OutOfMemoryError) as error:
        fix = _smaller(options, sizes, run.world, resumes)
        raise UsageError(f"{', '.join(asked) or '--plan auto'}: {error}; {fix}") from None
    run.say(host_memory_line(chosen, machine))
    counts = Counter(sample.bucket for sample in tensors.index.samples)
    average = mean_seconds(chosen, sizes, machine, tensors.geometry, counts)
    if precision != AUTO:
        run.say(quantization_report(transformer, precision, run.device, backend))
    if run.device.type != "cuda":  # the rates of a CPU are not measured
        return replace(chosen, seconds=0.0, base_precision=precision)
    return replace(chosen, mean_seconds=average, base_precision=precision)


def choose(
    run: Target, options: TrainOptions, sizes: Sizes, machine: Machine, compiled: bool, backend: str
) -> ExecutionPlan:
    """Returns the fastest plan that fits.

    All weights are sharded over the ranks where a complete copy on each does not fit. Optimizer state is stored on the
    host only where the shards do not fit either. Under DeepSpeed ZeRO-2, each rank has a complete copy, and the
    configuration says where the state is stored.

    Raises:
        NoPlanError: No allowed plan fits.
    """
    axes, shards = axes_of(options, run.world), shards_of(options, run.world)
    on_device = replace(axes, weights=(plan.DEVICE,), state=(plan.DEVICE,))
    # Ranks that store activations on the host share its bandwidth. For 5b on four H100, this was no faster than
    # recomputing them, and pinning the memory took 20 s. So it is only for what does not fit otherwise.
    here = replace(on_device, kept=(plan.DEVICE,)) if plan.DEVICE in axes.kept else on_device
    sharded = sharded_sizes(sizes, shards, fsdp_offloads())
    if under_deepspeed():
        sharded = sharded_sizes(sizes, run.world, offload_device("offload_optimizer") == "cpu", deepspeed=True)
    ways = [(here, sharded), (on_device, sharded)]
    if not under_fsdp() and not under_deepspeed():
        ways = [(axes, sizes)] if shards == 1 else [(on_device, sizes), *ways, (axes, sizes)]
    for allowed, held in ways[:-1]:
        with suppress(NoPlanError):
            return choice.choose_plan(allowed, held, machine, compiled, backend)
    allowed, held = ways[-1]
    return choice.choose_plan(allowed, held, machine, compiled, backend)


def sharded_sizes(sizes: Sizes, shards: int, on_host: bool, deepspeed: bool = False) -> Sizes:
    """Returns the sizes of a run whose state is sharded. It is in fp32: masters and moments of 12 bytes."""
    where = replace(sizes, shards=shards, shards_on_host=on_host, deepspeed=deepspeed)
    return replace(where, state_bytes=SHARDED_STATE_BYTES)


def shards_of(options: TrainOptions, world: int) -> int:
    """Returns over how many ranks the weights of a run may be sharded; 1 if they may not."""
    if isinstance(options, LoraOptions) or world == 1:
        return 1
    if under_fsdp():
        return copies_and_shards(world)[1]
    flags = wanted_places(options)
    free = {flags.plan, flags.weights_on, flags.optimizer_state_on} == {"auto"}
    return world if free and steps_on_device(options.optimizer) else 1


def base_precision(options: TrainOptions) -> str:
    """Returns the type in which frozen matrices are stored; AUTO if they are not quantized."""
    return options.plan.base_precision if isinstance(options, LoraOptions) else AUTO


def sizes_from_options(
    run: Target, options: TrainOptions, geometry: Geometry, buckets: list[Bucket], transformer: Any
) -> Sizes:
    """Returns the sizes of a run, including optimizer state, averages and gradient accumulation.

    Raises:
        UsageError: The base cannot be quantized to this precision.
    """
    precision = base_precision(options)
    try:
        sizes = sizes_of(transformer, geometry, buckets, options.train.train_batch_size, run.dtype, precision)
    except ValueError as error:
        raise UsageError(f"--base_precision {precision}: {error}; give int8") from None
    averages = AVERAGE_BYTES if options.loss.use_ema else 0
    passes = options.train.gradient_accumulation_steps
    rule = rule_of(options.optimizer)
    sums = not isinstance(rule, Adam) or gradients_are_sums(passes, run.world)
    device = run.device if torch.cuda.is_available() else torch.device("cpu")  # a dry run may be for a GPU elsewhere
    follows = isinstance(rule, Adam) and rule.weight_is_master(run.dtype)
    parallel = options.plan.sequence_parallel
    return replace(
        sizes,
        average_bytes=averages,
        average_follows_weight=follows,
        state_bytes=state_bytes(options.optimizer, run.dtype, device),
        ranks=local_processes(),
        tokens=-(-sizes.tokens // parallel),
        sequence_parallel=parallel,
        device_gradient_bytes=4 if sums else sizes.item_bytes,
        passes=passes,
        processes=run.world,
    )


def host_memory_line(chosen: ExecutionPlan, machine: Machine) -> str:
    """Returns what a plan will take of the host memory, for the user to read before any of it is pinned."""
    pinned, used, free = chosen.pinned, machine.host_bytes - chosen.spare_host, machine.host_bytes
    gibs = [f"{size / plan.GIB:.1f} GiB" for size in (pinned, max(0, used), free)]
    return "host memory: {} will be pinned; {} more than now will be used at most, of {} that are free".format(*gibs)


def drops_out(options: TrainOptions) -> bool:
    """Returns whether the LoRA has dropout."""
    return isinstance(options, LoraOptions) and options.lora.lora_dropout > 0


def compiles(run: Target, wanted: str, drops: bool) -> bool:
    """Returns whether blocks are compiled. Dropout prevents it: each step's masks would need another graph.

    Raises:
        UsageError: Compilation was asked for together with dropout.
    """
    if drops:
        if wanted == "yes":
            raise UsageError("--compile_blocks yes: dropout cannot be compiled; give --lora_dropout 0, or leave it out")
        return False
    return wanted == "yes" or (wanted == "auto" and (run.compiled or run.device.type == "cuda"))


def no_plan_reason(run: Target, options: TrainOptions, transformer: nn.Module) -> str | None:
    """Returns why a run uses diffusers' own blocks, or None if a Stack can run them.

    Raises:
        UsageError: A flag or the launcher asks for something that only a Stack can do, and it cannot run this model.
    """
    asked = asked_of_plan(options)
    obstacle = obstacle_to_plan(run, options, transformer)
    if obstacle and asked:
        raise UsageError(f"{', '.join(asked)}: {obstacle}; leave it out")
    if obstacle and under_fsdp():
        raise UsageError(f"accelerate launch: FSDP {obstacle}")
    return obstacle or ("--plan off runs the blocks of diffusers" if options.plan.plan == "off" else None)


def obstacle_to_plan(run: Target, options: TrainOptions, transformer: nn.Module) -> str | None:
    """Returns why a Stack cannot run this model, or None if it can."""
    if under_deepspeed() and zero_stage() == "3":
        return "DeepSpeed ZeRO-3 gathers the weights for diffusers' own modules"
    if not is_supported(transformer):
        return "supports only LoRAs without DoRA, on the blocks' attention and feed-forward layers"
    if run.device.type == "cuda" and run.dtype == torch.float32:
        return "requires --mixed_precision bf16 or fp16 on a GPU"
    return None


def mean_seconds(
    plan: ExecutionPlan, sizes: Sizes, machine: Machine, geometry: Geometry, counts: Mapping[Bucket, int]
) -> float:
    """Returns the mean seconds of a step, of which all samples are in one bucket; the plan has those of the largest.

    Args:
        plan: The plan of the run.
        sizes: The sizes for which it was chosen, before they were divided among processes that share weights.
        machine: The machine.
        geometry: The geometry of the model.
        counts: The number of samples of each bucket.
    """
    if plan.shards > 1 or plan.deepspeed:
        sizes = sharded_sizes(sizes, plan.shards, plan.shards_on_host, plan.deepspeed)
    total = 0.0
    for bucket, number in counts.items():
        tokens = -(-geometry.tokens(bucket) // sizes.sequence_parallel)
        total += number * choice.step_seconds(plan, replace(sizes, tokens=tokens), machine)
    return total / sum(counts.values())


def _smaller(options: TrainOptions, sizes: Sizes, world: int, resumes: bool = False) -> str:
    """Returns advice on the flags that could make a plan fit, without those that a resumed run must keep."""
    is_lora, asked = isinstance(options, LoraOptions), asked_of_plan(options)
    first = f"leave out {', '.join(asked)}" if asked else "give --plan off with --gradient_checkpointing"
    ways = [f"a --train_batch_size below {sizes.samples}"] if sizes.samples > 1 else []
    if resumes:
        ways = [f"{way} with more --gradient_accumulation_steps" for way in ways]
    else:
        ways += ["a smaller --rank"] * is_lora + ["a smaller bucket"]
    stays = [] if is_lora else [f"; what stays on the device: {reason}" for reason in host_restrictions(options, world)]
    if not is_lora and world > 1 and not steps_on_device(options.optimizer):
        rule = f"which {flag_of(options.optimizer)} cannot shard; adam and adamw without such a flag can"
        stays += [f"; what every GPU has: all weights and their state, {rule}"]
    fix = ", or ".join([first, *[f"give {' or '.join(ways)}"] * bool(ways), "free memory"])
    return f"{fix}; --dry_run names the smallest change that fits{''.join(stays)}"


def buckets_of(tensors: Tensors) -> list[Bucket]:
    """Returns the sorted buckets of the training samples."""
    return sorted({sample.bucket for sample in tensors.index.samples})


def host_restrictions(options: TrainOptions, world: int) -> Iterator[str]:
    """Yields each reason, other than flags of the plan, why weights and optimizer state must stay on the device."""
    yield from host_state_problems(options.optimizer, deepspeed=False, name="masters and moments")
    if world > 1 and not isinstance(options, LoraOptions):
        yield "weights can be trained on the host only with a single GPU"


def axes_of(options: TrainOptions, world: int) -> Axes:
    """Returns the values that the flags leave open for each axis of the plan."""
    flags, axes = wanted_places(options), plan.PRESETS[options.plan.plan]
    given = {"weights": flags.weights_on, "keep": flags.keep, "kept": flags.kept_on, "state": flags.optimizer_state_on}
    if list(host_state_problems(options.optimizer, deepspeed=False)):
        axes = replace(axes, state=(plan.DEVICE,))
    if not isinstance(options, LoraOptions) and any(host_restrictions(options, world)):
        axes = replace(axes, weights=(plan.DEVICE,))  # weights can only be trained on the host if state can be there
    axes = replace(axes, **{name: (value,) for name, value in given.items() if value != "auto"})
    if options.train.gradient_checkpointing and flags.keep == "auto":
        axes = replace(axes, keep=tuple(level for level in axes.keep if level in ("input", "attention")))
    return axes


def quantization_report(transformer: Any, precision: str, device: torch.device, backend: str) -> str:
    """Describes how much a quantized base changes LoRA gradients in the first, middle and last block with a LoRA."""
    trained = [
        block for block in transformer.transformer_blocks if any(map(active_lora, lora_target_layers(block).values()))
    ]
    sample = {id(trained[i]): trained[i] for i in (0, len(trained) // 2, -1)}.values()
    cosine = min(gradient_cosine(block, precision, device, backend) for block in sample)
    exact = str(trained[0].norm1.linear.weight.dtype).removeprefix("torch.")
    low = f"; this is low (below {LOW_COSINE}): the LoRA adapts to the quantized base; int8 is closer to the original"
    blocks = plural(len(sample), "sample block")
    text = f"base in {precision}: gradients of {blocks}: cosine {cosine:.4f} to those in {exact}"
    return text if cosine >= LOW_COSINE else text + low


def sizes_of(
    transformer: Any,
    geometry: Geometry,
    buckets: list[Bucket],
    samples: int,
    dtype: torch.dtype,
    precision: str = AUTO,
) -> Sizes:
    """Returns the sizes of a run, without optimizer state, averages and gradient accumulation.

    Args:
        transformer: The transformer with its adapters, on any device.
        geometry: The model's sizes.
        buckets: The buckets of the training samples. The one with the most tokens counts.
        samples: The number of samples in a micro-batch.
        dtype: The compute type.
        precision: The precision of frozen matrices, one of quant.KINDS, or AUTO.
    """
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
        lengths=len(set(map(geometry.tokens, buckets))),
        width=blocks[0].attn1.inner_dim,
        heads=blocks[0].attn1.heads,
        matrix_bytes=unquantized_matrix_bytes(blocks[0]) if precision != AUTO else 0,
        units_kept=tuple(map(max, zip(*kept, strict=True))),
        block_trained=block_trained,
    )


# -- the machine -------------------------------------------------------------------------------------------------------


def measure_machine(
    device: torch.device, dtype: torch.dtype, backend: str, sizes: Sizes, budget: float | None
) -> Machine:
    """Measures free memory, and rates by probes that take about two seconds in all; a CPU gets nominal rates.

    Args:
        device: The device of this process.
        dtype: The compute type.
        backend: The attention backend.
        sizes: The sizes of the run. Probes use the shapes of one sample.
        budget: The value of --vram_budget in GiB, or None.
    """
    # All processes of this host measure before any of them pins memory, so each may use an equal share.
    host = free_host_bytes() // local_processes()
    fits = free_device_bytes(device) if device.type == "cuda" else float(host)
    if budget is not None and device.type != "cuda":
        fits = min(fits, allowed_bytes(budget))
    machine = Machine(int(fits * plan.FRAGMENTS), host)
    return with_rates(machine, device, dtype, backend, sizes) if device.type == "cuda" else machine


def host_share(gib: float) -> int:
    """Returns the bytes of this process's share of host memory that all processes of this host use together."""
    return int(gib * plan.GIB) // local_processes()


def measure_all_ranks(run: Run, backend: str, sizes: Sizes, flags: PlanFlags) -> Machine:
    """Measures the device of each process and returns the minimum over all processes, and of what the flags allow.

    Raises:
        torch.OutOfMemoryError: On every process, if one device has no room even for the probes.
    """
    # Processes on one host share its memory and its bus, so all of them must measure at the same time.
    run.barrier()
    own: Machine | str
    try:
        own = measure_machine(run.device, run.dtype, backend, sizes, flags.vram_budget)
        if flags.host_memory is not None:
            own = replace(own, host_bytes=min(own.host_bytes, host_share(flags.host_memory)))
    except torch.OutOfMemoryError as error:
        # The error is gathered like a measurement, because the other processes would wait for this one forever.
        own = first_line(error)
    found = run.ranks.gather([own])
    for number, one in enumerate(found):
        if isinstance(one, str):
            raise torch.OutOfMemoryError(f"process {number}: {one}")
    machine = minimum_over_ranks([one for one in found if not isinstance(one, str)])
    if run.ranks.sequence is None or run.device.type != "cuda":
        return machine
    rate = exchange_rate(run.device, run.dtype, sizes, run.ranks.sequence)
    return replace(machine, exchange=min(run.ranks.gather([rate])))


def neighbors_of(ranks: Ranks) -> Neighbors | None:
    """Returns the ranks of this machine.

    None on all ranks, if one of them is alone on its machine, or if the ranks of a machine do not follow each other.

    The ranks are asked, because a launcher may give each of them one GPU and LOCAL_RANK=0.
    """
    machines = ranks.gather([machine_id()])
    runs = [len(list(group)) for _, group in groupby(machines)]
    if 1 in runs or len(runs) > len(set(machines)):
        return None
    own = machines[ranks.process_index]
    return Neighbors(machines.index(own), machines.count(own), ranks.process_index, ranks.gather)


def minimum_over_ranks(machines: list[Machine]) -> Machine:
    """Returns the minimum of each figure, so that all ranks choose the same plan and it fits on each of them."""
    return Machine(*map(min, zip(*map(astuple, machines), strict=True)))


def allowed_bytes(budget: float) -> float:
    """Returns the bytes that tensors may take on a card of ``budget`` GiB."""
    return budget * plan.GIB - plan.CONTEXT


def apply_vram_budget(run: Run, options: TrainOptions) -> None:
    """Limits all later allocations to --vram_budget, as a card of that size would; also those of T5 and validation."""
    budget = options.plan.vram_budget
    if budget is not None and run.device.type == "cuda":
        limit_device_memory(budget)


def limit_device_memory(budget: float) -> None:
    """Limits the memory that this process may allocate on the current GPU to that of a card of ``budget`` GiB."""
    total = torch.cuda.mem_get_info()[1]
    torch.cuda.set_per_process_memory_fraction(min(1.0, allowed_bytes(budget) / total))


# -- setting up --------------------------------------------------------------------------------------------------------


def apply_plan(transformer: Any, chosen: Plan, device: torch.device, run: Run | None = None) -> TrainedBlocks | None:
    """Moves the transformer from the CPU to where the plan wants it, and makes it run under the plan.

    Args:
        transformer: The transformer, on the CPU.
        chosen: The plan.
        device: Where the transformer computes.
        run: The run, whose processes on one machine share the frozen weights of streamed blocks.

    Returns:
        The blocks of which all weights are trained, or None if the plan does not place them.
    """
    group = run.ranks.sequence if run is not None else None
    if isinstance(chosen, ExecutionPlan) and chosen.deepspeed:
        ModuleStack(transformer.to(device), chosen, device, group)
        return None
    if isinstance(chosen, ExecutionPlan) and chosen.sharded:
        ShardedStack(transformer, chosen, device, sharding_mesh(device, chosen.shards), fsdp_offloads(), group)
        return None
    if isinstance(chosen, ExecutionPlan):
        neighbors = neighbors_of(run.ranks) if run is not None else None
        stack = Stack(transformer, chosen, device, neighbors, group)
        stack.install()
        if run is not None and neighbors is not None and stack.ring and not stack.trains_all:
            number, copied = neighbors.number, sum(host.numel() for host in stack.ring.hosts.values())
            more = copied * (number - 1) / number / plan.GIB
            run.say(SHARED.format(number) if stack.shares else NOT_SHARED.format(number, more))
        return stack.trained_blocks
    transformer.to(device)
    if chosen.recompute:
        transformer.enable_gradient_checkpointing()
    if chosen.compiled:
        for block in transformer.transformer_blocks:
            compile_block(block)
    return None


def compile_block(block: Any) -> None:
    """Compiles the forward pass of a diffusers block in place; one graph serves all blocks of a shape."""
    block.compile(dynamic=False)
    block._compiled_call_impl = allowing_graphs(block._compiled_call_impl)


def measured_line(step_seconds: float) -> str:
    """Returns a line with the measured step time and memory peaks, to compare with the plan's prediction."""
    return with_peaks(f"measured: {step_seconds:.2f} s a step")
