"""Finds contradictions between flags, and between flags and the launcher.

``flag_problems`` checks all flags of a script, and the check_ functions compare them with the launcher. Each function
yields problems as text: the flag, its value, the rule and the nearest fix. This module needs only the standard library.
"""

import dataclasses
import difflib
import importlib.util
import os
import re
from collections.abc import Iterator, Sequence

from cogvideox.config.deepspeed import launch_problems
from cogvideox.config.flags import (
    MIXED_PRECISIONS,
    POLYNOMIAL_END,
    SCHEDULES,
    WITH_SNR_GAMMA,
    DataFlags,
    DryRunFlags,
    HubFlags,
    LoraFlags,
    LossFlags,
    PrepareFlags,
    ValidationFlags,
)
from cogvideox.config.foreign_flags import guide_defaults
from cogvideox.config.launch import launch_remarks, network_problems, start_problems
from cogvideox.config.options import (
    CaptionOptions,
    DoctorOptions,
    LoraOptions,
    PrepareOptions,
    SceneOptions,
    ScriptOptions,
    SftOptions,
    TrainOptions,
    asked_of_plan,
    copies_and_shards,
    frame_counts,
    fsdp_offloads,
    fsdp_setting,
    given_flags,
    held_out_flags,
    host_flags,
    image_flags,
    launched_processes,
    parallelism_size,
    precision_of,
    reads_clips,
    resolution,
    samples_per_step,
    separated,
    target_pattern,
    tracker_names,
    trains_on_host,
    under_deepspeed,
    under_fsdp,
    wanted_places,
)
from cogvideox.errors import plural

# The flags of learning rate schedules, with the value that has no effect anyway, and the schedules that use the flag.
SCHEDULE_FLAGS = (
    ("lr_warmup_steps", 0, SCHEDULES[1:]),  # all but constant
    ("lr_num_cycles", 1, ("cosine_with_restarts",)),
    ("lr_power", 1.0, ("polynomial",)),
)
LOW_BIT = ("use_8bit", "use_bf16_moments", "use_4bit", "use_fp8")  # the flags that store moments in few bits
LOW_FOR_PRODIGY = 0.1  # a learning rate below this is probably meant for another optimizer
ONLY_TORCHAO, NOT_TORCHAO = ("use_4bit", "use_fp8"), ("use_bf16_moments", "use_stochastic_rounding")


def flag_problems(options: ScriptOptions, sources: dict[str, str]) -> Iterator[str]:
    """Yields contradictions between flags. Reads no file.

    Args:
        options: The options of the script, with derived values.
        sources: Where each value comes from, by flag.
    """
    if isinstance(options, CaptionOptions | DoctorOptions):
        return
    if isinstance(options, SceneOptions):
        yield from scene_problems(options)
        return
    data: DataFlags = options.data
    given = given_flags(sources)
    yield from bucket_problems(data, given)
    if data.frame_selection == "uniform" and data.fps is not None:
        rule = "spreads the frames over the whole clip, so there is no frame rate"
        yield f"--frame_selection uniform: {rule}; leave out --fps, or use middle, head or random"
    if reads_clips(options) and len(data.repeats) not in (1, len(data.data_root)):
        yield (
            f"--repeats {' '.join(map(str, data.repeats))}: {len(data.repeats)} numbers for "
            f"{plural(len(data.data_root), 'folder')} of --data_root; give one number, or one for each"
        )
    if isinstance(options, PrepareOptions):
        yield from prepare_problems(options.prepare)
        yield from size_problems(data, sources)
    if isinstance(options, TrainOptions):
        yield from train_problems(options)
        yield from dry_run_problems(options.forecast)
        yield from optimizer_problems(options, given)
        yield from loss_problems(options.loss, given)
        yield from best_problems(options)
        if isinstance(options, SftOptions) and options.full.checkpoint_weights_only:
            yield from weights_only_problems(options)
        yield from plan_problems(options)
    if isinstance(options, LoraOptions):
        yield from lora_problems(options.lora)


def dry_run_problems(flags: DryRunFlags) -> Iterator[str]:
    """Yields a problem if --gpu names what --dry_run predicts, and --dry_run is not given."""
    if flags.gpu is not None and not flags.dry_run:
        yield f"--gpu {flags.gpu}: is only used to predict a run; add --dry_run, or leave it out"


