"""Predicts whether a run fits, and its hours and disk space, for --dry_run. Nothing is encoded, loaded or trained.

    options, configs of the model --> transformer without weights --> Sizes   --.
    --gpu: a row of cards.py, or probes of this machine's GPU     --> Machine ---+--> choose --> ExecutionPlan
    headers of the clips, or index.json                           --> samples --> optimizer steps

``dry_run`` prints the report. If no plan fits, it tries changes from the cheapest to the most expensive, and names the
first one with which the run fits. All figures come from execution.choose and the plan that it returns, so that they are
the ones that the run itself prints.
"""

import dataclasses
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import lru_cache
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from cogvideox import stopping
from cogvideox.config.buckets import Bucket
from cogvideox.config.cards import BOTH_WAYS, CARDS
from cogvideox.config.conflicts import check_launcher
from cogvideox.config.flags import PLACES_OF_STATE, TENSOR_FOLDER, TENSOR_INDEX, ModelFlags
from cogvideox.config.geometry import Geometry, read_config, read_geometry
from cogvideox.config.lora_file import check_lora
from cogvideox.config.options import (
    LoraOptions,
    TrainOptions,
    dynamo_backend,
    ignores_positions,
    image_flags,
    launched_processes,
    local_processes,
    noise_variants,
    precision_of,
    samples_per_step,
    tensor_folder,
    under_deepspeed,
)
from cogvideox.config.prepared_flags import is_factory_layout
from cogvideox.data.cache import CacheIndex, open_index
from cogvideox.data.sampler import Order
from cogvideox.errors import UsageError, plural
from cogvideox.files import nearest_folder
from cogvideox.host_memory import free_host_bytes
from cogvideox.model.attention import FLASH_4, choose_backend, is_installed
from cogvideox.model.methods import Method, trainable
from cogvideox.model.models import DTYPES, has_weights, ignore_learned_positions, on_this_machine, stored_dtype
from cogvideox.model.tasks import Task
from cogvideox.optimizer.schedule import warm_up_note
from cogvideox.planning.execution import (
    allowed_bytes,
    base_precision,
    choose,
    compiles,
    drops_out,
    host_share,
    limit_device_memory,
    mean_seconds,
    measure_machine,
    no_plan_reason,
    shards_of,
    sizes_from_options,
)
from cogvideox.planning.plan import FRAGMENTS, GIB, ExecutionPlan, Machine, NoPlanError, Sizes
from cogvideox.preparation.encoding import Encoders
from cogvideox.preparation.prepare import Preparation
from cogvideox.preparation.report import duration, failures_explained, left_to_encode
from cogvideox.preparation.tensors import check_index, check_suitable
from cogvideox.runtime.checkpoint_files import checkpoints
from cogvideox.runtime.disk_room import checkpoint_bytes, new_at_once, result_bytes
from cogvideox.runtime.ranks import alone
from cogvideox.runtime.resume import (
    StartPoint,
    check_length,
    check_recipe,
    check_same_samples,
    expected_start,
    recipe_of,
)
from cogvideox.runtime.run import PRECISIONS, content_problem

STORED = "bf16"  # the precision of encoders that are not here; those of published models take as much
PLAN_FLAGS = ("plan", "weights_on", "keep", "kept_on", "optimizer_state_on")
LOW_RANK = 16
HOST_GIB = (8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256)  # free host memory that is tried
SHORTER = (33, 17, 9)  # frames of clips that are tried in place of longer ones


@dataclass(frozen=True)
class Samples:
    """Lists the training samples of a run, and the bytes of the tensors that it encodes first.

    Attributes:
        unchecked: Lines about what the run will check and the prediction could not.
    """

    ids: list[str]
    buckets: list[Bucket]
    encoded_bytes: int
    unchecked: tuple[str, ...] = ()


@dataclass(frozen=True)
class PlannedRun:
    """Describes what a run is predicted for. It has the attributes of ``execution.Target``.

    Attributes:
        stored: The type of the model's weights in their files.
    """

    geometry: Geometry
    method: type[Method]
    device: torch.device
    dtype: torch.dtype
    world: int
    compiled: bool
    stored: torch.dtype = torch.bfloat16
    steps: int = 0
    start: StartPoint = field(default_factory=StartPoint)

    @property
    def left(self) -> int:
        """Returns the number of steps that are not done yet."""
        return self.steps - self.start.step


