"""Defines every command-line flag once: its type, default, limits and help line.

Each group of flags is a frozen dataclass, named after what the flags are about. The name of a field is the name of the
flag; its ``aliases`` are the names that other CogVideoX trainers use. options.py lists the groups that each script
accepts, and ``MAIN_FLAGS`` the flags that --help shows. This module needs only the standard library.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from cogvideox.config.cards import CARDS

TENSOR_FOLDER = "cogvideox_tensors"  # default of --tensor_cache, inside the data root
TENSOR_INDEX = "index.json"  # name of the list of samples in a folder of tensors
# The default heights and widths of buckets.
SIZES = (256, 320, 384, 480, 512, 576, 720, 768, 960, 1024, 1280, 1536)
SCHEDULES = ("constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial")
POLYNOMIAL_END = 1e-7  # learning rate at the end of the polynomial schedule
MODEL_NAMES = (
    "cogvideox-t2v",
    "cogvideox-i2v",
    "cogvideox1.5-t2v",
    "cogvideox1.5-i2v",
)  # values of --model_name in the CogVideo guide
ADAMS = ("adam", "adamw")  # the optimizers whose moments may have few bits or be in host memory
OPTIMIZERS = (*ADAMS, "prodigy", "came")
NAMED_CLASS = "a class by its dotted name"  # in messages, and as the kind of such an optimizer
WITH_SNR_GAMMA = ("min_snr", "min_snr_plus_one", "soft_min_snr")  # the weightings that use --snr_gamma
MIXED_PRECISIONS = ("no", "fp16", "bf16")  # the values of --mixed_precision
WEIGHTINGS = ("none", *WITH_SNR_GAMMA, "debiased", "p2")
# The lists of a folder, if no flag names others.
CAPTION_FILES, VIDEO_FILES, IMAGE_FILES = ("prompts.txt", "prompt.txt"), ("videos.txt",), ("images.txt",)
FRAME_SELECTIONS = ("middle", "head", "random", "uniform")
RESHAPE_MODES = ("none", "center", "random")
MEMORY_PLACES = ("auto", "device", "host")  # where a plan may keep weights, activations and optimizer state
CAPTION_PROMPT = (  # default of --caption_prompt
    "These are {frames} frames of a video clip of {seconds} seconds, in order. Describe the clip in one paragraph of "
    "60 to 120 English words: what is seen, how it moves and changes, where it is, the light, the style, the camera. "
    "Write plain sentences in the present tense, begin with the subject, and mention neither frames nor a video."
)
HIDDEN = "(not shown)"  # printed in place of a secret
INFORMATION = "information"  # the heading of the flags that print something and end the script
# What --help shows: the headings and their flags, in the order in which people need them. --help_all adds the others.
MAIN_FLAGS = {
    "model": ("pretrained_model_name_or_path",),
    "data": (
        "data_root",
        "dataset_file",
        "validation_data_root",
        "id_token",
        "train_resolution",
        "video_reshape_mode",
        "load_tensors",
        "dataloader_num_workers",
    ),
    "preparation": ("save_image_latents", "suggest_buckets", "verify", "repair"),
    "scenes": ("table", "detector", "cut_threshold", "min_scene_seconds", "max_scene_seconds", "scene_captions"),
    "captions": ("endpoint", "caption_model", "caption_prompt", "caption_frames", "max_captions", "concurrency"),
    "LoRA": ("preset", "rank", "lora_alpha", "lora_path"),
    "all weights": ("save_pipeline",),
    "length": ("max_train_steps", "num_train_epochs", "train_batch_size", "gradient_accumulation_steps", "seed"),
    "learning rate": ("learning_rate", "lr_scheduler", "lr_warmup_steps", "optimizer"),
    "validation": ("validation_prompt", "validation_images", "validation_steps"),
    "plan": ("mixed_precision", "gradient_checkpointing", "plan", "vram_budget", "base_precision"),
    "output": ("output_dir", "checkpointing_steps", "report_to", "push_to_hub"),
    "checks": ("try_training",),
    INFORMATION: ("dry_run", "print_config"),
}
# Settings on which the state in a checkpoint does not depend, so that a run can be resumed with other values.
CHANGEABLE = (
    *("learning_rate", "scale_lr", "lr_scheduler", "lr_warmup_steps", "lr_num_cycles", "lr_power", "weight_decay"),
    *("max_grad_norm", "caption_dropout", "noised_image_dropout", "lora_dropout", "loss_weighting", "snr_gamma"),
    *("p2_gamma", "p2_k", "min_timestep", "max_timestep", "timestep_sampling", "ema_decay", "samples_per_step", "data"),
)
# Flags of the optimizer that only say where its state is stored, so that they are not part of a run's recipe.
PLACES_OF_STATE = ("use_cpu_offload_optimizer", "offload_gradients")
# Flags of training and validation that may differ between the processes of a run: paths, what only the main process
# reads, and what is compared in another form.
OWN_OF_PROCESS = (
    *("output_dir", "validation_dir", "validation_prompts", "resume_from_checkpoint", "no_resume", "report_to"),
    *("tracker_name", "logging_dir", "nccl_timeout", "mixed_precision"),
)


def flag(
    default: object,
    help: str,
    *,
    aliases: Sequence[str] = (),
    choices: Sequence[str] = (),
    const: str | None = None,
    least: float | None = None,
    most: float | None = None,
    below: float | None = None,
    dotted: bool = False,
    only: Sequence[str] = (),
    secret: bool = False,
    idle: str = "",
    refused: str | None = None,
) -> Any:
    """Returns the dataclass field of one flag.

    Args:
        default: The value when the flag is absent; REQUIRED if the flag must be given.
        help: The help line, a noun phrase or an instruction without a capital letter and a period.
        aliases: Other names of the flag.
        choices: The accepted values; empty if there is no such list.
        const: The value when the flag is given without a value; None if it needs one.
        least: The smallest accepted number.
        most: The largest accepted number.
        below: A number that the value must be less than.
        dotted: Accept the dotted name of a class as well as the ``choices``.
        only: The optimizers that use the flag; empty if all do.
        secret: Never show or write the value.
        idle: Why the flag is ignored; empty if it is not. It is accepted for the commands of other trainers.
        refused: Why another script that is given this flag ends with an error. Without a reason, other scripts only
            report that the flag has no effect. A reason is needed where ignoring the flag would do something else than
            was asked: for flags that choose the starting weights, the input or the destination of the result, or that
            ask for no training at all.
    """
    limits = {"least": least, "most": most, "below": below}
    kinds = {"choices": choices, "const": const, "dotted": dotted, "only": only, "secret": secret}
    metadata = {"help": help, "aliases": aliases, "idle": idle, "refused": refused} | kinds | limits
    return field(default=default, metadata=metadata, repr=not secret)


REQUIRED: Any = dataclasses.MISSING


def idle(default: object, why: str) -> Any:
    """Returns the field of a flag of other trainers that has no effect here, with the reason."""
    return flag(default, why, idle=why)


@dataclass(frozen=True)
class ModelFlags:
    """The model that is trained. Used by config/geometry.py and model/models.py."""

    pretrained_model_name_or_path: str = flag(
        REQUIRED,
        "CogVideoX pipeline: a folder, or a hub id such as THUDM/CogVideoX-5b",
        aliases=("model_path", "model_id"),
    )
    revision: str | None = flag(None, "branch, tag or commit of a hub model")
    variant: str | None = flag(None, "variant of the weight files, such as fp16")
    cache_dir: str | None = flag(None, "folder for files downloaded from the hub")


@dataclass(frozen=True)
class OptionalModelFlags(ModelFlags):
    """The model of doctor.py, which also checks a machine without one."""

    pretrained_model_name_or_path: str = flag(
        "",
        "CogVideoX pipeline whose files are checked: a folder, or a hub id, of which only the configs are read",
        aliases=("model_path", "model_id"),
    )


@dataclass(frozen=True)
class DoctorFlags:
    """The flags of doctor.py alone. Used by planning/doctor.py."""

    output_dir: str = flag(
        ".",
        "folder on the disk whose free space and rates are measured; if it does not exist, the one above it is used",
    )
    try_training: bool = flag(
        False,
        "also train a LoRA for two steps with the training script, on a generated clip; uses the tiny model of the "
        "examples if no model is given",
    )


@dataclass(frozen=True)
class FolderFlags:
    """The folders of clips, and how their files are read. Used by data/forms/ and data/media/."""

    data_root: tuple[str, ...] = flag(
        REQUIRED,
        "folders with the clips, in any form that docs/data.md lists",
        aliases=("instance_data_root",),
    )
    dataset_file: str | None = flag(
        None, "CSV, JSON or JSON Lines file with one row per clip: a name inside each data_root, or a path"
    )
    caption_column: str | None = flag(
        None,
        "file in data_root with one caption per line (default: prompts.txt, else prompt.txt), or the name of the "
        "column with the captions in a table",
    )
    video_column: str | None = flag(
        None,
        "file in data_root with one path per line, relative to data_root (default: videos.txt), or the name of the "
        "column with the paths in a table",
    )
    image_column: str | None = flag(
        None,
        "file in data_root with one path of a first frame per line, for image-to-video (default: images.txt, if "
        "--video_column is not given), or the name of the column with these paths in a table",
    )
    validation_data_root: tuple[str, ...] = flag(
        (), "folders of held-out clips, on which the loss is measured without training on them"
    )
    allow_path: tuple[str, ...] = flag((), "folders outside data_root from which listed files may be read")
    decode_timeout: float = flag(120.0, "seconds after which decoding a clip is abandoned", least=1.0)
    decode_memory: float = flag(4.0, "GiB of memory that decoding one clip may use", least=0.5)


@dataclass(frozen=True)
class DataFlags(FolderFlags):
    """The clips, and how each becomes a tensor. Used by preparation/prepare.py and data/."""

    repeats: tuple[int, ...] = flag(
        (1,), "number of times that each clip occurs in an epoch: one number for all, or one per data_root", least=1
    )
    id_token: str | None = flag(
        None, "trigger word that is put before every caption; prompts that contain it use what was learned"
    )
    train_resolution: tuple[str, ...] = flag(
        (),
        "buckets as FRAMESxHEIGHTxWIDTH, such as 49x480x720; replaces --height_buckets, --width_buckets and "
        "--frame_buckets",
    )
    height_buckets: tuple[int, ...] = flag(SIZES, "heights to train at, in pixels", least=1)
    width_buckets: tuple[int, ...] = flag(SIZES, "widths to train at, in pixels", least=1)
    frame_buckets: tuple[int, ...] = flag(
        (49,), "frame counts to train at, each of the form 4k+1; 1 is for images", least=1
    )
    max_num_frames: int | None = flag(
        None,
        "largest number of frames of a clip; longer frame buckets are ignored (default: 49, or the longest of "
        "--train_resolution)",
        least=1,
    )
    bucket_choice: str = flag(
        "nearest",
        "buckets of a clip: the nearest one, or every one that it fills with a similar aspect ratio",
        choices=("nearest", "every"),
    )
    max_upscale: float = flag(
        1.5, "largest factor by which a clip may be enlarged; clips that need more are not used", least=1.0
    )
    fps: float | None = flag(
        None,
        "frames per second at which clips are sampled (default: that of the model, 8, or 16 for CogVideoX 1.5)",
        aliases=("target_fps",),
        least=0.1,
    )
    frame_selection: str = flag(
        "middle",
        "position of the frames to use: in the middle, at the start (head), at random for each variant, or spread "
        "over the clip (uniform)",
        choices=FRAME_SELECTIONS,
    )
    skip_frames_start: int = flag(0, "source frames to skip at the start of each clip", least=0)
    skip_frames_end: int = flag(0, "source frames to skip at the end of each clip", least=0)
    video_reshape_mode: str = flag(
        "none",
        "how a clip is fitted to its bucket: none stretches it; center and random crop it and keep its aspect ratio",
        choices=RESHAPE_MODES,
    )
    random_flip: float | None = flag(
        None, "probability that a variant of a clip is mirrored", const="0.5", least=0.0, most=1.0
    )
    num_augmentations: int | None = flag(
        None,
        "variants of each clip to cache, of which each epoch uses one (default: 1, or 2 with --random_flip)",
        least=1,
    )
    max_bad_fraction: float = flag(
        0.0,
        "share of clips that may be damaged, too short or too small; if more are, the script exits",
        least=0.0,
        most=1.0,
    )
    video_reader: str = flag("pyav", "decoding library: pyav, which is exact, or decord 0.6, if it is installed")
    dataset_name: str | None = flag(None, "not supported; download a data set of the hub first")
    dataset_config_name: str | None = flag(None, "not supported; see --dataset_name")
    seed: int = flag(42, "seed of all random numbers", least=0)
    dataloader_num_workers: int = flag(
        0,
        "worker processes that load tensors; as many decode clips, or with 0 up to four",
        aliases=("num_workers",),
        least=0,
    )


@dataclass(frozen=True)
class EncodeFlags:
    """How clips and captions are encoded. Used by preparation/prepare.py and model/models.py."""

    dtype: str | None = flag(
        None,
        "precision of the VAE and T5 (default: that of the weight files; fp32 on a CPU)",
        choices=("fp32", "fp16", "bf16"),
    )
    encode_tiling: bool = flag(
        False,
        "encode in tiles, which needs less memory, but gives other latents than those that the model was trained on",
        aliases=("use_tiling",),
    )
    t5_on: str = flag(
        "auto",
        "memory that stores T5's weights: the device, or the host, from which they are streamed through 1.5 GiB of "
        "device memory with the same result; auto is host if the device has no room",
        choices=("auto", "host", "device"),
    )
    max_sequence_length: int | None = flag(
        None, "tokens per caption; must equal the value in the config of the transformer", least=1
    )


@dataclass(frozen=True)
class FirstFrameFlags:
    """How the first frames of clips are encoded, for image-to-video. Used by preparation/prepare.py."""

    num_image_noise_variants: int = flag(
        8, "encodings of each first frame to cache, each with its own noise; each epoch uses one", least=1
    )


@dataclass(frozen=True)
class PrepareFlags:
    """The flags of prepare_dataset.py alone."""

    output_dir: str = flag(REQUIRED, "folder for the tensors; give it to a training script as --data_root")
    save_latents_and_embeddings: bool = flag(
        True, "accepted for old commands; the script always saves them", aliases=("save_tensors",)
    )
    save_image_latents: bool | None = flag(
        None, "encode first frames too, for image-to-video (default: true if the model is an image-to-video model)"
    )
    batch_size: int = flag(1, "captions encoded at once; more than 1 changes the embeddings by rounding", least=1)
    dry_run: bool = flag(
        False,
        "print what would be encoded and what it would cost, and exit; needs no captions",
    )
    suggest_buckets: int | None = flag(
        None,
        "print at most this many buckets that suit the clips, as a value of --train_resolution, and exit; needs no "
        "captions",
        least=1,
        refused="this one would train",
    )
    verify: bool = flag(
        False,
        "check every tensor in output_dir against the data, and exit without encoding anything",
        refused="this one would train",
    )
    repair: bool = flag(
        False,
        "check every tensor in output_dir, and encode again those that are damaged or out of date",
        refused="this one would train",
    )
    nccl_timeout: int = flag(
        600, "seconds after which the script exits if it waits for other processes and none makes progress", least=1
    )
    use_slicing: bool = idle(False, "clips are encoded one at a time")
    pin_memory: bool = idle(False, "no batch waits for a device")
    num_decode_threads: int = idle(0, "--dataloader_num_workers sets how many processes decode")
    num_artifact_workers: int = idle(4, "tensors are written while the next clip is encoded, and clips are not copied")


@dataclass(frozen=True)
class SceneFlags:
    """The flags of split_scenes.py alone. Used by preparation/scenes/splitting.py."""

    table: str | None = flag(
        None,
        "CSV or TSV file to write, or to add new clips to; rows that it has are never changed (default: "
        "DATA_ROOT-scenes.csv, next to the folder)",
    )
    detector: str = flag(
        "adaptive",
        "how cuts are found: adaptive compares the change between two frames with the changes around it, so that fast "
        "movements do not count as cuts; content uses only the change itself",
        choices=("adaptive", "content"),
    )
    cut_threshold: float | None = flag(
        None,
        "change that counts as a cut; lower values find more cuts: for adaptive, a multiple of the changes around it "
        "(default 3); for content, the mean change of hue, saturation and brightness, from 0 to 255 (default 27)",
        least=0.1,
    )
    min_scene_seconds: float = flag(1.0, "leave out scenes that are shorter than this", least=0.0)
    max_scene_seconds: float | None = flag(
        None, "divide longer scenes into equal parts that are not longer than this (default: do not divide)", least=0.1
    )
    scene_captions: str = flag(
        "blank",
        "captions of the scenes of a clip that has a caption: blank, because it describes the whole clip, or repeat",
        choices=("blank", "repeat"),
    )


@dataclass(frozen=True)
class CaptionFlags:
    """The flags of caption_dataset.py alone. Used by preparation/captioning/missing_captions.py."""

    endpoint: str | None = flag(
        None,
        "URL of an OpenAI-compatible server with a vision-language model, such as http://localhost:8000/v1 of vllm "
        "serve; a key is read from the environment variable OPENAI_API_KEY (default: the model runs in this process)",
    )
    caption_model: str | None = flag(
        None,
        "name of the model on the server (default: the only one that the server lists); without --endpoint, a folder "
        "or hub id, such as Qwen/Qwen2.5-VL-3B-Instruct, which transformers runs",
    )
    caption_prompt: str = flag(
        CAPTION_PROMPT,
        "instruction for the model; {frames}, {seconds}, {file} and {folder} are replaced by the number of frames, the "
        "length of the clip, its name, and the name of its folder",
    )
    caption_frames: int = flag(8, "frames of a clip that the model sees, spread over its time", least=1, most=64)
    caption_size: int = flag(512, "pixels of the longer side of these frames; smaller clips are not enlarged", least=32)
    caption_tokens: int = flag(
        256, "most tokens of an answer; one that reaches the limit is cut after its last sentence", least=16
    )
    max_captions: int | None = flag(
        None, "stop after this many captions, to try the instruction on a few clips", least=1
    )
    concurrency: int = flag(
        4, "clips that are described at the same time, by requests to the server or as one batch", least=1, most=256
    )
    request_timeout: float = flag(120.0, "seconds that one request may take", least=1.0)
    request_attempts: int = flag(
        5, "attempts of a request that fails because the server is busy, restarts or cannot be reached", least=1
    )


@dataclass(frozen=True)
class GuideFlags:
    """Flags of the CogVideo guide's single script; they must agree with the script and the model."""

    model_type: str | None = flag(None, "task; must be the one in the name of the script", choices=("t2v", "i2v"))
    training_type: str | None = flag(None, "method; must be the one in the name of the script", choices=("lora", "sft"))
    model_name: str | None = flag(None, "family of the model; must agree with its config", choices=MODEL_NAMES)


