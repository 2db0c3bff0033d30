"""Processes for media files: a file that hangs, crashes or bloats its decoder costs one job, never the run.

jobs -> run(), at most `ahead` at a time -> a thread per worker -> a socket -> the worker process -> results in order

Each worker has a socket of its own. In the pools of concurrent.futures, multiprocessing and Pebble all workers share
one pipe and its lock, and a worker that is killed while it sends a clip leaves both useless to the others.
Nothing here imports torch, and workers do not import the script either, so they hold neither torch nor a device.
"""

import ctypes
import errno
import os
import pickle
import queue
import resource
import signal
import socket
import struct
import subprocess
import sys
import threading
import traceback
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from io import BufferedRWPair
from itertools import islice
from pathlib import Path
from typing import Any

from cogvideox.stopping import STOP_SIGNALS

ATTEMPTS = 2
EXIT_SECONDS = 5.0  # seconds for a killed process to be gone; one that hangs in a dead network mount never is

NOT_OPEN = "workers work only inside their context"
STARTED, RESULT, ERROR, NO_MEMORY = range(4)  # what a worker says
_COMMAND = "import sys; from cogvideox.data.media.workers import serve; serve(*map(int, sys.argv[1:]))"
_PR_SET_PDEATHSIG = 1
_LENGTH = struct.Struct("<Q")


@dataclass(frozen=True)
class Limits:
    """What one job may use: seconds from its start in the worker, and bytes of memory of its process."""

    seconds: float
    memory: int


@dataclass(frozen=True)
class Killed:
    """In place of a result: why the worker did not survive the job, in one line; transient: the file may be fine."""

    reason: str
    transient: bool = False


class Workers:
    """Worker processes; a context manager. They start with the first jobs and are gone when the context is left."""

    def __init__(self, number: int, limits: Limits) -> None:
        self.number = number
        self._is_open = False
        self._queue: queue.SimpleQueue[tuple[Future[Any], list[Any]] | None] = queue.SimpleQueue()
        self._slots = [_WorkerSlot(limits) for _ in range(number)]
        # Daemons, so that an interpreter that ends without leaving the context does not wait for a job.
        self._threads = [threading.Thread(target=self._serve_slot, args=(slot,), daemon=True) for slot in self._slots]

    def __enter__(self) -> "Workers":
        for thread in self._threads:
            thread.start()
        self._is_open = True
        return self

    def __exit__(self, *_: object) -> None:
        self._is_open = False
        for slot in self._slots:
            slot.close()
        for _thread in self._threads:
            self._queue.put(None)
        for thread in self._threads:
            thread.join()

    def run(self, jobs: Iterable[tuple[Any, ...]], ahead: int | None = None) -> Iterator[Any]:
        """What each job (function, arguments...) returns, or Killed, in the order of the jobs.

        At most `ahead` jobs (2 per worker) are begun and not yet handed out: decoded clips are large. Functions must
        be importable by name. An exception of a function is raised here, with the worker's traceback as a note.
        A job whose worker dies or runs out of memory is tried once more in a new one: an earlier file may have left
        the old one damaged, or somebody else may have killed it. Raises RuntimeError if workers do not start.
        """
        jobs, ahead = iter(jobs), ahead or 2 * self.number
        waiting: deque[Future[Any]] = deque()
        try:
            while True:
                waiting.extend(self._submit(job) for job in islice(jobs, ahead - len(waiting)))
                if not waiting:
                    return
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()

    def _submit(self, job: tuple[Any, ...]) -> "Future[Any]":
        if not self._is_open:
            raise RuntimeError(NOT_OPEN)
        future: Future[Any] = Future()
        self._queue.put((future, _pack(job)))
        return future

    def _serve_slot(self, slot: "_WorkerSlot") -> None:
        while (item := self._queue.get()) is not None:
            future, job = item
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(slot.run(job))
                except BaseException as error:
                    future.set_exception(error)
            del item, future  # they hold the result
        slot.wait()


