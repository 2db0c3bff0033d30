"""Reads the config files of a model, and checks sizes and flags against them.

``read_geometry`` combines config.json of the transformer and of the VAE with scheduler_config.json into a Geometry,
which computes every shape that training needs. The check_ functions are the checks for args.parse. This module needs
only the standard library and safetensors (and huggingface_hub for a hub model), so that a script with wrong sizes ends
before torch is imported.
"""

import json
import shlex
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cogvideox.config.buckets import Bucket, frame_problem, size_problem
from cogvideox.config.flags import FullFlags, ModelFlags
from cogvideox.config.hub import REFUSALS, failures, http_status, reason
from cogvideox.config.options import (
    ImageOptions,
    PrepareOptions,
    SampleOptions,
    TrainOptions,
    reads_clips,
    resolution,
)
from cogvideox.errors import UsageError, first_line
from cogvideox.files import FULL, check_readable, disk_errno, disk_error, is_lfs_pointer, lfs_rule

INDEX_NAME = "model_index.json"
PARTS = ("scheduler", "text_encoder", "tokenizer", "vae")  # the parts of a pipeline other than the transformer
SCHEDULERS = ("CogVideoXDDIMScheduler", "CogVideoXDPMScheduler")  # those with which the CogVideoX pipelines sample
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")  # weight files that can run code when they are read

NO_PICKLES = (
    "such a file can run code when it is read, so it is never read; if you trust it, load the model with diffusers, "
    "whose save_pretrained(FOLDER) writes safetensors"
)

# The values that diffusers uses for entries that a config does not have: the defaults of its classes.
TRANSFORMER_DEFAULTS: dict[str, Any] = {
    "in_channels": 16,
    "patch_size": 2,
    "patch_size_t": None,
    "sample_height": 60,
    "sample_width": 90,
    "sample_frames": 49,
    "num_attention_heads": 30,
    "attention_head_dim": 64,
    "use_rotary_positional_embeddings": False,
    "use_learned_positional_embeddings": False,
    "ofs_embed_dim": None,
    "max_text_seq_length": 226,
    "text_embed_dim": 4096,
}
VAE_DEFAULTS: dict[str, Any] = {
    "latent_channels": 16,
    "block_out_channels": (128, 256, 256, 512),
    "temporal_compression_ratio": 4,
    "scaling_factor": 1.15258426,
    "invert_scale_latents": False,
}
SCHEDULER_DEFAULTS: dict[str, Any] = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "trained_betas": None,
    "clip_sample": True,
    "set_alpha_to_one": True,
    "steps_offset": 0,
    "prediction_type": "epsilon",
    "clip_sample_range": 1.0,
    "sample_max_value": 1.0,
    "timestep_spacing": "leading",
    "rescale_betas_zero_snr": False,
    "snr_shift_scale": 3.0,
}


