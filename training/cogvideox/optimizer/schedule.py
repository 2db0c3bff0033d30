"""The learning rate of each step, and what to tell the user about it."""

import math

from cogvideox.config.flags import POLYNOMIAL_END, OptimizerFlags
from cogvideox.errors import plural

SAME_RATE = 1e-3  # relative difference up to which two rates count as equal; a slightly longer run changes less


def learning_rate(flags: OptimizerFlags, step: int, total_steps: int, global_batch: int) -> float:
    """Returns the learning rate of an optimizer step, counted from 0, in a run of ``total_steps`` steps."""
    peak = flags.learning_rate * (global_batch if flags.scale_lr else 1)
    return peak * schedule_factor(flags, step, total_steps, peak) if peak else 0.0


def schedule_factor(flags: OptimizerFlags, step: int, total_steps: int, peak: float) -> float:
    """Returns the factor, 0 to 1, of the peak rate at a step, as the schedulers of diffusers.optimization do."""
    name, warmup = flags.lr_scheduler, flags.lr_warmup_steps
    if name == "constant":
        return 1.0
    if step < warmup:
        return step / warmup
    if name == "constant_with_warmup":
        return 1.0
    progress = (step - warmup) / max(1, total_steps - warmup)
    if name == "linear":
        return max(0.0, 1.0 - progress)
    if name == "cosine":
        return max(0.0, 0.5 * (1.0 + math.cos(math.pi * progress)))
    if name == "cosine_with_restarts":
        return 0.0 if progress >= 1.0 else 0.5 * (1.0 + math.cos(math.pi * (flags.lr_num_cycles * progress % 1.0)))
    if step > total_steps:
        return POLYNOMIAL_END / peak
    remaining = 1.0 - (step - warmup) / max(1, total_steps - warmup)
    return ((peak - POLYNOMIAL_END) * remaining**flags.lr_power + POLYNOMIAL_END) / peak


def warm_up_note(flags: OptimizerFlags, total_steps: int, global_batch: int) -> str | None:
    """Returns a line for the user if a run ends before its learning rate has reached the peak, else None.

    Args:
        flags: The flags of the optimizer.
        total_steps: The length of the run.
        global_batch: Samples per step over all ranks.
    """
    warmup = flags.lr_warmup_steps
    if flags.lr_scheduler == "constant" or not flags.learning_rate or total_steps > warmup:
        return None
    last, peak = (learning_rate(flags, step, warmup + 1, global_batch) for step in (total_steps - 1, warmup))
    return (
        f"the learning rate rises to {last:.3g} and never reaches {peak:.3g}: --lr_warmup_steps {warmup} is not less "
        f"than the {plural(total_steps, 'step')} of this run; give --lr_warmup_steps {total_steps // 10}"
    )


def rate_jump(flags: OptimizerFlags, then: float, step: int, total_steps: int, global_batch: int) -> str | None:
    """Returns a line for the user if a resumed run does not continue its learning rate schedule, else None.

    Args:
        flags: The flags of the optimizer now.
        then: The learning rate that the last step of the run had.
        step: The number of steps that are done.
        total_steps: The length of the run now, which may differ from before.
        global_batch: Samples per step over all ranks.
    """
    now, following = (learning_rate(flags, number, total_steps, global_batch) for number in (step - 1, step))
    if step >= total_steps or any(math.isclose(then, rate, rel_tol=SAME_RATE) for rate in (now, following)):
        return None
    return (
        f"the learning rate jumps from {then:.3g} at step {step} to {following:.3g} at step {step + 1}: "
        f"--lr_scheduler {flags.lr_scheduler} is now that of a run of {total_steps} steps with --learning_rate "
        f"{flags.learning_rate:g}"
    )
