"""workers.py: if the process of one job is lost, the reason is reported and all other jobs return their results.

The jobs are functions of the standard library, so that a new worker imports nothing slow.
"""

from __future__ import annotations

import ctypes
import importlib
import os
import random
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from waiting import eventually

from cogvideox.data.media import workers as media_workers
from cogvideox.data.media.workers import AHEAD, Killed, Limits, Workers
from cogvideox.errors import UsageError

TRAINING = Path(__file__).parents[2] / "training"
MIB = 2**20
AMPLE = Limits(seconds=60, memory=2**30)
PID = (os.getpid,)
CRASH = (ctypes.string_at, 0)


def code(expression: str) -> tuple[Any, ...]:
    """Returns a job that evaluates an expression."""
    return (eval, expression)


def results(*jobs: tuple[Any, ...], number: int = 2, limits: Limits = AMPLE) -> list[Any]:
    with Workers(number, limits) as workers:
        return list(workers.run(jobs))


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.fixture
def workers() -> Iterator[Workers]:
    with Workers(2, AMPLE) as workers:
        yield workers


# -- results -----------------------------------------------------------------------------------------------------------


def test_results_come_in_order_and_few_are_waiting(workers: Workers) -> None:
    begun: list[int] = []

    def jobs() -> Iterator[tuple[Any, ...]]:
        for number in range(20):
            begun.append(number)
            yield code(f"(__import__('time').sleep({(7 * number) % 5 / 200}), {number})[1]")

    for done, result in enumerate(workers.run(jobs())):
        assert result == done
        assert len(begun) - done <= AHEAD * workers.number
    assert len(begun) == 20
    assert list(workers.run([])) == []


def test_jobs_run_at_the_same_time_in_as_many_processes_as_asked_for() -> None:
    slow = code("(__import__('time').sleep(0.3), __import__('os').getpid())[1]")
    pids = set(results(*[slow] * 6, number=3))
    assert len(pids) == 3
    assert os.getpid() not in pids
    assert not any(is_alive(pid) for pid in pids)


def test_large_results_arrive_whole_and_can_be_written(workers: Workers) -> None:
    jobs = [(np.full, (49, 480, 720, 3), k, np.uint8) for k in range(4)]
    for k, clip in enumerate(workers.run(jobs)):
        assert clip.shape == (49, 480, 720, 3)
        assert (clip == k).all()
        clip += 1
    flipped, mixed = workers.run([(np.flip, np.arange(6)), (dict, {"a": np.arange(3), "b": b"x" * MIB, "c": [None]})])
    assert flipped.tolist() == [5, 4, 3, 2, 1, 0]
    assert mixed["a"].tolist() == [0, 1, 2]
    assert (mixed["b"], mixed["c"]) == (b"x" * MIB, [None])


@pytest.mark.parametrize(
    ("job", "error", "text"),
    [
        ((int, "seven"), ValueError, "invalid literal for int"),
        ((os.stat, "/no such file"), FileNotFoundError, "/no such file"),
        (code("(_ for _ in ()).throw(TimeoutError('slow'))"), TimeoutError, "slow"),
        (code("(_ for _ in ()).throw(EOFError('end'))"), EOFError, "end"),
        (code("(_ for _ in ()).throw(BrokenPipeError('pipe'))"), BrokenPipeError, "pipe"),
        (code("lambda: 0"), Exception, "pickle"),
        (code("(_ for _ in ()).throw(type('Local', (Exception,), {})('text'))"), RuntimeError, "Local: text"),
    ],
    ids=["value", "file", "timeout", "eof", "pipe", "result that cannot be sent", "error that cannot be sent"],
)
def test_an_exception_is_raised_by_run_and_the_worker_continues(job: Any, error: Any, text: str) -> None:
    with Workers(1, AMPLE) as workers:
        (before,) = workers.run([PID])
        with pytest.raises(error, match=text) as raised:
            list(workers.run([job]))
        assert "in a worker process" in raised.value.__notes__[0]
        assert list(workers.run([PID])) == [before]


def test_a_usage_error_keeps_its_text() -> None:
    with pytest.raises(UsageError, match="one\ntwo"):
        results(code("(_ for _ in ()).throw(__import__('cogvideox.errors').errors.UsageError(['one', 'two']))"))


def test_a_job_that_cannot_be_sent_is_an_error(workers: Workers) -> None:
    with pytest.raises(Exception, match="local object"):
        list(workers.run([PID, (lambda: 0,)]))
    assert len(list(workers.run([PID] * 3))) == 3


# -- limits ------------------------------------------------------------------------------------------------------------


@pytest.mark.fault("data: a decoder that hangs")
def test_a_job_that_hangs_is_killed() -> None:
    found = results((pow, 2, 3), (time.sleep, 60), *[(pow, 3, k) for k in range(5)], limits=Limits(1.5, 2**30))
    assert found == [8, Killed("no result after 1.5 s; allow more with --decode_timeout"), 1, 3, 9, 27, 81]