@dataclass(frozen=True)
class Geometry:
    """The numbers in the configs of one CogVideoX model, and the shapes that follow from them.

    Pixels and frames are those of a video; latent sizes are those of the output of the VAE.

    Attributes:
        in_channels: The channels of the input of the transformer.
        latent_channels: The channels of the latents of the VAE.
        spatial_compression: The pixels per latent, in height and width.
        temporal_compression: The frames per latent frame.
        patch_size: The latents per patch, in height and width.
        patch_size_t: The latent frames per patch; None for CogVideoX 1.0, whose patches have no temporal size.
        sample_height: The height for which the transformer was configured, in latents.
        sample_width: The width for which the transformer was configured, in latents.
        sample_frames: The number of frames for which the transformer was configured.
        attention_head_dim: The size of an attention head.
        rotary: Whether positions are encoded by rotary embeddings.
        learned_positions: Whether there are learned position embeddings, which fit only the configured sizes.
        ofs: Whether an offset is embedded as well as the timestep.
        max_text_seq_length: The tokens per caption, padding included.
        text_embed_dim: The size of a text embedding.
        scaling_factor: The factor by which the latents of the VAE are multiplied for the transformer.
        invert_scale_latents: Whether image latents are divided by the scaling factor.
        default_fps: The frames per second of the videos with which the model was trained.
        schedule: The config of the scheduler.
    """

    in_channels: int
    latent_channels: int
    spatial_compression: int
    temporal_compression: int
    patch_size: int
    patch_size_t: int | None
    sample_height: int
    sample_width: int
    sample_frames: int
    attention_head_dim: int
    rotary: bool
    learned_positions: bool
    ofs: bool
    max_text_seq_length: int
    text_embed_dim: int
    scaling_factor: float
    invert_scale_latents: bool
    default_fps: int
    schedule: dict[str, Any]

    @property
    def image_to_video(self) -> bool:
        """Whether the input of the transformer contains image latents as well as those of the video."""
        return self.in_channels == 2 * self.latent_channels

    @property
    def own_bucket(self) -> Bucket:
        """The bucket for which the transformer was configured."""
        side = self.spatial_compression
        return Bucket(self.sample_frames, self.sample_height * side, self.sample_width * side)

    @property
    def size_multiple(self) -> int:
        """The number of pixels of which the height and width of a video must be multiples."""
        return self.spatial_compression * self.patch_size

    def latent_frames(self, frames: int) -> int:
        """Returns the number of latent frames that the VAE makes of ``frames`` frames (4k+1 -> k+1, 4k -> k)."""
        return (frames - 1) // self.temporal_compression + 1

    def inference_frames(self, frames: int) -> int:
        """Returns the number of frames that the pipelines generate when asked for ``frames``.

        The VAE decodes latent frames in pairs; if their number is odd, the first one becomes a single frame.
        """
        latents = self.latent_frames(frames)
        return self.temporal_compression * (latents - latents % 2) + latents % 2

    def padding_frames(self, latent_frames: int) -> int:
        """Returns how many latent frames are added in front, so that patches of patch_size_t frames fit."""
        return -latent_frames % (self.patch_size_t or 1)

    def latent_shape(self, bucket: Bucket) -> tuple[int, int, int, int]:
        """Returns the shape (F, C, H, W) of the latents of one clip in the input of the transformer, with padding."""
        frames = self.latent_frames(bucket.frames)
        height, width = bucket.height // self.spatial_compression, bucket.width // self.spatial_compression
        return frames + self.padding_frames(frames), self.latent_channels, height, width

    def moments_shape(self, bucket: Bucket) -> tuple[int, int, int, int]:
        """Returns the shape (2C, F, H, W) of the posterior of one clip: mean and log variance, without padding."""
        height, width = bucket.height // self.spatial_compression, bucket.width // self.spatial_compression
        return 2 * self.latent_channels, self.latent_frames(bucket.frames), height, width

    def tokens(self, bucket: Bucket) -> int:
        """Returns the number of tokens of one sample in the transformer, of text and video together."""
        frames, _, height, width = self.latent_shape(bucket)
        patches = frames // (self.patch_size_t or 1) * (height // self.patch_size) * (width // self.patch_size)
        return self.max_text_seq_length + patches

    def image_shape(self, bucket: Bucket) -> tuple[int, int, int]:
        """Returns the shape (2C, H, W) of the posterior of one image."""
        channels, _, height, width = self.moments_shape(bucket)
        return channels, height, width

    def has_positions(self, bucket: Bucket) -> bool:
        """Returns whether this bucket suits the learned position embeddings of the model, if it has any."""
        return not self.learned_positions or self.moments_shape(bucket) == self.moments_shape(self.own_bucket)

    def problem(self, kind: str, value: int) -> str | None:
        """Returns why the model cannot be trained with a value, with the nearest valid ones; or None if it can.

        Args:
            kind: One of "frames", "height" and "width".
            value: The number of frames, or of pixels.
        """
        if kind == "frames":
            return frame_problem(value, self.temporal_compression)
        largest = {"height": self.sample_height, "width": self.sample_width}[kind] * self.spatial_compression
        if self.rotary and self.patch_size_t and value > largest:
            return f"this model's positions end at {largest}; nearest: {largest}"
        return size_problem(value, self.size_multiple)