@dataclass(frozen=True)
class LoaderFlags:
    """Where the training scripts read tensors, and how these reach the device."""

    load_tensors: bool = flag(
        False,
        "read tensors from data_root, which is then one folder that prepare_dataset.py wrote",
        refused="this one reads clips",
    )
    tensor_cache: str | None = flag(
        None,
        "folder for tensors that a training script makes from clips, or from the .pt files of the CogVideoX factory "
        f"(default: DATA_ROOT/{TENSOR_FOLDER})",
    )
    pin_memory: bool = flag(False, "put batches into page-locked host memory")
    caption_dropout: float = flag(
        0.1, "share of samples trained with the empty caption, for classifier-free guidance", least=0.0, most=1.0
    )


@dataclass(frozen=True)
class ImageFlags:
    """The first frames of videos. Used by the image-to-video scripts."""

    noised_image_dropout: float = flag(
        0.05, "share of samples that are trained without their image", least=0.0, most=1.0
    )
    image_latent_scale: str = flag(
        "auto",
        "scaling of image latents by the scaling factor of the VAE; auto does what the pipeline of the model does",
        choices=("auto", "mul", "div", "none"),
    )
    ignore_learned_positional_embeddings: bool = flag(
        False, "train without the learned position embeddings of CogVideoX-5b-I2V, which fit only one size"
    )
    validation_images: str | None = flag(
        None,
        "first frames of the validation videos, one per prompt: paths or URLs, joined by --validation_prompt_separator",
    )


