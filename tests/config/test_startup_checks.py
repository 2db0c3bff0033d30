"""Tests that the comparisons of a run with diffusers, before the first step and at the end, find planted faults.

The scripts are run as a user runs them. test_parity.py and test_block_check.py test the comparisons themselves.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import block_faults
import pytest
import torch
from block_faults import BLOCK_FAULTS
from running import WEIGHTS, lora_flags, sft_flags, train, train_all, train_image, train_image_all

from cogvideox import loop
from cogvideox.data import dataset
from cogvideox.data.sampler import BucketBatchSampler
from cogvideox.evaluation import parity
from cogvideox.evaluation.parity import ParityError
from cogvideox.export.publish import RECIPE_NAME
from cogvideox.model import diffusion, rope, tasks
from cogvideox.planning.block_check import BlockError

pytestmark = pytest.mark.usefixtures("small")
Tiny = Callable[[str], Path]
FAULT = pytest.mark.fault("numbers: a training computation that differs from diffusers")
TWO = tuple(BLOCK_FAULTS)[:2]  # the sign of the rotation, and the modulations
SCRIPTS = {"lora": (train, lora_flags), "all": (train_all, sft_flags)}
IMAGE_SCRIPTS = {"lora": (train_image, lora_flags), "all": (train_image_all, sft_flags)}


def height_for_width(right: Any, self: Any, frames: int, height: int, width: int) -> Any:
    """Swaps height and width: a quarter of each head is for time, and half of the rest for each of the two."""

    def swapped(table: torch.Tensor) -> torch.Tensor:
        time, rest = table.tensor_split([table.shape[1] // 4], dim=1)
        return torch.cat([time, *reversed(rest.chunk(2, dim=1))], dim=1)

    return tuple(map(swapped, right(self, frames, height, width)))


def later(right: Any, self: Any, frames: int, height: int, width: int) -> Any:
    return tuple(table[height * width // 4 :] for table in right(self, frames + 1, height, width))


def in_compute_type(right: Any, transformer: Any, prompt_BLD: Any, *rest: Any, **more: Any) -> Any:
    def called(timestep: Any, **arguments: Any) -> Any:
        return transformer(timestep=timestep.to(prompt_BLD.dtype), **arguments)

    return right(called, prompt_BLD, *rest, **more)


def channels_swapped(right: Any, transformer: Any, *rest: Any, **more: Any) -> Any:
    def called(hidden_states: Any, **arguments: Any) -> Any:
        return transformer(hidden_states=hidden_states.roll(hidden_states.shape[2] // 2, 2), **arguments)

    return right(called, *rest, **more)


def noise_as_target(_: Any, schedule: Any, predict: Any, x0: Any, noise: Any, timestep: Any) -> Any:
    found = predict(schedule.add_noise(x0, noise, timestep), timestep)
    return (found.float() - noise).square().mean(dim=(1, 2, 3, 4))


def doubled_log_deviation(_: Any, moments: Any, noise: Any) -> Any:
    mean, log_variance = moments.float().chunk(2)
    return mean + log_variance.clamp(-30.0, 20.0).exp() * noise


# The owner and the name of the function that is replaced, and its replacement, whose first argument is the right one.
CLIP_FAULTS: dict[str, tuple[Any, str, Callable[..., Any]]] = {
    "rotary time one frame later": (rope.RotaryTables, "_compute", later),
    "rotary height and width swapped": (rope.RotaryTables, "_compute", height_for_width),
    "standard deviation without its half": (dataset, "sample_posterior", doubled_log_deviation),
    "noise as the target": (diffusion, "loss", noise_as_target),
    "clip and noise swapped": (diffusion, "loss", lambda right, s, p, x0, e, t: right(s, p, e, x0, t)),
    "timestep in the compute type": (tasks, "velocity_predictor", in_compute_type),
}
IMAGE_FAULTS: dict[str, tuple[Any, str, Callable[..., Any]]] = {
    "image and noise channels swapped": (tasks, "velocity_predictor", channels_swapped),
    "image latents scaled twice": (tasks, "image_scale", lambda right, *arguments: right(*arguments) ** 2),
}


def plant(patch: pytest.MonkeyPatch, fault: str) -> None:
    if fault in BLOCK_FAULTS:
        block_faults.plant(patch, fault)
        return
    owner, name, wrong = (CLIP_FAULTS | IMAGE_FAULTS)[fault]
    right = getattr(owner, name)
    # A fault in a source file would be in every module that imports the function.
    for place in {owner, parity if hasattr(parity, name) else owner}:
        patch.setattr(place, name, lambda *arguments, **more: wrong(right, *arguments, **more))


class FirstStepError(Exception):
    """Raised when a run has passed all checks."""


def no_steps(patch: pytest.MonkeyPatch) -> None:
    """Ends a run before its first step."""

    def passed(*_: Any) -> None:
        raise FirstStepError

    patch.setattr(BucketBatchSampler, "__iter__", passed)


@FAULT
@pytest.mark.parametrize("method", SCRIPTS)
@pytest.mark.parametrize("fault", [None, *CLIP_FAULTS, *TWO])
def test_no_fault_trains_clips(
    model: Path, tensors: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str | None, method: str
) -> None:
    stops(monkeypatch, fault, *SCRIPTS[method], model, tensors, tmp_path / "out")


@FAULT
@pytest.mark.parametrize("method", IMAGE_SCRIPTS)
@pytest.mark.parametrize("fault", [None, *IMAGE_FAULTS])
def test_no_fault_trains_images(
    tiny: Tiny, image_tensors: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str | None, method: str
) -> None:
    stops(monkeypatch, fault, *IMAGE_SCRIPTS[method], tiny("5b-i2v"), image_tensors, tmp_path / "out")


def stops(
    patch: pytest.MonkeyPatch, fault: str | None, script: Any, flags_of: Any, model: Path, data: Path, output: Path
) -> None:
    """A run with a fault ends in a check, and one without it gets as far as its first step."""
    no_steps(patch)
    if fault is not None:
        plant(patch, fault)
    flags = flags_of(model, data, output, "--load_tensors", "--plan", "fast", "--mixed_precision", "bf16")
    if fault is None:
        with pytest.raises(FirstStepError):
            script(flags)
        return
    with pytest.raises((ParityError, BlockError), match="nothing was trained; please report this"):
        script(flags)


# -- the export --------------------------------------------------------------------------------------------------------


@FAULT
@pytest.mark.parametrize("method", SCRIPTS)
@pytest.mark.parametrize("plan", ["fast", "lean"])
@pytest.mark.parametrize("fault", [None, *TWO])
def test_the_result_is_run_by_diffusers_alone(
    model: Path,
    tensors: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    fault: str | None,
    plan: str,
    method: str,
) -> None:
    """Without the check before the first step, faults of the blocks are found when the result is written."""
    script, flags_of = SCRIPTS[method]
    monkeypatch.setattr(loop, "check_blocks", lambda *_: None)
    flags = flags_of(model, tensors, tmp_path / "out", "--load_tensors", "--plan", plan, "--max_train_steps", 1)
    if fault is None:
        assert script(flags) == 0
        assert "run by diffusers alone, in a new transformer: max |difference| " in capfd.readouterr().err
        return
    plant(monkeypatch, fault)
    with pytest.raises(RuntimeError, match="diffusers' own blocks give another output than those of training"):
        script(flags)
    assert not (tmp_path / "out" / RECIPE_NAME).exists()


@pytest.mark.parametrize(
    "flags",
    [
        ("--plan", "fast", "--base_precision", "int8"),
        ("--mixed_precision", "bf16", "--plan", "lean"),
        ("--use_dora",),
        ("--lora_alpha", "6", "--fold_lora_scale", "--plan", "fast"),
        ("--init_lora_weights", "pissa", "--plan", "fast"),
    ],
)
def test_every_kind_of_result_is_the_same_in_diffusers(
    model: Path, tensors: Path, tmp_path: Path, flags: tuple[str, ...]
) -> None:
    output = tmp_path / "out"
    assert train(lora_flags(model, tensors, output, "--load_tensors", "--max_train_steps", 1, *flags)) == 0
    assert (output / WEIGHTS).exists()
