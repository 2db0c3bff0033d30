"""Tests the benchmark of full-size scripts within a part of the memory of GPU and host, with small programs."""

import argparse
import subprocess
import sys
from pathlib import Path

import pytest
import small_card

from cogvideox.config import args as flags_of_scripts
from cogvideox.config.options import LoraOptions, SftOptions

RUN = """
import pathlib, sys, time
folder = pathlib.Path(sys.argv[1])
folder.mkdir(exist_ok=True)
for step in range(1, int(sys.argv[2]) + 1):
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": %d, "loss": 1.0}\\n' % step)
    if step == 3:
        (folder / "checkpoint-3").mkdir(exist_ok=True)
    time.sleep(0.3)
"""


@pytest.fixture
def kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Provides a folder in the place of control groups, with the file of a limit that the kernel would provide."""
    monkeypatch.setattr(small_card, "MOUNT", tmp_path)
    (tmp_path / small_card.GROUP).mkdir()
    (tmp_path / small_card.GROUP / "memory.max").write_text("max")
    return tmp_path


@pytest.mark.parametrize(("rank", "more"), [(0, ["--use_8bit"]), (128, ["--plan", "lean"])])
def test_the_script_accepts_the_command(tmp_path: Path, rank: int, more: list[str]) -> None:
    given = argparse.Namespace(kind="5b", rank=rank, work_dir=tmp_path, gib=24.0, steps=6, kill_after=4, flags=more)
    command = small_card.command_of(given)
    options = LoraOptions if rank else SftOptions
    parsed = flags_of_scripts.parse(options, None, command[2:], ())
    assert Path(command[1]).is_file()
    assert (parsed.train.checkpointing_steps, parsed.plan.vram_budget) == (3, 24.0)


@pytest.mark.parametrize(("length", "done"), [(40, 4), (2, 2)])
def test_a_run_is_killed_after_a_step_and_a_checkpoint(tmp_path: Path, length: int, done: int) -> None:
    """A run that ends earlier is not waited for."""
    output, log = tmp_path / "run", tmp_path / "log"
    run = small_card.start([sys.executable, "-c", RUN, str(output), str(length)], None, log)
    small_card.kill_after(4, run, output)
    assert run.returncode == (-9 if length > done else 0), log.read_text()
    assert done <= len(small_card.lines_of(output)) < max(length, done + 1)


def test_a_run_starts_in_the_control_group(tmp_path: Path, kernel: Path) -> None:
    group, peak = small_card.control_group(64.0)
    assert group == kernel / small_card.GROUP
    assert (group / "memory.max").read_text() == str(64 * 2**30)
    assert peak == group / "memory.peak"
    run = small_card.start([sys.executable, "-c", "print('ran')"], group, tmp_path / "log")
    assert run.wait() == 0
    assert (group / "cgroup.procs").read_text().split() == [str(run.pid)]
    assert (tmp_path / "log").read_text() == "ran\n"


def test_nothing_of_an_earlier_run_is_measured(tmp_path: Path) -> None:
    output, log = small_card.empty_places(tmp_path)
    (output / "checkpoint-3").mkdir(parents=True)
    log.write_text("plan: an old one")
    assert small_card.empty_places(tmp_path) == (output, log)
    assert not output.exists()
    assert not log.exists()


def test_the_peak_of_an_earlier_group_is_not_measured(kernel: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    removed: list[Path] = []
    monkeypatch.setattr(Path, "rmdir", lambda folder: removed.append(folder))
    small_card.control_group(64.0)
    assert removed == [kernel / small_card.GROUP]


def test_groups_get_limits(kernel: Path) -> None:
    """Without this, groups of version 2 would have no files for limits."""
    (kernel / "cgroup.subtree_control").touch()
    small_card.control_group(64.0)
    assert (kernel / "cgroup.subtree_control").read_text() == "+memory"


def test_an_ordinary_folder_is_no_control_group(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where version 1 is mounted, the folder above its groups is an ordinary one, and a file there limits nothing."""
    monkeypatch.setattr(small_card, "MOUNT", tmp_path)
    memory = tmp_path / "memory" / small_card.GROUP
    memory.mkdir(parents=True)
    (memory / "memory.limit_in_bytes").write_text("max")
    assert small_card.control_group(64.0) == (memory, memory / "memory.max_usage_in_bytes")
    assert not (tmp_path / small_card.GROUP / "memory.max").exists()


def test_without_control_groups_the_flag_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(small_card, "MOUNT", tmp_path / "missing")
    with pytest.raises(SystemExit, match=r"--host_gib 64\.0: no control group can be made"):
        small_card.control_group(64.0)


def test_the_help_is_read_without_a_gpu() -> None:
    script = Path(small_card.__file__)
    done = subprocess.run([sys.executable, str(script), "--help"], capture_output=True, text=True, check=True)
    assert "--kill_after" in done.stdout