@dataclass(frozen=True)
class TrainFlags:
    """The length of a run, its checkpoints and its output. Used by loop.py and runtime/."""

    output_dir: str = flag(
        "",
        "folder of the run, for checkpoints, videos, metrics and the result (default: cogvideox-lora, "
        "cogvideox-i2v-sft, ...)",
    )
    mixed_precision: str | None = flag(
        None,
        "compute type of the network: bf16, or fp16 on GPUs older than the RTX 30 series; no is fp32, which is slow "
        "(default: the setting of accelerate, else no)",
        choices=MIXED_PRECISIONS,
    )
    train_batch_size: int = flag(4, "samples per device in one forward pass", aliases=("batch_size",), least=1)
    gradient_accumulation_steps: int = flag(1, "forward passes per optimizer step", least=1)
    num_train_epochs: int = flag(1, "number of passes over the data", aliases=("train_epochs",), least=1)
    max_train_steps: int | None = flag(
        None, "number of optimizer steps; overrides --num_train_epochs", aliases=("train_steps",), least=1
    )
    gradient_checkpointing: bool = flag(
        False,
        "recompute blocks in the backward pass, which is slower but needs far less memory; rarely needed, because a "
        "plan decides what is recomputed; with this flag, it saves at most the input and the attention outputs",
    )
    max_grad_norm: float = flag(
        1.0,
        "largest norm of the gradients; gradients of a larger norm are scaled down to it; 0 turns this off",
        least=0.0,
    )
    checkpointing_steps: int = flag(500, "optimizer steps between checkpoints", least=1)
    save_every_minutes: float | None = flag(
        None, "minutes between checkpoints that are saved in addition to those of --checkpointing_steps", least=0.0
    )
    checkpoints_total_limit: int | None = flag(
        None,
        "number of newest checkpoints to keep; older ones are deleted once a new one is complete",
        aliases=("checkpointing_limit",),
        least=1,
    )
    keep_best: bool = flag(False, "always keep the checkpoint with the lowest held-out loss; best.json names it")
    export_best: bool = flag(False, "export the best checkpoint of --keep_best instead of the last step")
    stop_when_worse: int | None = flag(
        None,
        "end the run when this many measurements of the held-out loss in a row were not better than the best one",
        least=1,
    )
    resume_from_checkpoint: str | None = flag(
        None,
        "checkpoint to resume at every start: a folder, or a name in output_dir (default: the newest, if there is one)",
    )
    no_resume: bool = flag(False, "start from the beginning; output_dir must be empty")
    allow_changed: tuple[str, ...] = flag(
        (),
        "settings that may differ from those of the resumed checkpoint; the step and the position in the schedule "
        "are kept",
        choices=CHANGEABLE,
    )
    allow_tf32: bool = flag(False, "use TF32 for fp32 matrix products on a GPU")
    nccl_timeout: int = flag(
        600,
        "seconds after which a run on several GPUs exits, if one waits for another that long or none makes progress",
        least=1,
    )
    report_to: str | None = flag(
        None,
        "tracker to report to, in addition to metrics.jsonl; all: tensorboard and wandb (default: none)",
        choices=("none", "wandb", "tensorboard", "trackio", "all"),
    )
    tracker_name: str | None = flag(None, "project name in the tracker (default: cogvideox)")
    logging_dir: str = flag("logs", "folder in output_dir for the files of tensorboard")


