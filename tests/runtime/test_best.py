"""best.py: the checkpoint with the lowest held-out loss is kept, and --export_best exports it."""

from __future__ import annotations

import gc
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from evaluating import split
from fakes import FakeEngine, flip_byte, run_alone, save_steps, saver_of
from running import PROMPT, equal, lora_flags, train, weights

from cogvideox.errors import UsageError
from cogvideox.evaluation.held_out import TIMESTEP_PARTS, HeldOut
from cogvideox.runtime import best as best_module
from cogvideox.runtime.best import BEST_NAME, BestCheckpoint, best_of, harm, losses_on_grid, not_better
from cogvideox.runtime.checkpoint_files import checkpoints, damage_of, step_of
from cogvideox.runtime.metrics import GRID, column, read_records
from cogvideox.runtime.run import METRICS_NAME, write_metrics

LOSSES = {0: 0.1, 2: 0.5, 3: 0.8, 4: 0.9, 6: 0.7, 8: 0.6, 10: 0.4}  # There is no checkpoint of step 0.


def names(output: Path) -> list[int]:
    return sorted(map(step_of, checkpoints(output)))


def measured(output: Path, losses: dict[int, float | None], grid: str | None = "g") -> None:
    lines = [json.dumps({"step": step, "held_out_loss": loss, GRID: grid}) for step, loss in losses.items()]
    (output / METRICS_NAME).write_text("".join(f"{line}\n" for line in lines))


def chosen(output: Path) -> int | None:
    path = output / BEST_NAME
    return json.loads(path.read_text())["step"] if path.exists() else None


# -- which checkpoint is best ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("losses", "last", "expected"),
    [
        ({2: 0.5, 4: 0.3, 6: 0.4}, 6, 4),
        ({2: 0.5, 4: 0.3, 6: 0.4}, 2, 2),  # Later checkpoints belong to steps that are repeated.
        ({2: 0.3, 4: 0.3}, 6, 2),
        ({2: None, 4: 0.3, 6: None}, 6, 4),
        ({0: 0.1, 3: 0.2, 4: 0.3}, 6, 4),  # Steps 0 and 3 have no checkpoint.
        ({}, 6, None),
        ({2: None}, 6, None),
    ],
)
def test_the_lowest_loss_of_the_existing_checkpoints(
    tmp_path: Path, losses: dict[int, float | None], last: int, expected: int | None
) -> None:
    save_steps(run_alone(tmp_path), 2, 4, 6)
    measured(tmp_path, losses)
    found = best_of(tmp_path, last, "g")
    assert (found and found["step"]) == expected
    if found:
        assert found == {"step": expected, "checkpoint": f"checkpoint-{expected}", "held_out_loss": losses[expected]}  # type: ignore[index]


def test_a_best_checkpoint_that_has_only_the_weights_cannot_be_exported(tmp_path: Path) -> None:
    """It may be of an earlier part of the run, which had --checkpoint_weights_only."""
    saver = saver_of(run_alone(tmp_path), FakeEngine(), weights_only=True)
    saver.save(2)
    measured(tmp_path, {2: 0.5})
    BestCheckpoint(saver, wanted=True, grid="g").start(2)
    with pytest.raises(UsageError, match=r"has only the weights; leave .* checkpoint-2 --max_train_steps 2$"):
        BestCheckpoint(saver, wanted=True, grid="g").start(2, exports=True)
    saver.weights_only = False
    saver.save(4)
    measured(tmp_path, {2: 0.5, 4: 0.4})
    BestCheckpoint(saver, wanted=True, grid="g").start(4, exports=True)


