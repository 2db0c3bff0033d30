"""locks.py: one process at a time has a lock, on file systems with and without POSIX locks."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fakes import options_of, run_alone
from waiting import eventually

from cogvideox import files, locks
from cogvideox.data.cache import Ledger, sole_writer
from cogvideox.locks import STALE, HeldError, held, take
from cogvideox.runtime.run import RUN_CONFIG_NAME, lock_output_folder

WITHOUT = [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP]
HOLD = """
import errno, fcntl, os, sys, time
from pathlib import Path

def refused(*_):
    raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

if sys.argv[2] == "without":
    fcntl.lockf = fcntl.flock = refused
from cogvideox.locks import take
lock = take(Path(sys.argv[1]), signs=True)
print("held", flush=True)
time.sleep(float(sys.argv[3]))
"""


@pytest.fixture(params=WITHOUT, ids=errno.errorcode.get)
def without_locks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Imitates a file system that has no POSIX locks."""

    def refused(*_: Any) -> None:
        raise OSError(request.param, os.strerror(request.param))

    monkeypatch.setattr("fcntl.lockf", refused)
    monkeypatch.setattr("fcntl.flock", refused)
    files.warn_once.cache_clear()


def holder(path: Path, how: str, seconds: float = 60.0) -> subprocess.Popen[str]:
    """Starts another process that has the lock."""
    code = [sys.executable, "-c", HOLD, str(path), how, str(seconds)]
    environment = {**os.environ, "PYTHONPATH": str(Path(locks.__file__).parents[1])}
    process = subprocess.Popen(code, env=environment, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def owner_of(path: Path) -> Path:
    return path.with_name(f".{path.name.removeprefix('.')}.owner")


def left_by(path: Path, **changed: Any) -> Path:
    """Makes a lock file as a killed process leaves it."""
    owner = owner_of(path)
    owner.write_text(json.dumps(locks.this_process() | changed))
    return owner


def make_old(path: Path, seconds: float) -> None:
    then = time.time() - seconds
    os.utime(path, (then, then))


@pytest.mark.parametrize("how", ["with", "without"])
@pytest.mark.fault("disk: no POSIX locks")
def test_another_process_waits_until_the_lock_is_free(
    how: str, tmp_path: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / ".lock"
    other = holder(path, how)
    try:
        if how == "without":
            monkeypatch.setattr("fcntl.lockf", lambda *_: (_ for _ in ()).throw(OSError(errno.ENOLCK, "none")))
        with pytest.raises(HeldError, match=f"process {other.pid} on ") as refusal:
            take(path, signs=True)
        assert not refusal.value.may_be_lost
    finally:
        other.send_signal(signal.SIGKILL)
        other.wait()
    take(path).release()


@pytest.mark.parametrize("how", ["with", "without"])
@pytest.mark.fault("ranks: the machine of the run that has locked the folder is lost")
def test_a_run_waits_for_the_lock_of_a_lost_machine(
    how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Here the holder is only on another machine; its lock is freed while the run waits."""
    other, run, options = holder(tmp_path / ".lock", how), run_alone(tmp_path), options_of(tmp_path)
    monkeypatch.setattr(locks, "machine_id", lambda: "another")
    if how == "without":
        monkeypatch.setattr("fcntl.lockf", lambda *_: (_ for _ in ()).throw(OSError(errno.ENOLCK, "none")))
        monkeypatch.setattr(locks, "STALE", 1.0)
        os.kill(other.pid, signal.SIGSTOP)  # so that it touches the file no longer
    units: list[str] = []

    def unit(name: str) -> None:
        units.append(name)
        if how == "with" and len(units) == 12:  # after a second
            other.kill()

    monkeypatch.setattr("cogvideox.stopping.unit", unit)
    try:
        assert lock_output_folder(run, options) is None
    finally:
        other.kill()
        other.wait()
    assert "wait for a lock" in units
    said = capsys.readouterr().err
    assert said.count(f"another run is using it (process {other.pid} on ") == 1
    assert "in case its machine is lost" in said


def test_only_a_long_wait_is_announced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Processes that prepare a folder together write its index one after the other, each in a few milliseconds."""
    path, said = tmp_path / ".lock", []
    for refusals in (3, 30):
        left = iter(range(refusals))

        def refused(*_: Any, left: Any = left) -> Any:
            if next(left, None) is not None:
                raise HeldError("process 1 on host")

        monkeypatch.setattr(locks, "take", refused)
        monkeypatch.setattr(time, "sleep", lambda _: None)
        locks.take_later(path, said.append)
        assert said == ["process 1 on host"] * (refusals == 30)


def test_a_run_waits_only_as_long_as_a_lost_machine_needs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = holder(tmp_path / ".lock", "with")
    monkeypatch.setattr(locks, "machine_id", lambda: "another")
    monkeypatch.setattr(locks, "STALE", 0.0)
    refusal = lock_output_folder(run_alone(tmp_path), options_of(tmp_path))
    other.kill()
    other.wait()
    assert f"another run is using it (process {other.pid} on " in (refusal or "")


def test_a_lock_names_only_a_process_that_exists(tmp_path: Path) -> None:
    """A name may be from before the holder has written its own."""
    path = tmp_path / ".lock"
    other = holder(path, "with")
    path.write_text(json.dumps(locks.this_process() | {"pid": 2**22 + 1}))
    with pytest.raises(HeldError, match="another process") as refusal:
        take(path, signs=True)
    other.kill()
    other.wait()
    assert not refusal.value.may_be_lost


@pytest.mark.fault("disk: no POSIX locks")
def test_a_run_works_without_posix_locks_and_reports_it(
    without_locks: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = run_alone(tmp_path)
    assert lock_output_folder(run, options_of(tmp_path)) is None
    assert {path.name for path in tmp_path.iterdir()} == {".lock", ".lock.owner", RUN_CONFIG_NAME}
    shown = capsys.readouterr().err
    assert shown.count("its file system has no locks") == 1
    assert shown.count("\n") == 1
    assert run._lock is not None
    run._lock.release()
    assert not (tmp_path / ".lock.owner").exists()


@pytest.mark.fault("disk: no POSIX locks")
def test_a_cache_is_prepared_without_posix_locks(without_locks: None, tmp_path: Path) -> None:
    ledger, said = Ledger(tmp_path), []
    with sole_writer(tmp_path, said.append):
        ledger.append([{"request": "a"}])
        ledger.append([{"request": "b"}])
    assert set(ledger.read()) == {"a", "b"}
    assert said == []
    assert {path.name for path in tmp_path.iterdir()} == {".lock", "ledger.jsonl"}


@pytest.mark.parametrize("how", ["with", pytest.param("without", marks=pytest.mark.fault("disk: no POSIX locks"))])
def test_a_second_job_waits_and_reports_it(how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other, said = holder(tmp_path / ".lock", how, seconds=2), []
    if how == "without":
        monkeypatch.setattr("fcntl.lockf", lambda *_: (_ for _ in ()).throw(OSError(errno.ENOSYS, "none")))
    units: list[str] = []
    monkeypatch.setattr("cogvideox.stopping.unit", units.append)
    with sole_writer(tmp_path, said.append):
        assert other.wait(10) == 0
    assert len(said) == 1
    assert said[0].startswith(f"{tmp_path}: another job is preparing it (process {other.pid} on ")
    assert "wait for a lock" in units  # Waiting counts as progress, so ranks in the barrier do not end.


def test_a_lock_file_of_an_earlier_process_of_the_same_number_is_stale(without_locks: None, tmp_path: Path) -> None:
    """Containers give their processes the same numbers at every start."""
    left_by(tmp_path / ".lock", started="1")
    take(tmp_path / ".lock").release()


@pytest.mark.parametrize(
    ("changed", "age", "free"),
    [
        ({"machine": "another", "host": "node-7"}, 5, False),
        ({"machine": "another", "host": "node-7"}, STALE + 5, True),
        ({"machine": "another"}, 5, False),  # This is another container of the same name.
        ({"pid": 2**22 + 1}, 5, True),
        ({"pid": os.getppid(), "started": locks.process_start(os.getppid())}, STALE + 5, False),
    ],
)
def test_when_a_lock_file_is_valid(
    changed: dict[str, Any], age: float, free: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fcntl.lockf", lambda *_: (_ for _ in ()).throw(OSError(errno.ENOSYS, "none")))
    make_old(left_by(tmp_path / ".lock", **changed), age)
    if free:
        take(tmp_path / ".lock").release()
        assert [path.name for path in tmp_path.iterdir()] == [".lock"]
    else:
        with pytest.raises(BlockingIOError, match=f"process .* on {changed.get('host', '')}"):
            take(tmp_path / ".lock")


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"{}", b'{"pid": "x"}', b'{"machine": 1, "pid": [], "host": 2}'])
@pytest.mark.fault("disk: an incomplete lock file")
def test_an_incomplete_lock_file_is_stale_after_some_minutes(
    content: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fcntl.lockf", lambda *_: (_ for _ in ()).throw(OSError(errno.ENOSYS, "none")))
    owner_of(tmp_path / ".lock").write_bytes(content)
    with pytest.raises(BlockingIOError):
        take(tmp_path / ".lock")
    make_old(owner_of(tmp_path / ".lock"), STALE + 5)
    take(tmp_path / ".lock").release()


def test_a_lock_file_is_touched_while_its_process_lives(
    without_locks: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(locks, "HEARTBEAT", 0.01)
    lock = take(tmp_path / ".lock")
    make_old(owner_of(tmp_path / ".lock"), STALE)
    eventually(lambda: time.time() - owner_of(tmp_path / ".lock").stat().st_mtime < 100)
    lock.release()
    eventually(lambda: not any(thread.name == "heartbeat" for thread in threading.enumerate()))


def test_a_lock_that_was_lost_is_not_taken_from_its_new_owner(without_locks: None, tmp_path: Path) -> None:
    lock = take(tmp_path / ".lock")
    owner = left_by(tmp_path / ".lock", machine="another")
    lock.release()
    assert owner.exists()


def test_a_child_does_not_end_the_lock_of_its_parent(without_locks: None, tmp_path: Path) -> None:
    lock = take(tmp_path / ".lock")
    child = os.fork()
    if child == 0:
        lock.release()
        os._exit(0)
    os.waitpid(child, 0)
    assert owner_of(tmp_path / ".lock").exists()
    lock.release()


def count_up(file: Path, path: Path) -> None:
    for _ in range(20):
        with held(path):
            number = int(file.read_text())
            time.sleep(0.0005)
            file.write_text(str(number + 1))


@pytest.mark.parametrize("how", ["with", "without", "stale"])
def test_no_two_processes_have_the_lock_at_once(how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Several processes increment a number in a file. A lost increment would mean that two had the lock at once."""
    if how != "with":
        monkeypatch.setattr("fcntl.lockf", lambda *_: (_ for _ in ()).throw(OSError(errno.ENOSYS, "none")))
    if how == "stale":
        make_old(left_by(tmp_path / ".lock", machine="another"), STALE + 5)
    counter = tmp_path / "counter"
    counter.write_text("0")
    in_children(4, lambda: count_up(counter, tmp_path / ".lock"))
    assert counter.read_text() == "80"


def in_children(number: int, work: Callable[[], None]) -> None:
    children = []
    for _ in range(number):
        child = os.fork()
        if child == 0:
            try:
                work()
                os._exit(0)
            finally:
                os._exit(1)
        children.append(child)
    assert [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children] == [0] * number