@dataclass(frozen=True)
class DryRunFlags:
    """Whether a run is only predicted, and for which machine. Used by planning/dry_run.py."""

    dry_run: bool = flag(
        False,
        "print whether the run fits into memory, and its steps, hours and disk space, and exit without encoding or "
        "training; --gpu names a card that this machine does not have",
        refused="this one would do its work",
    )
    gpu: str | None = flag(
        None,
        "card for which --dry_run predicts the run, also on a machine without it (default: the GPU of this machine)",
        choices=tuple(CARDS),
    )


@dataclass(frozen=True)
class LossFlags:
    """The loss, its timesteps, and the average of weights. Used by model/diffusion.py, data/ and optimizer/ema.py."""

    loss_weighting: str = flag(
        "none",
        "weighting of timesteps in the loss; none weights all equally; model/diffusion.py has the formulas",
        choices=WEIGHTINGS,
    )
    snr_gamma: float = flag(
        5.0,
        "signal-to-noise ratio at which the weightings min_snr, min_snr_plus_one and soft_min_snr are capped",
        least=1e-3,
    )
    p2_gamma: float = flag(1.0, "exponent of the weighting p2", least=0.0)
    p2_k: float = flag(1.0, "constant that the weighting p2 adds to the signal-to-noise ratio", least=1e-3)
    min_timestep: int = flag(0, "first timestep to train on; timestep 0 has the least noise", least=0)
    max_timestep: int | None = flag(None, "last timestep to train on (default: the last of the scheduler)", least=0)
    timestep_sampling: str = flag(
        "uniform",
        "sampling of timesteps: uniform draws each independently; stratified spreads those of an optimizer step "
        "evenly over the range",
        choices=("uniform", "stratified"),
    )
    use_ema: bool = flag(
        False, "validate and export an exponential moving average of the trained weights, kept in fp32"
    )
    ema_decay: float = flag(
        0.9999,
        "share of the average that is kept at each step; limited to (1 + n) / (10 + n) after n steps",
        least=0.0,
        below=1.0,
    )


