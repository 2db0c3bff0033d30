"""Compares the configuration of DeepSpeed with the flags of a run.

accelerate passes its deepspeed_config to the scripts in environment variables, and a deepspeed_config_file of the user
by its path. Batch size, accumulation, clipping, precision and optimizer come from the flags, so a configuration that
says something else about them is refused. This module needs only the standard library.
"""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cogvideox.config.options import (
    LoraOptions,
    TrainOptions,
    asked_of_plan,
    dynamo_backend,
    host_flags,
    launched_processes,
    precision_of,
)

AUTO = "auto"
ZERO_BUCKET = 5 * 10**8  # elements of the gradients that DeepSpeed sums over the processes at a time, at most
OFFLOADED = ("offload_optimizer", "offload_param")
OFFLOADING = {"device", "pin_memory", "buffer_count", "buffer_size", "max_in_cpu", "fast_init"}
# What a deepspeed_config_file may set, by section: what flags decide and must agree with, and what changes only memory,
# speed and logs. Other settings change results, such as quantized gradients, or put state where ZeroWeights
# (optimizer/zero_weights.py) does not find it, such as the "ratio" of an offloaded optimizer.
SUPPORTED = {
    "": {
        *("zero_optimization", "bf16", "fp16", "optimizer", "scheduler", "gradient_clipping", "train_batch_size"),
        *("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "zero_allow_untested_optimizer"),
        *("zero_force_ds_cpu_optimizer", "steps_per_print", "wall_clock_breakdown", "memory_breakdown", "dump_state"),
        *("tensorboard", "wandb", "csv_monitor", "comms_logger", "flops_profiler"),
    },
    "bf16": {"enabled"},
    "fp16": {
        *("enabled", "loss_scale", "initial_scale_power", "loss_scale_window", "hysteresis", "min_loss_scale"),
        "consecutive_hysteresis",
    },
    "zero_optimization": {
        *("stage", *OFFLOADED, "overlap_comm", "contiguous_gradients", "reduce_scatter", "reduce_bucket_size"),
        *("allgather_partitions", "allgather_bucket_size", "sub_group_size", "memory_efficient_linear"),
        *("stage3_prefetch_bucket_size", "stage3_param_persistence_threshold", "stage3_max_live_parameters"),
        *("stage3_max_reuse_distance", "stage3_gather_16bit_weights_on_model_save"),
    },
    "zero_optimization.offload_optimizer": OFFLOADING,
    "zero_optimization.offload_param": OFFLOADING,
}


def given_file() -> str | None:
    """Returns the path of the deepspeed_config_file of accelerate's configuration, if it has one."""
    path = os.environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", "none")
    return None if path == "none" else path


def file_settings(path: str | None) -> dict[str, Any]:
    """Returns the content of a deepspeed_config_file; nothing if there is no file, or none that can be read."""
    try:
        settings = json.loads(Path(path).read_text()) if path else {}
    except (OSError, ValueError):
        return {}
    return settings if isinstance(settings, dict) else {}


def section(settings: dict[str, Any], name: str) -> dict[str, Any]:
    """Returns a section of a configuration of DeepSpeed, empty if it is not there."""
    found = settings.get(name)
    return found if isinstance(found, dict) else {}


def zero_stage() -> str:
    """Returns the stage of ZeRO as text, from the user's file or from accelerate's configuration."""
    stage = section(file_settings(given_file()), "zero_optimization").get("stage", AUTO)
    return os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2") if stage == AUTO else str(stage)


def offload_device(what: str) -> str:
    """Returns where "offload_optimizer" or "offload_param" puts its tensors; "none" means on the GPU."""
    zero = section(file_settings(given_file()), "zero_optimization")
    device = section(zero, what).get("device", AUTO)
    return os.environ.get(f"ACCELERATE_DEEPSPEED_{what.upper()}_DEVICE", "none") if device == AUTO else str(device)


def sums_gradients(processes: int, passes: int, offloads: bool) -> bool:
    """Returns whether ZeRO-2 has to collect gradients in fp32, for which it keeps this process's share on the GPU.

    They need not be collected if each of them comes from a single process and backward pass, and is copied to the host.

    Args:
        processes: The number of processes.
        passes: The number of forward and backward passes in an optimizer step.
        offloads: Whether the optimizer is on the host.
    """
    return processes > 1 or passes > 1 or not offloads


def launch_problems(options: TrainOptions) -> Iterator[str]:
    """Yields what the configuration says against the flags, and what does not work in it, each with the nearest fix."""
    path = given_file()
    if path and not section(file_settings(path), "zero_optimization"):
        yield f"deepspeed_config_file {path}: is not a JSON file with a section zero_optimization; give another file"
        return
    yield from zero_problems(options)
    yield from placement_problems(options)
    for name in unsupported_settings(file_settings(path)):
        yield f"{name}: is not supported, because it may change the result or a checkpoint; remove it from {path}"
    settings = launched_settings() | file_settings(path)
    for name, (flag, expected) in expected_settings(options).items():
        found = setting(settings, name)
        if found not in (None, AUTO) and found != expected:
            fix = f"leave it out{', or set it to auto' if path else ''}"
            yield f"{name} {json.dumps(found)}: contradicts {flag}, which decides; {fix}"
    for name in ("optimizer", "scheduler"):
        if name in settings:
            yield f"{name}: --optimizer and --lr_scheduler decide; remove this section from {path}"


def unsupported_settings(settings: dict[str, Any]) -> Iterator[str]:
    """Yields the dotted names of settings that are not in SUPPORTED."""
    for group, names in SUPPORTED.items():
        found = settings
        for name in filter(None, group.split(".")):
            found = section(found, name)
        yield from (f"{group}.{name}".lstrip(".") for name in found if name not in names)


def launched_settings() -> dict[str, Any]:
    """Returns what accelerate's own deepspeed_config says that flags decide, by DeepSpeed's names."""
    names = ("gradient_accumulation_steps", "gradient_clipping")
    given = {name: os.environ.get(f"ACCELERATE_{name.upper()}", AUTO) for name in names}
    return {name: json.loads(text) for name, text in given.items() if text.replace(".", "", 1).isdigit()}


def setting(settings: dict[str, Any], name: str) -> Any:
    """Returns a setting by a dotted name, or None."""
    group, _, key = name.rpartition(".")
    return (section(settings, group) if group else settings).get(key)


def expected_settings(options: TrainOptions) -> dict[str, tuple[str, Any]]:
    """Returns, by the name of each setting that flags decide, the flag as it is typed and the value that it gives."""
    train, precision = options.train, precision_of(options.train.mixed_precision)
    batch = f"--train_batch_size {train.train_batch_size}"
    steps = f"--gradient_accumulation_steps {train.gradient_accumulation_steps}"
    samples = train.train_batch_size * train.gradient_accumulation_steps * launched_processes()
    return {
        "train_micro_batch_size_per_gpu": (batch, train.train_batch_size),
        "gradient_accumulation_steps": (steps, train.gradient_accumulation_steps),
        "train_batch_size": (f"{batch}, {steps} and the number of processes", samples),
        "gradient_clipping": (f"--max_grad_norm {train.max_grad_norm:g}", train.max_grad_norm),
        "bf16.enabled": (f"--mixed_precision {precision}", precision == "bf16"),
        "fp16.enabled": (f"--mixed_precision {precision}", precision == "fp16"),
        "fp16.loss_scale": ("--mixed_precision fp16, whose loss scale adapts", 0),
    }


def zero_problems(options: TrainOptions) -> Iterator[str]:
    """Yields what is not supported of ZeRO."""
    stage = zero_stage()
    if stage not in ("2", "3"):
        yield f"zero_stage {stage}: only 2 and 3 are supported; set it to 2"
    if stage == "3" and options.method == "lora":
        yield (
            "zero_stage 3: divides all weights between the processes, and a LoRA trains few; launch with "
            "accelerate_configs/uncompiled_2.yaml, and see --plan for less memory"
        )
    backend = dynamo_backend()
    if stage == "3" and backend != "no":
        yield f"dynamo_backend {backend}: blocks cannot be compiled with zero_stage 3; set dynamo_backend to no"
    for what in OFFLOADED:
        if offload_device(what) not in ("none", "cpu"):
            yield f"{what}_device {offload_device(what)}: only cpu is supported; set it to cpu or none"
    if stage != "3" and offload_device("offload_param") != "none":
        yield f"offload_param_device {offload_device('offload_param')}: needs zero_stage 3; set it to none"
    zero = section(file_settings(given_file()), "zero_optimization")
    if zero.get("memory_efficient_linear"):
        yield "memory_efficient_linear true: changes the rounding of all linear layers; set it to false"


def placement_problems(options: TrainOptions) -> Iterator[str]:
    """Yields the flags of the plan that ZeRO cannot follow."""
    if zero_stage() == "3" and (asked := ", ".join(asked_of_plan(options))):
        yield f"{asked}: zero_stage 3 runs diffusers' own blocks; leave it out, or launch with fsdp2.yaml"
        return
    for given in host_flags(options):
        yield f"{given}: DeepSpeed places weights and state; leave it out, and set offload_optimizer_device: cpu"
    if options.plan.optimizer_state_on == "device" and offload_device("offload_optimizer") == "cpu":
        yield "--optimizer_state_on device: contradicts offload_optimizer_device cpu; leave out one of them"
    if isinstance(options, LoraOptions) and options.plan.base_precision != "auto":
        yield f"--base_precision {options.plan.base_precision}: is not supported under DeepSpeed; give auto"
