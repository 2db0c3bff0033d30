"""What a model's config files say: compressions, patch sizes, channels, text length, noise schedule.

config.json of the transformer and the VAE, scheduler_config.json -> Geometry -> every shape that training needs.
Standard library only (huggingface_hub for a hub model), so that wrong sizes end a script before torch is imported.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cogvideox.config.buckets import Bucket, frame_problem, size_problem
from cogvideox.config.flags import FullFlags, ModelFlags
from cogvideox.config.options import LoraOptions, TrainOptions, reads_clips, resolution
from cogvideox.errors import UsageError, first_line
from cogvideox.files import is_lfs_pointer, lfs_rule

INDEX_NAME = "model_index.json"
PARTS = ("scheduler", "text_encoder", "tokenizer", "vae")  # of a pipeline, beside the transformer
SCHEDULERS = ("CogVideoXDDIMScheduler", "CogVideoXDPMScheduler")  # those that the CogVideoX pipelines sample with
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")  # weight files that can run code when they are read

NO_PICKLES = (
    "a file of that kind can run code when it is read, so it is not; load the model with diffusers where you trust it, "
    "and save_pretrained(FOLDER) writes safetensors"
)

# What diffusers takes for an entry that a config does not have: the defaults of the classes themselves.
TRANSFORMER_DEFAULTS: dict[str, Any] = {
    "in_channels": 16,
    "patch_size": 2,
    "patch_size_t": None,
    "sample_height": 60,
    "sample_width": 90,
    "sample_frames": 49,
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
    """The numbers of one CogVideoX. Pixels and frames are of videos; latent sizes are behind the VAE."""

    in_channels: int
    latent_channels: int
    spatial_compression: int
    temporal_compression: int
    patch_size: int
    patch_size_t: int | None
    sample_height: int  # latents
    sample_width: int
    sample_frames: int  # of a video
    attention_head_dim: int
    rotary: bool
    learned_positions: bool  # for sample_frames of sample_height x sample_width alone
    ofs: bool  # whether an offset is embedded beside the timestep
    max_text_seq_length: int
    text_embed_dim: int
    scaling_factor: float
    invert_scale_latents: bool  # image latents are divided by the scaling factor
    default_fps: int
    schedule: dict[str, Any]

    @property
    def image_to_video(self) -> bool:
        """Whether the transformer takes image latents beside those of the video."""
        return self.in_channels == 2 * self.latent_channels

    @property
    def own_bucket(self) -> Bucket:
        """What the transformer was configured for."""
        side = self.spatial_compression
        return Bucket(self.sample_frames, self.sample_height * side, self.sample_width * side)

    @property
    def size_multiple(self) -> int:
        """Height and width of a video are multiples of this."""
        return self.spatial_compression * self.patch_size

    def latent_frames(self, frames: int) -> int:
        """Latent frames that the VAE makes of ``frames`` frames (4k+1 -> k+1, 4k -> k)."""
        return (frames - 1) // self.temporal_compression + 1

    def inference_frames(self, frames: int) -> int:
        """Frames that the pipelines make when asked for ``frames``: the VAE decodes latent frames two by two, and of an
        odd number the first becomes a single frame.
        """
        latents = self.latent_frames(frames)
        return self.temporal_compression * (latents - latents % 2) + latents % 2

    def padding_frames(self, latent_frames: int) -> int:
        """Latent frames to repeat in front, so that patches of patch_size_t frames fit."""
        return -latent_frames % (self.patch_size_t or 1)

    def latent_shape(self, bucket: Bucket) -> tuple[int, int, int, int]:
        """(F, C, H, W) of one clip's latents as the transformer takes them, padding included."""
        frames = self.latent_frames(bucket.frames)
        height, width = bucket.height // self.spatial_compression, bucket.width // self.spatial_compression
        return frames + self.padding_frames(frames), self.latent_channels, height, width

    def moments_shape(self, bucket: Bucket) -> tuple[int, int, int, int]:
        """(2C, F, H, W) of the VAE's posterior of one clip: mean and log variance, without padding."""
        height, width = bucket.height // self.spatial_compression, bucket.width // self.spatial_compression
        return 2 * self.latent_channels, self.latent_frames(bucket.frames), height, width

    def tokens(self, bucket: Bucket) -> int:
        """Tokens of one sample in the transformer, text and video."""
        frames, _, height, width = self.latent_shape(bucket)
        patches = frames // (self.patch_size_t or 1) * (height // self.patch_size) * (width // self.patch_size)
        return self.max_text_seq_length + patches

    def image_shape(self, bucket: Bucket) -> tuple[int, int, int]:
        """(2C, H, W) of the VAE's posterior of one image."""
        channels, _, height, width = self.moments_shape(bucket)
        return channels, height, width

    def has_positions(self, bucket: Bucket) -> bool:
        """Whether learned positions, if any, are for this bucket."""
        return not self.learned_positions or self.moments_shape(bucket) == self.moments_shape(self.own_bucket)

    def problem(self, kind: str, value: int) -> str | None:
        """What is wrong with a number of frames, or a height or width in pixels."""
        if kind == "frames":
            return frame_problem(value, self.temporal_compression)
        largest = {"height": self.sample_height, "width": self.sample_width}[kind] * self.spatial_compression
        if self.rotary and self.patch_size_t and value > largest:
            return f"this model's positions end at {largest}; give less"
        return size_problem(value, self.size_multiple)