@dataclass(frozen=True)
class PlanFlags:
    """How the transformer blocks are run. Used by planning/execution.py; planning/choice.py chooses what is auto."""

    plan: str = flag(
        "auto",
        "way of running the transformer blocks: auto is the fastest plan that fits into memory; fast keeps weights "
        "and as many activations as fit on the device; balanced saves attention outputs, for 24 GB cards; lean keeps "
        "almost nothing on the device; off runs the modules of diffusers",
        choices=("auto", "fast", "balanced", "lean", "off"),
    )
    vram_budget: float | None = flag(
        None,
        "GiB of GPU memory that the run may use, T5 and validation included; the plan is chosen as for a card of "
        "that size",
        least=1.0,
    )
    host_memory: float | None = flag(
        None,
        "GiB of host memory that all processes of a machine together may plan with, of what is free; --dry_run assumes "
        "that so much is free (default: what is free)",
        least=1.0,
    )
    weights_on: str = flag(
        "auto",
        "memory that stores the weights of blocks: the device, or the host, from which they are streamed",
        choices=MEMORY_PLACES,
    )
    keep: str = flag(
        "auto",
        "activations of a block that are saved for the backward pass: input is only its input; attention adds the "
        "attention outputs; linear adds the outputs of linear layers; all recomputes nothing",
        choices=("auto", "input", "attention", "linear", "all"),
    )
    kept_on: str = flag("auto", "memory that stores the saved activations", choices=MEMORY_PLACES)
    optimizer_state_on: str = flag(
        "auto",
        "memory that stores fp32 master weights and the moments of the optimizer; when all weights are trained, auto "
        "may keep those of some blocks on the device",
        choices=MEMORY_PLACES,
    )
    compile_blocks: str = flag(
        "auto", "compile the blocks with torch.compile; auto means yes on a GPU", choices=("auto", "yes", "no")
    )
    attention_backend: str = flag(
        "auto",
        "attention kernel; auto is the fastest exact one that is available and whose gradients pass a check; sage "
        "(SageAttention 2) is quantized",
        choices=("auto", "flash-4", "cudnn", "flash", "sage", "cpu"),
    )
    sequence_parallel: int = flag(
        1,
        "number of consecutive processes that train on the same samples, each on a part of their tokens; for videos "
        "that are too long, or too slow, on one GPU",
        least=1,
    )

    @property
    def asked(self) -> list[str]:
        """The flags of the plan that were set to a specific value, as they are typed."""
        values = [(item, getattr(self, item.name)) for item in dataclasses.fields(self)]
        return [f"--{item.name} {value}" for item, value in values if value not in (item.default, "off")]