def bucket_problems(data: DataFlags, given: set[str]) -> Iterator[str]:
    """Yields contradictions between the flags that list buckets."""
    for text in data.train_resolution:
        if resolution(text) is None:
            yield f"--train_resolution {text}: is not a valid bucket; give FRAMESxHEIGHTxWIDTH, such as 49x480x720"
    lists = sorted({"height_buckets", "width_buckets", "frame_buckets"} & given)
    if data.train_resolution and lists:
        yield f"--train_resolution: contradicts --{', --'.join(lists)}; give one or the other"
    counts = frame_counts(data)
    if data.max_num_frames is not None and min(counts) > data.max_num_frames:
        fix = f"nearest: --max_num_frames {min(counts)}"
        if not chooses_frames(data, given):
            fix = f"to train at that length, add --frame_buckets {data.max_num_frames}"
        yield f"--max_num_frames {data.max_num_frames}: every frame bucket is longer; {fix}"
    if data.bucket_choice == "every" and not (data.train_resolution or {"height_buckets", "width_buckets"} <= given):
        yield "--bucket_choice every: needs buckets that you choose; give --train_resolution"


def size_problems(data: DataFlags, sources: dict[str, str]) -> Iterator[str]:
    """Yields a problem if prepare_dataset.py gets a size of clips as in earlier versions of the factory.

    Here, these flags are those of validation videos, which this script does not make. So they have an origin only if
    they are given.
    """
    sizes = [f"--{name}" for name in ("height", "width") if name in sources]
    if sizes and not chooses_sizes(data, given_flags(sources)):
        rule = "set the size of validation videos in training, and clips would get the nearest of all default sizes"
        yield f"{' and '.join(sizes)}: {rule}; give --height_buckets and --width_buckets instead"


def chooses_frames(data: DataFlags, given: set[str]) -> bool:
    """Returns whether the command says at how many frames clips are trained."""
    return bool(data.train_resolution or "frame_buckets" in given)


def chooses_sizes(data: DataFlags, given: set[str]) -> bool:
    """Returns whether the command says at which sizes clips are trained."""
    return bool(data.train_resolution or {"height_buckets", "width_buckets"} & given)


def prepare_problems(prepare: PrepareFlags) -> Iterator[str]:
    """Yields contradictions between the flags of prepare_dataset.py alone."""
    if not prepare.save_latents_and_embeddings:
        yield "--save_latents_and_embeddings false: the script writes nothing else; leave it out, or use --dry_run"
    if not prepare.output_dir:
        yield "--output_dir: is empty; give a folder for the tensors"
    modes = [name for name in ("dry_run", "suggest_buckets", "verify", "repair") if getattr(prepare, name)]
    if len(modes) > 1:
        yield f"--{modes[0]}: contradicts --{modes[1]}; give one of them"


def scene_problems(options: SceneOptions) -> Iterator[str]:
    """Yields contradictions between the flags of split_scenes.py."""
    scenes, roots = options.scenes, options.data.data_root
    if len(roots) != 1 or options.data.validation_data_root:
        yield "--data_root: a table is for one folder; split one folder at a time, and leave out --validation_data_root"
        return
    assert scenes.table is not None, "it has been derived"
    if not scenes.table.lower().endswith((".csv", ".tsv")):
        nearest = f"{os.path.splitext(scenes.table)[0]}.csv"
        yield f"--table {scenes.table}: must end in .csv or .tsv; nearest: --table {nearest}"
    inside = os.path.join(os.path.abspath(roots[0]), "")
    if os.path.abspath(scenes.table).startswith(inside):
        rule = "is inside data_root, where it would be mistaken for the data set that it is made from"
        yield f"--table {scenes.table}: {rule}; write it next to the folder: --table {inside.rstrip(os.sep)}-scenes.csv"
    if scenes.max_scene_seconds is not None and scenes.max_scene_seconds < 2 * scenes.min_scene_seconds:
        rule = f"must be at least twice --min_scene_seconds {scenes.min_scene_seconds:g}, so that no part is too short"
        yield f"--max_scene_seconds {scenes.max_scene_seconds:g}: {rule}; nearest: {2 * scenes.min_scene_seconds:g}"


