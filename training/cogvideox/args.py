"""Every flag once, grouped by who reads it, as frozen dataclasses; ``parse()`` fills them. Standard library only.

Command line -> strings (argparse) -> typed groups -> derived values -> problems, all of them in one message.
A flag's field name is its name; ``aliases`` are the names that other CogVideoX trainers gave it.
"""

import argparse
import dataclasses
import difflib
import errno
import importlib.util
import logging
import math
import os
import re
import sys
import typing
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import NoneType
from typing import Any, TypeVar

from cogvideox.errors import UsageError, one_line

TENSOR_FOLDER = "cogvideox_tensors"  # the default of --tensor_cache, in the data root itself
SIZES = (256, 320, 384, 480, 512, 576, 720, 768, 960, 1024, 1280, 1536)
SCHEDULES = ("constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial")
POLYNOMIAL_END = 1e-7  # learning rate at the end of the polynomial schedule
MODEL_NAMES = ("cogvideox-t2v", "cogvideox-i2v", "cogvideox1.5-t2v", "cogvideox1.5-i2v")  # in the CogVideo guide
ADAMS, RULES = ("adam", "adamw"), ("adam", "adamw", "prodigy", "came")  # of optimizers
NAMED_CLASS = "a class by its dotted name"
LOW_FOR_PRODIGY = 0.1  # learning rate; 1 is meant
LOW_BIT = ("use_8bit", "use_4bit", "use_fp8")
WITH_SNR_GAMMA = ("min_snr", "min_snr_plus_one", "soft_min_snr")
WEIGHTINGS = ("none", *WITH_SNR_GAMMA, "debiased", "p2")
USAGE_EXIT, INTERRUPTED_EXIT = 2, 130
HIDDEN = "(not shown)"  # instead of a secret
# of the file system: the user can mend them
DISK_ERRORS = {
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EROFS,
    errno.EACCES,
    errno.EPERM,
    errno.EEXIST,
    errno.ENOTDIR,
    errno.ENOENT,
}
# loggers that warn, wherever the package is merely installed, of extras that nothing here uses
NOISY = ("bitsandbytes", "torchao", "torch.utils._pytree", "diffusers.quantizers.torchao.torchao_quantizer")


def flag(
    default: Any,
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
    idle: bool = False,
) -> Any:
    """One flag. ``const`` is the value of the bare flag. A number is at least ``least``, at most ``most``, and less
    than ``below``. A ``dotted`` flag takes a dotted name beside its ``choices``. ``only``: the optimizers that have it.
    The value of a ``secret`` is shown and written nowhere. An ``idle`` flag is taken from old commands and does
    nothing; its help says why.
    """
    limits = {"least": least, "most": most, "below": below}
    kinds = {"choices": choices, "const": const, "dotted": dotted, "only": only, "secret": secret, "idle": idle}
    metadata = {"help": help, "aliases": aliases} | kinds | limits
    return field(default=default, metadata=metadata, repr=not secret)


REQUIRED: Any = dataclasses.MISSING


def idle(default: Any, why: str) -> Any:
    """A flag of other trainers that has no effect here."""
    return flag(default, f"has no effect here; {why}", idle=True)


# -- the flags ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ModelFlags:
    """Read by geometry.py and models.py."""

    pretrained_model_name_or_path: str = flag(
        REQUIRED,
        "CogVideoX pipeline: a folder or a hub id such as THUDM/CogVideoX-5b",
        aliases=("model_path", "model_id"),
    )
    revision: str | None = flag(None, "branch, tag or commit of a hub model")
    variant: str | None = flag(None, "variant of the weight files, such as fp16")
    cache_dir: str | None = flag(None, "folder of the hub's downloads")


@dataclass(frozen=True)
class DataFlags:
    """Read by prepare.py: which clips, and how each becomes a tensor."""

    data_root: tuple[str, ...] = flag(
        REQUIRED,
        "folders of the clips, in any of the forms that docs/data.md lists; with --load_tensors one prepared folder",
        aliases=("instance_data_root",),
    )
    dataset_file: str | None = flag(
        None, "CSV, JSON or JSON lines file with a row a clip, in each data_root (or a path); columns name its columns"
    )
    caption_column: str | None = flag(
        None, "file in data_root with one caption a line (prompts.txt, else prompt.txt); of a table, its column"
    )
    video_column: str | None = flag(
        None, "file in data_root with one path a line, relative to data_root (videos.txt); of a table, its column"
    )
    image_column: str | None = flag(
        None, "file in data_root with a first frame a line, for image-to-video (images.txt); of a table, its column"
    )
    repeats: tuple[int, ...] = flag((1,), "how often an epoch has each clip: one number, or one a data_root", least=1)
    validation_data_root: tuple[str, ...] = flag(
        (), "folders of clips to measure the loss on, never trained on; in the same form as data_root"
    )
    id_token: str | None = flag(None, "put before every caption; use it in prompts to call up what was learned")
    allow_path: tuple[str, ...] = flag((), "folders outside data_root in which listed files may lie")
    train_resolution: tuple[str, ...] = flag(
        (), "buckets as FRAMESxHEIGHTxWIDTH, such as 49x480x720; instead of the three lists of buckets"
    )
    height_buckets: tuple[int, ...] = flag(SIZES, "heights in pixels to train at", least=1)
    width_buckets: tuple[int, ...] = flag(SIZES, "widths in pixels to train at", least=1)
    frame_buckets: tuple[int, ...] = flag((49,), "frame counts to train at: 4k+1; 1 takes images", least=1)
    max_num_frames: int | None = flag(
        None,
        "longest clip in frames; larger frame buckets are not used (49; the longest of --train_resolution)",
        least=1,
    )
    bucket_choice: str = flag(
        "nearest",
        "buckets of a clip: the nearest one, or every one that it fills and whose shape is about as near",
        choices=("nearest", "every"),
    )
    max_upscale: float = flag(
        1.5, "how far a clip may be enlarged; one that would be enlarged more is not used", least=1.0
    )
    fps: float | None = flag(
        None,
        "frames a second to sample the clips at (the model's: 8, or 16 for 1.5)",
        aliases=("target_fps",),
        least=0.1,
    )
    frame_selection: str = flag(
        "middle",
        "window of the clip: its middle, head, a random place for each variant, or frames spread over it (uniform)",
        choices=("middle", "head", "random", "uniform"),
    )
    skip_frames_start: int = flag(0, "source frames to leave out at the start of each clip", least=0)
    skip_frames_end: int = flag(0, "source frames to leave out at the end of each clip", least=0)
    video_reshape_mode: str = flag(
        "none",
        "how a clip gets its bucket's shape: none stretches it; center and random keep its aspect ratio and cut",
        choices=("none", "center", "random"),
    )
    random_flip: float | None = flag(
        None, "probability that a variant of a clip is mirrored, whole", const="0.5", least=0.0, most=1.0
    )
    num_augmentations: int | None = flag(
        None, "variants of each clip to cache, one used per epoch (1; 2 with --random_flip)", least=1
    )
    max_bad_fraction: float = flag(
        0.0,
        "share of clips that may be damaged, too short or too small; beyond it nothing is trained",
        least=0.0,
        most=1.0,
    )
    video_reader: str = flag("pyav", "library that decodes: pyav, exact; or decord (0.6), where it is installed")
    decode_timeout: float = flag(120.0, "seconds after which a clip that still decodes is given up", least=1.0)
    decode_memory: float = flag(4.0, "GiB of memory that decoding one clip may take", least=0.5)
    dataset_name: str | None = flag(None, "refused: a data set of the hub is downloaded first")
    dataset_config_name: str | None = flag(None, "refused, as --dataset_name")
    seed: int = flag(42, "all random draws follow from it", least=0)
    dataloader_num_workers: int = flag(
        0, "processes that load tensors; decoding uses as many, at least one", aliases=("num_workers",), least=0
    )


