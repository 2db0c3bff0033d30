"""Every flag once, grouped by who reads it, as frozen dataclasses: type, default, limits and a help line each.

A flag's field name is its name; ``aliases`` are the names that other CogVideoX trainers gave it. Which script takes
which groups is in options.py. Standard library only.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

TENSOR_FOLDER = "cogvideox_tensors"  # the default of --tensor_cache, in the data root itself
SIZES = (256, 320, 384, 480, 512, 576, 720, 768, 960, 1024, 1280, 1536)
SCHEDULES = ("constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial")
POLYNOMIAL_END = 1e-7  # learning rate at the end of the polynomial schedule
MODEL_NAMES = ("cogvideox-t2v", "cogvideox-i2v", "cogvideox1.5-t2v", "cogvideox1.5-i2v")  # in the CogVideo guide
ADAMS, OPTIMIZERS = ("adam", "adamw"), ("adam", "adamw", "prodigy", "came")  # of optimizers
NAMED_CLASS = "a class by its dotted name"
WITH_SNR_GAMMA = ("min_snr", "min_snr_plus_one", "soft_min_snr")
WEIGHTINGS = ("none", *WITH_SNR_GAMMA, "debiased", "p2")
PLACES = ("auto", "device", "host")
HIDDEN = "(not shown)"  # instead of a secret
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
    "preparation": ("save_image_latents", "suggest_buckets", "dry_run", "verify", "repair"),
    "LoRA": ("rank", "lora_alpha", "lora_path"),
    "all weights": ("save_pipeline",),
    "length": ("max_train_steps", "num_train_epochs", "train_batch_size", "gradient_accumulation_steps", "seed"),
    "learning rate": ("learning_rate", "lr_scheduler", "lr_warmup_steps", "optimizer"),
    "validation": ("validation_prompt", "validation_images", "validation_steps"),
    "plan": ("mixed_precision", "gradient_checkpointing", "plan", "vram_budget", "base_precision"),
    "output": ("output_dir", "checkpointing_steps", "report_to", "push_to_hub"),
    INFORMATION: ("print_config",),
}
# Entries of a run's recipe that its state does not depend on, so that a checkpoint can be resumed with other values.
CHANGEABLE = (
    *("learning_rate", "scale_lr", "lr_scheduler", "lr_warmup_steps", "lr_num_cycles", "lr_power", "weight_decay"),
    *("max_grad_norm", "caption_dropout", "noised_image_dropout", "lora_dropout", "loss_weighting", "snr_gamma"),
    *("p2_gamma", "p2_k", "min_timestep", "max_timestep", "timestep_sampling", "ema_decay", "samples_per_step", "data"),
)


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
    refused: str | None = None,
) -> Any:
    """One flag. ``const`` is the value of the bare flag. A number is at least ``least``, at most ``most``, and less
    than ``below``. A ``dotted`` flag takes a dotted name beside its ``choices``. ``only``: the optimizers that have it.
    The value of a ``secret`` is shown and written nowhere. An ``idle`` flag is taken from old commands and does
    nothing; its help says why.

    A script takes the flags of the suite's other scripts too, says that they have no effect, and goes on. ``refused``
    is why it ends instead: without the flag's effect it would do something else than was asked. That is so for flags
    that say what to start from, what is read, where the result goes, or that nothing is trained.
    """
    limits = {"least": least, "most": most, "below": below}
    kinds = {"choices": choices, "const": const, "dotted": dotted, "only": only, "secret": secret, "idle": idle}
    kinds["refused"] = refused
    metadata = {"help": help, "aliases": aliases} | kinds | limits
    return field(default=default, metadata=metadata, repr=not secret)


REQUIRED: Any = dataclasses.MISSING


def idle(default: Any, why: str) -> Any:
    """A flag of other trainers that has no effect here."""
    return flag(default, f"has no effect here; {why}", idle=True)


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
        None,
        "precision of the VAE and T5 (that of the weight files; on a CPU fp32)",
        choices=("fp32", "fp16", "bf16"),
    )
    encode_tiling: bool = flag(
        False, "encode in tiles: less memory, but other latents than the model was trained on", aliases=("use_tiling",)
    )
    t5_on: str = flag(
        "auto",
        "where T5's weights lie: device, or host, from where they pass through 1.5 GiB of the device with the same "
        "result (host where the device has no room for them)",
        choices=("auto", "host", "device"),
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
    dry_run: bool = flag(
        False,
        "show what would be encoded, and what it costs, and stop; captions are not needed",
        refused="this one would train",
    )
    suggest_buckets: int | None = flag(
        None,
        "print at most so many buckets that suit the clips, as a value of --train_resolution, and stop; no captions "
        "are needed",
        least=1,
        refused="this one would train",
    )
    verify: bool = flag(
        False,
        "check every tensor in output_dir against the data, encode nothing, and stop",
        refused="this one would train",
    )
    repair: bool = flag(
        False,
        "check every tensor in output_dir, and encode anew what is damaged or out of date",
        refused="this one would train",
    )
    nccl_timeout: int = flag(600, "seconds that a device waits for the others while none makes progress", least=1)
    use_slicing: bool = idle(False, "clips are encoded one at a time")
    pin_memory: bool = idle(False, "no batch waits for a device")
    num_decode_threads: int = idle(0, "--dataloader_num_workers says how many processes decode")
    num_artifact_workers: int = idle(4, "tensors are written while the next clip is encoded; clips are not copied")


@dataclass(frozen=True)
class GuideFlags:
    """The CogVideo guide's, for its one script that does everything; compared with this script and its model."""

    model_type: str | None = flag(None, "task, which the script's name says", choices=("t2v", "i2v"))
    training_type: str | None = flag(None, "method, which the script's name says", choices=("lora", "sft"))
    model_name: str | None = flag(None, "family of the model, which its config says", choices=MODEL_NAMES)