def train_problems(options: TrainOptions) -> Iterator[str]:
    """Yields contradictions between the flags of a training script."""
    train = options.train
    if train.no_resume and train.resume_from_checkpoint:
        yield f"--no_resume: contradicts --resume_from_checkpoint {train.resume_from_checkpoint}; give one of them"
    if train.resume_from_checkpoint == "":
        yield "--resume_from_checkpoint: is empty; give a folder, a name in output_dir, or latest, or leave it out"
    if options.loader.load_tensors:
        yield from load_tensors_problems(options)
    optimizer = options.optimizer
    if optimizer.lr_scheduler == "polynomial" and optimizer.learning_rate <= POLYNOMIAL_END:
        yield (
            f"--learning_rate {optimizer.learning_rate:g}: the schedule polynomial ends at {POLYNOMIAL_END:g}; "
            "give a larger rate, or --lr_scheduler constant"
        )
    yield from validation_problems(options.validation)
    yield from hub_problems(options.hub)


def idle_schedule(validation: ValidationFlags, held_out: bool) -> Iterator[str]:
    """Yields remarks about --validation_steps and --validation_epochs if there is nothing to validate.

    Published commands have such flags without a prompt, so the run continues. Only --do_validation without a prompt is
    an error, because it asks for videos.

    Args:
        validation: The flags of validation.
        held_out: Whether there are held-out clips to measure the loss on.
    """
    for name in ("validation_steps", "validation_epochs"):
        value = getattr(validation, name)
        if value is not None and not (validation.settled or held_out):
            rule = "there is no --validation_prompt and no clip of --validation_data_root"
            yield f"--{name} {value}: has no effect; {rule}"


def validation_problems(validation: ValidationFlags) -> Iterator[str]:
    """Yields contradictions between the flags of validation."""
    if validation.do_validation and not validation.settled:
        yield "--do_validation: there is no prompt; give --validation_prompt or --validation_prompts"
    if validation.validation_steps and validation.validation_epochs:
        yield "--validation_steps: contradicts --validation_epochs; give one of them"
    separator = validation.validation_prompt_separator
    if not separator:
        yield "--validation_prompt_separator: is empty; give the text between two prompts, such as :::"
    elif validation.validation_prompt is not None and not separated(validation.validation_prompt, separator):
        yield "--validation_prompt: has no prompt; write one, or leave the flag out"
    if validation.validation_prompt and validation.validation_prompts:
        yield "--validation_prompt: contradicts --validation_prompts; give one of them"
    if validation.validation_dir and not validation.validation_prompts and validation.do_validation is not False:
        yield f"--validation_dir {validation.validation_dir}: names no file; give --validation_prompts too"


def loss_problems(loss: LossFlags, given: set[str]) -> Iterator[str]:
    """Yields contradictions between the flags of the loss, and parameters of weightings that are not used."""
    for name, weightings in (("snr_gamma", WITH_SNR_GAMMA), ("p2_gamma", ("p2",)), ("p2_k", ("p2",))):
        if name in given and loss.loss_weighting not in weightings:
            rule = f"has no effect with --loss_weighting {loss.loss_weighting}"
            yield f"--{name}: {rule}; leave it out, or give --loss_weighting {' or '.join(weightings)}"
    if loss.max_timestep is not None and loss.max_timestep < loss.min_timestep:
        yield (
            f"--max_timestep {loss.max_timestep}: is before --min_timestep {loss.min_timestep}; "
            f"nearest: --max_timestep {loss.min_timestep}"
        )
    if "ema_decay" in given and not loss.use_ema:
        yield "--ema_decay: has no effect without --use_ema; give it too, or leave this out"


