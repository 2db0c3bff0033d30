"""Tests benchmarks/scale.py without a GPU: its commands, how it ends an arm, and the table in docs/benchmarks.md."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import prepare
import psutil
import pytest
import scale
from random_models import ROOT
from record import put_into

from cogvideox.config import args
from cogvideox.config.options import LoraOptions, SftOptions

# Writes one line of metrics after another, as a training script does, and has a child that never ends.
TRAINS = """
import json, subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
print("plan: predicted: peak 2.85 GiB, 1.5 GiB of host memory, 0.52 s a step;", child.pid, flush=True)
for step in range(100):
    with open(sys.argv[1] + "/metrics.jsonl", "a") as file:
        file.write(json.dumps({"step": step, "loss": 1.0, "seconds": 0.5 + 9 * (step == 0), "peak_gib": step}) + "\\n")
    time.sleep(0.05)
"""


@pytest.mark.parametrize("arm", scale.ARMS, ids=lambda arm: arm.name)
def test_commands_of_arms_are_valid(arm: scale.Arm) -> None:
    command = scale.command_of(arm, Path("work"), Path("out"), 29500)
    if "--config_file" in command:
        assert Path(command[command.index("--config_file") + 1]).is_file()
    if "stock" not in arm.config:
        script = next(i for i, word in enumerate(command) if word.endswith(f"_{arm.method}.py"))
        kind = LoraOptions if arm.method == "lora" else SftOptions
        assert args.parse(kind, None, command[script + 1 :]).train.mixed_precision == arm.precision
        assert Path(command[script]).is_file()


def test_names_of_arms_are_different() -> None:
    names = {scale.result_of(arm, Path(), flash) for arm in scale.ARMS for flash in (True, False)}
    planned = [arm for arm in scale.ARMS if "stock" not in arm.config and "zero3" not in arm.config]
    assert len(names) == len(scale.ARMS) + len(planned)


def test_an_arm_is_ended_with_all_its_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        scale, "command_of", lambda arm, work, output, port: [sys.executable, "-c", TRAINS, str(output)]
    )
    row = scale.measure(scale.ARMS[0], tmp_path, 0)
    assert row["steps"] >= scale.ARMS[0].steps
    assert (row["seconds_per_step"], row["seconds"][0]) == (0.5, 9.5)
    assert row["peak_gib"] == row["steps"] - 1
    assert row["predicted"] == {"peak_gib": 2.85, "seconds_per_step": 0.52}
    [said] = row["said"]
    assert not psutil.pid_exists(int(said.split()[-1]))


def test_an_arm_that_fails_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scale, "command_of", lambda *_: [sys.executable, "-c", "raise SystemExit('no room')"])
    assert "no room" in scale.measure(scale.ARMS[0], tmp_path, 0)["failed"]


def test_the_table_in_the_docs_is_that_of_the_results(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text((ROOT / "docs" / "benchmarks.md").read_text())
    put_into(page, "scale.py", scale.table(ROOT / "benchmarks" / "results"))
    assert page.read_text() == (ROOT / "docs" / "benchmarks.md").read_text()
    row = next(iter((ROOT / "benchmarks" / "results").glob("scale_*.json")))
    (tmp_path / row.name).write_text(json.dumps(json.loads(row.read_text()) | {"seconds_per_step": 123.0}))
    assert "| 123.00 s |" in scale.table(tmp_path)


def test_the_rate_of_several_processes_counts_only_the_time_in_which_all_encode() -> None:
    """The first process encodes a clip in 2 s while it is alone, and all encode one a second together."""
    first, second = [0.0, 2.0, 4.0, 5.0, 6.0, 7.0], [4.5, 5.5, 6.5, 20.0]
    assert prepare.rate_together([[1.0, 2.0, 4.0]]) == pytest.approx(2 / 3)
    assert prepare.rate_together([first, second[:3]]) == pytest.approx(2)
    assert prepare.rate_together([first, first]) == pytest.approx(2 * 5 / 7)


def test_only_pauses_between_the_first_and_the_last_clip_count() -> None:
    assert prepare.share_inside([[0, 1], [1.5, 2.5], [5, 6], [9, 20]], [2, 4, 10]) == 0.312