@dataclass(frozen=True)
class EncodeFlags:
    """Read by prepare.py and models.py: how clips and captions are encoded."""

    dtype: str | None = flag(
        None, "precision of the VAE and T5 (what the weight files hold)", choices=("fp32", "fp16", "bf16")
    )
    encode_tiling: bool = flag(
        False, "encode in tiles: less memory, but other latents than the model was trained on", aliases=("use_tiling",)
    )
    max_sequence_length: int | None = flag(
        None, "tokens of a caption; must be what the transformer's config says", least=1
    )


@dataclass(frozen=True)
class FirstFrameFlags:
    """Read by prepare.py: how the images are encoded that clips begin with, for image-to-video."""

    num_image_noise_variants: int = flag(
        8, "encodings of each first frame to cache, each of the frame with other noise; one used per epoch", least=1
    )


@dataclass(frozen=True)
class PrepareFlags:
    """Read by prepare_dataset.py alone."""

    output_dir: str = flag(REQUIRED, "folder for the tensors; give it to a training script as --data_root")
    save_latents_and_embeddings: bool = flag(True, "accepted for old commands: this is what the script does")
    save_image_latents: bool | None = flag(None, "encode first frames too, for image-to-video (where the model is one)")
    batch_size: int = flag(1, "captions encoded at once; more than 1 changes embeddings by rounding", least=1)
    dry_run: bool = flag(False, "show what would be encoded, and what it costs, and stop")
    verify: bool = flag(False, "check every tensor in output_dir against the data, encode nothing, and stop")
    repair: bool = flag(False, "check every tensor in output_dir, and encode anew what is damaged or out of date")
    use_slicing: bool = idle(False, "clips are encoded one at a time")
    pin_memory: bool = idle(False, "no batch waits for a device")
    num_decode_threads: int = idle(0, "--dataloader_num_workers says how many processes decode")
    num_artifact_workers: int = idle(4, "tensors are written while the next clip is decoded; clips are not copied")


@dataclass(frozen=True)
class GuideFlags:
    """The CogVideo guide's, for its one script that does everything; compared with this script and its model."""

    model_type: str | None = flag(None, "task, which the script's name says", choices=("t2v", "i2v"))
    training_type: str | None = flag(None, "method, which the script's name says", choices=("lora", "sft"))
    model_name: str | None = flag(None, "family of the model, which its config says", choices=MODEL_NAMES)


@dataclass(frozen=True)
class LoaderFlags:
    """Read by the training scripts: which tensors, and how they reach the device."""

    load_tensors: bool = flag(False, "data_root is a folder made by prepare_dataset.py")
    tensor_cache: str | None = flag(
        None,
        f"folder for tensors made here: of clips, or of the factory's .pt files (DATA_ROOT/{TENSOR_FOLDER})",
    )
    pin_memory: bool = flag(False, "page-locked host memory for batches")
    caption_dropout: float = flag(
        0.1, "share of samples trained with the empty caption, for classifier-free guidance", least=0.0, most=1.0
    )


@dataclass(frozen=True)
class ImageFlags:
    """Read by the image-to-video scripts: the images that videos begin with."""

    noised_image_dropout: float = flag(0.05, "share of samples trained without their image", least=0.0, most=1.0)
    image_latent_scale: str = flag(
        "auto",
        "what is done to image latents with the VAE's scaling factor: auto is as the pipeline of the model does",
        choices=("auto", "mul", "div", "none"),
    )
    ignore_learned_positional_embeddings: bool = flag(
        False, "train without the learned positions of CogVideoX-5b-I2V, which are for one size alone"
    )
    validation_images: str | None = flag(
        None, "images that the validation videos begin with, one a prompt, joined by the separator: paths or URLs"
    )


@dataclass(frozen=True)
class TrainFlags:
    """Read by loop.py, run.py and checkpoint.py."""

    output_dir: str = flag(
        "", "folder of the run: checkpoints, videos, metrics, the result (cogvideox-lora, cogvideox-i2v-sft, ...)"
    )
    mixed_precision: str | None = flag(
        None, "compute type of the network (accelerate's setting, else no: fp32)", choices=("no", "fp16", "bf16")
    )
    train_batch_size: int = flag(4, "samples a device in one forward pass", aliases=("batch_size",), least=1)
    gradient_accumulation_steps: int = flag(1, "forward passes for one optimizer step", least=1)
    num_train_epochs: int = flag(1, "passes over the data", aliases=("train_epochs",), least=1)
    max_train_steps: int | None = flag(
        None, "optimizer steps; overrides --num_train_epochs", aliases=("train_steps",), least=1
    )
    gradient_checkpointing: bool = flag(False, "recompute blocks in the backward pass: slower, far less memory")
    max_grad_norm: float = flag(1.0, "gradients are scaled down to this norm; 0 leaves them", least=0.0)
    checkpointing_steps: int = flag(500, "optimizer steps between checkpoints", least=1)
    checkpoints_total_limit: int | None = flag(
        None,
        "checkpoints to keep, the newest; older ones go once a new one is safe",
        aliases=("checkpointing_limit",),
        least=1,
    )
    keep_best: bool = flag(
        False, "keep the checkpoint with the lowest held-out loss beyond --checkpoints_total_limit; best.json names it"
    )
    export_best: bool = flag(False, "with --keep_best: the result is that checkpoint, not the last step")
    resume_from_checkpoint: str | None = flag(
        None, "checkpoint folder or its name in output_dir, at every start; unset: the newest, where there is one"
    )
    no_resume: bool = flag(False, "start anew; output_dir must be empty")
    allow_tf32: bool = flag(False, "TF32 for fp32 matrix products on a GPU")
    nccl_timeout: int = flag(600, "seconds that a device waits for the others", least=1)
    report_to: str | None = flag(None, "tracker beside metrics.jsonl", choices=("none", "wandb", "tensorboard", "all"))
    tracker_name: str | None = flag(None, "project name in the tracker (cogvideox)")
    logging_dir: str = flag("logs", "folder in output_dir for tracker files")