def read_geometry(model: ModelFlags) -> Geometry:
    """Returns the geometry of a model, which is a folder or a hub id.

    Raises:
        UsageError: The model does not exist, is not a CogVideoX model, or its transformer has dropout.
    """
    transformer = read_config(model, "transformer", "config.json")
    vae = read_config(model, "vae", "config.json")
    scheduler = read_config(model, "scheduler", "scheduler_config.json")
    name = transformer.get("_class_name")
    if name != "CogVideoXTransformer3DModel":
        raise UsageError(f"{flag_text(model)}: its transformer is a {name}; give a CogVideoX pipeline")
    if transformer.get("dropout"):
        rule = f"has a dropout of {transformer['dropout']:g}, whose masks a resumed run could not repeat"
        raise UsageError(f'{flag_text(model)}: its transformer {rule}; set "dropout" to 0 in transformer/config.json')
    geometry = geometry_of(transformer, vae, scheduler)
    if problems := list(scheduler_problems(geometry.schedule)):
        raise UsageError(problems)
    return geometry


def scheduler_problems(config: dict[str, Any]) -> Iterator[str]:
    """Yields why a scheduler, or its noise schedule, is not one with which CogVideoX is sampled."""
    name = config.get("_class_name")
    if name not in SCHEDULERS:
        yield f"scheduler_config.json: _class_name is {name}; CogVideoX has {' or '.join(SCHEDULERS)}; give one of them"
    wanted = {"beta_schedule": "scaled_linear", "prediction_type": "v_prediction", "trained_betas": None}
    for entry, value in wanted.items():
        if config[entry] != value:
            rule = f"{entry} is {config[entry]}; CogVideoX has {value}"
            yield f"scheduler_config.json: {rule}; use the file of the published model"


def geometry_of(transformer: dict[str, Any], vae: dict[str, Any], scheduler: dict[str, Any]) -> Geometry:
    """Returns the geometry of three configs. Entries that they do not have get the defaults of diffusers."""
    transformer, vae = TRANSFORMER_DEFAULTS | transformer, VAE_DEFAULTS | vae
    return Geometry(
        in_channels=transformer["in_channels"],
        latent_channels=vae["latent_channels"],
        spatial_compression=2 ** (len(vae["block_out_channels"]) - 1),
        temporal_compression=int(vae["temporal_compression_ratio"]),
        patch_size=transformer["patch_size"],
        patch_size_t=transformer["patch_size_t"],
        sample_height=transformer["sample_height"],
        sample_width=transformer["sample_width"],
        sample_frames=transformer["sample_frames"],
        attention_head_dim=transformer["attention_head_dim"],
        rotary=transformer["use_rotary_positional_embeddings"],
        learned_positions=transformer["use_learned_positional_embeddings"],
        ofs=transformer["ofs_embed_dim"] is not None,
        max_text_seq_length=transformer["max_text_seq_length"],
        text_embed_dim=transformer["text_embed_dim"],
        scaling_factor=vae["scaling_factor"],
        invert_scale_latents=vae["invert_scale_latents"],
        default_fps=16 if transformer["patch_size_t"] else 8,  # the rates of the training of 1.5 and of 1.0
        schedule=SCHEDULER_DEFAULTS | scheduler,
    )


def read_config(model: ModelFlags, part: str, name: str) -> dict[str, Any]:
    """Returns the content of a JSON file in one part of the pipeline, such as config.json of the VAE."""
    folder = Path(model.pretrained_model_name_or_path)
    path = folder / part / name if folder.is_dir() else hub_file(model, f"{part}/{name}")
    return read_object(path, model, f"{part}/{name}")


