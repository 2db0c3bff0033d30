"""skipped.py and finite.py: steps with non-finite gradients are reported and counted, and too many end the run.

Tensors that are not finite are never saved.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from evaluating import split
from fakes import run_alone, save_steps
from running import (
    LORA_SCRIPT,
    WEIGHTS,
    Forked,
    equal,
    finish,
    fork_ranks,
    lora_flags,
    losses,
    metrics,
    python,
    safetensors_of,
    train,
    weights,
)
from safetensors.torch import load_file, save_file
from stepping import values
from torch.nn import Parameter

from cogvideox import loop
from cogvideox.data.cache import TensorCache, open_index
from cogvideox.errors import NonFiniteError
from cogvideox.finite import not_finite
from cogvideox.optimizer import engine
from cogvideox.optimizer.rule import make_masters
from cogvideox.runtime.run import METRICS_NAME
from cogvideox.runtime.skipped import SkippedSteps

NAN, INF = float("nan"), float("inf")


def numbers(skipped: bool, scale: float = 1.0) -> dict[str, float]:
    return {"skipped": float(skipped), "loss_scale": scale}


def ended_at(steps: SkippedSteps, skipped: Callable[[int], bool], last: int, first: int = 1) -> int | None:
    """Adds steps up to ``last``, and returns the step at which the run ended, or None if it did not."""
    for step in range(first, last + 1):
        try:
            steps.add(step, numbers(skipped(step)), [("a", 7)])
        except NonFiniteError:
            return step
    return None


# -- the rule ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("skipped", "end"),
    [
        (lambda step: step > 20, 28),
        (lambda step: step % 8 != 0 and step < 100, None),  # There are seven in a row, again and again.
        (lambda step: step % 2 == 0 and step < 500, 500),  # This is far above one percent.
        (lambda step: step % 100 == 0, None),  # This is exactly one percent.
        (lambda step: step % 99 == 0, 594),  # This is a little more than one percent at the sixth.
        (lambda step: step in (1, 2, 3, 4, 5, 6), 500),
    ],
)
def test_eight_in_a_row_or_more_than_one_percent_end_the_run(
    tmp_path: Path, skipped: Callable[[int], bool], end: int | None
) -> None:
    if end is None and skipped(1):
        assert ended_at(SkippedSteps(run_alone(tmp_path), 0), skipped, 400) is None
    else:
        assert ended_at(SkippedSteps(run_alone(tmp_path), 0), skipped, 1000) == end


@pytest.mark.fault("numbers: fp16 overflows at every step")
def test_an_overflow_that_lowers_the_loss_scale_is_not_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The scale falls from 2 ** 16 to 1 in 16 steps. The next eight, which no scale can prevent, end the run."""
    params = {"w": Parameter(torch.ones(16, dtype=torch.float16))}
    engine = make_masters(params, lambda p: torch.optim.AdamW(p, lr=0.1, fused=True), 1.0, dynamic_scale=True)
    run = run_alone(tmp_path)
    run.precision = "fp16"
    steps = SkippedSteps(run, 0)

    def add(step: int) -> None:
        engine.backward((params["w"].float() * INF).sum())
        steps.add(step, values(engine.step(0.1)), [("a", 7)])

    for step in range(1, 24):
        add(step)
    assert (steps.counted, steps.good_until) == (7, 16)
    with pytest.raises(NonFiniteError, match=r"or start a new run with --mixed_precision bf16$"):
        add(24)
    said = capsys.readouterr().err.splitlines()
    assert "step 1 changed no weight: fp16 overflowed with a loss scale of 65536, which is lowered; not" in said[0]
    assert "1 skipped so far" in said[16]
    assert torch.equal(params["w"], torch.ones_like(params["w"]))


def test_a_resumed_run_continues_to_count(tmp_path: Path) -> None:
    """It counts as if it had not been interrupted, but does not end if no further step is skipped."""
    lines = [{"step": step, "skipped": float(step <= 6 or step > 597)} for step in range(1, 603)]
    lines.insert(300, {"step": 300, "held_out_loss": 1.0})
    (tmp_path / METRICS_NAME).write_text("".join(json.dumps(line) + "\n" for line in lines))
    steps = SkippedSteps(run_alone(tmp_path), 600)  # The last two lines belong to steps that are repeated.
    assert (steps.counted, steps.in_a_row, steps.good_until) == (9, 3, 597)
    assert ended_at(steps, lambda step: True, 700, first=601) == 601
    assert ended_at(SkippedSteps(run_alone(tmp_path), 600), lambda step: False, 700, first=601) is None
    assert ended_at(SkippedSteps(run_alone(tmp_path), 6), lambda step: True, 700, first=7) == 8


def test_an_older_version_s_overflows_are_not_counted(tmp_path: Path) -> None:
    (tmp_path / METRICS_NAME).write_text('{"step": 1, "skipped": 1.0}\n{"step": 2, "skipped": 1.0, "loss_scale": 1}\n')
    run = run_alone(tmp_path)
    run.precision = "fp16"
    assert SkippedSteps(run, 2).counted == 1