@dataclass(frozen=True)
class SignalFlags:
    """Read by diffusion.py, data/dataset.py and ema.py: what is learned from, and what is made of the weights."""

    loss_weighting: str = flag(
        "none",
        "weight of a timestep's squared velocity error; none: all the same. The formulas are in diffusion.py",
        choices=WEIGHTINGS,
    )
    snr_gamma: float = flag(5.0, "signal-to-noise ratio at which the weights with snr in their name cap", least=1e-3)
    p2_gamma: float = flag(1.0, "exponent of p2", least=0.0)
    p2_k: float = flag(1.0, "added to the signal-to-noise ratio by p2", least=1e-3)
    min_timestep: int = flag(0, "first timestep to train on; 0 has the least noise", least=0)
    max_timestep: int | None = flag(None, "last timestep to train on (the scheduler's last)", least=0)
    timestep_sampling: str = flag(
        "uniform",
        "uniform: each timestep on its own; stratified: the samples of an optimizer step share the range out evenly",
        choices=("uniform", "stratified"),
    )
    use_ema: bool = flag(
        False, "validate and export an exponential moving average of the trained weights, kept in fp32"
    )
    ema_decay: float = flag(
        0.9999,
        "share of the average that a step keeps; (1 + n) / (10 + n) after n steps, while that is less",
        least=0.0,
        below=1.0,
    )


@dataclass(frozen=True)
class LoraFlags:
    """Read by lora_file.py, lora.py and methods.py."""

    rank: int = flag(64, "rank of the LoRA matrices", least=1)
    lora_alpha: float = flag(64.0, "the LoRA is scaled by lora_alpha / rank", least=0.0)
    target_modules: tuple[str, ...] = flag(
        ("to_q", "to_k", "to_v", "to_out.0"),
        "names of the linear layers that get a LoRA, or one regular expression for whole names, such as .*attn1.*",
    )
    use_rslora: bool = flag(False, "scale by lora_alpha / sqrt(rank), so that a high rank learns as fast as a low one")
    use_dora: bool = flag(False, "DoRA: train the length of every output channel's weights apart from their direction")
    lora_dropout: float = flag(
        0.0, "share of a LoRA's inputs set to zero in training, drawn anew for every sample", least=0.0, below=1.0
    )
    init_lora_weights: str = flag(
        "default",
        "start of the matrices: default, gaussian, pissa (largest singular values), or pissa_niter_N (N rounds of a "
        "faster SVD)",
    )
    lora_path: str | None = flag(
        None,
        "safetensors file or folder of a LoRA to start from; its rank, alpha and layers must be those of the flags",
        aliases=("init_lora_from",),
    )


@dataclass(frozen=True)
class NoLoraFlags:
    """Those of LoraFlags, where all weights are trained."""

    rank: int = idle(64, "all weights are trained; a LoRA is trained by the script with lora in its name")
    lora_alpha: float = idle(64.0, "as --rank")
    target_modules: tuple[str, ...] = idle((), "as --rank")


@dataclass(frozen=True)
class OptimizerFlags:
    """Read by optim.py."""

    optimizer: str = flag(
        "adam",
        "adam has L2, adamw decoupled weight decay; prodigy finds its own step size (give --learning_rate 1); came; or "
        "a class by its dotted name, such as torch.optim.RAdam",
        choices=RULES,
        dotted=True,
    )
    optimizer_args: tuple[str, ...] = flag(
        (), "arguments of the class as key=value, values as in Python: momentum=0.9", only=(NAMED_CLASS,)
    )
    use_8bit: bool = flag(
        False,
        "moments in 8 bits, by bitsandbytes (whose weight decay is decoupled for adam too) or torchao",
        aliases=("use_8bit_adam",),
        only=ADAMS,
    )
    use_4bit: bool = flag(False, "moments in 4 bits; needs --use_torchao", only=ADAMS)
    use_fp8: bool = flag(False, "moments in fp8; needs --use_torchao", only=ADAMS)
    use_torchao: bool = flag(False, "low-bit moments by torchao instead of bitsandbytes", only=ADAMS)
    use_cpu_offload_optimizer: bool = flag(
        False, "masters, moments and the step on the CPU, by torchao; one GPU; needs --max_grad_norm 0", only=ADAMS
    )
    offload_gradients: bool = flag(
        False, "with --use_cpu_offload_optimizer: free each gradient on the GPU at once; no accumulation", only=ADAMS
    )
    learning_rate: float = flag(1e-4, "peak learning rate", least=0.0)
    scale_lr: bool = flag(False, "multiply the learning rate by the number of samples in an optimizer step")
    lr_scheduler: str = flag("constant", "shape of the learning rate over the run", choices=SCHEDULES)
    lr_warmup_steps: int = flag(500, "optimizer steps of linear warm-up (not for constant)", least=0)
    lr_num_cycles: int = flag(1, "restarts of cosine_with_restarts", least=1)
    lr_power: float = flag(1.0, "power of polynomial", least=0.0)
    beta1: float | None = flag(0.9, "decay of the first moment", aliases=("adam_beta1",), least=0.0, below=1.0)
    beta2: float | None = flag(0.95, "decay of the second moment", aliases=("adam_beta2",), least=0.0, below=1.0)
    beta3: float | None = flag(
        None,
        "prodigy: decay of the step size's sums (root of beta2); came: of the instability (0.9999)",
        aliases=("prodigy_beta3",),
        least=0.0,
        below=1.0,
        only=("prodigy", "came"),
    )
    weight_decay: float | None = flag(1e-4, "weight decay", aliases=("adam_weight_decay",), least=0.0)
    epsilon: float | None = flag(
        1e-8,
        "added to the root of the second moment",
        aliases=("adam_epsilon",),
        least=0.0,
        only=(*ADAMS, "prodigy", NAMED_CLASS),
    )
    prodigy_decouple: bool = flag(False, "decoupled weight decay, as adamw's", only=("prodigy",))
    prodigy_use_bias_correction: bool = flag(False, "Adam's bias correction", only=("prodigy",))
    prodigy_safeguard_warmup: bool = flag(
        False, "keep the learning rate out of the step size's estimate, for warm-up", only=("prodigy",)
    )

    @property
    def kind(self) -> str:
        """The rule, or that it is a class by its dotted name."""
        return NAMED_CLASS if "." in self.optimizer else self.optimizer


