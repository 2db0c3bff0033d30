"""Tests benchmarks/measure_all.py with small programs in place of measurements, and its jobs without running them."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import bench
import gpu_tests
import guide_memory
import measure_all
import one_block
import psutil
import pytest
import scale
import small_card
from measure_all import RESULTS, SECONDS, WORK_DIR, Job, Queue

# Records when it ran on which GPUs and with which arguments, and has a child that lasts as long.
PROGRAM = """
import json, os, pathlib, subprocess, sys, time
result, seconds, *arguments = sys.argv[1:]
child = subprocess.Popen([sys.executable, "-c", f"import time; time.sleep({seconds})"])
began = time.time()
row = {"gpus": os.environ["CUDA_VISIBLE_DEVICES"], "began": began, "arguments": arguments, "child": child.pid}
pathlib.Path(result).with_suffix(".begun").write_text(json.dumps(row))
time.sleep(float(seconds))
if "fails" in arguments:
    raise SystemExit("no memory")
pathlib.Path(result).write_text(json.dumps(row | {"ended": time.time()}))
if "fails late" in arguments:
    raise SystemExit(3)
"""
MADE = ("5b/model_index.json", "5b/vae/model.safetensors", "run/checkpoint-3/state.safetensors", "tensors/index.json")
KEPT = ("run.log", "run/metrics.jsonl", "run/report.html", "run/validation/step-000000.mp4")


@pytest.fixture
def program(tmp_path: Path) -> str:
    path = tmp_path / "program.py"
    path.write_text(PROGRAM)
    return str(path)


def job_of(program: str, name: str, takes: float, *more: str, gpus: int = 1, seconds: float = 1.0) -> Job:
    command = (program, f"{RESULTS}/{name}.json", str(takes), *more)
    return Job(name, command, (f"{name}.json",), seconds, gpus)


def row_of(folder: Path, name: str) -> dict[str, object]:
    return json.loads((folder / f"{name}.json").read_text())


def test_each_job_has_gpus_of_its_own(tmp_path: Path, program: str) -> None:
    """The second of the three jobs needs both GPUs, so the third one waits although a GPU is free."""
    jobs = [job_of(program, "first", 0.3), job_of(program, "both", 0.3, gpus=2), job_of(program, "last", 0.3)]
    queue = Queue([*jobs, job_of(program, "too large", 0, gpus=3)], ["4", "7"], tmp_path, tmp_path / "work")
    queue.run(60)
    assert queue.failed == []
    first, both, last = (row_of(tmp_path, job.name) for job in jobs)
    assert first["ended"] <= both["began"] < both["ended"] <= last["began"]
    assert (first["gpus"], sorted(both["gpus"].split(",")), len(last["gpus"])) == ("4", ["4", "7"], 1)
    assert not (tmp_path / "too large.json").exists()


def test_jobs_run_side_by_side_and_in_the_order_of_importance(tmp_path: Path, program: str) -> None:
    """Each job waits until the other has begun."""
    waits = """
import pathlib, sys, time
own, other = map(pathlib.Path, sys.argv[1:])
own.with_suffix(".begun").touch()
while not other.with_suffix(".begun").exists():
    time.sleep(0.01)