def remarks(options: ScriptOptions, sources: dict[str, str]) -> Iterator[str]:
    """Yields remarks about given flags whose effect other flags prevent, or whose values are unusual.

    Published commands have such flags, so the run continues. A value that only says what happens anyway, such as a
    single cycle, is not remarked.

    Args:
        options: The options of the script, with derived values.
        sources: Where each value comes from, by flag.
    """
    given = given_flags(sources)
    found: dict[str, str] = {}
    if not isinstance(options, SceneOptions) and os.path.isdir(options.model.pretrained_model_name_or_path):
        found["revision"] = "the model is a folder"
    if isinstance(options, PrepareOptions | TrainOptions):
        yield from longer_buckets(options.data)
        yield from shorter_buckets(options.data, given) if reads_clips(options) else ()
        if (options.data.num_augmentations or 1) > 1 and not draws_at_random(options.data):
            rule = "all variants of a clip are equal; give --video_reshape_mode random, --frame_selection random"
            found["num_augmentations"] = f"{rule} or --random_flip"
    if isinstance(options, CaptionOptions) and options.caption.endpoint is None:
        found |= dict.fromkeys(("request_timeout", "request_attempts"), "there is no --endpoint to send a request to")
    if isinstance(options, TrainOptions):
        found |= without_effect_on_training(options)
        yield from guide_defaults(sources)
        yield from sizes_of_videos(options, given)
    yield from (f"--{name}: has no effect; {reason}" for name, reason in found.items() if name in given)
    if isinstance(options, TrainOptions):
        yield from training_remarks(options)


def without_effect_on_training(options: TrainOptions) -> Iterator[tuple[str, str]]:
    """Yields (flag, reason) of each flag of a training script whose effect other flags prevent."""
    flags, validation, trackers = options.optimizer, options.validation, tracker_names(options.train.report_to)
    for name, value, schedules in SCHEDULE_FLAGS:
        if flags.lr_scheduler not in schedules and getattr(flags, name) != value:
            yield name, f"--lr_scheduler {flags.lr_scheduler} does not use it; give {' or '.join(schedules)}"
    if options.loss.timestep_sampling == "stratified" and samples_per_step(options, launched_processes()) == 1:
        yield "timestep_sampling", "an optimizer step has one sample; give --gradient_accumulation_steps"
    if options.train.max_train_steps is not None:
        yield "num_train_epochs", "--max_train_steps decides how long the run is"
    if options.train.report_to == "wandb" and not trackers:
        yield "report_to", "WANDB_DISABLED is set, so nothing is sent to wandb"
    if not trackers:
        yield "tracker_name", "there is no tracker; give --report_to"
    if "tensorboard" not in trackers:
        yield "logging_dir", "only tensorboard writes there; give --report_to tensorboard"
    if options.loader.load_tensors:
        yield from ((name, "--load_tensors decodes no clip") for name in ("decode_timeout", "decode_memory"))
    if not validation.settled:
        yield "num_validation_videos", "there is no --validation_prompt"
    if validation.guidance_scale <= 1:
        rule = f"--guidance_scale {validation.guidance_scale:g} turns guidance off; give a scale above 1"
        yield from ((name, rule) for name in ("negative_prompt", "use_dynamic_cfg") if getattr(validation, name))


def training_remarks(options: TrainOptions) -> Iterator[str]:
    """Yields remarks about flags of a training script that fit neither its method, its data nor its optimizer."""
    yield from launch_remarks(options)
    if options.data.image_column and image_flags(options) is None:
        yield "--image_column: has no effect here; a text-to-video model is not conditioned on images"
    if isinstance(options, LoraOptions) and options.optimizer.offload_gradients:
        yield "--offload_gradients: has no effect on a LoRA, whose gradients are small"
    if not options.loader.load_tensors:  # which may contain held-out clips
        yield from idle_schedule(options.validation, bool(options.data.validation_data_root))
    rate = options.optimizer.learning_rate
    if options.optimizer.kind == "prodigy" and rate < LOW_FOR_PRODIGY:
        yield f"--learning_rate {rate:g}: prodigy multiplies the step size that it finds by this; 1 is usual"


def draws_at_random(data: DataFlags) -> bool:
    """Returns whether variants of a clip may differ."""
    return "random" in (data.video_reshape_mode, data.frame_selection) or data.random_flip not in (None, 0.0, 1.0)


def longer_buckets(data: DataFlags) -> Iterator[str]:
    """Yields a remark about buckets that are longer than --max_num_frames, so that no clip is trained at them."""
    name = "train_resolution" if data.train_resolution else "frame_buckets"
    longer = [frames for frames in frame_counts(data) if frames > (data.max_num_frames or frames)]
    if longer:
        rule = f"longer than --max_num_frames {data.max_num_frames}, so no clip is trained at them"
        yield f"--{name}: {' and '.join(map(str, longer))} frames are {rule}; give --max_num_frames {max(longer)}"