# A change of flags: what to give, the changed options, and the buckets of the changed data.
Change = tuple[str, TrainOptions, list[Bucket]]
KindOfChange = Callable[[TrainOptions, list[Bucket]], Iterator[Change]]


def dry_run(options: TrainOptions, task: type[Task], method: type[Method]) -> int:
    """Prints what a run would need, from the main process only.

    Args:
        options: The flags of the script.
        task: The class of the task, TextToVideo or ImageToVideo.
        method: The class of the method, Lora or FullFinetune.

    Returns:
        The exit status: 0, or 1 if the run does not fit.

    Raises:
        UsageError: There is no GPU and none was named, the data or the output folder cannot be used, the run has passed
            its last step, or its checkpoint was made with other settings or data.
    """
    if not stopping.speaks():
        return 0
    if options.forecast.gpu is None and not torch.cuda.is_available():
        raise UsageError("--dry_run: this machine has no GPU; name a card, such as --gpu rtx4090")
    geometry = read_geometry(options.model)
    compiled = dynamo_backend() != "no"
    dtype = PRECISIONS[precision_of(options.train.mixed_precision)]
    stored = stored_type(options, geometry)
    run = PlannedRun(geometry, method, torch.device("cuda"), dtype, launched_processes(), compiled, stored)
    if problem := content_problem(options.train):
        raise UsageError(problem)
    start = expected_start(options.train)
    unchecked = list(settings_unchecked(start, options, geometry, task, method))
    samples = promised_samples(options, geometry, start)
    order = Order(samples.ids, samples.buckets, samples_per_step(options, run.world), options.data.seed)
    steps = order.total_steps(options.train.max_train_steps, options.train.num_train_epochs)
    check_length(start, steps, options.train)
    lines, fits = report(replace(run, steps=steps, start=start), options, samples)
    print("\n".join([*lines, *unchecked, *samples.unchecked]))
    return 0 if fits else 1


def stored_type(options: TrainOptions, geometry: Geometry) -> torch.dtype:
    """Returns the type of the model's weights in their files, or that of the published model if they are not here."""
    here = on_this_machine(options.model)
    if has_weights(here, "transformer"):
        return DTYPES[stored_dtype(here, "transformer")]
    return torch.bfloat16 if geometry.rotary else torch.float16  # only 2b has no rotary positions


def settings_unchecked(
    start: StartPoint, options: TrainOptions, geometry: Geometry, task: type[Task], method: type[Method]
) -> Iterator[str]:
    """Checks that a checkpoint was made with the settings of a run; yields a line if that needs weights not here.

    Raises:
        UsageError: It was made with others.
    """
    if start.folder is None:
        return
    here = on_this_machine(options.model)
    if has_weights(here, "transformer"):
        check_recipe(start, recipe_of(replace(options, model=here), geometry, task, method), options)
    else:
        yield unchecked_line(f"{start.folder.name} was made with these settings", options, ["transformer"])


def unchecked_line(what: str, options: TrainOptions, parts: list[str]) -> str:
    """Returns a line about a check of the run for which the weights of parts of the model are missing."""
    name = options.model.pretrained_model_name_or_path
    return f"not checked: whether {what}; {name} has no {' and '.join(parts)} here"


def report(run: PlannedRun, options: TrainOptions, samples: Samples) -> tuple[list[str], bool]:
    """Returns the lines of the report, and whether the run fits into memory and on the disk."""
    buckets = sorted(set(samples.buckets))
    counts = ", ".join(f"{number} of {bucket}" for bucket, number in sorted(Counter(samples.buckets).items()))
    number = samples_per_step(options, run.world)
    lines = [f"data: {counts}", f"steps: {run.steps} of {plural(number, 'sample')}"]
    if run.start.folder is not None:
        lines[-1] += f"; {run.start.step} are done, in {run.start.folder.name}"
    if line := warm_up_note(options.optimizer, run.steps, number):
        lines.append(line)
    transformer = expected_transformer(run, options)
    if reason := no_plan_reason(run, options, transformer):
        disks, enough = disk_lines(options, samples, run, transformer)
        return [*lines, f"memory and time are not predicted: {reason}", *disks], enough
    sizes = sizes_from_options(run, options, run.geometry, buckets, transformer)
    machine, backend, name = machine_for(run, options, sizes)
    lines.insert(0, f"{name}; {machine.host_bytes / GIB:.1f} GiB of free host memory for each process")
    try:
        plan = plan_for(run, options, buckets, machine, backend)
    except NoPlanError as error:
        lines += [f"does not fit: {error}", *ways_out(run, options, buckets, machine, backend)]
        return [*lines, *disk_lines(options, samples, run, transformer)[0]], False
    lines.append(f"plan: {plan}")
    plan = replace(plan, seconds=mean_seconds(plan, sizes, machine, run.geometry, Counter(samples.buckets)))
    disks, enough = disk_lines(options, samples, run, transformer, plan)
    average = " on average" * (sizes.lengths > 1)
    return [*lines, *plan_lines(plan, machine, run, average), *disks], enough