own.write_text("{}")
"""
    path = tmp_path / "waits.py"
    path.write_text(waits)
    names = [f"{RESULTS}/{name}.json" for name in ("a", "b")]
    jobs = [Job("a", (str(path), *names), ("a.json",), 1), Job("b", (str(path), *reversed(names)), ("b.json",), 1)]
    queue = Queue(jobs, ["0", "1"], tmp_path, tmp_path / "work")
    queue.run(60)
    assert queue.failed == []


def test_what_is_measured_is_left_out(tmp_path: Path, program: str) -> None:
    (tmp_path / "old.json").write_text('{"old": 1}')
    queue = Queue([job_of(program, "old", 0), job_of(program, "new", 0)], ["0"], tmp_path, tmp_path / "work")
    queue.run(60)
    assert row_of(tmp_path, "old") == {"old": 1}
    assert (tmp_path / "new.json").exists()


def test_what_another_commit_has_measured_is_measured_again(tmp_path: Path, program: str) -> None:
    """Its result is moved away before, because programs leave out what has a result."""
    for name, commit in (("other", "aaa"), ("same", "bbb"), ("waits", "aaa")):
        (tmp_path / f"{name}.json").write_text(json.dumps({"commit": commit}))
    jobs = [job_of(program, name, 0, "fails") for name in ("other", "same")]
    queue = Queue([*jobs, job_of(program, "waits", 0, seconds=100)], ["0"], tmp_path, tmp_path / "work", "bbb")
    queue.run(60)
    assert queue.failed == ["other"]
    assert not (tmp_path / "other.json").exists()
    assert row_of(tmp_path / "work" / "other_commits", "other") == {"commit": "aaa"}
    assert row_of(tmp_path, "same") == {"commit": "bbb"}
    assert row_of(tmp_path, "waits") == {"commit": "aaa"}  # there is no time for it


def test_a_job_that_fails_does_not_prevent_others(
    tmp_path: Path, program: str, capsys: pytest.CaptureFixture[str]
) -> None:
    jobs = [job_of(program, "bad", 0, "fails"), job_of(program, "good", 0)]
    queue = Queue(jobs, ["0"], tmp_path, tmp_path / "work")
    queue.run(60)
    assert queue.failed == ["bad"]
    assert (tmp_path / "good.json").exists()
    assert "bad, GPU 0: ended with status 1, results are missing" in capsys.readouterr().out
    assert "no memory" in (tmp_path / "work" / "logs" / "bad.log").read_text()


def test_a_job_that_fails_after_its_result_is_not_measured(
    tmp_path: Path, program: str, capsys: pytest.CaptureFixture[str]
) -> None:
    queue = Queue([job_of(program, "late", 0, "fails late")], ["0"], tmp_path, tmp_path / "work")
    queue.run(60)
    assert queue.failed == ["late"]
    assert "late, GPU 0: ended with status 3 after" in capsys.readouterr().out


def files_of(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if not path.is_dir())


def make_files(folder: Path) -> None:
    for name in (*MADE, *KEPT):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)


@pytest.mark.parametrize("more", [(), ("fails",)])
def test_only_what_people_read_remains_of_a_job(tmp_path: Path, program: str, more: tuple[str, ...]) -> None:
    """The files of other jobs are not touched."""
    for name in ("a", "other"):
        make_files(tmp_path / "work" / name)
    Queue([job_of(program, "a", 0, *more)], ["0"], tmp_path, tmp_path / "work").run(60)
    assert files_of(tmp_path / "work" / "a") == sorted(KEPT)
    assert files_of(tmp_path / "work" / "other") == sorted((*MADE, *KEPT))
    assert (tmp_path / "work" / "logs" / "a.log").is_file()
    assert not (tmp_path / "work" / "a" / "5b").exists()  # a part of a model would be taken for a model


def test_a_killed_job_keeps_its_files(tmp_path: Path, program: str) -> None:
    make_files(tmp_path / "work" / "hangs")
    Queue([job_of(program, "hangs", 600, seconds=0.0)], ["0"], tmp_path, tmp_path / "work").run(0.5)
    assert files_of(tmp_path / "work" / "hangs") == sorted((*MADE, *KEPT))


@pytest.mark.parametrize("linked", ["", "5b", "run/checkpoint-3", "run/checkpoint-3/state.safetensors"])
def test_links_of_a_job_are_not_followed(tmp_path: Path, program: str, linked: str) -> None:
    """The job's folder, a base model in it, or a file may be on another disk."""
    folder, disk = tmp_path / "work" / "a", tmp_path / "disk"
    make_files(folder)
    (folder / linked).rename(disk)
    before = files_of(disk) or disk.read_text()
    (folder / linked).symlink_to(disk)
    Queue([job_of(program, "a", 0)], ["0"], tmp_path, tmp_path / "work").run(60)
    assert (folder / linked).readlink() == disk
    assert before == (files_of(disk) or disk.read_text())