@dataclass(frozen=True)
class ValidationFlags:
    """Read by validation.py: the videos made while training."""

    do_validation: bool | None = flag(None, "make validation videos (where there are prompts)")
    validation_prompt: str | None = flag(None, "prompts of the validation videos, joined by the separator")
    validation_prompt_separator: str = flag(":::", "between two prompts", aliases=("validation_prompt_seperator",))
    validation_dir: str | None = flag(None, "folder of --validation_prompts")
    validation_prompts: str | None = flag(None, "file with a prompt a line, in validation_dir (or a path)")
    negative_prompt: str = flag("", "what guidance leads away from")
    num_validation_videos: int = flag(1, "videos a prompt", least=1)
    validation_steps: int | None = flag(
        None,
        "optimizer steps between validations, beside those before the first and after the last step",
        least=1,
    )
    validation_epochs: int | None = flag(None, "epochs between validations", least=1)
    num_inference_steps: int = flag(50, "sampling steps of a validation video", least=1)
    guidance_scale: float = flag(6.0, "classifier-free guidance; 1 turns it off", least=0.0)
    use_dynamic_cfg: bool = flag(False, "let the guidance grow over the sampling steps")
    height: int | None = flag(
        None, "height of validation videos in pixels (first height bucket given, else 480)", least=1
    )
    width: int | None = flag(None, "width of validation videos in pixels (first width bucket given, else 720)", least=1)
    validation_frames: int | None = flag(None, "frames of validation videos (the longest frame bucket in use)", least=1)
    validation_fps: float | None = flag(None, "frames a second of the files (--fps)", aliases=("gen_fps",), least=0.1)
    enable_slicing: bool = flag(False, "decode validation videos one at a time")
    enable_tiling: bool = flag(False, "decode validation videos in tiles: far less memory")

    @property
    def settled(self) -> bool:
        """Whether the command says what to make videos of, or that there are none."""
        return self.do_validation is False or bool(self.validation_prompt or self.validation_prompts)


@dataclass(frozen=True)
class HubFlags:
    """Read by hub.py: where the result is shared."""

    push_to_hub: bool = flag(False, "upload the result to the Hugging Face hub; the repository is made at the start")
    hub_token: str | None = flag(
        None,
        "token that may write (HF_TOKEN, or that of `hf auth login`, which nobody sees in a list of processes)",
        secret=True,
    )
    hub_model_id: str | None = flag(None, "name of the repository, or namespace/name (the name of output_dir)")
    hub_private: bool = flag(False, "make a repository that only you can see; one that is there stays as it is")


@dataclass(frozen=True)
class IdleFlags:
    """Of other trainers' training scripts; each says why it does nothing."""

    enable_model_cpu_offload: bool = idle(
        False, "T5 is gone before training, and the VAE is on the device for validation only"
    )
    validation_videos: str | None = idle(None, "no video is a condition of what is sampled")


@dataclass(frozen=True)
class ScriptFlags:
    """Read by parse() itself."""

    print_config: bool = flag(False, "print every flag's value and where it comes from, and stop")


# -- what each script takes --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PrepareOptions:
    """prepare_dataset.py."""

    model: ModelFlags
    data: DataFlags
    encode: EncodeFlags
    first_frames: FirstFrameFlags
    prepare: PrepareFlags
    script: ScriptFlags


@dataclass(frozen=True)
class TrainOptions:
    """What every training script takes; ``task`` and ``method`` are the CogVideo guide's names."""

    task = "t2v"
    method = "lora"

    model: ModelFlags
    guide: GuideFlags
    data: DataFlags
    loader: LoaderFlags
    encode: EncodeFlags
    train: TrainFlags
    signal: SignalFlags
    optimizer: OptimizerFlags
    validation: ValidationFlags
    hub: HubFlags
    idle: IdleFlags
    script: ScriptFlags


@dataclass(frozen=True)
class LoraOptions(TrainOptions):
    """The LoRA scripts."""

    lora: LoraFlags


@dataclass(frozen=True)
class SftOptions(TrainOptions):
    """The scripts that train all weights."""

    method = "sft"

    lora: NoLoraFlags


@dataclass(frozen=True)
class ImageLoraOptions(LoraOptions):
    """The LoRA script for image-to-video."""

    task = "i2v"

    first_frames: FirstFrameFlags
    image: ImageFlags


@dataclass(frozen=True)
class ImageSftOptions(SftOptions):
    """The script that trains all weights for image-to-video."""

    task = "i2v"

    first_frames: FirstFrameFlags
    image: ImageFlags


Options = TypeVar("Options", bound=PrepareOptions | TrainOptions)
Check = Callable[[Any], Iterator[str]]


def derive(options: Any, sources: dict[str, str]) -> Any:
    """Values that follow from other flags; needs no file. Records each one's origin in ``sources``."""
    data: DataFlags = options.data
    found: dict[str, dict[str, Any]] = {"data": {}}
    if data.num_augmentations is None:
        found["data"]["num_augmentations"] = 2 if data.random_flip else 1
    if data.max_num_frames is None:
        found["data"]["max_num_frames"] = max((frames for frames, _, _ in resolutions(data)), default=49)
    if isinstance(options, TrainOptions):
        validation = options.validation
        given = {name for name, source in sources.items() if source.startswith("given")}
        most = data.max_num_frames or found["data"]["max_num_frames"]
        height = data.height_buckets[0] if "height_buckets" in given else 480
        width = data.width_buckets[0] if "width_buckets" in given else 720
        usual = (max((count for count in data.frame_buckets if count <= most), default=49), height, width)
        listed = [numbers for numbers in resolutions(data) if numbers[0] <= most]
        longest = max(listed, key=lambda numbers: numbers[0], default=usual)  # the first of those
        wanted = dict(zip(("validation_frames", "height", "width"), longest, strict=True))
        found["validation"] = {name: value for name, value in wanted.items() if getattr(validation, name) is None}
        if not options.train.output_dir:
            task = "i2v-" if options.task == "i2v" else ""
            found["train"] = {"output_dir": f"cogvideox-{task}{options.method}"}
        found["optimizer"] = dict.fromkeys(left_to_library(options.optimizer, given))
        if options.loader.tensor_cache is None and not options.loader.load_tensors:
            found["loader"] = {"tensor_cache": str(Path(data.data_root[0]) / TENSOR_FOLDER)}
    for values in found.values():
        sources.update(dict.fromkeys(values, "derived"))
    groups = {name: dataclasses.replace(getattr(options, name), **values) for name, values in found.items()}
    return dataclasses.replace(options, **groups)


def left_to_library(flags: OptimizerFlags, given: set[str]) -> Iterator[str]:
    """Flags whose default is not for this optimizer: its library's own value holds."""
    if flags.kind == NAMED_CLASS:
        yield from {"beta1", "beta2", "weight_decay", "epsilon"} - given
    elif flags.kind == "came":
        yield from {"epsilon"} - given


def resolution(text: str) -> tuple[int, int, int] | None:
    """(frames, height, width) out of 49x480x720; None if it is not of that form."""
    match = re.fullmatch(r"(\d+)x(\d+)x(\d+)", text.lower())
    return (int(match[1]), int(match[2]), int(match[3])) if match else None