@dataclass(frozen=True)
class LoraPlanFlags(PlanFlags):
    """The plan of the LoRA scripts, in which the weights of the blocks are frozen."""

    base_precision: str = flag(
        "auto",
        "storage type of the frozen matrices during training and validation: auto is the compute type; int8 and fp8 "
        "need half as much memory as bf16; nf4 (QLoRA) needs a third; the cosine similarity to unquantized gradients "
        "is printed; the exported inference.py loads the unquantized base",
        choices=("auto", "int8", "fp8", "nf4"),
    )


@dataclass(frozen=True)
class PresetFlags:
    """The goal of a LoRA, for which config/presets.py sets other flags."""

    preset: str | None = flag(
        None,
        "starting values for what the LoRA should learn: they set the rank, alpha, learning rate, schedule, optimizer, "
        "batch size and number of passes over the data, unless these flags are given; docs/training.md lists them",
        choices=("style", "subject", "motion"),
        refused="its values are for a LoRA; give the flags of this script",
    )


@dataclass(frozen=True)
class LoraFlags:
    """The LoRA. Used by config/lora_file.py, model/lora.py and model/methods.py."""

    rank: int = flag(64, "rank of the LoRA matrices", least=1)
    lora_alpha: float = flag(64.0, "scale of the LoRA: its output is multiplied by lora_alpha / rank", least=0.0)
    target_modules: tuple[str, ...] = flag(
        ("to_q", "to_k", "to_v", "to_out.0"),
        "names of the linear layers that get a LoRA, or one regular expression that matches full names, such as "
        ".*attn1.*",
    )
    use_rslora: bool = flag(
        False, "scale the LoRA by lora_alpha / sqrt(rank), so that a high rank learns as fast as a low one"
    )
    use_dora: bool = flag(
        False, "use DoRA: train the magnitude of the weights of each output channel separately from their direction"
    )
    lora_dropout: float = flag(
        0.0,
        "share of the inputs of a LoRA that are set to zero in training, drawn for each sample",
        least=0.0,
        below=1.0,
    )
    init_lora_weights: str = flag(
        "default",
        "initial LoRA matrices: default, gaussian, pissa (from the largest singular values), or pissa_niter_N (pissa "
        "with N iterations of a faster SVD)",
    )
    lora_path: str | None = flag(
        None,
        "LoRA to start from: a safetensors file, or the folder that contains it; its rank, alpha and layers must "
        "match the flags",
        aliases=("init_lora_from",),
        refused="this one would not start from it",
    )
    fold_lora_scale: bool = flag(
        False,
        "multiply the exported matrices by the scale of the LoRA, for loaders that ignore the metadata of the file; "
        "this rounds, except for a scale that is a power of two, which is always multiplied in",
    )