def test_files_that_cannot_be_deleted_do_not_end_other_jobs(
    tmp_path: Path, program: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused(path: Path) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    make_files(tmp_path / "work" / "a")
    monkeypatch.setattr(Path, "unlink", refused)
    queue = Queue([job_of(program, "a", 0), job_of(program, "b", 0)], ["0"], tmp_path, tmp_path / "work")
    queue.run(60)
    assert queue.failed == []
    assert (tmp_path / "b.json").is_file()
    assert "a, GPU 0: its files are not deleted: [Errno 13] Permission denied" in capsys.readouterr().out


def test_jobs_are_killed_with_their_children(tmp_path: Path, program: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A job that needs more time than there is does not begin, and a later one that needs less does."""

    def interrupted(_: Queue) -> None:
        if (tmp_path / "hangs.begun").exists():
            raise KeyboardInterrupt

    jobs = [job_of(program, "long", 0, seconds=100), job_of(program, "hangs", 600, seconds=0.5)]
    queue = Queue(jobs, ["0"], tmp_path, tmp_path / "work")
    monkeypatch.setattr(Queue, "_collect", interrupted)
    with pytest.raises(KeyboardInterrupt):
        queue.run(60)
    child = json.loads((tmp_path / "hangs.begun").read_text())["child"]
    assert not psutil.pid_exists(child) or psutil.Process(child).status() == psutil.STATUS_ZOMBIE
    assert queue.failed == ["hangs"]
    assert not (tmp_path / "long.begun").exists()


def test_the_time_ends(tmp_path: Path, program: str) -> None:
    queue = Queue([job_of(program, "hangs", 600, seconds=0.0)], ["0"], tmp_path, tmp_path / "work")
    queue.run(0.5)
    assert queue.failed == ["hangs"]


def test_a_job_is_told_its_folders_and_the_time_that_is_left(tmp_path: Path, program: str) -> None:
    queue = Queue([job_of(program, "a", 0, f"{WORK_DIR}/5b", SECONDS)], ["0"], tmp_path, tmp_path / "work")
    queue.run(60)
    folder, left = row_of(tmp_path, "a")["arguments"]
    assert folder == str(tmp_path / "work" / "a" / "5b")
    assert 0 < float(left) <= 60


def test_every_measurement_is_a_job_whose_command_its_program_accepts(monkeypatch: pytest.MonkeyPatch) -> None:
    jobs = measure_all.all_jobs()
    assert len({job.name for job in jobs}) == len(jobs)
    files = {file for job in jobs for file in job.results}
    assert files >= {bench.path_of(Path(), row).name for row in bench.ROWS}
    assert files >= {guide_memory.path_of(Path(), arm).name for arm in guide_memory.ARMS.values()}
    assert files >= {scale.result_of(arm, Path(), scale.has_flash()).name for arm in scale.ARMS}
    programs = {f"{module.__name__}.py": module for module in (bench, guide_memory, one_block, small_card)}
    for job in jobs:
        script, *arguments = job.command
        if script in programs:
            programs[script].build_parser().parse_args([word.replace(SECONDS, "10") for word in arguments])
        assert (measure_all.ROOT / "benchmarks" / script).is_file()


def test_the_list_has_only_what_is_missing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert measure_all.main(["--list", "--results", str(tmp_path)]) == 0
    before = capsys.readouterr().out.splitlines()
    assert before[0] == "preparation: 2 GPUs, at least 230 s"
    assert len(before) == len(measure_all.all_jobs())
    (tmp_path / "prepare_ranks.json").write_text("{}")
    assert measure_all.main(["--list", "--results", str(tmp_path)]) == 0
    assert capsys.readouterr().out.splitlines() == before[1:]


def test_tests_of_all_runs_are_counted() -> None:
    """The lines are those that pytest prints, with and without workers."""
    printed = (
        "1 failed in words in 2 s\n30 passed, 1 skipped in 100.05s (0:01:40)\n== 1 failed, 12 passed in 9.12s ==\n"
    )
    assert gpu_tests.counts(printed) == {"passed": 42, "skipped": 1, "failed": 1}


def test_gpu_tests_run_with_this_python(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """make is replaced by a program that prints its arguments and the line of pytest."""
    make = tmp_path / "make"
    make.write_text('#!/bin/sh\necho "$@"\necho "3 passed in 1.00s"\nexit ${MAKE_STATUS:-0}\n')
    make.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.setattr(sys, "argv", ["gpu_tests.py", "--results", str(tmp_path)])
    assert gpu_tests.main() == 0
    row = json.loads((tmp_path / "gpu_tests.json").read_text())
    assert row["tests"] == {"passed": 3}
    (tmp_path / "gpu_tests.json").unlink()
    monkeypatch.setenv("MAKE_STATUS", "2")
    assert gpu_tests.main() == 2
    assert not (tmp_path / "gpu_tests.json").exists()