def read_object(path: Path, model: ModelFlags, name: str) -> dict[str, Any]:
    """Returns the content of a JSON file, which must be one object.

    Args:
        path: The file.
        model: The model that it belongs to.
        name: The path of the file in the pipeline, for messages.

    Raises:
        UsageError: The file does not exist, or is not a JSON object.
    """
    try:
        config: Any = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UsageError(f"{flag_text(model)}: has no {name}; give the folder of a complete pipeline") from None
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{path}: is not valid JSON ({error}); download the model again") from None
    if not isinstance(config, dict):
        raise UsageError(f"{path}: is not one JSON object; download the model again")
    return config


def read_model_index(model: ModelFlags) -> dict[str, Any]:
    """Returns the content of model_index.json, which names the classes of the parts of the pipeline."""
    folder = Path(model.pretrained_model_name_or_path)
    path = folder / INDEX_NAME if folder.is_dir() else hub_file(model, INDEX_NAME)
    return read_object(path, model, INDEX_NAME)


def saves_pipeline(options: TrainOptions) -> bool:
    """Returns whether a complete pipeline is exported, which needs --save_pipeline."""
    flags: FullFlags | None = getattr(options, "full", None)
    return flags is not None and flags.save_pipeline


def check_pipeline(options: TrainOptions) -> Iterator[str]:
    """Yields what the folder of the model lacks for --save_pipeline, for args.parse. A hub model has all parts."""
    if not saves_pipeline(options):
        return
    folder = Path(options.model.pretrained_model_name_or_path)
    read_model_index(options.model)
    missing = [part for part in PARTS if folder.is_dir() and not (folder / part).is_dir()]
    if missing:
        yield f"--save_pipeline: {folder} has no {', '.join(missing)}; give the folder of a complete pipeline"


def check_heads(options: TrainOptions) -> Iterator[str]:
    """Yields a problem if attention has fewer heads than --sequence_parallel has processes, for args.parse."""
    parallel = options.plan.sequence_parallel
    if parallel == 1:
        return
    heads = (TRANSFORMER_DEFAULTS | read_config(options.model, "transformer", "config.json"))["num_attention_heads"]
    if parallel > heads:
        rule = f"each process computes at least one attention head, and the model has {heads}"
        yield f"--sequence_parallel {parallel}: {rule}; nearest: --sequence_parallel {heads}"


def hub_file(model: ModelFlags, name: str) -> Path:
    """Returns the path of a file of a hub model, and downloads it if it is not in the cache.

    Args:
        model: The model, whose name is a hub id.
        name: The path of the file in the repository.

    Raises:
        UsageError: The name is not a valid hub id, or the file cannot be downloaded.
    """
    from huggingface_hub import hf_hub_download

    repo = model.pretrained_model_name_or_path
    with downloading(model):
        return Path(hf_hub_download(repo, name, revision=model.revision, cache_dir=model.cache_dir))


@contextmanager
def downloading(model: ModelFlags) -> Iterator[None]:
    """Turns the failure of a download of a hub model into a UsageError."""
    from huggingface_hub import constants
    from huggingface_hub.errors import HFValidationError

    try:
        yield
    except HFValidationError:
        raise UsageError(f"{flag_text(model)}: no such folder, and not a valid hub id") from None
    except failures() as error:  # offline, a broken connection, no such repository, no access
        number = disk_errno(error)
        if number in FULL or (number is not None and getattr(error, "filename", None)):  # sockets have no file name
            raise disk_error(Path(model.cache_dir or constants.HF_HUB_CACHE), number, None) from None
        login = "check the name, the login (`hf auth login` or HF_TOKEN), and the terms on the page of the model"
        fix = login if http_status(error) in REFUSALS else download_fix(model)
        problem = f"no such folder, and it cannot be downloaded from the hub ({reason(error, None)})"
        raise UsageError(f"{flag_text(model)}: {problem}; {fix}") from None