def shorter_buckets(data: DataFlags, given: set[str]) -> Iterator[str]:
    """Yields a remark about a --max_num_frames that no bucket uses, because the command chooses no buckets."""
    longest = max(frame_counts(data))
    if not chooses_frames(data, given) and longest < (data.max_num_frames or 0):
        rule = f"clips are trained with {longest} frames, the default bucket"
        yield f"--max_num_frames {data.max_num_frames}: {rule}; give --frame_buckets {data.max_num_frames}"


def sizes_of_videos(options: TrainOptions, given: set[str]) -> Iterator[str]:
    """Yields a remark about a size of videos that is likely meant for the clips, as in the examples of diffusers."""
    data, video = options.data, options.validation
    if {"height", "width"} <= given and reads_clips(options) and not chooses_sizes(data, given):
        rule = "are the size of validation videos; clips are trained at the nearest of all default sizes"
        fix = f"to train at this size, give --height_buckets {video.height} --width_buckets {video.width}"
        yield f"--height {video.height} and --width {video.width}: {rule}; {fix}"


def best_problems(options: TrainOptions) -> Iterator[str]:
    """Yields which flags are missing for --keep_best, --export_best and --stop_when_worse."""
    train = options.train
    if train.export_best and not train.keep_best:
        yield "--export_best: no checkpoint is kept for it; add --keep_best"
    for given in held_out_flags(options):
        if not options.data.validation_data_root and not options.loader.load_tensors:
            yield f"{given}: there are no clips to measure the loss on; give --validation_data_root"


def weights_only_problems(options: TrainOptions) -> Iterator[str]:
    """Yields what a checkpoint without optimizer state and master weights cannot do."""
    if options.loss.use_ema:
        rule = "such a checkpoint has one set of weights, and a resumed run needs the trained ones and their average"
        yield f"--checkpoint_weights_only: contradicts --use_ema; {rule}; leave one of them out"
    if options.train.export_best:
        rule = "the best checkpoint cannot be loaded into a run that has other master weights"
        fix = "leave one of them out; --resume_from_checkpoint checkpoint-N --max_train_steps N exports a checkpoint"
        yield f"--checkpoint_weights_only: contradicts --export_best; {rule}; {fix}"


def hub_problems(hub: HubFlags) -> Iterator[str]:
    """Yields contradictions between the flags of the hub, and a token of impossible form."""
    if not hub.push_to_hub:
        for name in ("hub_token", "hub_model_id", "hub_private", "hub_overwrite"):
            if getattr(hub, name) not in (None, False):
                yield f"--{name}: has no effect without --push_to_hub; give it too, or leave this out"
    if hub.hub_token is not None and not re.fullmatch("[!-~]+", hub.hub_token):
        yield "--hub_token: is empty, or contains spaces or other characters that tokens never have; copy it again"


def optimizer_problems(options: TrainOptions, given: set[str]) -> Iterator[str]:
    """Yields contradictions between the flags of the optimizer, and flags that the chosen optimizer does not have."""
    flags = options.optimizer
    for item in dataclasses.fields(flags):
        only = item.metadata["only"]
        if only and flags.kind not in only and item.name in given and getattr(flags, item.name) is not False:
            rule = f"has no effect with --optimizer {flags.optimizer}"
            yield f"--{item.name}: {rule}; leave it out, or give --optimizer {' or '.join(only)}"
    low = [f"--{name}" for name in LOW_BIT if getattr(flags, name)]
    if len(low) > 1:
        yield f"{low[0]}: contradicts {low[1]}; give one of them"
    for name in ONLY_TORCHAO:
        if getattr(flags, name) and not flags.use_torchao and len(low) == 1:
            yield f"--{name}: only torchao has such an optimizer; add --use_torchao"
    for name in NOT_TORCHAO:
        if getattr(flags, name) and flags.use_torchao:
            yield f"--{name}: torchao's optimizers do not have this; leave --use_torchao out"
    if flags.use_stochastic_rounding and precision_of(options.train.mixed_precision) != "bf16":
        rule = "concerns weights in bf16 only"
        yield f"--use_stochastic_rounding: {rule}; give --mixed_precision bf16, or leave it out"
    if flags.use_torchao and not low:
        yield "--use_torchao: chooses the library for low-bit moments; add --use_8bit, --use_4bit or --use_fp8"
    if flags.offload_gradients and not flags.use_cpu_offload_optimizer:
        yield "--offload_gradients: needs optimizer state in host memory; add --use_cpu_offload_optimizer"


