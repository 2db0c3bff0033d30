"""Runs the measurements of this folder that are missing, one program on each GPU of this machine.

    python benchmarks/measure_all.py --list                    # what is missing, the important ones first
    python benchmarks/measure_all.py                           # measures everything; start it again to continue
    python benchmarks/measure_all.py --seconds 560 --only preparation 5b-8bit
    python benchmarks/measure_all.py --this_commit             # measures again what other commits have measured

A job is a command with the number of GPUs that it needs, and the files of its results. A job whose results exist is
left out, and so is one that needs more GPUs or time than there is. A job never shares a GPU, because that would change
its seconds. When the time is over, jobs that have not ended are killed with all of their processes. What a job printed
is in WORK_DIR/logs, and its other files are in WORK_DIR/NAME. When it has ended, those that nobody reads are deleted,
such as weights, checkpoints and tensors: the disk has no room for those of all jobs. Links, and what they lead to, are
never deleted, so a base model may be on another disk. The files of a job that was killed stay for the next start.

Afterwards, --table of bench.py, scale.py and guide_memory.py writes the tables of docs/benchmarks.md.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import bench
import guide_memory
import scale
from random_models import ROOT
from record import current_commit

# In a command, for what is known when it starts: folders for results and for files of the job, and seconds.
RESULTS, WORK_DIR, SECONDS = "{results}", "{work_dir}", "{seconds}"
READ = (".log", ".jsonl", ".html", ".png", ".mp4")  # suffixes of files that people read
GUIDE_SECONDS = 240.0  # of a job that measures rows of the guides
ARM_SECONDS = 120.0  # of an arm of scale.py


@dataclass(frozen=True)
class Job:
    """Describes a command, what it needs, and the files that it writes into the folder of results."""

    name: str
    command: tuple[str, ...]  # a program of this folder and its arguments
    results: tuple[str, ...]
    seconds: float  # with less time left, it is not started
    gpus: int = 1

    def is_done(self, results: Path, commit: str | None = None) -> bool:
        """Returns whether all results exist; if a commit is given, only its results count."""
        return all(path.is_file() and is_of(path, commit) for path in self.paths(results))

    def paths(self, results: Path) -> list[Path]:
        """Returns the paths of the results."""
        return [results / name for name in self.results]


def is_of(result: Path, commit: str | None) -> bool:
    """Returns whether a result was measured with a commit; None stands for all commits."""
    return commit is None or json.loads(result.read_text()).get("commit") == commit


# -- jobs --------------------------------------------------------------------------------------------------------------


def bench_job(name: str, rows: Sequence[str], *more: str) -> Job:
    """Returns the job that measures rows of bench.py, of which the first must fit into the time left."""
    process = bench.ROWS[rows[0]]
    seconds = bench.ROW_SECONDS[process.kind] * (2 if process.stock_steps else 1)
    command = ("bench.py", "--results", RESULTS, "--seconds", SECONDS, "--rows", *rows, *more)
    return Job(name, command, tuple(bench.path_of(Path(), row).name for row in rows), seconds)


def scale_job(arm: scale.Arm) -> Job:
    """Returns the job that measures an arm of scale.py."""
    command = ("scale.py", "--results", RESULTS, "--work_dir", WORK_DIR, "--arms", arm.name)
    return Job(arm.name, command, (scale.result_of(arm, Path(), scale.has_flash()).name,), ARM_SECONDS, arm.gpus)


def small_card_job(kind: str, gib: int, seconds: float, *more: str, result: str) -> Job:
    """Returns the job that trains all weights on a part of a GPU, and kills and resumes the run."""
    size = ("--kind", kind, "--gib", str(gib), "--rank", "0")
    command = ("small_card.py", "--results", RESULTS, "--work_dir", WORK_DIR, *size, "--kill_after", "4", *more)
    return Job(f"{kind}-within-{gib}gb", command, (result,), seconds)


def block_job(kind: str) -> Job:
    """Returns the job that measures one block of which all weights are trained."""
    command = ("one_block.py", "--results", RESULTS, "--kind", kind, "--rank", "0", "--backends", "flash-4")
    return Job(f"{kind}-block", command, (f"one_block_{kind}_sft.json",), 60)


def guide_jobs() -> Iterator[Job]:
    """Yields jobs that measure rows of the guides, by importance. Those of a job share their weights."""
    for _, group in groupby(guide_memory.ARMS.values(), lambda arm: arm.process):
        parts: list[list[guide_memory.Arm]] = [[]]
        for arm in group:
            if parts[-1] and sum(other.row.seconds for other in [*parts[-1], arm]) > GUIDE_SECONDS:
                parts.append([])
            parts[-1].append(arm)
        for part in parts:
            rows = tuple(arm.name for arm in part)
            command = ("guide_memory.py", "--results", RESULTS, "--seconds", SECONDS, "--rows", *rows)
            results = tuple(guide_memory.path_of(Path(), arm).name for arm in part)
            yield Job(f"guide-{rows[0]}", command, results, part[0].row.seconds)


def all_jobs() -> list[Job]:
    """Returns all jobs, by importance. Rows that are wanted early are also in the job with all rows of their kind."""
    ranks = ("prepare.py", "--results", RESULTS, "--only", "ranks", "--gpus", "1", "2", "--seconds", "300")
    # A disk of 64 GB has no room for two checkpoints with the state of 5b.
    first, resumed = "--checkpointing_steps 4 --max_train_steps 4", "--checkpoint_weights_only"
    halves = ("--steps", "6", f"--first_flags={first}", f"--resumed_flags={resumed}")
    within_64 = ("--host_gib", "64", *halves, "--flags", "--use_8bit")
    arms = sorted(scale.ARMS, key=lambda arm: not arm.kind.endswith("i2v"))
    return [
        Job("preparation", ranks, ("prepare_ranks.json",), 230, gpus=2),
        bench_job("5b-8bit", ["5b-sft-24gb-8bit", "5b-sft-lean-8bit", "5b-sft-80gb-device-8bit"], "--trace"),
        Job("gpu-tests", ("gpu_tests.py", "--results", RESULTS), ("gpu_tests.json",), 480),
        small_card_job("5b", 24, 480, *within_64, result="small_card_5b_sft_host_64_killed.json"),
        small_card_job("2b", 8, 250, result="small_card_2b_sft_killed.json"),
        bench_job("stock-offload", ["5b-sft-stock-offload"]),
        bench_job("slow-copies", ["5b-sft-lean-8bit-copies12", "5b-r128-lean-copies12"]),
        bench_job("1.5-5b-within-24gb", ["1.5-5b-sft-24gb-8bit"]),
        *map(block_job, ("1.5-5b", "2b")),
        scale_job(arms[0]),
        bench_job("fp16", ["5b-r128-lean-fp16"]),
        *guide_jobs(),
        *map(scale_job, arms[1:]),
        *(bench_job(f"bench-{next(iter(process.rows))}", [*process.rows]) for process in bench.PROCESSES),
    ]


# -- their files -------------------------------------------------------------------------------------------------------


def delete_unread(folder: Path) -> None:
    """Deletes the files in a folder that nobody reads, and folders that are empty then. Links are not followed."""
    if folder.is_symlink():
        return
    for parent, _, names in os.walk(folder, topdown=False):
        for path in (Path(parent, name) for name in names):
            if path.suffix not in READ and not path.is_symlink():
                path.unlink()
        with suppress(OSError):  # the folder is not empty
            os.rmdir(parent)


# -- running them ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Running:
    """Holds a job that runs, its process, the GPUs that it has, and when it was started."""

    job: Job
    process: subprocess.Popen[bytes]
    gpus: Sequence[str]
    began: float

    def say(self, what: str) -> None:
        """Prints what became of the job."""
        after = f"after {time.monotonic() - self.began:.0f} s"
        print(f"{self.job.name}, GPU {','.join(self.gpus)}: {what} {after}", flush=True)


class Queue:
    """Runs jobs on GPUs that are free, until the time is over or no job is left that could run."""

    def __init__(
        self, jobs: Sequence[Job], gpus: Sequence[str], results: Path, work_dir: Path, commit: str | None = None
    ) -> None:
        """Takes the jobs that have no result and do not need more GPUs than there are.

        Args:
            jobs: The jobs by importance.
            gpus: Names of GPUs for CUDA_VISIBLE_DEVICES.
            results: The folder of results.
            work_dir: The folder for logs and for a folder of each job.
            commit: The commit whose results count; None if all do.
        """
        self.failed: list[str] = []  # names of jobs that ended without their results
        self._results, self._work_dir, self._commit = results.resolve(), work_dir.resolve(), commit
        self._free, self._running = list(gpus), list[Running]()
        self._waiting = [job for job in jobs if job.gpus <= len(gpus)]

    def run(self, seconds: float) -> None:
        """Runs the jobs, and kills those that have not ended after this time."""
        end = time.monotonic() + seconds
        try:
            while time.monotonic() < end:
                # A result is read to know its commit, so not while all GPUs are busy.
                while self._free and (job := self._next(end - time.monotonic())):
                    self._start(job, end - time.monotonic())
                if not self._running:
                    return
                time.sleep(0.2)
                self._collect()
        finally:
            for running in self._running:
                scale.end_all(running.process)
                running.say("has not ended")
            self.failed += [running.job.name for running in self._running]

    def _next(self, seconds: float) -> Job | None:
        """Returns the most important job that is missing and fits into the time, or None if its GPUs are not free."""
        self._waiting = [
            job for job in self._waiting if not job.is_done(self._results, self._commit) and job.seconds <= seconds
        ]
        if not self._waiting or self._waiting[0].gpus > len(self._free):
            return None
        return self._waiting.pop(0)

    def _start(self, job: Job, seconds: float) -> None:
        """Starts a job on free GPUs, with the seconds that are left. It would leave out what other commits measured."""
        for path in job.paths(self._results):
            if path.is_file() and not is_of(path, self._commit):
                others = self._work_dir / "other_commits"
                others.mkdir(parents=True, exist_ok=True)
                shutil.move(path, others / path.name)
        gpus, self._free = self._free[: job.gpus], self._free[job.gpus :]
        known = {RESULTS: str(self._results), WORK_DIR: str(self._work_dir / job.name), SECONDS: str(seconds)}
        script, *arguments = job.command
        for name, value in known.items():
            arguments = [word.replace(name, value) for word in arguments]
        log = self._work_dir / "logs" / f"{job.name}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        environment = os.environ | {"CUDA_VISIBLE_DEVICES": ",".join(gpus), "PYTHONUNBUFFERED": "1"}
        with log.open("ab") as file:
            command = [sys.executable, str(ROOT / "benchmarks" / script), *arguments]
            process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, cwd=ROOT, env=environment)
        self._running.append(Running(job, process, gpus, time.monotonic()))
        self._running[-1].say("started")

    def _collect(self) -> None:
        """Takes back the GPUs of jobs that have ended, and deletes what nobody reads of their files."""
        for running in [running for running in self._running if running.process.poll() is not None]:
            self._running.remove(running)
            self._free += running.gpus
            done, status = running.job.is_done(self._results, self._commit), running.process.returncode
            if done and not status:
                running.say("measured")
            else:
                running.say(f"ended with status {status}" + ("" if done else ", results are missing"))
                self.failed.append(running.job.name)
            try:
                delete_unread(self._work_dir / running.job.name)
            except OSError as error:  # other jobs run, and may have room
                running.say(f"its files are not deleted: {error}")


def visible_gpus() -> list[str]:
    """Returns the names of the GPUs that this process may use, as in CUDA_VISIBLE_DEVICES."""
    import torch

    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    return named.split(",") if named else [str(number) for number in range(torch.cuda.device_count())]


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the jobs, and returns whether one of them failed."""
    jobs = all_jobs()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=[job.name for job in jobs], metavar="NAME", help="only these jobs")
    parser.add_argument("--seconds", type=float, default=1e9, help="kill what has not ended after so long")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--work_dir", type=Path, default=Path("/tmp/measure_all"), help="for logs and random models")
    parser.add_argument("--list", action="store_true", help="print the jobs that are missing")
    parser.add_argument(
        "--this_commit",
        action="store_true",
        help="results of other commits count as missing, and are moved to WORK_DIR/other_commits",
    )
    flags = parser.parse_args(argv)
    jobs = [job for job in jobs if not flags.only or job.name in flags.only]
    commit = current_commit() if flags.this_commit else None
    if flags.list:
        for job in jobs:
            if not job.is_done(flags.results, commit):
                print(f"{job.name}: {job.gpus} GPU{'s' * (job.gpus > 1)}, at least {job.seconds:.0f} s")
        return 0
    gpus = visible_gpus()
    if not gpus:
        parser.error("there is no GPU")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that the jobs are killed, too
    queue = Queue(jobs, gpus, flags.results, flags.work_dir, commit)
    queue.run(flags.seconds)
    return int(bool(queue.failed))


if __name__ == "__main__":
    sys.exit(main())