def resolutions(data: DataFlags) -> list[tuple[int, int, int]]:
    """The well-formed values of --train_resolution."""
    return [numbers for text in data.train_resolution if (numbers := resolution(text))]


def image_flags(options: Any) -> ImageFlags | None:
    """The flags of an image-to-video script; None: it is another one."""
    flags: ImageFlags | None = getattr(options, "image", None)
    return flags


def noise_variants(options: TrainOptions) -> int:
    """How many encodings of each first frame a script trains on; 0: none."""
    flags: FirstFrameFlags | None = getattr(options, "first_frames", None)
    return flags.num_image_noise_variants if flags is not None else 0


def ignores_positions(options: Any) -> bool:
    """Whether a model is trained without its learned positions."""
    flags = image_flags(options)
    return flags is not None and flags.ignore_learned_positional_embeddings


def separated(text: str | None, separator: str) -> list[str]:
    """The texts in a value of --validation_prompt or --validation_images."""
    return [part.strip() for part in (text or "").split(separator) if part.strip()]


def is_url(text: str) -> bool:
    """Whether an image is to be fetched from the web."""
    return text.startswith(("http://", "https://"))


def reads_clips(options: Any) -> bool:
    """Whether media files are opened: not where --load_tensors takes what was made of them."""
    loader = getattr(options, "loader", None)
    return loader is None or not loader.load_tensors


def flag_problems(options: Any, sources: dict[str, str]) -> Iterator[str]:
    """Contradictions between flags; needs no file."""
    data: DataFlags = options.data
    given = {name for name, source in sources.items() if source.startswith("given")}
    yield from bucket_problems(data, given)
    if data.frame_selection == "uniform" and data.fps is not None:
        yield "--frame_selection uniform: has no rate; leave out --fps, or use middle, head or random"
    if len(data.repeats) not in (1, len(data.data_root)):
        yield (
            f"--repeats {' '.join(map(str, data.repeats))}: {len(data.repeats)} numbers for {len(data.data_root)} "
            "folders of --data_root; give one number, or one for each"
        )
    if isinstance(options, PrepareOptions):
        yield from prepare_problems(options.prepare)
    if isinstance(options, TrainOptions):
        yield from train_problems(options)
        yield from optimizer_problems(options, given)
        yield from signal_problems(options.signal, given)
        yield from best_problems(options)
    if isinstance(options, LoraOptions):
        yield from lora_problems(options.lora)


def bucket_problems(data: DataFlags, given: set[str]) -> Iterator[str]:
    """Contradictions between the flags that list buckets."""
    for text in data.train_resolution:
        if resolution(text) is None:
            yield f"--train_resolution {text}: is no bucket; give FRAMESxHEIGHTxWIDTH, such as 49x480x720"
    lists = sorted({"height_buckets", "width_buckets", "frame_buckets"} & given)
    if data.train_resolution and lists:
        yield f"--train_resolution: contradicts --{', --'.join(lists)}; give either"
    counts = [frames for frames, _, _ in resolutions(data)] or data.frame_buckets
    if data.max_num_frames is not None and min(counts) > data.max_num_frames:
        yield (
            f"--max_num_frames {data.max_num_frames}: every frame bucket is longer; "
            f"nearest: --max_num_frames {min(counts)}"
        )
    if data.bucket_choice == "every" and not (data.train_resolution or {"height_buckets", "width_buckets"} <= given):
        yield "--bucket_choice every: needs your own buckets; give --train_resolution"


def prepare_problems(prepare: PrepareFlags) -> Iterator[str]:
    """Contradictions between the flags of prepare_dataset.py alone."""
    if not prepare.save_latents_and_embeddings:
        yield "--save_latents_and_embeddings false: nothing else is written; leave it out, or use --dry_run"
    if not prepare.output_dir:
        yield "--output_dir: is empty; give a folder for the tensors"
    modes = [name for name in ("dry_run", "verify", "repair") if getattr(prepare, name)]
    if len(modes) > 1:
        yield f"--{modes[0]}: contradicts --{modes[1]}; give one of them"


def train_problems(options: TrainOptions) -> Iterator[str]:
    """Contradictions between the flags of a training script."""
    train = options.train
    if train.no_resume and train.resume_from_checkpoint:
        yield f"--no_resume: contradicts --resume_from_checkpoint {train.resume_from_checkpoint}; give one of them"
    if options.loader.load_tensors:
        yield from load_tensors_problems(options)
    optimizer = options.optimizer
    if optimizer.lr_scheduler == "polynomial" and optimizer.learning_rate <= POLYNOMIAL_END:
        yield (
            f"--learning_rate {optimizer.learning_rate:g}: polynomial goes down to {POLYNOMIAL_END:g}; "
            "give a larger one, or --lr_scheduler constant"
        )
    yield from validation_problems(options, options.validation)
    yield from hub_problems(options.hub)


def validation_problems(options: TrainOptions, validation: ValidationFlags) -> Iterator[str]:
    """Contradictions between the flags of validation."""
    scheduled = "--validation_steps" if validation.validation_steps else "--validation_epochs"
    if validation.do_validation and not validation.settled:
        yield "--do_validation: there is no prompt; give --validation_prompt or --validation_prompts"
    elif (validation.validation_steps or validation.validation_epochs) and not (
        validation.settled or options.data.validation_data_root or options.loader.load_tensors
    ):
        yield f"{scheduled}: there is nothing to validate; give --validation_prompt or --validation_data_root"
    if validation.validation_steps and validation.validation_epochs:
        yield "--validation_steps: contradicts --validation_epochs; give one of them"
    if validation.validation_prompt and validation.validation_prompts:
        yield "--validation_prompt: contradicts --validation_prompts; give one of them"
    if validation.validation_dir and not validation.validation_prompts and validation.do_validation is not False:
        yield f"--validation_dir {validation.validation_dir}: names no file; give --validation_prompts too"


def signal_problems(signal: SignalFlags, given: set[str]) -> Iterator[str]:
    """Contradictions between the flags of the training signal, and parameters of what is not used."""
    for name, weightings in (("snr_gamma", WITH_SNR_GAMMA), ("p2_gamma", ("p2",)), ("p2_k", ("p2",))):
        if name in given and signal.loss_weighting not in weightings:
            yield (
                f"--{name}: has no effect with --loss_weighting {signal.loss_weighting}; it is for "
                f"{', '.join(weightings)}"
            )
    if signal.max_timestep is not None and signal.max_timestep < signal.min_timestep:
        yield (
            f"--max_timestep {signal.max_timestep}: is before --min_timestep {signal.min_timestep}; "
            f"nearest: --max_timestep {signal.min_timestep}"
        )
    if "ema_decay" in given and not signal.use_ema:
        yield "--ema_decay: has no effect without --use_ema; give it too, or leave this out"


