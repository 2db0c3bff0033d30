"""Combines groups of flags into the options of each script, and derives values from them.

The options of a script are a dataclass with one field per group of flags.py. ``SCRIPTS`` has those of the scripts that
may be given each other's flags. ``derive`` fills in the values that follow from other flags. The functions below it
compute what several modules need to know about options, such as whether clips are read. This module needs only the
standard library.
"""

import dataclasses
import os
import re
import typing
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from cogvideox.config.flags import (
    NAMED_CLASS,
    SIZES,
    TENSOR_FOLDER,
    CaptionFlags,
    DataFlags,
    DoctorFlags,
    DryRunFlags,
    EncodeFlags,
    FirstFrameFlags,
    FolderFlags,
    FullFlags,
    GuideFlags,
    HubFlags,
    IdleFlags,
    ImageFlags,
    LoaderFlags,
    LoraFlags,
    LoraPlanFlags,
    LossFlags,
    ModelFlags,
    OptimizerFlags,
    OptionalModelFlags,
    PlanFlags,
    PrepareFlags,
    PresetFlags,
    SceneFlags,
    ScriptFlags,
    TrainFlags,
    ValidationFlags,
)


@dataclass(frozen=True)
class PrepareOptions:
    """The options of prepare_dataset.py."""

    model: ModelFlags
    data: DataFlags
    encode: EncodeFlags
    first_frames: FirstFrameFlags
    prepare: PrepareFlags
    script: ScriptFlags


@dataclass(frozen=True)
class SceneOptions:
    """The options of split_scenes.py."""

    data: FolderFlags
    scenes: SceneFlags
    script: ScriptFlags


@dataclass(frozen=True)
class CaptionOptions:
    """The options of caption_dataset.py."""

    model: ModelFlags
    data: FolderFlags
    caption: CaptionFlags
    script: ScriptFlags


@dataclass(frozen=True)
class DoctorOptions:
    """The options of doctor.py."""

    model: OptionalModelFlags
    doctor: DoctorFlags
    script: ScriptFlags


@dataclass(frozen=True)
class TrainOptions:
    """The options that all training scripts share; ``task`` and ``method`` have the names of the CogVideo guide."""

    task = "t2v"
    method = "lora"

    model: ModelFlags
    guide: GuideFlags
    data: DataFlags
    loader: LoaderFlags
    encode: EncodeFlags
    train: TrainFlags
    forecast: DryRunFlags
    loss: LossFlags
    optimizer: OptimizerFlags
    plan: PlanFlags
    validation: ValidationFlags
    hub: HubFlags
    idle: IdleFlags
    script: ScriptFlags


@dataclass(frozen=True)
class LoraOptions(TrainOptions):
    """The options of the LoRA scripts."""

    preset: PresetFlags
    lora: LoraFlags
    plan: LoraPlanFlags


@dataclass(frozen=True)
class SftOptions(TrainOptions):
    """The options of the scripts that train all weights."""

    method = "sft"

    full: FullFlags


@dataclass(frozen=True)
class ImageLoraOptions(LoraOptions):
    """The options of the LoRA script for image-to-video."""

    task = "i2v"

    first_frames: FirstFrameFlags
    image: ImageFlags


@dataclass(frozen=True)
class ImageSftOptions(SftOptions):
    """The options of the script that trains all weights for image-to-video."""

    task = "i2v"

    first_frames: FirstFrameFlags
    image: ImageFlags


SCRIPTS: dict[str, type] = {
    "prepare_dataset.py": PrepareOptions,
    "cogvideox_text_to_video_lora.py": LoraOptions,
    "cogvideox_text_to_video_sft.py": SftOptions,
    "cogvideox_image_to_video_lora.py": ImageLoraOptions,
    "cogvideox_image_to_video_sft.py": ImageSftOptions,
}
SampleOptions = PrepareOptions | TrainOptions  # of the scripts that encode clips or train on them
ImageOptions = ImageLoraOptions | ImageSftOptions
ScriptOptions = SampleOptions | SceneOptions | CaptionOptions | DoctorOptions
Options = TypeVar("Options", bound=ScriptOptions)


Fields = tuple[tuple[str, "dataclasses.Field[Any]", Any], ...]
FIELDS: dict[type, Fields] = {}  # the results of fields_of: resolving types takes longer than the rest of parsing