def read_geometry(model: ModelFlags) -> Geometry:
    """The geometry of a pipeline folder or hub id.

    Raises:
        UsageError: the model does not exist, is not a CogVideoX, or its transformer has dropout of its own.
    """
    transformer = read_config(model, "transformer", "config.json")
    vae = read_config(model, "vae", "config.json")
    scheduler = read_config(model, "scheduler", "scheduler_config.json")
    name = transformer.get("_class_name")
    if name != "CogVideoXTransformer3DModel":
        raise UsageError(f"{flag_text(model)}: its transformer is a {name}; give a CogVideoX pipeline")
    if transformer.get("dropout"):
        rule = f"has a dropout of {transformer['dropout']:g}, whose masks a resumed run could not draw again"
        raise UsageError(f'{flag_text(model)}: its transformer {rule}; set "dropout" to 0 in transformer/config.json')
    geometry = geometry_of(transformer, vae, scheduler)
    if problems := list(scheduler_problems(geometry.schedule)):
        raise UsageError(problems)
    return geometry


def scheduler_problems(config: dict[str, Any]) -> Iterator[str]:
    """Why a scheduler, or its noise schedule, is none that CogVideoX is sampled with."""
    name = config.get("_class_name")
    if name not in SCHEDULERS:
        yield f"scheduler_config.json: _class_name is {name}; CogVideoX has {' or '.join(SCHEDULERS)}; name one"
    wanted = {"beta_schedule": "scaled_linear", "prediction_type": "v_prediction", "trained_betas": None}
    for entry, value in wanted.items():
        if config[entry] != value:
            rule = f"{entry} is {config[entry]}; CogVideoX has {value}"
            yield f"scheduler_config.json: {rule}; take the file of the published model"


def geometry_of(transformer: dict[str, Any], vae: dict[str, Any], scheduler: dict[str, Any]) -> Geometry:
    """Geometry out of the three config dictionaries; what one does not have is diffusers' default."""
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
        default_fps=16 if transformer["patch_size_t"] else 8,  # the rates that 1.5 and 1.0 were trained at
        schedule=SCHEDULER_DEFAULTS | scheduler,
    )


def read_config(model: ModelFlags, part: str, name: str) -> dict[str, Any]:
    """One json file of the pipeline."""
    folder = Path(model.pretrained_model_name_or_path)
    path = folder / part / name if folder.is_dir() else hub_file(model, f"{part}/{name}")
    return read_object(path, model, f"{part}/{name}")