def best_problems(options: TrainOptions) -> Iterator[str]:
    """What --keep_best and --export_best lack, as far as flags say."""
    train = options.train
    if train.export_best and not train.keep_best:
        yield "--export_best: no checkpoint is kept for it; add --keep_best"
    if train.keep_best and not options.data.validation_data_root and not options.loader.load_tensors:
        yield "--keep_best: there are no clips to measure the loss on; give --validation_data_root"


def hub_problems(hub: HubFlags) -> Iterator[str]:
    """Contradictions between the flags of the hub, and a token that cannot be one."""
    if not hub.push_to_hub:
        for name in ("hub_token", "hub_model_id", "hub_private"):
            if getattr(hub, name) not in (None, False):
                yield f"--{name}: has no effect without --push_to_hub; give it too, or leave this out"
    if hub.hub_token is not None and not re.fullmatch("[!-~]+", hub.hub_token):
        yield "--hub_token: is empty, or holds spaces or other characters that no token has; copy it again"


def optimizer_problems(options: TrainOptions, given: set[str]) -> Iterator[str]:
    """Contradictions between the flags of the optimizer, and flags that the one chosen does not have."""
    flags, train = options.optimizer, options.train
    for item in dataclasses.fields(flags):
        only = item.metadata["only"]
        if only and flags.kind not in only and item.name in given and getattr(flags, item.name) is not False:
            yield f"--{item.name}: has no effect with --optimizer {flags.optimizer}; it is for {', '.join(only)}"
    low = [f"--{name}" for name in LOW_BIT if getattr(flags, name)]
    if len(low) > 1:
        yield f"{low[0]}: contradicts {low[1]}; give one of them"
    if low and low[0] != "--use_8bit" and not flags.use_torchao:
        yield f"{low[0]}: bitsandbytes has no such optimizer; add --use_torchao"
    if flags.use_torchao and not low:
        yield "--use_torchao: says whose low-bit moments; add --use_8bit, --use_4bit or --use_fp8"
    if flags.offload_gradients and not flags.use_cpu_offload_optimizer:
        yield "--offload_gradients: needs an optimizer on the CPU; add --use_cpu_offload_optimizer"
    if flags.use_cpu_offload_optimizer:
        yield from offload_problems(flags, train, low)


def offload_problems(flags: OptimizerFlags, train: TrainFlags, low: list[str]) -> Iterator[str]:
    """What torchao's optimizer on the CPU cannot do."""
    name = "--use_cpu_offload_optimizer"
    if low:
        yield f"{name}: contradicts {low[0]}: on the CPU moments are fp32; give either"
    if train.max_grad_norm:
        yield f"{name}: torchao clips no gradients, and --max_grad_norm is {train.max_grad_norm:g}; give 0"
    if train.mixed_precision == "fp16":
        yield f"{name}: torchao knows no loss scale, which fp16 needs; give --mixed_precision bf16"
    if flags.offload_gradients and train.gradient_accumulation_steps > 1:
        yield (
            f"--offload_gradients: contradicts --gradient_accumulation_steps {train.gradient_accumulation_steps}: each "
            "gradient leaves the GPU at once; give 1, or leave --offload_gradients out"
        )


def lora_problems(lora: LoraFlags) -> Iterator[str]:
    """Contradictions between the flags of a LoRA, and values that are of no known form."""
    yield from target_problems(lora.target_modules)
    init = lora.init_lora_weights
    given = f"--init_lora_weights {init}"
    if not re.fullmatch("default|gaussian|pissa|pissa_niter_[1-9][0-9]*", init):
        yield f"{given}: is one of default, gaussian, pissa, pissa_niter_N; nearest: {nearest_init(init)}"
    elif lora.lora_path and init != "default":
        yield f"{given}: contradicts --lora_path {lora.lora_path}, which has the matrices to start from; give one"
    if init.startswith("pissa") and lora.use_dora:
        yield f"{given}: contradicts --use_dora, with which its result is no plain LoRA; give one of them"
    if init.startswith("pissa") and not lora.lora_alpha:
        yield "--lora_alpha 0: PiSSA divides by the scale of the LoRA; give the rank"


def target_problems(target_modules: Sequence[str]) -> Iterator[str]:
    """What is wrong with --target_modules by itself."""
    patterns = [target for target in target_modules if target_pattern((target,)) is not None]
    if patterns and len(target_modules) > 1:
        yield f"--target_modules {patterns[0]}: a regular expression stands alone; join them: 'one|other'"
    for text in patterns:
        try:
            re.compile(text)
        except re.error as error:
            yield f"--target_modules {text}: is no regular expression: {error}; give names, or mend it"


def target_pattern(target_modules: Sequence[str]) -> str | None:
    """The regular expression that --target_modules is; None where it lists names."""
    plain = len(target_modules) != 1 or re.fullmatch(r"[\w.]+", target_modules[0])
    return None if plain else target_modules[0]


def nearest_init(text: str) -> str:
    """The value of --init_lora_weights that looks most like a text."""
    known = ("default", "gaussian", "pissa", "pissa_niter_4")
    return (difflib.get_close_matches(text, known, 1, 0.3) or known)[0]


def load_tensors_problems(options: TrainOptions) -> Iterator[str]:
    """Contradictions with --load_tensors."""
    if len(options.data.data_root) > 1:
        yield "--data_root: --load_tensors takes one prepared folder; give prepare_dataset.py all folders of clips"
    if options.data.validation_data_root:
        yield "--validation_data_root: --load_tensors takes its clips from the prepared folder; prepare with the flag"


def check_ema(options: TrainOptions) -> Iterator[str]:
    """Problems of --use_ema with the launcher's configuration, for args.parse."""
    if options.signal.use_ema and os.environ.get("ACCELERATE_USE_DEEPSPEED", "false") == "true":
        yield (
            "--use_ema: under DeepSpeed no rank has all fp32 weights to average; leave it out, or launch with "
            "accelerate_configs/uncompiled_2.yaml"
        )


def check_trackers(options: TrainOptions) -> Iterator[str]:
    """Problems of --report_to, for args.parse."""
    wanted = tracker_names(options.train.report_to)
    for name in wanted:
        if importlib.util.find_spec(name) is None:
            yield f"--report_to {name}: {name} is not installed; pip install {name}, or leave the flag out"
    login = os.environ.get("WANDB_API_KEY") or any(Path.home().joinpath(name).exists() for name in (".netrc", "_netrc"))
    if "wandb" in wanted and not login and os.environ.get("WANDB_MODE") not in ("offline", "disabled"):
        yield "--report_to wandb: not logged in; run `wandb login`, or set WANDB_MODE=offline"


def precision_of(flag: str | None) -> str:
    """The flag, else what `accelerate launch` was told, else no."""
    return flag or os.environ.get("ACCELERATE_MIXED_PRECISION", "no")