@dataclass(frozen=True)
class LoaderFlags:
    """Read by the training scripts: which tensors, and how they reach the device."""

    load_tensors: bool = flag(False, "data_root is a folder made by prepare_dataset.py", refused="this one reads clips")
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
    gradient_checkpointing: bool = flag(
        False,
        "recompute blocks in the backward pass: slower, far less memory; a plan then keeps attention outputs at most",
    )
    max_grad_norm: float = flag(1.0, "gradients are scaled down to this norm; 0 leaves them", least=0.0)
    checkpointing_steps: int = flag(500, "optimizer steps between checkpoints", least=1)
    save_every_minutes: float | None = flag(
        None, "minutes after which a checkpoint is saved, in addition to those of --checkpointing_steps", least=0.0
    )
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
    allow_changed: tuple[str, ...] = flag(
        (),
        "settings that may differ from those of the resumed checkpoint; the step and the schedule's phase stay",
        choices=CHANGEABLE,
    )
    allow_tf32: bool = flag(False, "TF32 for fp32 matrix products on a GPU")
    nccl_timeout: int = flag(
        600,
        "seconds that a device waits for the others in a training step, or elsewhere while none makes progress",
        least=1,
    )
    report_to: str | None = flag(None, "tracker beside metrics.jsonl", choices=("none", "wandb", "tensorboard", "all"))
    tracker_name: str | None = flag(None, "project name in the tracker (cogvideox)")
    logging_dir: str = flag("logs", "folder in output_dir for tracker files")


@dataclass(frozen=True)
class LossFlags:
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
class PlanFlags:
    """Read by execution.py: how the transformer's blocks are run. plan.py chooses what is left open."""

    plan: str = flag(
        "auto",
        "how blocks are run: auto is the fastest way that fits the memory; fast keeps weights on the device, and as "
        "many activations as fit; balanced keeps attention outputs, for 24 GB cards; lean keeps next to nothing on "
        "the device; off runs diffusers' own modules",
        choices=("auto", "fast", "balanced", "lean", "off"),
    )
    vram_budget: float | None = flag(
        None, "GiB of the GPU that the run may take, T5 and validation too: plans for a card of that size", least=1.0
    )
    weights_on: str = flag(
        "auto", "where weights of blocks lie: on the device, or on the host, streamed", choices=PLACES
    )
    keep: str = flag(
        "auto",
        "what forward keeps of a block for backward: its input, attention outputs too, those of linear layers too, or "
        "all; the rest is computed again",
        choices=("auto", "input", "attention", "linear", "all"),
    )
    kept_on: str = flag("auto", "where that is kept", choices=PLACES)
    optimizer_state_on: str = flag(
        "auto",
        "where fp32 masters and the optimizer's moments lie; where all weights are trained auto may have those of some "
        "blocks on the device",
        choices=PLACES,
    )
    compile_blocks: str = flag(
        "auto", "compile the blocks with torch.compile; auto does on a GPU", choices=("auto", "yes", "no")
    )
    attention_backend: str = flag(
        "auto",
        "attention kernels; auto is the fastest exact one that is there and passes a check of its gradients; sage, "
        "SageAttention 2, quantizes",
        choices=("auto", "flash-4", "cudnn", "flash", "sage", "cpu"),
    )

    @property
    def asked(self) -> list[str]:
        """The flags that leave something less open, as they are typed."""
        values = dataclasses.asdict(self).items()
        return [f"--{name} {value}" for name, value in values if value not in ("auto", "off", None)]


@dataclass(frozen=True)
class LoraPlanFlags(PlanFlags):
    """The same, where the blocks' own weights are frozen."""

    base_precision: str = flag(
        "auto",
        "type in which the blocks' frozen matrices are stored while training and validating; inference.py loads the "
        "base as it is. auto is the type of the computation; int8 and fp8 take half of bf16, nf4 (QLoRA) a third. How "
        "far that turns the gradients is printed",
        choices=("auto", "int8", "fp8", "nf4"),
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
        refused="this one would not start from it",
    )
    fold_lora_scale: bool = flag(
        False,
        "multiply the result's matrices by the LoRA's scale, with rounding, for loaders that do not read a file's "
        "metadata; a scale that is a power of two needs no flag, it is always multiplied in without rounding",
    )


@dataclass(frozen=True)
class FullFlags:
    """Read by pipeline_folder.py, where all weights are trained."""

    save_pipeline: bool = flag(
        False,
        "make output_dir/pipeline too: a whole pipeline for from_pretrained, of hard links (else copies) to the base's "
        "files and the trained ones; --push_to_hub does not upload it",
        refused="this one makes no transformer of its own; scripts/merge_lora.py makes one with a LoRA",
    )


@dataclass(frozen=True)
class OptimizerFlags:
    """Read by optim.py."""

    optimizer: str = flag(
        "adam",
        "adam has L2, adamw decoupled weight decay; prodigy finds its own step size (give --learning_rate 1); came; or "
        "a class by its dotted name, such as torch.optim.RAdam",
        choices=OPTIMIZERS,
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

    push_to_hub: bool = flag(
        False,
        "upload the result to the Hugging Face hub; the repository is made at the start",
        refused="this one uploads nothing",
    )
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
