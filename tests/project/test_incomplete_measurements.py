"""Tests that programs of benchmarks/ fail, and write no result, if a part of a measurement failed or did not happen."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import checks
import every_task
import inference
import large_clips
import prepare
import pytest
import scale
import startup
from tiny_benchmarks import TINY_VAE

# Writes a number of steps, and a recipe if it is given one, and ends with a status.
TRAINS = """
import pathlib, sys
folder, steps, recipe, status = sys.argv[1:]
folder = pathlib.Path(folder)
folder.mkdir(exist_ok=True)
lines = ['{"step": %d, "loss": 2.0, "seconds": 1.0, "peak_gib": 1.0}\\n' % step for step in range(int(steps))]
(folder / "metrics.jsonl").write_text("".join(lines))
if recipe:
    (folder / "recipe.json").write_text(recipe)
sys.exit(int(status))
"""
VERIFIED, UNVERIFIED = '{"verification": {"cosine": 1.0}}', '{"verification": null}'
Main = Callable[..., int]


def trains(output: Path, steps: int, recipe: str = "", status: int = 0) -> list[str]:
    return [sys.executable, "-c", TRAINS, str(output), str(steps), recipe, str(status)]


def run_main(monkeypatch: pytest.MonkeyPatch, main: Main, *flags: object) -> int:
    monkeypatch.setattr(sys, "argv", ["program.py", *map(str, flags)])
    return main()


@pytest.mark.parametrize(
    ("steps", "recipe", "status", "is_complete"),
    [
        (3, VERIFIED, 0, True),
        (2, VERIFIED, 0, False),
        (3, "", 0, False),
        (3, UNVERIFIED, 0, False),
        (3, VERIFIED, 1, False),
    ],
)
def test_a_task_runs_to_its_end(tmp_path: Path, steps: int, recipe: str, status: int, is_complete: bool) -> None:
    output = tmp_path / "run"
    row = every_task.run(trains(output, steps, recipe, status), output, 3, complete=True)
    assert ("failed" not in row) == is_complete


def test_steps_of_an_earlier_run_are_not_those_of_a_task(tmp_path: Path) -> None:
    output = tmp_path / "run"
    assert "failed" not in every_task.run(trains(output, 3), output, 3, complete=False)
    row = every_task.run([sys.executable, "-c", "raise SystemExit('no room')"], output, 3, complete=False)
    assert "no room" in row["failed"]


def test_steps_of_an_earlier_run_are_not_those_of_an_arm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commands = [trains(tmp_path / "runs" / scale.ARMS[0].name, scale.ARMS[0].steps)]
    commands += [[sys.executable, "-c", "raise SystemExit('no room')"]]
    monkeypatch.setattr(scale, "command_of", lambda *_: commands.pop(0))
    assert "failed" not in scale.measure(scale.ARMS[0], tmp_path, 0)
    assert "no room" in scale.measure(scale.ARMS[0], tmp_path, 0)["failed"]


def test_an_arm_that_ends_before_its_last_step_has_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arm = scale.ARMS[0]
    monkeypatch.setattr(scale, "command_of", lambda arm, work, output, port: trains(output, arm.steps - 1))
    assert f"{arm.steps - 1} of {arm.steps} steps" in scale.measure(arm, tmp_path, 0)["failed"]


def fails() -> dict[str, Any]:
    raise RuntimeError("no room")


@pytest.mark.parametrize(("seconds", "second"), [(60, fails), (-1, dict)], ids=["failed", "left-out"])
def test_a_preparation_is_a_result_when_all_arms_are(
    tmp_path: Path, seconds: float, second: Callable[[], dict[str, Any]]
) -> None:
    arms = prepare.Arms(60, tmp_path)
    arms.run("first", dict)
    arms.seconds = seconds
    arms.run("second", second)
    assert arms.finish() == 1
    [path] = tmp_path.iterdir()
    assert path.name == "prepare.incomplete"
    assert ["error" in row for row in json.loads(path.read_text())["arms"]] == [False, True]
    arms.rows.pop()
    assert arms.finish() == 0
    assert [path.name for path in tmp_path.iterdir()] == ["prepare.json"]


@pytest.mark.long
def test_all_clips_are_encoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One of the two clips is damaged, and the preparation may leave it out."""
    make, flags = prepare.RanksArms._make_clips, prepare.RanksArms._flags

    def damaged(self: prepare.RanksArms, folder: Path, number: int) -> None:
        make(self, folder, number)
        (folder / "000.mp4").write_bytes(b"")

    monkeypatch.setattr(prepare, "CLIPS_OF_RANK", 3)
    arms = prepare.RanksArms(tmp_path, prepare.VAE | TINY_VAE, (9, 64, 96))
    row = arms.arm(1)
    assert row["clips"] == [3]
    assert 0 <= row["waited_for_clips"][0] <= 1
    monkeypatch.setattr(prepare.RanksArms, "_make_clips", damaged)
    monkeypatch.setattr(prepare.RanksArms, "_flags", lambda *given: [*flags(*given), "--max_bad_fraction", "0.5"])
    (tmp_path / "1").rename(tmp_path / "before")
    with pytest.raises(RuntimeError, match="2 of 3 clips were encoded"):
        arms.arm(1)


@pytest.mark.parametrize("error", ["", "cosine 0.9"])
def test_checks_without_an_error_are_a_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: str) -> None:
    monkeypatch.setattr(checks, "backends", lambda: ["sdpa"])
    monkeypatch.setattr(checks, "row_of", lambda *case: {"cosine": 1.0} | ({"error": error} if error else {}))
    status = run_main(monkeypatch, checks.main, "--results", tmp_path)
    assert (status, len([*tmp_path.iterdir()])) == ((1, 0) if error else (0, 1))


@pytest.mark.parametrize(("error", "is_result"), [("CUDA out of memory. Tried", True), ("ImportError: av", False)])
def test_a_video_that_does_not_fit_is_a_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: str, is_result: bool
) -> None:
    monkeypatch.setattr(inference, "export_lora", lambda *_: Path())
    monkeypatch.setattr(inference, "measure", lambda script, gib, arguments: {"gib": gib, "error": error})
    status = run_main(monkeypatch, inference.main, "--model", "tiny", "--gib", "8", "--results", tmp_path)
    assert (status, len([*tmp_path.iterdir()])) == ((0, 1) if is_result else (1, 0))


def test_a_clip_that_cannot_be_read_is_not_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A clip of 16 frames is too short for the window that is read."""
    short = large_clips.make(tmp_path / "short.mp4", "libx264", "yuv420p", (64, 96), 16, 1, **large_clips.X264)
    monkeypatch.setattr(large_clips, "clips", lambda folder: [short])
    with pytest.raises(RuntimeError, match=r"short\.mp4: "):
        large_clips.measure(tmp_path)


def test_a_reader_that_dies_is_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(large_clips, "clips", lambda folder: [tmp_path / "missing.mp4"])
    with pytest.raises(EOFError):
        large_clips.measure(tmp_path)


def test_rows_are_read_until_the_missing_file_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The folder has no model, which is an error with the same status."""
    startup.time_rows(3)
    assert len(capsys.readouterr().out.splitlines()) == 3
    make = startup.make_files

    def complete(root: Path, rows: int) -> list[tuple[str, str]]:
        pairs = make(root, rows)
        (root / pairs[-1][0]).touch()
        return pairs

    monkeypatch.setattr(startup, "make_files", complete)
    with pytest.raises(RuntimeError, match="1 problem"):
        startup.time_rows(3)