def download_fix(model: ModelFlags) -> str:
    """Returns, for messages, how to download the files of a hub model that a run needs and does not find."""
    where = {"--revision": model.revision, "--cache-dir": model.cache_dir}
    given = [part for name, value in where.items() if value for part in (name, value)]
    return (
        f"run where there is a network: {shlex.join(['hf', 'download', model.pretrained_model_name_or_path, *given])}"
    )


def flag_text(model: ModelFlags) -> str:
    """Returns the flag of the model with its value, for messages."""
    return f"--pretrained_model_name_or_path {model.pretrained_model_name_or_path}"


def check_model(options: TrainOptions) -> Iterator[str]:
    """Yields problems of the model and the sizes of a training script. Reads config files only."""
    geometry = read_geometry(options.model)
    yield from weight_problems(options.model, ("transformer", "vae", "text_encoder"))
    yield from channel_problems(options, geometry)
    yield from geometry_problems(options, geometry)
    if isinstance(options, ImageOptions):
        yield from position_problems(options, geometry)


def check_preparation(options: PrepareOptions) -> Iterator[str]:
    """Yields problems of the model and the sizes of prepare_dataset.py, which accepts every CogVideoX model."""
    geometry = read_geometry(options.model)
    yield from weight_problems(options.model, ("vae", "text_encoder"))
    yield from geometry_problems(options, geometry)


def weight_problems(model: ModelFlags, parts: Sequence[str]) -> Iterator[str]:
    """Yields weight files of a model folder that are missing, damaged or Git LFS pointers, or are pickle files only."""
    for part in parts:
        folder = Path(model.pretrained_model_name_or_path, part)
        weights = [path for path in folder.glob("*.safetensors") if path.is_file()]
        pointers = [path for path in weights if is_lfs_pointer(path, path.stat().st_size)]
        if pointers:
            yield f"{pointers[0]}: {lfs_rule(folder)}"
        yield from damaged_files([path for path in weights if path not in pointers])
        yield from missing_files(folder)
        pickles = sorted(path.name for pattern in PICKLES for path in folder.glob(pattern))
        if pickles and not any(folder.glob("*.safetensors")):
            yield f"{folder}: its weights are only in {pickles[0]}; {NO_PICKLES}"


def damaged_files(weights: Sequence[Path]) -> Iterator[str]:
    """Yields safetensors files whose header cannot be read, or does not match their size."""
    from safetensors import SafetensorError, safe_open

    for path in weights:
        check_readable(path)
        try:
            with safe_open(path, framework="numpy"):
                pass
        except SafetensorError as error:
            if disk_errno(error) is not None:
                raise
            yield f"{path}: is damaged or incomplete ({first_line(error)}); download this file again"


def missing_files(folder: Path) -> Iterator[str]:
    """Yields indices of weights that are damaged, or name files that do not exist."""
    for index in folder.glob("*.safetensors.index*.json"):
        try:
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (ValueError, KeyError, TypeError, AttributeError):
            yield f"{index}: is damaged; download this file again"
            continue
        missing = [name for name in names if not (folder / name).is_file()]
        if missing:
            yield f"{folder}: {', '.join(missing)} of {len(names)} files missing; download the model again"


def channel_problems(options: TrainOptions, geometry: Geometry) -> Iterator[str]:
    """Yields a problem if a model is for the other task, which the channels of its transformer show."""
    wanted = "image-to-video" if isinstance(options, ImageOptions) else "text-to-video"
    channels = {"text-to-video": geometry.latent_channels, "image-to-video": 2 * geometry.latent_channels}
    if geometry.in_channels == channels[wanted]:
        return
    takes = f"{flag_text(options.model)}: takes {geometry.in_channels} channels"
    (other,) = channels.keys() - {wanted}
    if geometry.in_channels != channels[other]:
        yield f"{takes}, and {wanted} has {channels[wanted]}; no script of this suite trains such a model"
        return
    script = f"cogvideox_{other.replace('-', '_')}_{options.method}.py"
    article = "an" if other.startswith("image") else "a"
    yield f"{takes}, so it is {article} {other} model; {wanted} takes {channels[wanted]} channels; use {script}"