def fields_of(options_type: type) -> Fields:
    """Returns (group name, field, type of its value) for every flag of a script."""
    if options_type not in FIELDS:
        groups = typing.get_type_hints(options_type).items()
        types = {of: typing.get_type_hints(of) for _, of in groups}
        fields = ((name, of, item) for name, of in groups for item in dataclasses.fields(of))
        FIELDS[options_type] = tuple((name, item, types[of][item.name]) for name, of, item in fields)
    return FIELDS[options_type]


def names_of(item: "dataclasses.Field[Any]") -> tuple[str, ...]:
    """Returns all names of a flag: its own, then its aliases."""
    return (item.name, *item.metadata["aliases"])


def given_flags(sources: dict[str, str]) -> set[str]:
    """Returns the names of the flags that the command line has; ``sources`` says where each value comes from."""
    return {name for name, source in sources.items() if source.startswith("given")}


def derive(options: Options, sources: dict[str, str]) -> Options:
    """Returns the options with the values that follow from other flags filled in. Reads no file.

    Args:
        options: The options as given, with defaults.
        sources: Where each value comes from, by flag; the origin of each derived value is set to "derived".
    """
    if isinstance(options, CaptionOptions | DoctorOptions):
        return options
    if isinstance(options, SceneOptions):
        if options.scenes.table is not None:
            return options
        sources["table"] = "derived"
        scenes = dataclasses.replace(options.scenes, table=default_table(options.data.data_root[0]))
        return dataclasses.replace(options, scenes=scenes)
    data: DataFlags = options.data
    found: dict[str, dict[str, Any]] = {"data": {}}
    if data.num_augmentations is None:
        found["data"]["num_augmentations"] = 2 if data.random_flip else 1
    if data.max_num_frames is None:
        found["data"]["max_num_frames"] = max((frames for frames, _, _ in resolutions(data)), default=49)
    if isinstance(options, TrainOptions):
        given = given_flags(sources)
        if not options.train.output_dir:
            task = "i2v-" if options.task == "i2v" else ""
            found["train"] = {"output_dir": f"cogvideox-{task}{options.method}"}
        found["optimizer"] = dict.fromkeys(left_to_library(options.optimizer, given))
        if options.loader.tensor_cache is None and not options.loader.load_tensors:
            found["loader"] = {"tensor_cache": str(Path(data.data_root[0]) / TENSOR_FOLDER)}
    return with_values(options, found, sources)


def derive_video_size(options: Options, sources: dict[str, str]) -> Options:
    """Returns the options with the size of validation videos filled in, which follows from the buckets.

    This is separate from ``derive`` because --load_tensors replaces the buckets by those of the preparation first.

    Args:
        options: The options with buckets that are final.
        sources: Where each value comes from, by flag; the origin of each derived value is set to "derived".
    """
    if not isinstance(options, TrainOptions):
        return options
    wanted = dict(zip(("validation_frames", "height", "width"), longest_bucket(options.data), strict=True))
    missing = {name: value for name, value in wanted.items() if getattr(options.validation, name) is None}
    return with_values(options, {"validation": missing}, sources)


def longest_bucket(data: DataFlags) -> tuple[int, int, int]:
    """Returns (frames, height, width) of the longest bucket, the first of several; 480x720 if no sizes are chosen."""
    listed = resolutions(data)
    most = data.max_num_frames or max((frames for frames, _, _ in listed), default=49)
    # The lists are empty if the folder of --load_tensors does not record them.
    height = 480 if data.height_buckets in (SIZES, None, ()) else data.height_buckets[0]
    width = 720 if data.width_buckets in (SIZES, None, ()) else data.width_buckets[0]
    usual = (max((count for count in data.frame_buckets or () if count <= most), default=49), height, width)
    return max((bucket for bucket in listed if bucket[0] <= most), key=lambda bucket: bucket[0], default=usual)


def with_values(options: Options, found: dict[str, dict[str, Any]], sources: dict[str, str]) -> Options:
    """Returns the options with derived values, which are given by group and flag, and marks them in the sources."""
    for values in found.values():
        sources.update(dict.fromkeys(values, "derived"))
    groups = {name: dataclasses.replace(getattr(options, name), **values) for name, values in found.items()}
    return dataclasses.replace(options, **groups)