def plan_lines(plan: ExecutionPlan, machine: Machine, run: PlannedRun, average: str) -> list[str]:
    """Returns the lines about memory and time under a plan that fits."""
    total = f"{duration(run.left * plan.seconds + plan.compilation)} for {plural(run.left, 'step')}"
    host = f"{plan.pinned / GIB:.1f} of {machine.host_bytes / GIB:.1f} GiB for each process"
    return [
        f"GPU memory (predicted): {plan.peak / GIB:.2f} of {machine.device_bytes / GIB:.2f} GiB that can be filled",
        f"pinned host memory (predicted): {host}",
        f"time (predicted): {plan.seconds:.2f} s a step{average}, {total}, without encoding and validation videos",
    ]


# -- the data ----------------------------------------------------------------------------------------------------------


def promised_samples(options: TrainOptions, geometry: Geometry, start: StartPoint) -> Samples:
    """Returns the training samples: those of a prepared folder, or those that the headers of the clips promise.

    Raises:
        UsageError: The folder has no index, or does not suit the flags, the model or the checkpoint; or too many clips
            are unusable.
    """
    root = Path(options.data.data_root[0])
    if options.loader.load_tensors:
        folder = Path(options.loader.tensor_cache or root / TENSOR_FOLDER) if is_factory_layout(root) else root
        if folder != root and not (folder / TENSOR_INDEX).is_file():
            rule = "a folder of the CogVideoX factory has no index until a run has converted it"
            raise UsageError(f"--dry_run: {rule}; start the run once, or give the clips without --load_tensors")
        index = open_index(folder)
        # A run converts a folder of the factory again, so this index may not be the one that it trains on.
        unchecked = tuple(encoders_unchecked(index, geometry, options)) if folder == root else ()
        check_suitable(index, geometry, options)
        if folder == root:
            used = index if image_flags(options) is not None else index.without_images()
            check_same_samples(start, used, options)
        return Samples([s.id for s in index.samples], [s.bucket for s in index.samples], 0, unchecked)
    where, variants = (tensor_folder(options), alone("cuda")), noise_variants(options)
    here = on_this_machine(options.model)
    preparation = Preparation(here, options.data, options.encode, geometry, *where, variants)
    records = preparation.plan()
    with failures_explained(preparation, tqdm.write):
        preparation.check(records)
    if absent := absent_encoders(here):  # so nothing has been encoded
        dtype = options.encode.dtype or STORED
        encoders = Encoders("", "", dtype, dtype, options.encode.encode_tiling, geometry.max_text_seq_length)
    else:
        encoders = preparation.encoders
    index, unchecked = preparation.index_of(records, encoders), ()
    if not absent:
        check_same_samples(start, index, options)
    elif start.folder is not None:
        unchecked = (unchecked_line(f"{start.folder.name} was made with these clips", options, absent),)
    encoded_bytes = left_to_encode(preparation, records, encoders)[-1]
    return Samples([s.id for s in index.samples], [s.bucket for s in index.samples], encoded_bytes, unchecked)


def absent_encoders(model: ModelFlags) -> list[str]:
    """Returns the encoders of which weights are missing in the folder of a model, or else the tokenizer if it is."""
    absent = [part for part in ("vae", "text_encoder") if not has_weights(model, part)]
    has_tokenizer = Path(model.pretrained_model_name_or_path, "tokenizer").is_dir()
    return absent or ([] if has_tokenizer else ["tokenizer"])


def encoders_unchecked(index: CacheIndex, geometry: Geometry, options: TrainOptions) -> Iterator[str]:
    """Checks that a prepared folder was made with the model's encoders; yields a line if their weights are not here.

    Raises:
        UsageError: The folder was made with others.
    """
    here = on_this_machine(options.model)
    if absent := absent_encoders(here):
        yield unchecked_line("this model encoded the tensors", options, absent)
    else:
        encoders = Encoders.of(here, options.encode, geometry, torch.device("cpu"))
        check_index(index, encoders, Path(options.data.data_root[0]))


