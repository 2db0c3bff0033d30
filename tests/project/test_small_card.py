"""Tests the benchmark of full-size scripts within a part of the memory of GPU and host, with small programs."""

import argparse
import json
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import record
import small_card
from random_models import ROOT

from cogvideox.config import args as flags_of_scripts
from cogvideox.config.options import LoraOptions, SftOptions
from cogvideox.data.media.pixels.decode import write_video

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

# Stands for the training script, with five steps and a checkpoint after the third; each word is a fault.
SCRIPT = """
import json, os, pathlib, shutil, sys, time
output, video, *faults = sys.argv[1:]
output = pathlib.Path(output)
metrics, videos = output / "metrics.jsonl", output / "validation"
videos.mkdir(parents=True, exist_ok=True)
if "refused" in faults:
    sys.exit("No space left on device, 41.7 GiB needed")
done = 3 if (output / "checkpoint-3").is_dir() and "anew" not in faults else 0
if done:
    print(f"resuming from {output / 'checkpoint-3'} after step {done}", flush=True)
    metrics.write_text("".join(metrics.read_text().splitlines(keepends=True)[:done]))
else:
    metrics.unlink(missing_ok=True)
    shutil.copy(video, videos / "step-000000_prompt-0.mp4")
for step in range(done + 1, 6):
    if step == 4 and "no-memory" in faults:
        os.kill(os.getpid(), 9)
    if step == 4 and "ends" in faults:
        break
    with metrics.open("a") as file:
        file.write(json.dumps({"step": step, "loss": 1.0}) + "\\n")
    if step == 3:
        (output / "checkpoint-3").mkdir(exist_ok=True)
    if step == 4 and "waits" in faults:
        time.sleep(600)
if "unsaved" not in faults:
    print("checkpoint-5: written in 0 s", flush=True)
if "unseen" not in faults:
    shutil.copy(video, videos / "step-000005_prompt-0.mp4")
verification = None if "unverified" in faults else {"cosine": 1.0}
(output / "recipe.json").write_text(json.dumps({"verification": verification}))
sys.exit(3 if "fails" in faults else 0)
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


@pytest.fixture
def results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Replaces the training script by SCRIPT and the models by nothing; returns the folder of results."""
    size, video = (9, 64, 96), tmp_path / "video.mp4"
    write_video(video, np.zeros((*size, 3), np.uint8), 8)
    command = [sys.executable, "-c", SCRIPT, str(tmp_path / "work" / "run"), str(video)]
    for name in ("make_pipeline", "make_tensors"):
        monkeypatch.setattr(small_card, name, lambda *_: (tmp_path / "work").mkdir(exist_ok=True))
    monkeypatch.setattr(small_card, "clip_size", lambda kind: size)
    monkeypatch.setattr(small_card, "command_of", lambda args: [*command, *args.flags])
    return tmp_path / "results"


def measured(results: Path, monkeypatch: pytest.MonkeyPatch, *flags: str) -> tuple[int, dict[str, Any]]:
    """Runs small_card.py; returns its exit status and the result that it wrote, which is empty without any."""
    folders = ["--work_dir", str(results.parent / "work"), "--results", str(results)]
    monkeypatch.setattr(sys, "argv", ["small_card.py", *folders, "--rank", "0", "--steps", "5", *flags])
    status = small_card.main()
    found = [json.loads(path.read_text()) for path in results.glob("*.json")]
    return status, found[0] if found else {}


@pytest.mark.parametrize(("length", "done"), [(40, 4), (2, 2)])
def test_a_run_is_killed_after_a_step_and_a_checkpoint(tmp_path: Path, length: int, done: int) -> None:
    """A run that ends earlier is not waited for."""
    output, log = tmp_path / "run", tmp_path / "log"
    run = small_card.start([sys.executable, "-c", RUN, str(output), str(length)], None, log)
    checkpoint = small_card.kill_after(4, run, output)
    assert checkpoint == (3 if length > done else None)
    assert run.returncode == (-9 if length > done else 0), log.read_text()
    assert done <= len(small_card.lines_of(output)) < max(length, done + 1)