def read_object(path: Path, model: ModelFlags, name: str) -> dict[str, Any]:
    """A json file of the pipeline, which messages call ``name``."""
    try:
        config: Any = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UsageError(f"{flag_text(model)}: has no {name}; give the folder of a whole pipeline") from None
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{path}: is no JSON ({error}); download the model again") from None
    if not isinstance(config, dict):
        raise UsageError(f"{path}: is not one JSON object; download the model again")
    return config


def read_model_index(model: ModelFlags) -> dict[str, Any]:
    """The pipeline's model_index.json: which classes its parts have."""
    folder = Path(model.pretrained_model_name_or_path)
    path = folder / INDEX_NAME if folder.is_dir() else hub_file(model, INDEX_NAME)
    return read_object(path, model, INDEX_NAME)


def saves_pipeline(options: Any) -> bool:
    """Whether a whole pipeline is to be made."""
    flags: FullFlags | None = getattr(options, "full", None)
    return flags is not None and flags.save_pipeline


def check_pipeline(options: Any) -> Iterator[str]:
    """What --save_pipeline lacks in a base that is a folder, for args.parse; one of the hub has it."""
    if not saves_pipeline(options):
        return
    folder = Path(options.model.pretrained_model_name_or_path)
    read_model_index(options.model)
    missing = [part for part in PARTS if folder.is_dir() and not (folder / part).is_dir()]
    if missing:
        yield f"--save_pipeline: {folder} has no {', '.join(missing)}; give the folder of a whole pipeline"