def tracker_names(report_to: str | None) -> list[str]:
    """The trackers that --report_to asks for."""
    return {None: [], "none": [], "all": ["tensorboard", "wandb"]}.get(report_to, [str(report_to)])


# -- parsing -----------------------------------------------------------------------------------------------------------


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Every flag takes any number of strings from argparse; read_value() counts them. Help shows what it accepts."""

    def _format_args(self, action: argparse.Action, default_metavar: str) -> str:
        return str(action.metavar) if action.nargs == "*" else super()._format_args(action, default_metavar)


def fields_of(options_type: type) -> Iterator[tuple[str, "dataclasses.Field[Any]", Any]]:
    """(group name, field, type of its value) of every flag."""
    for group_name, group_type in typing.get_type_hints(options_type).items():
        types = typing.get_type_hints(group_type)
        for item in dataclasses.fields(group_type):
            yield group_name, item, types[item.name]


def value_type(annotation: Any) -> tuple[type, bool]:
    """(type of one value, whether the flag takes several)."""
    arguments = [a for a in typing.get_args(annotation) if a not in (NoneType, Ellipsis)]
    return (arguments[0] if arguments else annotation), typing.get_origin(annotation) is tuple


def build_parser(options_type: type, description: str | None) -> argparse.ArgumentParser:
    """A parser that hands every value over as the strings that were typed."""
    parser = argparse.ArgumentParser(
        usage="%(prog)s --flag value ...", description=description, allow_abbrev=False, formatter_class=HelpFormatter
    )
    groups = {name: parser.add_argument_group(name) for name in typing.get_type_hints(options_type)}
    for group_name, item, annotation in fields_of(options_type):
        of, many = value_type(annotation)
        shown = (*item.metadata["choices"], *(["DOTTED.NAME"] if item.metadata["dotted"] else []))
        value = "|".join(shown) or ("true|false" if of is bool else of.__name__.upper())
        optional = of is bool or item.metadata["const"]
        groups[group_name].add_argument(
            *(f"--{name}" for name in (item.name, *item.metadata["aliases"])),
            dest=item.name,
            nargs="*",
            default=argparse.SUPPRESS,
            metavar=f"[{value}]" if optional else (f"{value} ..." if many else value),
            help=help_text(item).replace("%", "%%"),
        )
    return parser


def help_text(item: "dataclasses.Field[Any]") -> str:
    """The help line with the default behind it."""
    text: str = item.metadata["help"]
    if item.default is dataclasses.MISSING:
        return f"{text} [required]"
    shown = " ".join(map(str, item.default)) if isinstance(item.default, tuple) else item.default
    return text if shown in (None, "") else f"{text} [{shown}]"


def as_typed(item: "dataclasses.Field[Any]", texts: Sequence[str]) -> str:
    """A flag and its value for messages; of a secret only the flag."""
    return f"--{item.name}" if item.metadata["secret"] else f"--{item.name} {' '.join(texts)}"


def convert(item: "dataclasses.Field[Any]", of: type, text: str) -> Any:
    """One typed value out of one string; raises UsageError with the rule and the nearest fix."""
    name = as_typed(item, [text])
    if not text.isprintable() and any("\ud800" <= letter <= "\udfff" for letter in text):
        raise UsageError(f"--{item.name}: holds bytes that are no UTF-8")
    if of is bool:
        if text.lower() not in ("true", "false", "1", "0", "yes", "no"):
            raise UsageError(f"{name}: takes true or false, or nothing for true")
        return text.lower() in ("true", "1", "yes")
    choices = item.metadata["choices"]
    if choices and not (item.metadata["dotted"] and re.fullmatch(r"[^\W\d]\w*(\.[^\W\d]\w*)+", text)):
        value = next((choice for choice in choices if choice.lower() == text.lower()), None)
        if value is None:
            near = difflib.get_close_matches(text.lower(), choices, 1, 0.4)
            among = f"is one of {', '.join(choices)}" + (", or a dotted name" if item.metadata["dotted"] else "")
            raise UsageError(f"{name}: {among}" + (f"; nearest: {near[0]}" if near else ""))
        return value
    try:
        value = of(text)
    except ValueError:
        raise UsageError(f"{name}: takes {'a whole number' if of is int else 'a number'}") from None
    least, most, below = item.metadata["least"], item.metadata["most"], item.metadata["below"]
    if of in (int, float) and not math.isfinite(value):
        raise UsageError(f"{name}: must be a finite number")
    if least is not None and not value >= least:  # NaN fails too
        raise UsageError(f"{name}: must be at least {least}; nearest: {least}")
    if most is not None and not value <= most:
        raise UsageError(f"{name}: must be at most {most}; nearest: {most}")
    if below is not None and not value < below:
        raise UsageError(f"{name}: must be less than {below}")
    return value


def read_value(item: "dataclasses.Field[Any]", annotation: Any, given: Sequence[str]) -> Any:
    """The typed value of a flag out of the strings behind it."""
    of, many = value_type(annotation)
    bare = "true" if of is bool else item.metadata["const"]
    texts = list(given) or ([bare] if bare else [])
    if not texts:
        raise UsageError(f"--{item.name}: takes a value: {item.metadata['help']}")
    if many:
        return tuple(convert(item, of, text) for text in texts)
    if len(texts) > 1:
        raise UsageError(f"{as_typed(item, texts)}: takes one value; quote it if it has spaces")
    return convert(item, of, texts[0])


def unknown_flags(rest: Sequence[str], parser: argparse.ArgumentParser) -> Iterator[str]:
    """One problem for each flag that does not exist, with the nearest one; its values are passed over."""
    known = list(parser._option_string_actions)
    names = [text.split("=")[0] for text in rest]
    for name in names:
        if name.startswith("--"):
            near = difflib.get_close_matches(name, known, 1)
            yield f"{name}: no such flag" + (f"; nearest: {near[0]}" if near else "; see --help")
        elif name == names[0]:
            yield f"{name}: belongs to no flag"


def spelling(argv: Sequence[str], item: "dataclasses.Field[Any]") -> str:
    """The name under which a flag was given; raises UsageError where it was given under two."""
    given = {text.split("=")[0] for text in argv}
    used = [name for name in (item.name, *item.metadata["aliases"]) if f"--{name}" in given]
    if len(used) > 1:
        raise UsageError(f"--{used[0]}: is the same flag as --{used[1]}; give one of them")
    return used[0]


def foreign_problems(options_type: type[Options], values: dict[str, dict[str, Any]]) -> Iterator[str]:
    """What commands of other trainers ask of another script, or of the hub; they may have unknown flags too."""
    asked = {name: values["data"][name] for name in ("dataset_name", "dataset_config_name") if name in values["data"]}
    if asked:
        flags = " ".join(f"--{name} {value}" for name, value in asked.items())
        download = f"hf download --repo-type dataset {asked.get('dataset_name', 'NAME')} --local-dir D"
        yield f"{flags}: is not downloaded here; {download}, then give --data_root D"
    if issubclass(options_type, TrainOptions):
        yield from script_problems(options_type, GuideFlags(**values["guide"]))


def script_problems(options_type: type[TrainOptions], guide: GuideFlags) -> Iterator[str]:
    """What the CogVideo guide's flags say of the script, where it is another one."""
    family = (guide.model_name or "").rpartition("-")[2]
    task, method = guide.model_type or family or options_type.task, guide.training_type or options_type.method
    if family and task != family:
        yield f"--model_name {guide.model_name}: contradicts --model_type {task}; give one of them"
    if (task, method) != (options_type.task, options_type.method):
        values = {"model_type": guide.model_type, "model_name": guide.model_name, "training_type": guide.training_type}
        asked = " ".join(f"--{name} {value}" for name, value in values.items() if value)
        right = f"cogvideox_{'image' if task == 'i2v' else 'text'}_to_video_{method}.py"
        yield f"{asked}: is not what this script trains; the right one is {right}"