class _WorkerSlot:
    """A place for one worker at a time. run() belongs to one thread; close() may come from another."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._worker: _Worker | None = None
        self._closed = False
        self._lock = threading.Lock()

    def run(self, job: list[Any]) -> Any:
        """The result of a packed job, or Killed."""
        for _ in range(ATTEMPTS):
            worker = self._worker or self._start_worker()
            try:
                return worker.run(job, self._limits)
            except _WorkerLost as lost:
                self._worker, last = None, lost
            if last.final:
                break
        if not worker.has_started:
            raise RuntimeError(f"worker processes do not start: {last}")
        return Killed(str(last), last.transient)

    def close(self) -> None:
        """Ends the worker, whatever it does; there will be no other."""
        with self._lock:
            self._closed = True
            if self._worker is not None:
                self._worker.process.kill()

    def wait(self) -> None:
        """Waits until the worker that close() ended is gone."""
        if self._worker is not None:
            self._worker.wait()

    def _start_worker(self) -> "_Worker":
        with self._lock:
            if self._closed:
                raise RuntimeError(NOT_OPEN)
            self._worker = _Worker(self._limits.memory)
            return self._worker


class _WorkerLost(Exception):
    """The worker is gone, for this reason; final: another attempt would only cost the same time again; transient: the
    machine may be the cause, not the job.
    """

    def __init__(self, reason: str, final: bool = False, transient: bool = False) -> None:
        super().__init__(reason)
        self.final, self.transient = final, transient


class _Worker:
    """One process and the socket to it. Created by a thread that outlives it (see end_with_parent)."""

    def __init__(self, memory: int) -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            try:
                self.process = _spawn(theirs.fileno(), memory)
            except BaseException:
                ours.close()
                raise
        self._channel, self._stream = ours, ours.makefile("rwb")
        self.has_started = False

    def run(self, job: list[Any], limits: Limits) -> Any:
        """The result of a packed job. Raises what the function raises, and _WorkerLost."""
        try:
            kind, value = self._exchange(job, limits.seconds)
        except TimeoutError:
            self._kill()
            raise _WorkerLost(
                f"no result after {limits.seconds:g} s; --decode_timeout gives it more", final=True
            ) from None
        except (EOFError, OSError):
            code = self.wait()
            raise _WorkerLost(_cause_of_death(code), transient=code in (None, -signal.SIGKILL)) from None
        if kind == ERROR:
            raise value
        if kind == NO_MEMORY:
            self._kill()
            size = f"{limits.memory / 2**30:.3g} GiB"
            raise _WorkerLost(f"its worker ran out of memory ({size}); --decode_memory gives it more")
        return value

    def _exchange(self, job: list[Any], seconds: float) -> tuple[int, Any]:
        self._channel.settimeout(None)
        _write(self._stream, job)
        reply: tuple[int, Any] = _unpack(_read(self._stream))
        if reply[0] == STARTED:  # only now: a new process first imports the decoder
            self.has_started = True
            self._channel.settimeout(seconds)
            reply = _unpack(_read(self._stream))
        return reply

    def _kill(self) -> None:
        self.process.kill()
        self.wait()

    def wait(self) -> int | None:
        """The exit code of a process that is on its way out; None if it does not get there."""
        with suppress(OSError):
            self._stream.close()
        self._channel.close()
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(EXIT_SECONDS)
        self.process.kill()
        return self.process.returncode


def _spawn(channel: int, memory: int) -> "subprocess.Popen[bytes]":
    # Not multiprocessing: its children import the script that runs, and with it torch. Workers are the parallel part,
    # and the threads of a BLAS would each count as memory.
    environment = {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-P", "-c", _COMMAND, *map(str, (channel, memory, os.getpid()))],
        stdin=subprocess.DEVNULL,
        pass_fds=[channel],
        env=os.environ | environment,
        process_group=0,  # Ctrl-C and Ctrl-Z are for the parent
    )


def _cause_of_death(code: int | None) -> str:
    if code is None:
        return "its worker neither answers nor ends"
    if code >= 0:
        return f"the decoder ended its process (exit code {code})"
    name = {each.value: each.name for each in signal.Signals}.get(-code, f"signal {-code}")
    if -code == signal.SIGKILL:
        return f"its worker was killed ({name}); this machine may be out of memory"
    return f"the decoder crashed ({name})"


def serve(channel: int, memory: int, parent: int) -> None:
    """The life of a worker: jobs from the socket `channel` until its other end closes. memory: bytes; parent: pid."""
    _apply_limits(memory)
    end_with_parent(parent)
    with socket.socket(fileno=channel) as connection, suppress(EOFError, ConnectionError):
        stream = connection.makefile("rwb")
        while True:
            _write(stream, _answer(_read(stream), stream))


def _answer(job: list[Any], stream: BufferedRWPair) -> list[Any]:
    try:
        function, *arguments = _unpack(job)
        _write(stream, _pack((STARTED, None)))
        return _pack((RESULT, function(*arguments)))
    except Exception as error:
        if _is_out_of_memory(error):
            return _pack((NO_MEMORY, None))
        return _pack((ERROR, _picklable(error)))


def _is_out_of_memory(error: BaseException | None) -> bool:
    """Also where it led to another error."""
    while error is not None:
        if isinstance(error, MemoryError) or getattr(error, "errno", None) == errno.ENOMEM:
            return True
        error = error.__cause__ or error.__context__
    return False


def _picklable(error: Exception) -> Exception:
    """The error itself, if it survives pickling; with its traceback."""
    text = "".join(traceback.format_exception(error))
    try:
        copy: Exception = pickle.loads(pickle.dumps(error))
    except Exception:
        copy = RuntimeError(f"{type(error).__name__}: {error}")
    copy.add_note(f"in a worker process:\n{text}")
    return copy


def ignore_stop_signals() -> None:
    """Some launchers and terminals send them to every process; only the process of the run acts on them."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def _apply_limits(memory: int) -> None:
    ignore_stop_signals()
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    # Not RLIMIT_AS, which also counts libraries, mapped files and address space that is only reserved.
    _, most = resource.getrlimit(resource.RLIMIT_DATA)
    memory = memory if most == resource.RLIM_INFINITY else min(memory, most)
    resource.setrlimit(resource.RLIMIT_DATA, (memory, memory))
    with suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000")  # the kernel shall take this process before the run