def default_table(root: str) -> str:
    """Returns the default of --table: ROOT-scenes.csv, next to the folder."""
    root = os.path.normpath(root)
    return f"{root if os.path.basename(root) not in ('', '.', '..') else os.path.abspath(root)}-scenes.csv"


def left_to_library(flags: OptimizerFlags, given: set[str]) -> Iterator[str]:
    """Yields the flags whose defaults are not meant for this optimizer, so that the defaults of its library hold."""
    if flags.kind == NAMED_CLASS:
        yield from {"beta1", "beta2", "weight_decay", "epsilon"} - given
    elif flags.kind == "came":
        yield from {"epsilon"} - given


def resolution(text: str) -> tuple[int, int, int] | None:
    """Returns (frames, height, width) of a text such as 49x480x720, or None if it does not have that form."""
    match = re.fullmatch(r"(\d+)x(\d+)x(\d+)", text.lower())
    return (int(match[1]), int(match[2]), int(match[3])) if match else None


def resolutions(data: DataFlags) -> list[tuple[int, int, int]]:
    """Returns the well-formed values of --train_resolution as (frames, height, width)."""
    return [numbers for text in data.train_resolution if (numbers := resolution(text))]


def frame_counts(data: DataFlags) -> Sequence[int]:
    """Returns the number of frames of each bucket that the flags list; none if a prepared folder records none."""
    return [frames for frames, _, _ in resolutions(data)] or data.frame_buckets or ()


def image_flags(options: SampleOptions) -> ImageFlags | None:
    """Returns the flags of an image-to-video script, or None for other scripts."""
    flags: ImageFlags | None = getattr(options, "image", None)
    return flags


def noise_variants(options: TrainOptions) -> int:
    """Returns how many encodings of each first frame a script trains on; 0 if it uses no first frames."""
    flags: FirstFrameFlags | None = getattr(options, "first_frames", None)
    return flags.num_image_noise_variants if flags is not None else 0


def ignores_positions(options: SampleOptions) -> bool:
    """Returns whether a model is trained without its learned position embeddings."""
    flags = image_flags(options)
    return flags is not None and flags.ignore_learned_positional_embeddings


def separated(text: str | None, separator: str) -> list[str]:
    """Returns the parts of a value of --validation_prompt or --validation_images, without empty ones."""
    return [part.strip() for part in (text or "").split(separator) if part.strip()]


def is_url(text: str) -> bool:
    """Returns whether the text is the URL of an image to download."""
    return text.startswith(("http://", "https://"))


def reads_clips(options: SampleOptions) -> bool:
    """Returns whether a script opens media files, which it does not with --load_tensors."""
    return not isinstance(options, TrainOptions) or not options.loader.load_tensors


def tensor_folder(options: SampleOptions) -> Path:
    """Returns the folder into which a script that reads clips prepares them."""
    return Path(options.prepare.output_dir if isinstance(options, PrepareOptions) else str(options.loader.tensor_cache))


def needs_captions(options: SampleOptions) -> bool:
    """Returns whether captions are used, which they are not when prepare_dataset.py only inspects a data set."""
    return not isinstance(options, PrepareOptions) or not (options.prepare.dry_run or options.prepare.suggest_buckets)


def target_pattern(target_modules: Sequence[str]) -> str | None:
    """Returns the regular expression in --target_modules, or None if the flag lists names."""
    plain = len(target_modules) != 1 or re.fullmatch(r"[\w.]+", target_modules[0])
    return None if plain else target_modules[0]


def precision_of(flag: str | None) -> str:
    """Returns the value of --mixed_precision, else the setting of `accelerate launch`, else "no"."""
    return flag or os.environ.get("ACCELERATE_MIXED_PRECISION", "no")


def wanted_places(options: TrainOptions) -> PlanFlags:
    """Returns the flags of the plan, with what --use_cpu_offload_optimizer and --offload_gradients mean for them."""
    flags, plan = options.optimizer, options.plan
    if flags.use_cpu_offload_optimizer:
        plan = dataclasses.replace(plan, optimizer_state_on="host")
    if flags.offload_gradients and not isinstance(options, LoraOptions):
        plan = dataclasses.replace(plan, weights_on="host")
    return plan