def remarks(options: Any, sources: dict[str, str]) -> Iterator[str]:
    """What a user may want to know of flags that are no problem."""
    for group, item, _ in fields_of(type(options)):
        if item.metadata["idle"] and sources[item.name] != "default" and getattr(getattr(options, group), item.name):
            yield f"--{item.name}: {item.metadata['help']}"
    if isinstance(options, TrainOptions) and options.optimizer.kind == "prodigy":
        rate = options.optimizer.learning_rate
        if rate < LOW_FOR_PRODIGY:
            yield f"--learning_rate {rate:g}: prodigy multiplies the step size that it finds by this; usual: 1"


def read_flags(
    options_type: type[Options], argv: Sequence[str], description: str | None
) -> tuple[Options, dict[str, str]]:
    """Options with only what was given and the defaults, and where each value comes from.

    Raises:
        UsageError: all unknown flags, bad values and missing flags at once.
    """
    parser = build_parser(options_type, description)
    namespace, rest = parser.parse_known_args(list(argv))
    problems = list(unknown_flags(rest, parser))
    values: dict[str, dict[str, Any]] = {name: {} for name in typing.get_type_hints(options_type)}
    sources: dict[str, str] = {}
    for group, item, annotation in fields_of(options_type):
        sources[item.name] = "default"
        if not hasattr(namespace, item.name):
            if item.default is dataclasses.MISSING:
                problems.append(f"--{item.name}: is required: {item.metadata['help']}")
            continue
        try:
            used = spelling(argv, item)
            sources[item.name] = "given" if used == item.name else f"given as --{used}"
            values[group][item.name] = read_value(item, annotation, getattr(namespace, item.name))
        except UsageError as error:
            problems.extend(error.problems)
    problems.extend(foreign_problems(options_type, values))
    if problems:
        raise UsageError(problems)
    groups = {name: of(**values[name]) for name, of in typing.get_type_hints(options_type).items()}
    return options_type(**groups), sources


def config_text(options: Any, sources: dict[str, str]) -> str:
    """Every flag with its value and origin, a line each."""
    lines = []
    for group_name, item, _ in fields_of(type(options)):
        value = to_show(item, getattr(getattr(options, group_name), item.name))
        shown = " ".join(map(str, value)) if isinstance(value, tuple) else str(value)
        lines.append(f"{item.name:31} {sources[item.name]:30} {shown}".rstrip())
    return "\n".join(lines)


def config_dict(options: Any) -> dict[str, Any]:
    """Every flag's value by its name, for config.json, the recipe and trackers; secrets are left out."""
    return {
        item.name: to_show(item, getattr(getattr(options, group), item.name))
        for group, item, _ in fields_of(type(options))
    }


def to_show(item: "dataclasses.Field[Any]", value: Any) -> Any:
    """A flag's value, or of a secret that there is one."""
    return HIDDEN if item.metadata["secret"] and value is not None else value


def hide_secrets(options: Any) -> None:
    """Takes the values of secrets out of sys.argv, which trackers record."""
    values = [(item, getattr(getattr(options, group), item.name)) for group, item, _ in fields_of(type(options))]
    for secret in [value for item, value in values if item.metadata["secret"] and value]:
        sys.argv[1:] = [text.replace(secret, HIDDEN) for text in sys.argv[1:]]


def parse(
    options_type: type[Options],
    description: str | None = None,
    argv: Sequence[str] | None = None,
    checks: Sequence[Check] = (),
) -> Options:
    """The options of a script; ``--help`` and ``--print_config`` end it with status 0.

    ``checks`` look at files and configs (never at weights); they run once the flags themselves are in order, and not
    at all for ``--print_config``.

    Raises:
        UsageError: every problem at once.
    """
    options, sources = read_flags(options_type, sys.argv[1:] if argv is None else argv, description)
    options = derive(options, sources)
    problems = list(flag_problems(options, sources))
    if not problems and os.environ.get("RANK", "0") == "0":
        for remark in remarks(options, sources):
            print(remark, file=sys.stderr)
    if options.script.print_config and not problems:
        print(config_text(options, sources))
        sys.exit(0)
    for check in checks:
        try:
            problems.extend(check(options))
        except UsageError as error:
            problems.extend(error.problems)
    if problems:
        raise UsageError(problems)
    return options


def run_script(
    main: Callable[[Options], int | None], options_type: type[Options], doc: str | None, checks: Sequence[Check]
) -> typing.NoReturn:
    """Parses, runs ``main`` and ends the script: status 2 and a line for each problem where the user can mend it."""
    for name in NOISY:
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        options = parse(options_type, doc, None, checks)
        hide_secrets(options)
        leave(main(options))
    except UsageError as error:
        count = "1 problem" if len(error.problems) == 1 else f"{len(error.problems)} problems"
        lines = [f"{Path(sys.argv[0]).name}: {count}", *(f"  {one_line(text)}" for text in error.problems)]
        print(*lines, sep="\n", file=sys.stderr)
        leave(USAGE_EXIT)
    except KeyboardInterrupt:
        print("stopped; the same command goes on", file=sys.stderr)
        leave(INTERRUPTED_EXIT)
    except OSError as error:
        if error.errno not in DISK_ERRORS:
            raise
        print(f"{error.filename or 'the disk'}: {error.strerror}; mend that and run the same command", file=sys.stderr)
        leave(USAGE_EXIT)


def leave(status: int | None) -> typing.NoReturn:
    """Ends the script. accelerate and torchrun make 1 of every status; who needs it (scripts/sweep.sh) names a file."""
    if path := os.environ.get("COGVIDEOX_EXIT_FILE"):
        Path(path).write_text(str(status or 0))  # on every rank: the launcher may kill those that come last
    sys.exit(status)