def end_with_parent(parent: int) -> None:
    """Lets the kernel end this process when the thread that created it ends, for example by kill -9."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it was quicker
        os._exit(1)


def _pack(value: Any) -> list[Any]:
    """A pickle, then the arrays in it, which are not copied."""
    arrays: list[pickle.PickleBuffer] = []
    body = pickle.dumps(value, 5, buffer_callback=arrays.append)
    return [body, *(array.raw() for array in arrays)]


def _unpack(parts: list[Any]) -> Any:
    body, *arrays = parts
    return pickle.loads(body, buffers=arrays)


def _write(stream: BufferedRWPair, parts: list[Any]) -> None:
    stream.write(_LENGTH.pack(len(parts)))
    for part in parts:
        stream.write(_LENGTH.pack(len(part)))
        stream.write(part)
    stream.flush()


def _read(stream: BufferedRWPair) -> list[Any]:
    """The parts of one message. Raises EOFError if the other side is gone."""
    return [_read_part(stream, _read_length(stream)) for _ in range(_read_length(stream))]


def _read_length(stream: BufferedRWPair) -> int:
    length: int = _LENGTH.unpack(_read_part(stream, _LENGTH.size))[0]
    return length


def _read_part(stream: BufferedRWPair, length: int) -> bytearray:
    part = bytearray(length)
    if stream.readinto(part) < length:
        raise EOFError
    return part