def disk_lines(
    options: TrainOptions, samples: Samples, run: PlannedRun, transformer: Any, plan: ExecutionPlan | None = None
) -> tuple[list[str], bool]:
    """Returns a line about each disk, and whether all have enough space: for tensors, checkpoints and the result.

    Args:
        options: The flags of the script.
        samples: The training samples.
        run: What is predicted.
        transformer: The transformer, without weights.
        plan: The plan of the run; None if it has none.
    """
    train = options.train
    there, seconds = len(checkpoints(Path(train.output_dir))), plan.seconds if plan is not None else 0.0
    kept = new_at_once(train, run.start.step, run.steps, there, seconds)
    sharded = plan.sharded if plan is not None else shards_of(options, run.world) > 1
    refers = not (isinstance(options, LoraOptions) or options.loss.use_ema or sharded or under_deepspeed())
    trained = sum(parameter.numel() for parameter in trainable(transformer).values())
    one = checkpoint_bytes(options, trained, run.dtype, torch.device("cpu"), refers)
    result, encoded = result_bytes(options, trained, run.dtype), samples.encoded_bytes
    written = {f"{plural(kept, 'checkpoint')} of {one / GIB:.2f}": kept * one, f"result {result / GIB:.2f}": result}
    tensors = {f"tensors {encoded / GIB:.2f}": encoded}
    output = nearest_folder(Path(train.output_dir).absolute())
    cache = nearest_folder(tensor_folder(options).absolute()) if encoded else output
    fix = "give --checkpoints_total_limit, or free space"
    if cache.stat().st_dev == output.stat().st_dev:
        found = [disk_line(output, tensors | written, fix)]
    else:
        found = [
            disk_line(cache, tensors, "give another --tensor_cache, or free space"),
            disk_line(output, written, fix),
        ]
    return [line for line, _ in found], all(enough for _, enough in found)


def disk_line(folder: Path, written: dict[str, int], fix: str) -> tuple[str, bool]:
    """Returns the line about the disk of a folder, and whether it has enough space for bytes by their description."""
    needed, free = sum(written.values()), shutil.disk_usage(folder).free
    line = f"disk: {needed / GIB:.2f} GiB ({', '.join(written)}); {free / GIB:.1f} GiB are free in {folder}"
    return (line, True) if needed < free else (f"{line}: {fix}", False)


# -- the plan ----------------------------------------------------------------------------------------------------------


def expected_transformer(run: PlannedRun, options: TrainOptions) -> Any:
    """Returns the transformer with its adapters on the meta device, made from its config; no weights are read.

    It is made once for all changes of batches and of plans, because it takes longer than a prediction.
    """
    shaping = replace(options, train=type(options.train)(), plan=type(options.plan)())
    return _expected_transformer(run.method, run.dtype, shaping)


@lru_cache(maxsize=2)
def _expected_transformer(method: type[Method], dtype: torch.dtype, options: TrainOptions) -> Any:
    """Makes the transformer from options whose flags of batches and plans have their defaults."""
    from diffusers import CogVideoXTransformer3DModel

    with torch.device("meta"):
        transformer = CogVideoXTransformer3DModel.from_config(read_config(options.model, "transformer", "config.json"))
        if ignores_positions(options):
            ignore_learned_positions(transformer)
        # Loading converts what the files have. Other buffers, such as the positions of 2b in fp64, keep their type.
        stored = {name: tensor.to(dtype) for name, tensor in transformer.state_dict().items()}
        transformer.load_state_dict(stored, assign=True)
        transformer.requires_grad_(False)
        if isinstance(options, LoraOptions):  # the values of its matrices do not matter
            options = replace(options, lora=replace(options.lora, lora_path=None))
        return method(transformer, options).transformer