def asked_of_plan(options: TrainOptions) -> list[str]:
    """Returns the flags that only a plan can follow, as they are typed."""
    offloads = options.optimizer.offload_gradients and not isinstance(options, LoraOptions)
    # To a dry run, --host_memory only describes the machine.
    flags = dataclasses.replace(options.plan, host_memory=None) if options.forecast.dry_run else options.plan
    return [*flags.asked, *["--offload_gradients"] * offloads]


def trains_on_host(options: TrainOptions) -> bool:
    """Returns whether the plan asks for block weights that are stored and trained in host memory."""
    flags = wanted_places(options)
    wanted = flags.weights_on == "host" or (flags.plan == "lean" and flags.weights_on == "auto")
    return wanted and not isinstance(options, LoraOptions)


def host_flags(options: TrainOptions) -> list[str]:
    """Returns the flags that put weights or optimizer state on the host, as they are typed."""
    plan = options.plan
    given = {"--plan lean": plan.plan == "lean", "--weights_on host": plan.weights_on == "host"}
    given["--optimizer_state_on host"] = plan.optimizer_state_on == "host"
    return [name for name, is_given in given.items() if is_given]


def held_out_flags(options: TrainOptions) -> list[str]:
    """Returns the flags that need a held-out loss, as they are typed."""
    train = options.train
    given = {"--keep_best": train.keep_best, f"--stop_when_worse {train.stop_when_worse}": train.stop_when_worse}
    return [name for name, value in given.items() if value]


def samples_per_step(options: TrainOptions, world: int) -> int:
    """Returns the global batch size: samples per optimizer step over all processes and micro-batches."""
    groups = world // options.plan.sequence_parallel  # each of them trains on samples of its own
    return options.train.train_batch_size * options.train.gradient_accumulation_steps * groups


def launched_processes() -> int:
    """Returns the number of processes of this run, as the launcher reports it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def local_processes() -> int:
    """Returns the number of processes of this run on this machine, as the launcher reports it.

    Not every launcher does. Connected processes then count themselves (``count_here`` in runtime/ranks.py). Until
    then, all of them count as being on this machine.
    """
    return int(os.environ.get("LOCAL_WORLD_SIZE", launched_processes()))


def asked_for_cpu() -> bool:
    """Returns whether the configuration of accelerate is for CPUs."""
    return os.environ.get("ACCELERATE_USE_CPU", "").lower() == "true"


def dynamo_backend() -> str:
    """Returns what accelerate's configuration wants blocks to be compiled with, or "no"."""
    return os.environ.get("ACCELERATE_DYNAMO_BACKEND", "no").lower()


def under_deepspeed() -> bool:
    """Returns whether the configuration of accelerate selects DeepSpeed."""
    return os.environ.get("ACCELERATE_USE_DEEPSPEED", "").lower() == "true"


def under_fsdp() -> bool:
    """Returns whether the configuration of accelerate selects FSDP."""
    return os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true"


def fsdp_setting(name: str, default: str = "false") -> str:
    """Returns a setting of accelerate's fsdp_config, such as "offload_params", in lower case."""
    return os.environ.get(f"FSDP_{name.upper()}", default).lower()


def fsdp_offloads() -> bool:
    """Returns whether accelerate's configuration keeps sharded weights and optimizer state in host memory."""
    return under_fsdp() and fsdp_setting("offload_params") == "true"


def parallelism_size(name: str) -> int:
    """Returns a size of accelerate's parallelism_config, such as "dp_replicate"; 1, as there, if it is not given."""
    return int(os.environ.get(f"PARALLELISM_CONFIG_{name.upper()}_SIZE", "1"))


def copies_and_shards(world: int) -> tuple[int, int]:
    """Returns (copies of the model, processes over which each copy is sharded) of accelerate's parallelism_config.

    Without dp_shard_size, each copy is sharded over all processes that it has.
    """
    copies, shards = parallelism_size("dp_replicate"), parallelism_size("dp_shard")
    return copies, shards if shards > 1 else world // copies


def tracker_names(report_to: str | None) -> list[str]:
    """Returns the trackers that --report_to selects, without wandb if WANDB_DISABLED is set."""
    names = {None: [], "none": [], "all": ["tensorboard", "wandb"]}.get(report_to, [str(report_to)])
    disabled = os.environ.get("WANDB_DISABLED", "").lower() in ("true", "1", "yes", "on")
    return [name for name in names if not (name == "wandb" and disabled)]