@pytest.mark.parametrize("other", ["h", None])
def test_losses_of_other_clips_are_not_compared(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], other: str | None
) -> None:
    """Lines without a fingerprint, as older versions wrote them, count as losses of other clips."""
    save_steps(run_alone(tmp_path), 2, 4, 6)
    measured(tmp_path, {2: 0.1, 4: 0.2, 6: 0.3}, grid=other)
    before = (tmp_path / METRICS_NAME).read_text()
    assert best_of(tmp_path, 6, "g") is None
    measured(tmp_path, {4: 0.9, 6: 0.8})
    (tmp_path / METRICS_NAME).write_text(before + (tmp_path / METRICS_NAME).read_text())
    best = BestCheckpoint(saver_of(run_alone(tmp_path), FakeEngine(), limit=1), wanted=True, grid="g")
    best.start(6)
    assert chosen(tmp_path) == 6
    (line, _) = capsys.readouterr().err.splitlines()
    assert line.startswith("--keep_best: checkpoint-2: measured on other held-out clips")


def test_an_incomplete_line_is_ignored(tmp_path: Path) -> None:
    save_steps(run_alone(tmp_path), 2, 4)
    (tmp_path / METRICS_NAME).write_text(
        '{"step": 2, "held_out_loss": 0.5, "held_out_grid": "g"}\n{"step": 4, "held_out_loss": 0.1'
    )
    assert (best_of(tmp_path, 4, "g") or {})["step"] == 2


def kept_after(output: Path, losses: dict[int, float], limit: int) -> tuple[list[int], int | None]:
    """Saves and measures step by step as a run does, and returns the remaining checkpoints and the best one."""
    run = run_alone(output)
    saver = saver_of(run, FakeEngine(), limit=limit)
    best = BestCheckpoint(saver, wanted=True, grid="g")
    for step, loss in losses.items():
        saver.save(step)
        write_metrics(run, {"step": step, "held_out_loss": loss, GRID: "g"})
        best.update(step)
    return names(output), chosen(output)


@pytest.mark.parametrize(
    ("losses", "limit", "there", "expected"),
    [
        ([0.5, 0.9, 0.7, 0.8], 1, [2, 8], 2),
        ([0.5, 0.4, 0.7, 0.8], 2, [4, 6, 8], 4),
        ([0.5, 0.9, 0.7, 0.4], 1, [8], 8),  # The previous best checkpoint is removed at once.
        ([0.5, 0.9, 0.7, 0.6], 3, [2, 4, 6, 8], 2),
        ([0.5, 0.4, 0.3, 0.2], 2, [6, 8], 8),
    ],
)
def test_the_best_is_kept_beyond_the_limit(
    tmp_path: Path, losses: list[float], limit: int, there: list[int], expected: int
) -> None:
    assert kept_after(tmp_path, dict(zip((2, 4, 6, 8), losses, strict=True)), limit) == (there, expected)


def test_a_best_checkpoint_of_repeated_steps_is_forgotten(tmp_path: Path) -> None:
    assert kept_after(tmp_path, {2: 0.5, 4: 0.6, 6: 0.1}, limit=9)[1] == 6
    saver = saver_of(run_alone(tmp_path), FakeEngine(), limit=1)
    measured(tmp_path, {2: 0.5, 4: 0.6})  # These are the metrics of a run that resumes from step 4.
    best = BestCheckpoint(saver, wanted=True, grid="g")
    best.update(4)
    assert chosen(tmp_path) == 2
    assert names(tmp_path) == [2, 4, 6]  # Later checkpoints are removed when a new one is saved.
    saver.save(6)
    assert names(tmp_path) == [2, 6]


def test_without_the_flag_no_checkpoint_is_best(tmp_path: Path) -> None:
    kept_after(tmp_path, {2: 0.5, 4: 0.6}, limit=1)
    saver = saver_of(run_alone(tmp_path), FakeEngine(), limit=1)
    BestCheckpoint(saver, wanted=False, grid="g").update(4)
    assert chosen(tmp_path) is None
    saver.save(6)
    assert names(tmp_path) == [6]


def test_checkpoints_beyond_the_limit_after_a_kill_are_removed_at_the_next_start(tmp_path: Path) -> None:
    """The kill came after the last checkpoint was written and before an older one was removed."""
    save_steps(run_alone(tmp_path), 2, 4)
    BestCheckpoint(saver_of(run_alone(tmp_path), FakeEngine(), limit=1), wanted=False, grid="g").update(4)
    assert names(tmp_path) == [4]