def plan_for(
    run: PlannedRun, options: TrainOptions, buckets: list[Bucket], machine: Machine, backend: str
) -> ExecutionPlan:
    """Returns the plan that the run will choose on a machine.

    Raises:
        NoPlanError: No allowed plan fits.
    """
    transformer = expected_transformer(run, options)
    sizes = replace(sizes_from_options(run, options, run.geometry, buckets, transformer), steps=run.steps)
    compiled = compiles(run, options.plan.compile_blocks, drops_out(options))
    # A run measures free memory after it has loaded the weights. If these are converted, they are no pages of a file.
    loaded = sum(p.nbytes for p in transformer.parameters()) if run.dtype != run.stored else 0
    machine = replace(machine, host_bytes=max(0, machine.host_bytes - loaded))
    chosen = choose(run, options, sizes, machine, compiled, backend)
    return replace(chosen, base_precision=base_precision(options))


def machine_for(run: PlannedRun, options: TrainOptions, sizes: Sizes) -> tuple[Machine, str, str]:
    """Returns the machine of --gpu, or else of the GPU here, with its attention backend and its description."""
    name, budget, wanted = options.forecast.gpu, options.plan.vram_budget, options.plan.attention_backend
    if name is not None:
        machine, backend = machine_of_card(options, name)
        described = f"{name}, {CARDS[name].gib:g} GiB; the rates are those of a table of cards, not measured here"
    else:
        if budget is not None:
            limit_device_memory(budget)
        try:
            backend, _ = choose_backend(run.device, run.dtype, wanted)
        except ValueError as error:
            raise UsageError(f"--attention_backend {wanted}: {error}") from None
        machine = measure_machine(run.device, run.dtype, backend, sizes, budget)
        described = f"{torch.cuda.get_device_name(run.device)}; rates and free memory were measured here"
        described += ", but NVLink between the GPUs is assumed" * (run.world > 1)
    if options.plan.host_memory is not None:
        machine = replace(machine, host_bytes=host_share(options.plan.host_memory))
    return machine, backend, described