def lora_problems(lora: LoraFlags) -> Iterator[str]:
    """Yields contradictions between the flags of a LoRA, and values that are not valid."""
    yield from target_problems(lora.target_modules)
    init = lora.init_lora_weights
    given = f"--init_lora_weights {init}"
    if not re.fullmatch("default|gaussian|pissa|pissa_niter_[1-9][0-9]*", init):
        yield f"{given}: must be one of default, gaussian, pissa, pissa_niter_N; nearest: {nearest_init(init)}"
    elif lora.lora_path and init != "default":
        yield f"{given}: contradicts --lora_path {lora.lora_path}, which has the matrices to start from; give one"
    if init.startswith("pissa") and lora.use_dora:
        yield f"{given}: contradicts --use_dora, with which the result is not a plain LoRA; give one of them"
    if not lora.lora_alpha:
        rule = "the output of the LoRA is multiplied by it, so that nothing would be trained"
        yield f"--lora_alpha 0: {rule}; nearest: --lora_alpha {lora.rank}"


def plan_problems(options: TrainOptions) -> Iterator[str]:
    """Yields what a plan cannot run, as far as flags show it. The rest is checked when the model is loaded."""
    asked, wanted = ", ".join(asked_of_plan(options)), wanted_places(options)
    for name, place in (("use_cpu_offload_optimizer", "optimizer_state_on"), ("offload_gradients", "weights_on")):
        given = getattr(options.plan, place)
        if given not in ("auto", getattr(wanted, place)):
            yield f"--{name}: contradicts --{place} {given}; leave one of them out"
    if options.train.gradient_checkpointing and options.plan.keep in ("linear", "all"):
        rule = "which saves more than the input and the attention outputs of a block; leave one of them out"
        yield f"--gradient_checkpointing: contradicts --keep {options.plan.keep}, {rule}"
    if asked and options.plan.plan == "off":
        yield f"{asked}: contradicts --plan off; leave one of them out"
    if asked and isinstance(options, LoraOptions) and options.lora.use_dora:
        yield f"{asked}: contradicts --use_dora, which needs diffusers modules; leave one of them out"
    if trains_on_host(options) and launched_processes() > 1:
        yield f"{asked}: only one GPU can train weights that are stored on the host; launch one process"
    if options.plan.sequence_parallel > 1 and isinstance(options, LoraOptions) and options.lora.lora_dropout > 0:
        rule = "the masks of dropout are drawn for all tokens of a sample; leave one of them out"
        yield f"--sequence_parallel: contradicts --lora_dropout {options.lora.lora_dropout:g}; {rule}"


def sequence_problems(options: TrainOptions) -> Iterator[str]:
    """Yields how --sequence_parallel contradicts the launcher."""
    parallel, world = options.plan.sequence_parallel, launched_processes()
    if world % parallel:
        fix = f"launch with --num_processes {-(-world // parallel) * parallel}, or leave it out"
        yield f"--sequence_parallel {parallel}: must divide the number of processes, {world}; {fix}"


def target_problems(target_modules: Sequence[str]) -> Iterator[str]:
    """Yields problems of the value of --target_modules itself."""
    patterns = [target for target in target_modules if target_pattern((target,)) is not None]
    if patterns and len(target_modules) > 1:
        yield f"--target_modules {patterns[0]}: there can be only one regular expression; join them: 'one|other'"
    for text in patterns:
        try:
            re.compile(text)
        except re.error as error:
            yield f"--target_modules {text}: is not a valid regular expression: {error}; give names, or fix it"


def nearest_init(text: str) -> str:
    """Returns the value of --init_lora_weights that is most similar to a text."""
    known = ("default", "gaussian", "pissa", "pissa_niter_4")
    return (difflib.get_close_matches(text, known, 1, 0.3) or known)[0]


def load_tensors_problems(options: TrainOptions) -> Iterator[str]:
    """Yields contradictions with --load_tensors."""
    if len(options.data.data_root) > 1:
        yield "--data_root: --load_tensors takes one prepared folder; prepare all folders of clips into one"
    if options.data.validation_data_root:
        rule = "with --load_tensors, held-out clips are those of the prepared folder"
        yield f"--validation_data_root: {rule}; give this flag to prepare_dataset.py instead"