def position_problems(options: ImageOptions, geometry: Geometry) -> Iterator[str]:
    """Yields sizes that the learned position embeddings of a model do not fit."""
    ignored, own = options.image.ignore_learned_positional_embeddings, geometry.own_bucket
    if ignored and not geometry.learned_positions:
        yield "--ignore_learned_positional_embeddings: this model has no such embeddings; leave the flag out"
    if ignored or not geometry.learned_positions:
        return
    sizes = all_sizes(options, listed_sizes(options) if reads_clips(options) else [])
    wrong: dict[tuple[str, str], list[str]] = {}
    for name, kind, value in sizes:
        if not geometry.has_positions(replace(own, **{kind: value})):
            wrong.setdefault((name, kind), []).append(str(value))
    for (name, kind), values in wrong.items():
        rule = f"this model's learned positions are for {own} only; nearest: {getattr(own, kind)}"
        yield f"{name} {' '.join(values)}: {rule}, or --ignore_learned_positional_embeddings"


def listed_sizes(options: SampleOptions) -> list[tuple[str, str, int]]:
    """Returns (flag, kind, value) of each number in the flags that list buckets. The kinds are those of ``problem``."""
    data = options.data
    sizes = [
        (f"--train_resolution {text}: {kind}", kind, value)
        for text in data.train_resolution
        for kind, value in zip(("frames", "height", "width"), resolution(text) or (), strict=False)
    ]
    if not data.train_resolution:
        sizes = [("--frame_buckets", "frames", value) for value in data.frame_buckets]
        sizes += [("--height_buckets", "height", value) for value in data.height_buckets]
        sizes += [("--width_buckets", "width", value) for value in data.width_buckets]
    return sizes


def all_sizes(options: SampleOptions, listed: list[tuple[str, str, int]]) -> list[tuple[str, str, int]]:
    """Returns the listed sizes, followed by those of validation videos that are not among them."""
    if not isinstance(options, TrainOptions):
        return listed
    known = {(kind, value) for _, kind, value in listed}
    flags = options.validation
    more = [("--height", "height", flags.height), ("--width", "width", flags.width)]
    more += [("--validation_frames", "frames", flags.validation_frames)]
    return listed + [(name, kind, value) for name, kind, value in more if value and (kind, value) not in known]


def geometry_problems(options: SampleOptions, geometry: Geometry) -> Iterator[str]:
    """Yields flags that the configs contradict: sizes, timesteps, --max_sequence_length and --model_name."""
    if isinstance(options, TrainOptions):
        yield from timestep_problems(options, geometry)
    for name, kind, value in all_sizes(options, listed_sizes(options)):
        problem = geometry.problem(kind, value)
        if problem:
            yield f"{name} {value}: {problem}"
    length = options.encode.max_sequence_length
    if length not in (None, geometry.max_text_seq_length):
        yield (
            f"--max_sequence_length {length}: the config of the transformer has {geometry.max_text_seq_length}, and "
            "another length changes every embedding; leave the flag out"
        )
    named, patched = options.guide.model_name if isinstance(options, TrainOptions) else None, geometry.patch_size_t
    if named and named.startswith("cogvideox1.5") != (patched is not None):
        yield f"--model_name {named}: by its config the model is {'1.5' if patched else '1.0'}; leave the flag out"


def timestep_problems(options: TrainOptions, geometry: Geometry) -> Iterator[str]:
    """Yields problems of the range of timesteps, whose number is in the config of the scheduler."""
    last = int(geometry.schedule["num_train_timesteps"]) - 1
    for name in ("min_timestep", "max_timestep"):
        value = getattr(options.loss, name)
        if value is not None and value > last:
            yield f"--{name} {value}: the last timestep of the scheduler is {last}; nearest: --{name} {last}"