def test_nothing_to_export(tmp_path: Path) -> None:
    best = BestCheckpoint(saver_of(run_alone(tmp_path), FakeEngine()), wanted=True, grid="g")
    best.update(0)
    with pytest.raises(UsageError, match=r"--export_best: .*: no checkpoint has a held-out loss"):
        best.step()
    kept_after(tmp_path, {2: 0.5}, limit=1)
    best.update(2)
    assert best.step() == 2
    flip_byte(tmp_path / "checkpoint-2" / "optimizer.safetensors")
    with pytest.raises(UsageError, match=r"--export_best: .*: optimizer\.safetensors is not what was written"):
        best.step()


# -- in complete runs --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def prepared(tensors: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns a prepared folder with four clips to train on and two held out. Tests must not change it."""
    return split(tensors, tmp_path_factory.mktemp("held") / "out", 4, 5, train=slice(4))


@pytest.fixture
def scripted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replaces the held-out losses by those of LOSSES."""

    def measure(self: HeldOut, step: int) -> None:
        if not self._measured(step):
            write_metrics(self.run, {"step": step, "held_out_loss": LOSSES[step], GRID: self.grid})

    monkeypatch.setattr(HeldOut, "measure", measure)


def flags_of(model: Path, prepared: Path, output: Path, *more: object) -> list[str]:
    keep = ("--load_tensors", "--keep_best", "--checkpoints_total_limit", 1)
    return lora_flags(model, prepared, output, *keep, *more)


@pytest.mark.usefixtures("scripted")
def test_the_best_is_described_by_the_settings_of_its_steps(model: Path, prepared: Path, tmp_path: Path) -> None:
    flags = flags_of(model, prepared, tmp_path, "--export_best")
    assert train([*flags, "--max_train_steps", "4"]) == 0
    assert train([*flags, "--max_train_steps", "6", "--learning_rate", "2e-2", "--allow_changed", "learning_rate"]) == 0
    made = json.loads((tmp_path / "recipe.json").read_text())
    assert (made["step"], made["learning_rate"], made.get("earlier")) == (2, 0.01, None)


@pytest.mark.usefixtures("scripted")
def test_the_best_is_exported_with_its_videos(model: Path, prepared: Path, tmp_path: Path) -> None:
    """The result equals that of a run that ends at the best step, also with an average of the weights."""
    more = ("--use_ema", "--ema_decay", 0.5, "--validation_prompt", PROMPT)
    assert train(flags_of(model, prepared, tmp_path / "best", *more, "--export_best")) == 0
    assert train(flags_of(model, prepared, tmp_path / "two", *more, "--max_train_steps", 2)) == 0
    assert equal(weights(tmp_path / "best"), weights(tmp_path / "two"))
    assert json.loads((tmp_path / "best" / "recipe.json").read_text())["step"] == 2
    videos = {int(path.name[5:11]): path for path in (tmp_path / "best" / "validation").glob("step-*.mp4")}
    assert sorted(videos) == [0, 2, 6]
    assert videos[2].read_bytes() == next((tmp_path / "two" / "validation").glob("step-000002*.mp4")).read_bytes()
    assert "step-000002" in (tmp_path / "best" / "README.md").read_text()


@pytest.mark.usefixtures("scripted")
def test_the_result_follows_the_flag(model: Path, prepared: Path, tmp_path: Path) -> None:
    """The run is interrupted at a step that is not measured when it resumes."""
    flags = flags_of(model, prepared, tmp_path)
    assert train([*flags, "--max_train_steps", "3"]) == 0
    for more, step in (("--export_best", 2), ("--no_resume=false", 6)):
        assert train([*flags, more]) == 0
        assert names(tmp_path) == [2, 6]
        assert chosen(tmp_path) == 2
        assert equal(weights(tmp_path), weights(tmp_path / f"checkpoint-{step}"))


@pytest.mark.usefixtures("scripted")
@pytest.mark.parametrize("before", [0.05, 2.0])
def test_a_result_that_is_worse_than_the_base_model_is_reported(
    model: Path,
    prepared: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    before: float,
) -> None:
    """The best checkpoint, of step 2, has the lowest loss of all checkpoints. That of the base model may be lower."""
    monkeypatch.setitem(LOSSES, 0, before)
    monkeypatch.setitem(LOSSES, 2, 0.4)
    assert train(flags_of(model, prepared, tmp_path, "--max_train_steps", 4, "--export_best")) == 0
    line = "has a held-out loss of 0.40000, more than the 0.05000 before training; give a lower --learning_rate"
    assert (line in capsys.readouterr().err) == (before < 0.4)


@pytest.mark.usefixtures("scripted")
def test_the_last_checkpoint_is_exported_if_it_is_the_best(model: Path, prepared: Path, tmp_path: Path) -> None:
    assert train(flags_of(model, prepared, tmp_path, "--max_train_steps", 10, "--export_best")) == 0
    assert names(tmp_path) == [10]
    assert equal(weights(tmp_path), weights(tmp_path / "checkpoint-10"))


@pytest.mark.usefixtures("scripted")
def test_every_checkpoint_is_measured_whenever_videos_are_due(model: Path, prepared: Path, tmp_path: Path) -> None:
    more = ("--validation_epochs", 9, "--max_train_steps", 6)
    assert train(flags_of(model, prepared, tmp_path, *more)) == 0
    lines = [json.loads(line) for line in (tmp_path / METRICS_NAME).read_text().splitlines()]
    assert [line["step"] for line in lines if "held_out_loss" in line] == [0, 2, 4, 6]


@pytest.mark.usefixtures("scripted")
@pytest.mark.parametrize("moment", ["saved", "measured", "trimmed"])
@pytest.mark.fault("kills: an interruption while the best checkpoint is chosen")
def test_a_kill_at_any_moment_changes_nothing(
    model: Path, prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    """The kill comes after checkpoint 10 is saved, after its loss is written, or before an older one is removed."""

    flags = flags_of(model, prepared, tmp_path, "--max_train_steps", 10, "--export_best")
    assert train([*flags, "--max_train_steps", "8"]) == 0
    assert names(tmp_path) == [2, 8]
    of, name = {
        "saved": (HeldOut, "measure"),
        "measured": (best_module, "write_atomically"),
        "trimmed": (best_module.Saver, "trim"),
    }[moment]
    before = getattr(of, name)

    def at_the_end(*given: Any) -> Any:
        if (tmp_path / "checkpoint-10").exists() and (moment != "trimmed" or chosen(tmp_path) == 10):
            raise KeyboardInterrupt
        return before(*given)

    with monkeypatch.context() as patch:
        patch.setattr(of, name, at_the_end)
        with pytest.raises(KeyboardInterrupt):
            train(flags)
    gc.collect()  # This closes the files of the stopped run.
    assert 2 in names(tmp_path)
    assert train(flags) == 0
    assert (names(tmp_path), chosen(tmp_path)) == ([10], 10)
    assert equal(weights(tmp_path), weights(tmp_path / "checkpoint-10"))
    assert damage_of(tmp_path / "checkpoint-10") is None


@pytest.mark.fault("data: different validation clips when a run is resumed")
def test_losses_on_other_validation_clips_are_not_compared(
    model: Path, tensors: Path, prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Losses on the new clips are higher, and the lower ones on the old clips must not win."""
    monkeypatch.setattr(
        HeldOut, "losses", lambda self: torch.full((len(self.samples), TIMESTEP_PARTS), next(losses)).double()
    )
    losses = iter([0.1, 0.1, 0.1, 0.6, 0.5])
    flags = ("--load_tensors", "--keep_best", "--learning_rate", 1e-4)
    assert train(lora_flags(model, prepared, tmp_path / "lora", *flags, "--max_train_steps", 4)) == 0
    other = split(tensors, tmp_path / "other", 3, 4, train=slice(4))
    assert train(lora_flags(model, other, tmp_path / "lora", *flags, "--max_train_steps", 6)) == 0
    assert json.loads((tmp_path / "lora" / BEST_NAME).read_text())["held_out_loss"] == 0.5
    assert chosen(tmp_path / "lora") == 6