# -- messages ----------------------------------------------------------------------------------------------------------


def test_each_skipped_step_is_reported_with_the_samples_of_all_ranks(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = run_alone(tmp_path)
    run.ranks.gather = lambda items: [*items, ("b", 12)]  # type: ignore[method-assign]
    steps = SkippedSteps(run, 0)
    steps.add(3, numbers(skipped=False), [("a", 7)])
    steps.add(4, numbers(skipped=True), [("a", 7)])
    steps.add(5, numbers(skipped=True), [(f"c{k}", 1) for k in range(9)])
    first, second = capsys.readouterr().err.splitlines()
    assert first == (
        "step 4 changed no weight: its gradients were not finite; 1 skipped so far, 1 in a row; "
        "samples: a at timestep 7, b at timestep 12"
    )
    assert "2 skipped so far, 2 in a row" in second
    assert second.endswith("c7 at timestep 1 and 2 more")
    assert (steps.summary() or "").startswith("2 optimizer steps changed no weight")
    assert SkippedSteps(run_alone(tmp_path / "other"), 0).summary() is None


def test_the_error_names_the_last_good_checkpoint_and_the_samples(tmp_path: Path) -> None:
    save_steps(run_alone(tmp_path), 2, 4, 6)
    steps = SkippedSteps(run_alone(tmp_path), 0)
    for step in range(5, 12):
        samples = [("good", 1)] if step < 7 else [("videos/bad.mp4", 9), (f"{step}", 1)]
        steps.add(step, numbers(skipped=True), samples)
    with pytest.raises(NonFiniteError) as error:
        steps.add(12, numbers(skipped=True), [("videos/bad.mp4", 3)])
    assert str(error.value) == (
        "the last 8 optimizer steps, up to 12, were skipped because their gradients were not finite; most of them had "
        "videos/bad.mp4 (6 of 8): check it, or leave it out; the last good checkpoint is "
        f"{tmp_path}/checkpoint-4: resume with --resume_from_checkpoint checkpoint-4, a lower --learning_rate and "
        "--allow_changed learning_rate"
    )


# -- in complete runs --------------------------------------------------------------------------------------------------


@pytest.fixture
def poisoned_from(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Returns a function that makes the losses of all batches from a number on NaN."""

    def poison(first: int) -> None:
        losses_of, calls = loop.losses_of, iter(range(1, 1000))

        def poisoned(*given: Any) -> torch.Tensor:
            right = losses_of(*given)
            return right * NAN if torch.is_grad_enabled() and next(calls) >= first else right

        monkeypatch.setattr(loop, "losses_of", poisoned)

    return poison


FLAGS = ("--load_tensors", "--gradient_accumulation_steps", 1)


@pytest.mark.fault("numbers: NaN loss at every step from one on")
def test_nan_losses_end_the_run_and_keep_earlier_checkpoints(
    model: Path, tensors: Path, tmp_path: Path, poisoned_from: Callable[[int], None], capsys: pytest.CaptureFixture[str]
) -> None:
    poisoned_from(6)
    flags = lora_flags(model, tensors, tmp_path / "lora", *FLAGS, "--max_train_steps", 30, "--use_ema")
    with pytest.raises(NonFiniteError, match=r"up to 13, were .*/checkpoint-4: resume with --resume_from_checkpoint"):
        train([*flags, "--checkpointing_steps", "4", "--checkpoints_total_limit", "1"])
    said = capsys.readouterr().err
    assert [f"step {step} changed no weight" in said for step in (5, 6, 13)] == [False, True, True]
    assert [line["skipped"] for line in metrics(tmp_path / "lora")] == [0.0] * 5 + [1.0] * 8
    four, twelve = (safetensors_of(tmp_path / "lora" / f"checkpoint-{step}") for step in (4, 12))
    assert not equal(four, twelve)  # Step 5 changed the weights.
    assert not (tmp_path / "lora" / WEIGHTS).exists()


@pytest.mark.fault("numbers: a latent that overflows, in one of six clips")
def test_a_few_skipped_steps_are_reported_and_change_nothing(
    model: Path, tensors: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = Path(shutil.copytree(tensors, tmp_path / "tensors"))
    sample = open_index(folder).samples[2]
    overflow(folder, sample.video_keys[0])
    assert train(lora_flags(model, folder, tmp_path / "lora", *FLAGS)) == 0
    said = [line for line in capsys.readouterr().err.splitlines() if "changed no weight" in line]
    assert f"samples: {sample.id} at timestep " in said[0]
    assert "1 optimizer step changed no weight in this run" in said[-1]
    assert sum(line["skipped"] for line in metrics(tmp_path / "lora") if "skipped" in line) == 1
    assert not not_finite(weights(tmp_path / "lora"))


def overflow(folder: Path, key: str) -> None:
    """Makes a number of a cached clip so large that the loss is infinite, although the number is finite."""
    cache = TensorCache(folder)
    moments = cache.read(key)["moments_CFHW"]
    moments[0, 0, 0, 0] = 1e38
    cache.write(key, {"moments_CFHW": moments})


@pytest.mark.slow
@pytest.mark.fault("numbers: gradients that are not finite on one of two ranks, at every step")
def test_all_ranks_skip_and_end_alike(model: Path, tensors: Path, tmp_path: Path) -> None:
    """Each step uses both clips, one on each rank."""
    folder = split(tensors, tmp_path / "tensors", train=slice(2))
    bad, good = open_index(folder).samples
    overflow(folder, bad.video_keys[0])
    flags = lora_flags(model, folder, tmp_path / "lora", *FLAGS, "--max_train_steps", 20, "--checkpointing_steps", 20)
    said, silent = (finish(rank, 3) for rank in fork_ranks(2, python(LORA_SCRIPT, *flags)))
    for step in range(1, 9):
        (line,) = [line for line in said.splitlines() if f"step {step} changed no weight" in line]
        assert f"{bad.id} at timestep" in line
        assert f"{good.id} at timestep" in line
    assert said.count("the last 8 optimizer steps, up to 8, were skipped") == 1
    assert "no checkpoint was saved before" in said.splitlines()[-1]
    assert "Traceback" not in said + silent
    assert "skipped" not in silent
    assert len(losses(tmp_path / "lora")) == 8


@pytest.mark.fault("numbers: infinity in a LoRA weight")
def test_the_script_ends_with_status_3_and_one_line(model: Path, tensors: Path, tmp_path: Path) -> None:
    """The LoRA from which the run starts contains infinity, which the first checkpoint would save."""
    flags = lora_flags(model, tensors, tmp_path / "lora", *FLAGS, "--max_train_steps", 1)
    assert train(flags) == 0
    start = tmp_path / "start.safetensors"
    broken = load_file(tmp_path / "lora" / WEIGHTS)
    name = sorted(broken)[0]
    broken[name][0, 0] = INF
    with_metadata(tmp_path / "lora" / WEIGHTS, broken, start)
    again = lora_flags(model, tensors, tmp_path / "again", *FLAGS, "--lora_path", start)
    said = finish(Forked(python(LORA_SCRIPT, *again)), 3)
    assert "Traceback" not in said
    last = said.splitlines()[-1]
    assert last.startswith(f"{LORA_SCRIPT.name}: checkpoint-2 is not saved: master/")
    assert "holds numbers that are not finite" in last
    assert not list((tmp_path / "again").glob("checkpoint-*"))


def with_metadata(of: Path, tensors: dict[str, torch.Tensor], path: Path) -> None:
    from safetensors import safe_open

    with safe_open(of, "pt") as file:
        save_file(tensors, path, metadata=file.metadata())


# -- saved tensors -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_which_tensors_are_not_finite(value: float, dtype: torch.dtype) -> None:
    bad = torch.zeros(1000, dtype=dtype)
    bad[777] = value
    largest = torch.full((7, 9), torch.finfo(dtype).max, dtype=dtype)
    good = {
        "integers": torch.arange(5),
        "none": torch.zeros(0),
        "largest": largest,
        "least": -largest,
        "one": torch.ones(()),
    }
    assert not_finite(good) == []
    assert not_finite({**good, "bad": bad, "view": bad.view(10, 100).T, "part": bad[:700]}) == ["bad", "view"]


@pytest.mark.fault("numbers: infinity in a master weight, NaN in a moment, NaN in an average")
@pytest.mark.parametrize(
    ("what", "value", "plan"),
    [("master", INF, "off"), ("exp_avg_sq", NAN, "off"), ("average", NAN, "off"), ("master", INF, "lean")],
)
def test_no_checkpoint_has_numbers_that_are_not_finite(
    model: Path, tensors: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str, value: float, plan: str
) -> None:
    """Step 4 is not finite, so the checkpoint of step 2 remains the last one, although the limit is one."""
    step, steps = engine.LocalEngine.step, iter(range(1, 1000))

    def broken(self: Any, *given: Any, **more: Any) -> Any:
        result = step(self, *given, **more)
        if next(steps) == 4:
            tensors = self.masters.tensors() | self.ema.tensors()
            name = next(name for name in tensors if name.startswith(f"{what}/"))
            tensors[name].view(-1)[-1] = value
        return result

    monkeypatch.setattr(engine.LocalEngine, "step", broken)
    flags = lora_flags(model, tensors, tmp_path / "lora", *FLAGS, "--use_ema", "--checkpoints_total_limit", 1)
    with pytest.raises(NonFiniteError, match=rf"^checkpoint-4 is not saved: {what}/.*good .*/checkpoint-2: resume"):
        train([*flags, "--plan", plan])
    assert [path.name for path in (tmp_path / "lora").glob("checkpoint-*")] == ["checkpoint-2"]
    assert not not_finite(safetensors_of(tmp_path / "lora" / "checkpoint-2"))