@dataclass(frozen=True)
class FullFlags:
    """The checkpoints and the export when all weights are trained. Used by runtime/ and export/pipeline_folder.py."""

    checkpoint_weights_only: bool = flag(
        False,
        "save only the weights in checkpoints, rounded to the compute type: with bf16, a sixth of the disk space; a "
        "run that resumes from one has fresh optimizer state, so its result differs from that of an uninterrupted run",
    )
    save_pipeline: bool = flag(
        False,
        "also write output_dir/pipeline, a complete pipeline for from_pretrained, as hard links (or else copies) of "
        "the base model's files and of the trained ones; --push_to_hub does not upload it",
        refused="this one makes no transformer; scripts/merge_lora.py merges a LoRA into one",
    )


@dataclass(frozen=True)
class OptimizerFlags:
    """The optimizer and the learning rate. Used by config/optimizers.py and optimizer/."""

    optimizer: str = flag(
        "adam",
        "optimizer: adam (L2 penalty), adamw (decoupled weight decay), prodigy (finds its step size; use "
        "--learning_rate 1), came, or the dotted name of a class, such as torch.optim.RAdam",
        choices=OPTIMIZERS,
        dotted=True,
    )
    optimizer_args: tuple[str, ...] = flag(
        (),
        "arguments for an optimizer given by its dotted name, as key=value with Python literals, such as momentum=0.9",
        only=(NAMED_CLASS,),
    )
    use_8bit: bool = flag(
        False,
        "store moments in 8 bits, 2 bytes per weight in place of 8; also under every plan and in host memory",
        aliases=("use_8bit_adam",),
        only=ADAMS,
    )
    use_bf16_moments: bool = flag(
        False,
        "store moments in bf16, 4 bytes per weight in place of 8, rounded at random; under every plan",
        only=ADAMS,
    )
    use_stochastic_rounding: bool = flag(
        False,
        "train bf16 weights without master weights: each step is rounded up or down at random; saves 2 bytes per "
        "weight",
        only=ADAMS,
    )
    use_4bit: bool = flag(False, "store moments in 4 bits; needs --use_torchao", only=ADAMS)
    use_fp8: bool = flag(False, "store moments in fp8; needs --use_torchao", only=ADAMS)
    use_torchao: bool = flag(
        False, "take the optimizer for low-bit moments from torchao; its state stays on the device", only=ADAMS
    )
    use_cpu_offload_optimizer: bool = flag(
        False,
        "store the state of the optimizer in host memory, as --optimizer_state_on host does",
    )
    offload_gradients: bool = flag(
        False,
        "send each gradient to host memory at once, as --weights_on host does; with --use_cpu_offload_optimizer, and "
        "if all weights are trained",
    )
    learning_rate: float = flag(1e-4, "peak learning rate", aliases=("lr",), least=0.0)
    scale_lr: bool = flag(False, "multiply the learning rate by the number of samples per optimizer step")
    lr_scheduler: str = flag("constant", "learning rate schedule", choices=SCHEDULES)
    lr_warmup_steps: int = flag(
        500, "optimizer steps of linear warm-up, which every schedule except constant has", least=0
    )
    lr_num_cycles: int = flag(1, "number of cycles of cosine_with_restarts", least=1)
    lr_power: float = flag(1.0, "power of the polynomial schedule", least=0.0)
    beta1: float | None = flag(0.9, "decay of the first moment", aliases=("adam_beta1",), least=0.0, below=1.0)
    beta2: float | None = flag(0.95, "decay of the second moment", aliases=("adam_beta2",), least=0.0, below=1.0)
    beta3: float | None = flag(
        None,
        "decay of prodigy's sums for the step size (default: root of beta2), or of came's instability (default: "
        "0.9999)",
        aliases=("prodigy_beta3",),
        least=0.0,
        below=1.0,
        only=("prodigy", "came"),
    )
    weight_decay: float | None = flag(1e-4, "strength of the weight decay", aliases=("adam_weight_decay",), least=0.0)
    epsilon: float | None = flag(
        1e-8,
        "constant added to the root of the second moment",
        aliases=("adam_epsilon",),
        least=0.0,
        only=(*ADAMS, "prodigy", NAMED_CLASS),
    )
    prodigy_decouple: bool = flag(False, "let prodigy decouple weight decay, as adamw does", only=("prodigy",))
    prodigy_use_bias_correction: bool = flag(False, "let prodigy use the bias correction of Adam", only=("prodigy",))
    prodigy_safeguard_warmup: bool = flag(
        False,
        "let prodigy exclude the learning rate from its estimate of the step size, for warm-up",
        only=("prodigy",),
    )

    @property
    def kind(self) -> str:
        """The name of the optimizer, or NAMED_CLASS if the flag is the dotted name of a class."""
        return NAMED_CLASS if "." in self.optimizer else self.optimizer