def hub_file(model: ModelFlags, name: str) -> Path:
    """A file of a hub model, downloaded if need be."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HFValidationError

    repo = model.pretrained_model_name_or_path
    try:
        return Path(hf_hub_download(repo, name, revision=model.revision, cache_dir=model.cache_dir))
    except HFValidationError:
        raise UsageError(f"{flag_text(model)}: no such folder, and no hub id either") from None
    except (OSError, ValueError) as error:  # offline, no such repository, no access
        reason = first_line(error)
        raise UsageError(
            f"{flag_text(model)}: no such folder, and not to be had from the hub ({reason}); "
            f"where there is a network: hf download {repo}"
        ) from None


def flag_text(model: ModelFlags) -> str:
    """The flag as typed, for messages."""
    return f"--pretrained_model_name_or_path {model.pretrained_model_name_or_path}"


def check_text_to_video(options: Any) -> Iterator[str]:
    """Problems of the model and the sizes for a text-to-video script. Reads config files only."""
    geometry = read_geometry(options.model)
    yield from weight_problems(options.model, ("transformer", "vae", "text_encoder"))
    yield from channel_problems(options, geometry, "text-to-video")
    yield from check_sizes(options, geometry)


def check_image_to_video(options: Any) -> Iterator[str]:
    """Problems of the model and the sizes for an image-to-video script. Reads config files only."""
    geometry = read_geometry(options.model)
    yield from weight_problems(options.model, ("transformer", "vae", "text_encoder"))
    yield from channel_problems(options, geometry, "image-to-video")
    yield from check_sizes(options, geometry)
    yield from position_problems(options, geometry)


def check_preparation(options: Any) -> Iterator[str]:
    """Problems of the model and the sizes for prepare_dataset.py, which takes every model. Reads config files only."""
    geometry = read_geometry(options.model)
    yield from weight_problems(options.model, ("vae", "text_encoder"))
    yield from check_sizes(options, geometry)


def weight_problems(model: ModelFlags, parts: Sequence[str]) -> Iterator[str]:
    """Parts of a model folder whose weights are in pickle files only, which are never read."""
    for part in parts:
        folder = Path(model.pretrained_model_name_or_path, part)
        weights = [path for path in folder.glob("*.safetensors") if path.is_file()]
        pointers = [path for path in weights if is_lfs_pointer(path, path.stat().st_size)]
        if pointers:
            yield f"{pointers[0]}: {lfs_rule(folder)}"
        pickles = sorted(path.name for pattern in PICKLES for path in folder.glob(pattern))
        if pickles and not any(folder.glob("*.safetensors")):
            yield f"{folder}: its weights are in {pickles[0]} only; {NO_PICKLES}"


def channel_problems(options: Any, geometry: Geometry, wanted: str) -> Iterator[str]:
    """A model that is for another script."""
    channels = {"text-to-video": geometry.latent_channels, "image-to-video": 2 * geometry.latent_channels}
    if geometry.in_channels == channels[wanted]:
        return
    takes = f"{flag_text(options.model)}: takes {geometry.in_channels} channels"
    (other,) = channels.keys() - {wanted}
    if geometry.in_channels != channels[other]:
        yield f"{takes}, {wanted} has {channels[wanted]}; no script here trains it"
        return
    method = "lora" if isinstance(options, LoraOptions) else "sft"
    script = f"cogvideox_{other.replace('-', '_')}_{method}.py"
    article = "an" if other.startswith("image") else "a"
    yield f"{takes}, so it is {article} {other} model; {wanted} takes {channels[wanted]}; use {script}"


def position_problems(options: Any, geometry: Geometry) -> Iterator[str]:
    """Sizes for which a model has no learned positions."""
    ignored, own = options.image.ignore_learned_positional_embeddings, geometry.own_bucket
    if ignored and not geometry.learned_positions:
        yield "--ignore_learned_positional_embeddings: this model has none; leave the flag out"
    if ignored or not geometry.learned_positions:
        return
    sizes = all_sizes(options, listed_sizes(options) if reads_clips(options) else [])
    wrong: dict[tuple[str, str], list[str]] = {}
    for name, kind, value in sizes:
        if not geometry.has_positions(replace(own, **{kind: value})):
            wrong.setdefault((name, kind), []).append(str(value))
    for (name, kind), values in wrong.items():
        rule = f"this model's learned positions are for {own} alone; nearest: {getattr(own, kind)}"
        yield f"{name} {' '.join(values)}: {rule}, or --ignore_learned_positional_embeddings"


def listed_sizes(options: Any) -> list[tuple[str, str, int]]:
    """(flag, kind, value) of each number of frames or pixels in the flags for buckets."""
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


def all_sizes(options: Any, listed: list[tuple[str, str, int]]) -> list[tuple[str, str, int]]:
    """Listed sizes, then those of validation videos that are not taken over from them."""
    if not isinstance(options, TrainOptions):
        return listed
    known = {(kind, value) for _, kind, value in listed}
    flags = options.validation
    more = [("--height", "height", flags.height), ("--width", "width", flags.width)]
    more += [("--validation_frames", "frames", flags.validation_frames)]
    return listed + [(name, kind, value) for name, kind, value in more if value and (kind, value) not in known]


def check_sizes(options: Any, geometry: Geometry) -> Iterator[str]:
    """Problems of the buckets, the validation size, the text length and the guide's name of the model."""
    if isinstance(options, TrainOptions):
        yield from check_timesteps(options, geometry)
    for name, kind, value in all_sizes(options, listed_sizes(options)):
        problem = geometry.problem(kind, value)
        if problem:
            yield f"{name} {value}: {problem}"
    length = options.encode.max_sequence_length
    if length not in (None, geometry.max_text_seq_length):
        yield (
            f"--max_sequence_length {length}: the transformer's config says {geometry.max_text_seq_length}; "
            "another padding changes every embedding; leave the flag out"
        )
    named, patched = options.guide.model_name if isinstance(options, TrainOptions) else None, geometry.patch_size_t
    if named and named.startswith("cogvideox1.5") != (patched is not None):
        yield f"--model_name {named}: the model's config says {'1.5' if patched else '1.0'}; leave the flag out"


def check_timesteps(options: TrainOptions, geometry: Geometry) -> Iterator[str]:
    """Problems of the range of timesteps: the scheduler's config says how many there are."""
    last = int(geometry.schedule["num_train_timesteps"]) - 1
    for name in ("min_timestep", "max_timestep"):
        value = getattr(options.loss, name)
        if value is not None and value > last:
            yield f"--{name} {value}: the scheduler's last timestep is {last}; nearest: --{name} {last}"
