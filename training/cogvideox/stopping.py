"""Ends a script early without losing work: after a signal, the end of its launcher, a request of a rank, or a hang.

A script is always in one of two situations.

*Nothing to lose*: everything done so far is on the disk, or can be done again. This is the case while modules are
imported, models load, tensors are prepared, and between a checkpoint and the next optimizer step. The first signal
raises Stopped in the main thread. Where that thread is inside a long call of a library, no exception can reach it, so
a watcher thread ends the process a moment later.

*Something to lose*: from ``defer`` until ``allow``, optimizer steps exist in memory only. The first signal is only
remembered. ``requested`` and ``unit`` ask for it after each unit of work (a micro-batch, a denoising step), so that the
caller can save a checkpoint and then call ``allow``, which raises Stopped.

With several ranks, all of the training loop counts as something to lose: a rank that left at once would leave the
others waiting for its gradients.

Either way the script ends with REQUEUE_EXIT, and the same command continues the work. Standard library only: this is
installed before anything heavy is imported.
"""

import atexit
import faulthandler
import fcntl
import hashlib
import os
import re
import select
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import NoReturn, Protocol

STOP_SIGNALS = (signal.SIGHUP, signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
EXIT_FILE = "COGVIDEOX_EXIT_FILE"  # the variable with the path of a file to which the exit status is written
REQUEUE_EXIT, HANG_EXIT = 75, 1  # 75 is EX_TEMPFAIL of sysexits.h
FAILED = "failed"  # name of the file by which a process tells the others of a launch that it fails
SECOND_SIGNAL = 1.0  # seconds; an earlier signal repeats the first: schedulers signal a launcher and its children
UNWINDING = 0.5  # seconds for the main thread to end by itself when nothing is to be saved
FAREWELL = 2.0  # seconds for it after a checkpoint was saved, for example to close trackers
PERIOD = 0.2  # seconds between two checks by the watcher
SIZE = re.compile(r"[\d.]+ (bytes?|[KMG]iB)")  # as files.size_text formats it
IO_UNIT = 24  # bits: 16 MiB read or written count as a unit of work, such as a part of a large checkpoint
ACCELERATE = ("accelerate", "accelerate-launch", "accelerate.commands.launch", "accelerate.commands.accelerate_cli")
LAUNCHERS = (
    *ACCELERATE,
    *("torchrun", "torch.distributed.run", "torch.distributed.launch", "deepspeed.launcher.launch"),
)


class Stopped(BaseException):
    """Raised to end the work because the process was asked to stop.

    It is not an Exception, because code that handles errors must not catch it.
    """


class Store(Protocol):
    """A store of counters that all ranks share, such as a torch.distributed.TCPStore."""

    def add(self, key: str, amount: int) -> int: ...


class _State:
    """What this process knows about how it ends. Only the main thread writes it unless a comment says otherwise."""

    def __init__(self) -> None:
        self.asked = False  # whether to stop; also written by the watcher, which may receive a signal first
        self.deferred = False  # whether optimizer steps exist in memory only
        self.stoppable = False  # whether unit() may raise
        self.status: int | None = None  # the exit status, once it is decided
        self.achieved = ""  # what was saved, for the last line
        self.grace = UNWINDING
        self.units = 0
        self.last_unit = "start"
        self.phase = "the start"  # what the run does now, for the message about a hang
        self.waiting_since: float | None = None  # when this rank began to wait for other ranks
        self.disk_work: list[None] = []  # an element for each block of disk_work, which any thread may enter
        self.watcher: _Watcher | None = None


_state = _State()


def requested() -> bool:
    """Returns whether the process was asked to stop."""
    return _state.asked


def stops_now() -> bool:
    """Returns whether the process was asked to stop and has nothing to lose."""
    return _state.asked and not _state.deferred


def defer() -> None:
    """Marks that there is something to lose: from now on signals are only remembered, until ``allow``."""
    _state.deferred = True


def allow(achieved: str = "") -> None:
    """Marks that there is nothing to lose: from now on a signal ends the work at once.

    Args:
        achieved: What was saved, such as "and saved after step 3 of 6", for the line that a stopped script ends with.

    Raises:
        Stopped: A signal was deferred.
    """
    _state.achieved = achieved
    if _state.asked:
        _state.grace = FAREWELL
    _state.deferred = False
    if _state.asked:
        _raise_stopped()


def unit(name: str) -> None:
    """Counts a finished unit of work, which proves that this process does not hang.

    Args:
        name: What was finished, for the message about a hang.

    Raises:
        Stopped: The process was asked to stop and is inside ``stoppable``.
    """
    _state.units += 1
    _state.last_unit = name
    if _state.stoppable and _state.asked:
        raise Stopped


@contextmanager
def stoppable() -> Iterator[None]:
    """Marks work that may be abandoned after each unit, because it can be repeated later."""
    before, _state.stoppable = _state.stoppable, True
    try:
        yield
    finally:
        _state.stoppable = before


@contextmanager
def waiting() -> Iterator[None]:
    """Marks a wait for other ranks; the run ends if no rank makes progress meanwhile."""
    before, _state.waiting_since = _state.waiting_since, time.monotonic()
    try:
        yield
    finally:
        _state.waiting_since = before


@contextmanager
def disk_work() -> Iterator[None]:
    """Marks work on a disk, whose calls may take any time: a full cache is flushed, or a large file is deleted.

    Meanwhile this process counts as making progress, until its watcher is silent because it is suspended or gone. The
    work must not wait for other ranks.
    """
    _state.disk_work.append(None)
    try:
        yield
    finally:
        _state.disk_work.pop()


@contextmanager
def phase(name: str) -> Iterator[None]:
    """Names what the run does in a block, such as "the export", for messages about ranks that wait too long."""
    before, _state.phase = _state.phase, name
    yield
    _state.phase = before  # after an error, the message of the error needs the name


def current_phase() -> str:
    """Returns the name of what the run does now."""
    return _state.phase


def stop() -> NoReturn:
    """Ends the work on the request of another rank, as a signal does after a unit of work.

    Raises:
        Stopped: Always.
    """
    _state.asked = True
    raise Stopped


def _raise_stopped() -> NoReturn:
    _state.status = REQUEUE_EXIT
    raise Stopped


def _handle(_number: int, _frame: FrameType | None) -> None:
    """Handles a signal. Python runs it in the main thread between two bytecodes, possibly long after the signal."""
    _state.asked = True
    if not _state.deferred and _state.status is None:
        _raise_stopped()


def install() -> None:
    """Installs the signal handlers and starts the watcher. The main thread of a script calls it once."""
    bell, ringer = socket.socketpair()
    ringer.setblocking(False)
    for number in STOP_SIGNALS:
        if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:  # nohup ignores it
            signal.signal(number, _handle)
    # faulthandler prints the stacks even if Python itself hangs. The Python handler only makes Python write the signal
    # to the wakeup file descriptor, through which the watcher learns of it and asks the other ranks for their stacks.
    signal.signal(signal.SIGQUIT, lambda *_: None)
    faulthandler.register(signal.SIGQUIT, file=2, all_threads=True, chain=True)
    signal.set_wakeup_fd(ringer.fileno(), warn_on_full_buffer=False)
    _state.watcher = _Watcher(bell, ringer, os.getppid())
    _state.watcher.start()


def join_ranks(store: Store, rank: int, number: int, patience: float) -> None:
    """Makes the watcher exchange requests and progress with the other ranks.

    Args:
        store: The shared counters; only the watcher thread uses it.
        rank: The rank of this process.
        number: The number of ranks.
        patience: Seconds without progress on any rank, while one rank waits for others, after which all ranks end.
    """
    if _state.watcher is not None:
        _state.watcher.others = _Others(store, rank, number, patience)


def part_from_ranks() -> None:
    """Ends the exchange of the watcher with the other ranks, after which the process that has the store may end it."""
    if _state.watcher is not None:
        with _state.watcher.exchanging:
            _state.watcher.parted = True


def leave(status: int | None, is_cause: bool = True) -> NoReturn:
    """Exits with a status, and writes it to the file that COGVIDEOX_EXIT_FILE names.

    The file is needed because accelerate and torchrun turn every status into 1.

    Args:
        status: The status; None is 0.
        is_cause: Whether this rank knows why the run ends. One that only lost the others keeps what they have written.
    """
    status = _state.status = status or 0
    if is_cause and status not in (0, REQUEUE_EXIT):
        record_failure()
    try:
        _write_exit_file(status, is_cause)
    except FileExistsError:
        pass
    except OSError as error:  # such as a full disk, which may be the reason for the status
        print(f"{EXIT_FILE} {os.environ[EXIT_FILE]}: cannot be written ({error.strerror})", file=sys.stderr)
    if _state.watcher is not None:
        _state.watcher.close()
    end_process(status)


def end_process(status: int) -> NoReturn:
    """Exits with a status as sys.exit does in the main thread, but leaves the memory of all objects to the system.

    Freeing each object and library takes seconds once torch is imported, and more where gigabytes are pinned.
    """
    try:
        threading._shutdown()  # type: ignore[attr-defined]  # waits for threads that are not daemons
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(status)


def last_line() -> str:
    """Returns the last line that a stopped script prints."""
    return f"stopped{_state.achieved and ' ' + _state.achieved}; the same command continues"


def speaks() -> bool:
    """Returns whether this process prints messages for all ranks."""
    return os.environ.get("RANK", "0") == "0"


def says_last_line() -> bool:
    """Returns whether this process prints the last line of a stopped script for all ranks.

    If one of them has failed, it has said why, and what was saved is all that is left to say.
    """
    return speaks() and bool(_state.achieved or not another_failed())


def record_failure() -> None:
    """Records for the other processes of the launch that this one fails. The launcher then stops them by a signal."""
    with suppress(OSError):
        _launch_file(FAILED).touch()


def another_failed() -> bool:
    """Returns whether a process fails that the launcher has started on this machine together with this one."""
    with suppress(OSError):
        return _launch_file(FAILED).exists()
    return False


def print_once(*lines: str) -> None:
    """Prints lines on stderr, unless another process of the launch has printed the same ones to the same place.

    ``torchrun`` and ``accelerate launch`` create a folder for the processes that they start on a machine, in which each
    one has a file for its error. A file next to these says what was printed. A process holds its lock until the lines
    are written, so if it is killed before that, another one prints them. Without such a folder, each process prints.

    Lines that differ only in sizes are the same: each process measures the free space of a full disk by itself.
    """
    text = "".join(f"{line}\n" for line in lines)
    with ExitStack() as opened:
        record = None
        with suppress(OSError):
            record = opened.enter_context(open(_record_of(text), "a"))
            fcntl.flock(record, fcntl.LOCK_EX)
            if record.seek(0, os.SEEK_END):
                return
        sys.stderr.write(text)
        sys.stderr.flush()
        if record is not None:
            record.truncate(1)  # which also works on a full disk


def _record_of(text: str) -> Path:
    """Returns the file that says that a process of this launch has printed a text to where this one prints.

    Raises:
        OSError: No launcher has started this process, or stderr is not a file of the system.
    """
    place = os.fstat(sys.stderr.fileno())  # the launcher may redirect or drop what some processes print
    name = hashlib.sha256(f"{place.st_dev} {place.st_ino} {SIZE.sub('', text)}".encode()).hexdigest()
    return _launch_file(f"printed-{name}")


def _launch_file(name: str) -> Path:
    """Returns a file of the folder that ``torchrun`` and ``accelerate launch`` create for each start of processes.

    Raises:
        OSError: No launcher has started this process.
    """
    error_file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if not error_file or not is_launcher(os.getppid()):
        raise FileNotFoundError
    return Path(error_file).parent.with_name(name)


def _write_exit_file(status: int, is_cause: bool = True) -> None:
    """Writes the exit status to its file. Every rank does so, because the launcher may kill the last ones.

    A rank that only stops because another one has failed keeps what that one has written.
    """
    if path := os.environ.get(EXIT_FILE):
        is_cause = is_cause and not (status == REQUEUE_EXIT and another_failed())
        with open(path, "w" if is_cause else "x") as file:
            file.write(str(status))


def _end(status: int, line: str = "") -> NoReturn:
    """Ends the process from any thread, whatever the main thread is doing. Worker processes end with their parent."""
    if line:
        os.write(2, f"{line}\n".encode())
    with suppress(OSError):
        _write_exit_file(status)
    os._exit(status)


class _Watcher(threading.Thread):
    """The thread that ensures that the process ends in time.

    It receives signals while the main thread is inside a library, and exchanges requests with other ranks. It is a
    daemon thread, so that it never keeps a finished script alive.
    """

    def __init__(self, bell: socket.socket, ringer: socket.socket, parent: int) -> None:
        super().__init__(name="stopping", daemon=True)
        self.bell, self.ringer = bell, ringer
        self.parent = parent if is_launcher(parent) else None
        self.others: _Others | None = None
        self.exchanging = threading.Lock()  # held while the store is used
        self.parted = False  # whether the store must not be used any more; the main thread sets it
        self.first_signal: float | None = None
        self.deadline: float | None = None
        self.closing = False

    def run(self) -> None:
        while not (self.closing and self._told_others()):
            for number in self._heard():
                self._take(number)
            orphaned = self.parent is not None and os.getppid() != self.parent
            if (self._asked_by_others() or orphaned) and not _state.asked:
                os.kill(os.getpid(), signal.SIGTERM)  # also interrupts a system call of the main thread
            self._end_if_late()

    def close(self) -> None:
        """Ends the thread, because a thread inside a library can abort the process when the interpreter shuts down."""
        self.closing = True
        self.ringer.send(b"\0")
        self.join(FAREWELL)

    def _told_others(self) -> bool:
        return self.others is None or not _state.asked or self.others.all_know()

    def _asked_by_others(self) -> bool:
        with self.exchanging:
            if self.others is not None and (self.parted or not self.others.exchange()):
                self.others = None  # if the store is gone, a failing collective operation will report why
            return self.others is not None and self.others.stopping > 0

    def _heard(self) -> bytes:
        """Waits at most PERIOD seconds, and returns the numbers of the signals that have arrived."""
        ready, _, _ = select.select([self.bell], [], [], PERIOD)
        return self.bell.recv(256) if ready else b""

    def _take(self, number: int) -> None:
        now = time.monotonic()
        if number == signal.SIGQUIT and self.others is not None:
            self.others.ask_for_stacks()
        if number not in STOP_SIGNALS:
            return
        _state.asked = True
        if self.first_signal is None:
            self.first_signal = now
        elif now - self.first_signal >= SECOND_SIGNAL:
            _end(128 + number if _state.status is None else _state.status)

    def _end_if_late(self) -> None:
        """Ends the process if the main thread had nothing to save and has not ended within the grace period."""
        if not stops_now():
            self.deadline = None
            return
        if self.deadline is None:
            self.deadline = time.monotonic() + _state.grace
        elif time.monotonic() >= self.deadline + (0 if self._told_others() else FAREWELL):
            # A script that was already ending prints its own message.
            decided = _state.status not in (None, REQUEUE_EXIT)
            line = last_line() if not decided and says_last_line() else ""
            _end(_state.status or 0 if decided else REQUEUE_EXIT, line)


class _Others:
    """Exchanges state with the watchers of the other ranks, through counters to which all of them add."""

    def __init__(self, store: Store, rank: int, number: int, patience: float) -> None:
        self.store, self.rank, self.number, self.patience = store, rank, number, patience
        self.stopping = 0  # number of ranks that know of the request to stop
        self.told_stop = False
        self.progress, self.told_units = 0, 0  # units of all ranks; units that this rank has reported
        self.changed = time.monotonic()
        self.stacks = 0  # number of requests to print all stacks

    def all_know(self) -> bool:
        """Returns whether every rank knows that all ranks must stop."""
        return self.stopping >= self.number

    def exchange(self) -> bool:
        """Reports the state of this rank and reads that of the others. Returns False if the store no longer answers."""
        try:
            self._exchange_stop()
            self._exchange_stacks()
            self._exchange_progress()
        except Exception:
            return False
        return True

    def ask_for_stacks(self) -> None:
        """Asks the other ranks to print their stacks; this rank has already done so."""
        with suppress(Exception):
            self.stacks = self.store.add("stacks", 1)

    def _exchange_stop(self) -> None:
        tells = _state.asked and not self.told_stop
        self.stopping = self.store.add("stop", int(tells))
        self.told_stop |= tells

    def _exchange_stacks(self) -> None:
        wanted = self.store.add("stacks", 0)
        if wanted > self.stacks:
            faulthandler.dump_traceback(2, all_threads=True)
        self.stacks = wanted

    def _exchange_progress(self) -> None:
        units = _state.units + (_bytes_moved() >> IO_UNIT)
        progress = self.store.add("progress", units - self.told_units + len(_state.disk_work))
        self.told_units = units
        now = time.monotonic()
        if progress != self.progress:
            self.progress, self.changed = progress, now
        since = _state.waiting_since
        hangs = since is not None and now - max(since, self.changed) > self.patience
        if hangs or self.store.add("hang", 0):
            self._end_hang()

    def _end_hang(self) -> NoReturn:
        """Prints the stacks of this rank and ends it, once all ranks know or FAREWELL seconds have passed."""
        self.store.add(f"hang/{self.rank}", 1)
        self.store.add("hang", 1)
        what = "waits for the others" if _state.waiting_since is not None else f"last finished: {_state.last_unit}"
        rule = f"no rank made progress for {self.patience:g} s (--nccl_timeout) during {_state.phase}"
        fix = "give more seconds if the work is only slow"
        os.write(2, f"rank {self.rank}: {rule}; this one {what}; {fix}. Its threads:\n".encode())
        faulthandler.dump_traceback(2, all_threads=True)
        end = time.monotonic() + FAREWELL
        while (silent := self._silent()) and time.monotonic() < end:
            time.sleep(PERIOD)
        _end(HANG_EXIT, f"no answer from rank {', '.join(map(str, silent))}" if silent else "")

    def _silent(self) -> list[int]:
        """Returns the ranks that do not know of the hang, because they are suspended or their machine is gone."""
        return [rank for rank in range(self.number) if not self.store.add(f"hang/{rank}", 0)]


def _bytes_moved() -> int:
    """Returns the bytes that this process has read and written, through system calls or from mapped files."""
    with suppress(OSError, ValueError):
        pairs = (line.split(":") for line in Path("/proc/self/io").read_text().splitlines())
        return sum(int(value) for name, value in pairs if name in ("rchar", "wchar", "read_bytes"))
    return 0


def is_launcher(pid: int, among: Sequence[str] = LAUNCHERS) -> bool:
    """Returns whether a process is a launcher of training processes, which must not outlive it."""
    try:
        words = Path(f"/proc/{pid}/cmdline").read_text(errors="replace").split("\0")[:6]
    except OSError:
        return False
    names = {Path(word).name.removesuffix(".py") for word in words} | set(words)
    return bool(names & set(among))