def test_without_validation_clips_the_run_ends_before_a_model_is_loaded(
    model: Path, tensors: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cogvideox.model.models.load_transformer", None)
    with pytest.raises(UsageError) as error:
        train(flags_of(model, tensors, tmp_path, "--stop_when_worse", 2))
    assert [problem.split(":")[0] for problem in error.value.problems] == ["--keep_best", "--stop_when_worse 2"]


@pytest.mark.usefixtures("scripted")
def test_a_run_ends_when_the_loss_has_not_improved(
    model: Path, prepared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The losses of steps 2 and 4 are above that of step 0. The same command does not train on; a higher limit does."""
    flags = lora_flags(model, prepared, tmp_path, "--load_tensors", "--max_train_steps", 6)
    for _ in range(2):
        assert train([*flags, "--stop_when_worse", "2"]) == 0
        text = capsys.readouterr().err
        assert "training ends after step 4 of 6" in text
        assert "has no effect" not in text
        assert json.loads((tmp_path / "recipe.json").read_text())["step"] == 4
        assert column(read_records(tmp_path / METRICS_NAME), "loss")[0].tolist() == [1, 2, 3, 4]
    assert train([*flags, "--stop_when_worse", "4"]) == 0
    rule = "has no effect; the held-out loss is measured 2 times between the first and the last step"
    assert f"--stop_when_worse 4: {rule}" in capsys.readouterr().err
    assert json.loads((tmp_path / "recipe.json").read_text())["step"] == 6


@pytest.mark.usefixtures("scripted")
@pytest.mark.parametrize(
    ("more", "remark"),
    [
        (("--validation_steps", 3), "--keep_best: cannot keep every measured step; there is no checkpoint of step 3, "),
        (("--validation_steps", 3, "--checkpointing_steps", 3), ""),
        (("--validation_steps", 3, "--save_every_minutes", 0), ""),
        (("--checkpointing_steps", 6), "--export_best: has no effect; there is no checkpoint before that of the last"),
        (("--validation_steps", 4), ""),
    ],
)
def test_measurements_that_cannot_be_exported_are_reported(
    more: tuple[object, ...],
    remark: str,
    model: Path,
    prepared: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The best of the measured steps may have no checkpoint."""
    assert train(flags_of(model, prepared, tmp_path, "--export_best", *more)) == 0
    found = [line for line in capsys.readouterr().err.splitlines() if line.startswith("--")]
    assert len(found) == bool(remark)
    assert all(line.startswith(remark) for line in found)


@pytest.mark.parametrize(
    ("measured", "last", "count"),
    [({}, 9, 0), ({0: 1.0}, 9, 0), ({0: 1.0, 2: 0.5, 4: 0.5, 6: 0.7}, 9, 2), ({0: 1.0, 2: 0.5, 4: 0.4}, 2, 0)],
)
def test_measurements_that_are_not_better(measured: dict[float, float], last: int, count: int) -> None:
    assert not_better(measured, last) == count


def test_a_loss_that_is_not_finite_is_worse_than_all_others(tmp_path: Path) -> None:
    best = BestCheckpoint(saver_of(run_alone(tmp_path), FakeEngine()), wanted=True, grid="g")
    measured(tmp_path, {0: 0.5, 2: 0.3, 4: None, 6: None})
    assert best.has_worsened(6, 2)
    assert not best.has_worsened(6, 3)
    assert str(harm(losses_on_grid(tmp_path, "g"), 6)).startswith("the result has a held-out loss of inf, more than")