def test_a_hang_that_no_signal_handler_interrupts() -> None:
    """The job holds the interpreter's lock, as a loop in a decoder may."""
    hang = code("__import__('re').match('(a*)*b', 'a' * 40)")
    assert [type(each) for each in results(hang, PID, limits=Limits(1.5, 2**30))] == [Killed, int]


def test_the_clock_starts_with_the_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The time limit does not count imports of a new worker, or waiting for a worker or a reader of results."""
    lines = ["import os, time", "time.sleep(float(os.environ['IMPORT']))", "def job(k): time.sleep(0.2); return k"]
    (tmp_path / "slow.py").write_text("\n".join(lines))
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("IMPORT", "0")
    job = importlib.import_module("slow").job
    monkeypatch.setenv("IMPORT", "1.6")
    found = []
    with Workers(1, Limits(1.5, 2**30)) as workers:
        for result in workers.run([(job, k) for k in range(6)]):
            found.append(result)
            time.sleep(1.6 if result == 0 else 0)  # meanwhile a result waits
    assert found == list(range(6))


@pytest.mark.parametrize(
    "job",
    [
        (bytearray, 2**30),
        (np.ones, (2**28,)),
        code("[bytes(2**20) for _ in iter(int, 1)]"),
        code("__import__('av').error.err_check(-12)"),
        code("(_ for _ in ()).throw(OSError(12, 'Cannot allocate memory'))"),
    ],
    ids=["at once", "array", "bit by bit", "in FFmpeg", "as an OSError"],
)
@pytest.mark.fault("data: a decoder that takes too much memory")
def test_a_job_that_takes_too_much_memory_is_killed(job: tuple[Any, ...]) -> None:
    reason = "its worker ran out of memory (0.25 GiB); allow more with --decode_memory"
    assert results(job, (pow, 2, 3), limits=Limits(60, 256 * MIB)) == [Killed(reason), 8]


def test_mapped_memory_does_not_count_toward_the_limit() -> None:
    assert results(code("len(__import__('mmap').mmap(-1, 2**30))"), limits=Limits(60, 256 * MIB)) == [2**30]


def test_the_limits_of_the_process() -> None:
    limit = "__import__('resource').getrlimit"
    memory, core = results(code(f"{limit}({resource.RLIMIT_DATA})"), code(f"{limit}({resource.RLIMIT_CORE})"))
    assert (memory, core) == ((2**30, 2**30), (0, 0))


def test_workers_that_do_not_start_are_not_blamed_on_files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(RuntimeError, match=r"do not start: .* \(exit code 1\)"):
        results(PID)


# -- death -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("job", "reason"),
    [
        (CRASH, "the decoder crashed (SIGSEGV)"),
        ((os.abort,), "the decoder crashed (SIGABRT)"),
        ((os._exit, 3), "the decoder ended its process (exit code 3)"),
        ((os._exit, 0), "the decoder ended its process (exit code 0)"),
        ((sys.exit, 4), "the decoder ended its process (exit code 4)"),
        ((signal.raise_signal, signal.SIGKILL), "its worker was killed (SIGKILL); this machine may be out of memory"),
    ],
)
@pytest.mark.fault("data: a decoder that crashes")
def test_a_crash_costs_one_job(job: tuple[Any, ...], reason: str) -> None:
    killed = Killed(reason, transient="SIGKILL" in reason)
    assert results((pow, 2, 1), job, (pow, 2, 2), (pow, 2, 3)) == [2, killed, 4, 8]


def test_two_hundred_jobs_of_which_every_tenth_crashes(workers: Workers) -> None:
    found = list(workers.run([CRASH if k % 10 == 0 else (pow, k, 2) for k in range(200)]))
    crashed = Killed("the decoder crashed (SIGSEGV)")
    assert found == [crashed if k % 10 == 0 else k * k for k in range(200)]


def test_a_job_whose_worker_dies_once_is_tried_again(tmp_path: Path) -> None:
    """A job is tried again, because an earlier file may have damaged the process, or another program killed it."""
    path, number = str(tmp_path / "tried"), signal.SIGSEGV
    job = code(
        f"'second' if __import__('os').path.exists({path!r}) else "
        f"(__import__('os').mkdir({path!r}), __import__('signal').raise_signal({number:d}))"
    )
    assert results((pow, 2, 3), job, (pow, 2, 4)) == [8, "second", 16]


@pytest.mark.fault("kills: SIGKILL of a process that reads media files")
def test_a_worker_killed_while_idle_is_replaced() -> None:
    with Workers(1, AMPLE) as workers:
        for _ in range(3):
            (pid,) = workers.run([PID])
            os.kill(pid, signal.SIGKILL)
        eventually(lambda: not is_alive(pid))
        (other,) = workers.run([PID])
    assert other != pid


def test_a_worker_killed_while_busy_loses_nothing() -> None:
    with Workers(1, AMPLE) as workers:
        (pid,) = workers.run([PID])
        timer = threading.Timer(0.2, os.kill, (pid, signal.SIGKILL))
        timer.start()
        assert list(workers.run([code("(__import__('time').sleep(0.5), 'done')[1]"), (pow, 2, 3)])) == ["done", 8]


@pytest.mark.fault("kills: SIGKILL of a process that reads media files", times=4)
def test_a_kill_while_results_are_sent_corrupts_nothing(workers: Workers) -> None:
    """Workers are killed at random times, so that some are killed while they, or others, send 100 MB."""
    draws = random.Random(0)
    for _ in range(4):
        jobs = [
            code(f"(__import__('os').getpid(), __import__('numpy').full({100 * MIB}, {k}, 'uint8'))") for k in range(3)
        ]
        found = workers.run(jobs)
        pid, first = next(found)
        timer = threading.Timer(draws.uniform(0, 0.12), os.kill, (pid, signal.SIGKILL))
        timer.start()
        for k, clip in enumerate([first, *(clip for _, clip in found)]):
            assert clip.size == 100 * MIB
            assert (clip[:: MIB // 16] == k).all()
            assert clip[-1] == k
        timer.join()


# -- ends --------------------------------------------------------------------------------------------------------------


def test_an_abandoned_generator_leaves_no_process() -> None:
    with Workers(2, AMPLE) as workers:
        pids = set(workers.run([PID] * 20))
        found = workers.run([(pow, 2, 3), *[(time.sleep, 60)] * 10])
        assert next(found) == 8
    assert not any(is_alive(pid) for pid in pids)
    with pytest.raises(RuntimeError, match="inside their context"):
        next(found)


def test_running_jobs_outside_of_the_context_is_an_error() -> None:
    with Workers(1, AMPLE) as workers:
        found = workers.run([(pow, 2, 3)] * 20)
        assert next(found) == 8
    for late in (found, workers.run([PID]), Workers(1, AMPLE).run([PID])):
        with pytest.raises(RuntimeError, match="inside their context"):
            list(late)


def test_jobs_of_a_closed_generator_are_not_begun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(media_workers, "AHEAD", 4)
    with Workers(1, AMPLE) as workers:
        found = workers.run([(pow, 2, 3), (time.sleep, 0.3), *[(os.mkdir, str(tmp_path / "begun"))] * 2])
        assert next(found) == 8
        found.close()  # type: ignore[attr-defined]
        assert list(workers.run([(pow, 2, 4)])) == [16]
    assert not list(tmp_path.iterdir())


def test_an_exception_of_the_reader_leaves_no_process() -> None:
    pids: set[int] = set()

    def read() -> None:
        with Workers(2, AMPLE) as workers:
            pids.update(workers.run([PID] * 20))
            for result in workers.run([(pow, 2, 0), *[(time.sleep, 60)] * 4]):
                assert result // 0

    with pytest.raises(ZeroDivisionError):
        read()
    assert pids
    assert not any(is_alive(pid) for pid in pids)


def test_without_jobs_there_is_no_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subprocess, "Popen", None)
    with Workers(2, AMPLE) as workers:
        assert list(workers.run([])) == []
        with pytest.raises(TypeError, match="not callable"):
            list(workers.run([PID]))


def test_workers_ignore_stop_signals() -> None:
    with Workers(1, AMPLE) as workers:
        (pid,) = workers.run([PID])
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
            os.kill(pid, number)
        assert list(workers.run([PID])) == [pid]
        assert list(workers.run([(os.getpgrp,)])) != [
            os.getpgrp()
        ]  # signals of the keyboard do not reach another process group


@pytest.fixture
def script(tmp_path: Path) -> Iterator[tuple[subprocess.Popen[str], list[int]]]:
    """Starts a script that uses torch and has two hanging workers; yields the process and the workers' pids."""
    (tmp_path / "torch.py").write_text("")
    (tmp_path / "script.py").write_text(f"""
import os, re, sys, time
sys.path.insert(0, {str(TRAINING)!r})
import torch
from cogvideox.data.media.workers import Limits, Workers
print("imported", "torch" in sys.modules)
with Workers(3, Limits(60, 2**30)) as workers:
    look = "(__import__('time').sleep(0.2), __import__('os').getpid(), 'torch' in __import__('sys').modules)[1:]"
    for pid, torch in workers.run([(eval, look)] * 3):
        print(pid, torch, flush=True)
    list(workers.run([(time.sleep, 60), (re.match, "(a*)*b", "a" * 40)]))
""")
    command = [sys.executable, str(tmp_path / "script.py")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "imported True\n"
        lines = [process.stdout.readline().split() for _ in range(3)]
        assert [torch for _, torch in lines] == ["False"] * 3
        time.sleep(0.1)
        yield process, [int(pid) for pid, _ in lines]
        process.kill()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
@pytest.mark.fault("kills: a signal to the parent of processes that read media files")
def test_no_worker_outlives_its_parent(script: tuple[subprocess.Popen[str], list[int]], number: int) -> None:
    """Workers that are idle, busy, or hold the interpreter's lock end; none has imported the script's modules."""
    process, pids = script
    assert len(set(pids)) == 3
    assert all(is_alive(pid) for pid in pids)
    os.kill(process.pid, number)
    assert process.wait(30) != 0
    eventually(lambda: not any(is_alive(pid) for pid in pids))
    assert process.stderr is not None
    assert process.stderr.read().count("Traceback") == (number == signal.SIGINT)