@dataclass(frozen=True)
class ValidationFlags:
    """The videos that are made during training. Used by evaluation/validation.py."""

    do_validation: bool | None = flag(None, "make validation videos (default: true if there are prompts)")
    validation_prompt: str | None = flag(
        None, "prompts of the validation videos, joined by --validation_prompt_separator"
    )
    validation_prompt_separator: str = flag(
        ":::", "separator between two prompts", aliases=("validation_prompt_seperator",)
    )
    validation_dir: str | None = flag(None, "folder that contains the file of --validation_prompts")
    validation_prompts: str | None = flag(
        None, "file with one prompt per line: a name inside validation_dir, or a path"
    )
    negative_prompt: str = flag("", "negative prompt of the validation videos")
    num_validation_videos: int = flag(1, "videos per prompt", least=1)
    validation_steps: int | None = flag(
        None,
        "optimizer steps between validations; there is also one before the first step and one after the last",
        least=1,
    )
    validation_epochs: int | None = flag(None, "epochs between validations", least=1)
    num_inference_steps: int = flag(50, "sampling steps of a validation video", least=1)
    guidance_scale: float = flag(6.0, "scale of classifier-free guidance; 1 turns it off", least=0.0)
    use_dynamic_cfg: bool = flag(False, "increase the guidance over the sampling steps")
    height: int | None = flag(
        None, "height of validation videos in pixels (default: the first given height bucket, else 480)", least=1
    )
    width: int | None = flag(
        None, "width of validation videos in pixels (default: the first given width bucket, else 720)", least=1
    )
    validation_frames: int | None = flag(
        None, "frames of validation videos (default: the longest frame bucket in use)", least=1
    )
    validation_fps: float | None = flag(
        None, "frames per second of the video files (default: --fps)", aliases=("gen_fps",), least=0.1
    )
    enable_slicing: bool = flag(False, "decode validation videos one at a time")
    enable_tiling: bool = flag(False, "decode validation videos in tiles, with far less memory")

    @property
    def settled(self) -> bool:
        """Whether the command names prompts for videos, or turns validation videos off."""
        return self.do_validation is False or bool(self.validation_prompt or self.validation_prompts)


@dataclass(frozen=True)
class HubFlags:
    """Where the result is shared. Used by config/hub.py."""

    push_to_hub: bool = flag(
        False,
        "upload the result to the Hugging Face Hub; the repository is created at the start",
        refused="this one uploads nothing",
    )
    hub_token: str | None = flag(
        None,
        "token with write access (default: HF_TOKEN, else that of `hf auth login`; unlike this flag, these do not "
        "appear in the list of processes)",
        secret=True,
    )
    hub_model_id: str | None = flag(None, "name of the repository, or namespace/name (default: the name of output_dir)")
    hub_private: bool = flag(False, "create the repository as private; an existing one is not changed")
    hub_overwrite: bool = flag(
        False, "upload also into a repository with files of something else, and replace those of the same names"
    )


@dataclass(frozen=True)
class IdleFlags:
    """Flags of the training scripts of other trainers, each with the reason why it has no effect here."""

    enable_model_cpu_offload: bool = idle(
        False, "T5 is freed before training, and the VAE is on the device only for validation"
    )
    validation_videos: str | None = idle(None, "sampling is not conditioned on a video")


@dataclass(frozen=True)
class ScriptFlags:
    """The flags that config/args.py handles itself."""

    print_config: bool = flag(False, "print the value of every flag and where it comes from, and exit")