def test_the_result_has_the_step_from_which_the_run_resumed(results: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    status, row = measured(results, monkeypatch, "--kill_after", "4", "--first_flags=waits", "--flags")
    assert status == 0
    assert (row["checkpoint_at_kill"], row["resumed_from"]) == (3, 3)
    assert [line["step"] for line in row["steps"]] == [1, 2, 3, 4, 5]


def test_a_run_is_measured_without_a_kill(results: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is left from the first measurement from which the second could resume."""
    for _ in range(2):
        status, row = measured(results, monkeypatch, "--flags")
        assert (status, row["checkpoint_at_kill"], row["resumed_from"]) == (0, None, None)


@pytest.mark.parametrize(
    ("first", "resumed", "problem"),
    [
        ("refused", "", "the first run was not killed after step 4 and a checkpoint: it had ended with status 1"),
        ("no-memory", "", "the first run was not killed after step 4 and a checkpoint: it had ended with status -9"),
        ("ends", "", "the first run was not killed after step 4 and a checkpoint: it had ended with status 0"),
        ("waits", "anew", "the run resumed from step None, not from checkpoint-3"),
        ("waits", "ends", "metrics.jsonl has the steps [1, 2, 3], not 1 to 5"),
        ("waits", "unsaved", "checkpoint-5 was not written"),
        ("waits", "unseen", "validation after step 5 has made no video, not 9x64x96"),
        ("waits", "unverified", "the result was not verified"),
        ("waits", "fails", "the script ended with status 3"),
    ],
)
def test_what_has_not_happened_is_not_a_result(
    results: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    first: str,
    resumed: str,
    problem: str,
) -> None:
    flags = (f"--first_flags={first}", f"--resumed_flags={resumed}", "--flags")
    assert measured(results, monkeypatch, "--kill_after", "4", *flags) == (1, {})
    assert problem in capsys.readouterr().err.splitlines()


@pytest.mark.long
def test_a_run_is_measured_from_end_to_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The real script trains the tiny model of the examples."""
    import random_models

    for module in (random_models, small_card):
        monkeypatch.setattr(module, "clip_size", lambda kind: (9, 64, 96))
    shutil.copytree(ROOT / "examples" / "model", tmp_path / "work" / "5b")
    status, row = measured(tmp_path / "results", monkeypatch, "--gib", "8", "--kill_after", "4", "--flags")
    assert (status, row["checkpoint_at_kill"], row["resumed_from"]) == (0, 3, 3)


def test_a_run_starts_in_the_control_group(tmp_path: Path, kernel: Path) -> None:
    group, peak = small_card.control_group(64.0)
    assert group == kernel / small_card.GROUP
    assert (group / "memory.max").read_text() == str(64 * 2**30)
    assert peak == group / "memory.peak"
    run = small_card.start([sys.executable, "-c", "print('ran')"], group, tmp_path / "log")
    assert run.wait() == 0
    assert (group / "cgroup.procs").read_text().split() == [str(run.pid)]
    assert (tmp_path / "log").read_text() == "ran\n"


def test_page_cache_of_the_group_counts_as_free(kernel: Path) -> None:
    group, _ = small_card.control_group(1.0)
    (group / "memory.current").write_text(str(2**30 - 100))
    (group / "memory.stat").write_text("anon 800\ninactive_file 50\nactive_file 20\n")
    assert small_card.left_bytes(group) == 170


@pytest.mark.parametrize(("choose", "found"), [(min, 3), (max, 5)])
def test_a_number_is_watched_until_the_context_ends(choose: Callable[[int, int], int], found: int) -> None:
    numbers, read_all = [4, 3, 5], threading.Event()

    def read() -> int:
        number = numbers.pop(0) if numbers else 4
        if not numbers:
            read_all.set()
        return number

    with record.watched(choose, read) as watched:
        assert read_all.wait(60)
    assert watched == [found]


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