def check_launcher(options: TrainOptions) -> Iterator[str]:
    """Yields problems of the configuration of accelerate, for args.parse."""
    if (precision := precision_of(options.train.mixed_precision)) not in MIXED_PRECISIONS:
        rule = f"is not supported; set it to {', '.join(MIXED_PRECISIONS)}, or give --mixed_precision"
        yield f"accelerate launch: mixed_precision {precision}: {rule}"
    yield from sequence_problems(options)
    yield from network_problems()
    if unstarted := list(start_problems()):
        yield from unstarted
        return
    if under_deepspeed():
        yield from (f"accelerate launch (DeepSpeed): {problem}" for problem in launch_problems(options))
    if under_fsdp():
        yield from (f"accelerate launch (FSDP): {problem}" for problem in fsdp_problems(options))
    elif os.environ.get("ACCELERATE_USE_PARALLELISM_CONFIG", "false").lower() == "true":
        yield "accelerate launch: parallelism_config: needs FSDP; remove it, or use accelerate_configs/hsdp.yaml"


def fsdp_problems(options: TrainOptions) -> Iterator[str]:
    """Yields what a run under FSDP cannot do, each with the nearest fix."""
    if fsdp_setting("version", "1") != "2":
        yield "only version 2 is supported; set fsdp_version: 2 in its configuration"
    if options.method == "lora":
        yield "shards all weights, and a LoRA trains few; launch with accelerate_configs/uncompiled_2.yaml"
    if fsdp_setting("activation_checkpointing") == "true":
        yield "fsdp_activation_checkpointing: the plan decides what is saved; set it to false, and give --keep"
    if fsdp_setting("cpu_ram_efficient_loading") == "true":
        yield "fsdp_cpu_ram_efficient_loading: each process maps the files of the weights already; set it to false"
    if fsdp_setting("reshard_after_forward", "true") == "false":
        yield "fsdp_reshard_after_forward: false would keep all weights gathered until backward; set it to true"
    if "FSDP_IGNORED_MODULES" in os.environ:
        yield "fsdp_ignored_modules: all weights are trained and sharded; leave it out"
    for name in ("tp", "cp", "sp"):
        if parallelism_size(name) > 1:
            given = f"parallelism_config_{name}_size {parallelism_size(name)}"
            yield f"{given}: is not supported; leave it out, and give --sequence_parallel to divide long clips"
    plan, flags = options.plan, options.optimizer
    if plan.plan == "off":
        yield "--plan off: the weights are sharded; give --plan auto, fast or balanced"
    for given in host_flags(options):
        yield f"{given}: sharded weights and their state move together; set fsdp_offload_params: true instead"
    for name, value in (("--weights_on", plan.weights_on), ("--optimizer_state_on", plan.optimizer_state_on)):
        if value == "device" and fsdp_offloads():
            yield f"{name} device: contradicts fsdp_offload_params: true; leave out one of them"
    if flags.use_cpu_offload_optimizer:
        yield "--use_cpu_offload_optimizer: set fsdp_offload_params: true instead"
    world = launched_processes()
    copies, shards = copies_and_shards(world)
    if world == 1:
        yield "one process has nothing to shard; give --num_processes 2 or more, or launch with uncompiled_1.yaml"
    elif copies * shards != world or shards < 2:
        yield (
            f"dp_replicate_size {copies} times dp_shard_size {shards} must be the number of processes, {world}, with "
            "at least 2 shards; change one of them, or --num_processes"
        )


def check_trackers(options: TrainOptions) -> Iterator[str]:
    """Yields problems of --report_to, for args.parse."""
    wanted = tracker_names(options.train.report_to)
    for name in wanted:
        if importlib.util.find_spec(name) is None:
            yield f"--report_to {name}: {name} is not installed; pip install {name}, or leave the flag out"
    logins = map(os.path.expanduser, ("~/.netrc", "~/_netrc"))  # Path.home raises an error for a user without a home
    login = os.environ.get("WANDB_API_KEY") or any(map(os.path.exists, logins))
    if "wandb" in wanted and not login and os.environ.get("WANDB_MODE") not in ("offline", "dryrun", "disabled"):
        yield "--report_to wandb: not logged in; run `wandb login`, or set WANDB_MODE=offline"