def machine_of_card(options: TrainOptions, name: str) -> tuple[Machine, str]:
    """Returns a machine with a card of the table, this machine's host memory, and the attention backend of the run.

    Raises:
        UsageError: The table has no rate of the backend that the flags name.
    """
    card, wanted, budget = CARDS[name], options.plan.attention_backend, options.plan.vram_budget
    known = [backend for backend in card.attention if backend == wanted]
    if wanted == "auto":
        known = [backend for backend in card.attention if backend != FLASH_4 or is_installed("flash_attn", "cute")]
    if not known:
        rule = f"its rate on {name} is not known; known are {', '.join(card.attention)}"
        raise UsageError(f"--attention_backend {wanted}: {rule}; give one of them, or leave the flag out")
    gib = card.gib if budget is None else min(card.gib, budget)
    rates = card.matmul, *card.attention[known[0]], card.memory, card.copies, BOTH_WAYS * card.copies, card.exchange
    return Machine(int(FRAGMENTS * allowed_bytes(gib)), free_host_bytes() // local_processes(), *rates), known[0]


# -- what would make it fit --------------------------------------------------------------------------------------------


def ways_out(
    run: PlannedRun, options: TrainOptions, buckets: list[Bucket], machine: Machine, backend: str
) -> Iterator[str]:
    """Yields the cheapest change of flags with which the run fits, and the smallest hardware on which it does."""

    def plan_if_it_fits(options: TrainOptions, buckets: list[Bucket], machine: Machine) -> ExecutionPlan | None:
        with suppress(NoPlanError, UsageError):  # nf4 does not suit every model
            return plan_for(run, options, buckets, machine, backend)
        return None

    resizable = ignores_positions(options) or not run.geometry.learned_positions
    every = CHANGES if run.start.folder is None else EXACT_CHANGES  # the other settings are those of the checkpoint
    kinds = [kind for kind in every if resizable or kind is not shorter_clips]
    for text, changed, left in changes(options, buckets, kinds):
        if plan := plan_if_it_fits(changed, left, machine):
            yield f"cheapest change: {text}: {plan.peak / GIB:.2f} GiB, {plan.seconds:.2f} s a step (predicted)"
            break
    else:
        fix = "; give a smaller bucket" if shorter_clips in kinds else ""
        yield f"no change of flags was found with which it fits{fix}"
    for gib in HOST_GIB:
        more = replace(machine, host_bytes=gib * GIB)
        if more.host_bytes > machine.host_bytes and plan_if_it_fits(options, buckets, more):
            yield f"or {gib} GiB of free host memory for each process"
            break
    for name, card in sorted(CARDS.items(), key=lambda item: item[1].gib):
        larger = replace(machine, device_bytes=int(FRAGMENTS * allowed_bytes(card.gib)))
        if larger.device_bytes > machine.device_bytes and plan_if_it_fits(options, buckets, larger):
            budget = f"--vram_budget {card.gib:g}, on " if options.plan.vram_budget else ""
            yield f"or {budget}a card of {card.gib:g} GiB, such as {name}"
            break


def changes(options: TrainOptions, buckets: list[Bucket], kinds: Sequence[KindOfChange]) -> Iterator[Change]:
    """Yields changes from the cheapest to the most expensive: each alone, then each added to the ones before it."""
    for kind in kinds:
        yield from accepted(kind(options, buckets))
    texts: list[str] = []
    for kind in kinds:
        found = list(accepted(kind(options, buckets)))
        for text, changed, left in found:
            if texts:
                yield ", ".join([*texts, text]), changed, left
        if found:
            text, options, buckets = found[-1]
            texts.append(text)


def accepted(found: Iterator[Change]) -> Iterator[Change]:
    """Yields those changes that suit the launcher and the LoRA from which training starts."""
    return (change for change in found if not any(chain(check_lora(change[1]), check_launcher(change[1]))))


def without_plan_flags(options: TrainOptions, buckets: list[Bucket]) -> Iterator[Change]:
    """Yields the options without flags that force a plan; any plan computes the same gradients."""
    forced = [name for name in PLAN_FLAGS if getattr(options.plan, name) != "auto"]
    forced += ["compile_blocks"] * (options.plan.compile_blocks == "no")  # uncompiled blocks need more memory
    offloads = [name for name in PLACES_OF_STATE if getattr(options.optimizer, name)]
    if forced or offloads:
        automatic: dict[str, Any] = dict.fromkeys(forced, "auto")
        here: dict[str, Any] = dict.fromkeys(offloads, False)
        plan, optimizer = replace(options.plan, **automatic), replace(options.optimizer, **here)
        names = " ".join(f"--{name}" for name in [*forced, *offloads])
        yield f"leave out {names}", replace(options, plan=plan, optimizer=optimizer), buckets


def smaller_batches(options: TrainOptions, buckets: list[Bucket]) -> Iterator[Change]:
    """Yields smaller micro-batches that are accumulated to the same global batch, so that the result is the same."""
    train = options.train
    for size in range(train.train_batch_size - 1, 0, -1):
        if train.train_batch_size % size == 0:
            passes = train.gradient_accumulation_steps * train.train_batch_size // size
            text = f"--train_batch_size {size} --gradient_accumulation_steps {passes}"
            changed = replace(train, train_batch_size=size, gradient_accumulation_steps=passes)
            yield text, replace(options, train=changed), buckets


def quantized_bases(options: TrainOptions, buckets: list[Bucket]) -> Iterator[Change]:
    """Yields a base of fewer bits, which changes gradients a little."""
    if isinstance(options, LoraOptions) and options.plan.base_precision == "auto":
        for precision in ("int8", "nf4"):
            changed = replace(options, plan=replace(options.plan, base_precision=precision))
            yield f"--base_precision {precision}", changed, buckets


def lower_ranks(options: TrainOptions, buckets: list[Bucket]) -> Iterator[Change]:
    """Yields a LoRA of low rank, which learns less."""
    if isinstance(options, LoraOptions) and options.lora.rank > LOW_RANK:
        alpha = options.lora.lora_alpha * LOW_RANK / options.lora.rank
        changed = replace(options, lora=replace(options.lora, rank=LOW_RANK, lora_alpha=alpha))
        yield f"--rank {LOW_RANK} --lora_alpha {alpha:g}", changed, buckets


def shorter_clips(options: TrainOptions, buckets: list[Bucket]) -> Iterator[Change]:
    """Yields buckets with fewer frames, so that the model sees less of the motion."""
    for frames in SHORTER:
        if frames < max(bucket.frames for bucket in buckets):
            shorter = sorted({dataclasses.replace(bucket, frames=min(frames, bucket.frames)) for bucket in buckets})
            again = "clips prepared again with " if options.loader.load_tensors else ""
            yield f"{again}--train_resolution {' '.join(map(str, shorter))}", options, shorter


EXACT_CHANGES: tuple[KindOfChange, ...] = (without_plan_flags, smaller_batches)  # with the same result
CHANGES: tuple[KindOfChange, ...] = (*EXACT_CHANGES, quantized_bases, lower_ranks, shorter_clips)
