"""Runs functions on media files in worker processes, so that a bad file costs one job and never the run.

Decoders of videos are C libraries: a damaged file can crash them, let them hang, or make them fill the memory. Each job
therefore runs in a process that can be killed. ``Workers`` is the entry point. It has one slot for each worker, and one
thread for each slot, which sends a job to its worker, waits for the answer with a timeout, and replaces the worker
where it died, hung, or ran out of memory. Results come out in the order of the jobs:

    jobs --run()--> queue, 2 jobs for each worker --> thread 0 <--socket--> worker process 0 --+
                                                  --> thread 1 <--socket--> worker process 1 --+--> results, in order
                                                  --> ...

Each worker has its own socket. In the pools of concurrent.futures, multiprocessing and Pebble, all workers share one
pipe and its lock, so a worker that is killed while it sends a clip leaves the pipe unusable for all the others.

For each job a worker sends two messages: STARTED when it begins, then RESULT, ERROR or NO_MEMORY. The time limit counts
from STARTED, because a new process first needs seconds to import the decoder.

Nothing here imports torch, and workers do not import the script that started them. So a worker needs little memory and
never touches a GPU.
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
from typing import Any, TypeVar

from cogvideox.host_memory import free_host_bytes
from cogvideox.stopping import STOP_SIGNALS

ATTEMPTS = 2
AHEAD = 2  # jobs per worker that are started before their results are consumed: decoded clips take much memory
USUAL_WORKERS = 4  # see usual_number
EXIT_SECONDS = 5.0  # how long to wait for a killed process to exit; one that hangs in a dead network mount never does

NOT_OPEN = "workers work only inside their context"
STARTED, RESULT, ERROR, NO_MEMORY = range(4)  # kinds of messages that a worker sends
_COMMAND = "import sys; from cogvideox.data.media.workers import serve; serve(*map(int, sys.argv[1:]))"
_PR_SET_PDEATHSIG = 1
_LENGTH = struct.Struct("<Q")

Key = TypeVar("Key")
Job = tuple[Any, ...]  # a function and its arguments
Parts = list[bytes | bytearray | memoryview]  # a message: a pickle, and the buffers of its arrays


@dataclass(frozen=True)
class Limits:
    """Limits the resources of a job.

    Attributes:
        seconds: Longest run time of one job, counted from its start in the worker.
        memory: Most bytes of memory that the data of a worker process may take (RLIMIT_DATA).
    """

    seconds: float
    memory: int


@dataclass(frozen=True)
class Killed:
    """Replaces the result of a job whose worker was lost.

    Attributes:
        reason: One line that says why the worker was lost.
        transient: Whether the machine, and not the file, may be the cause, so that a later run may succeed.
    """

    reason: str
    transient: bool = False


def usual_number(limits: Limits, processes: int = 1) -> int:
    """Returns how many workers a script starts if no flag says so: as many as cores and free memory allow, at most 4.

    Args:
        limits: What each worker may use.
        processes: How many processes of the script share the machine.
    """
    allowed = len(os.sched_getaffinity(0)), free_host_bytes() // limits.memory
    return max(1, min(USUAL_WORKERS, *(number // processes for number in allowed)))


class Workers:
    """Context manager that runs jobs in a fixed number of worker processes.

    Processes start when the first jobs arrive, and are killed when the context is left.
    """

    def __init__(self, number: int, limits: Limits) -> None:
        """Prepares the workers, without starting a process.

        Args:
            number: How many worker processes run at a time.
            limits: Time and memory that one job may use.
        """
        self.number = number
        self._is_open = False
        self._queue: queue.SimpleQueue[tuple[Future[Any], Parts] | None] = queue.SimpleQueue()
        self._slots = [_WorkerSlot(limits) for _ in range(number)]
        # Daemon threads, because otherwise an interpreter that exits without leaving the context would wait for jobs.
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

    def run(self, jobs: Iterable[Job]) -> Iterator[Any]:
        """Runs jobs and yields their results, or ``Killed``, in the order of the jobs.

        A job whose worker dies or runs out of memory is tried once more in a new worker: an earlier file may have
        damaged the memory of the old one, or another program may have killed it. A job that exceeds its time is not
        tried again.

        Args:
            jobs: The jobs. Their functions must be importable by name.

        Raises:
            RuntimeError: The context is not open, or worker processes do not start.
            Exception: Whatever a job raises, with the traceback of the worker as a note.
        """
        jobs, ahead = iter(jobs), AHEAD * self.number
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

    def run_keyed(self, jobs: Iterable[tuple[Key, Job]]) -> Iterator[tuple[Key, Any]]:
        """Runs jobs as ``run`` does, each of which has a key; yields each key with the result of its job."""
        begun: deque[Key] = deque()

        def begin() -> Iterator[Job]:
            for key, job in jobs:
                begun.append(key)
                yield job

        for result in self.run(begin()):
            yield begun.popleft(), result

    def _submit(self, job: Job) -> "Future[Any]":
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
            # Without this, the result of this job would stay in memory until the next job arrives.
            del item, future
        slot.wait()


class _WorkerSlot:
    """Holds one worker at a time and replaces it where it is lost.

    The thread of the slot calls ``run`` and ``wait``; the thread that leaves the context calls ``close``.
    """

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._worker: _Worker | None = None
        self._closed = False
        # Without this lock, close() could miss a worker that is just being started, and it would never be killed.
        self._lock = threading.Lock()

    def run(self, job: Parts) -> Any:
        """Runs a packed job and returns its result, or ``Killed`` where its last attempt lost the worker."""
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
        """Kills the worker, whatever it is doing, and prevents the start of another."""
        with self._lock:
            self._closed = True
            if self._worker is not None:
                self._worker.process.kill()

    def wait(self) -> None:
        """Waits until the worker that ``close`` killed has exited."""
        if self._worker is not None:
            self._worker.wait()

    def _start_worker(self) -> "_Worker":
        with self._lock:
            if self._closed:
                raise RuntimeError(NOT_OPEN)
            self._worker = _Worker(self._limits.memory)
            return self._worker


class _WorkerLost(Exception):
    """Signals that a worker died or had to be killed.

    Attributes:
        final: Whether another attempt would only take the same time again.
        transient: Whether the machine, and not the job, may be the cause.
    """

    def __init__(self, reason: str, final: bool = False, transient: bool = False) -> None:
        super().__init__(reason)
        self.final, self.transient = final, transient


class _Worker:
    """Owns one worker process and the socket to it.

    It must be created by a thread that lives longer than the process: on Linux the kernel kills the process when the
    thread that created it ends (see ``end_with_parent``).
    """

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

    def run(self, job: Parts, limits: Limits) -> Any:
        """Runs a packed job in the process and returns its result.

        Raises:
            _WorkerLost: The process died, exceeded its time, or ran out of memory. It has been killed.
            Exception: Whatever the job raises.
        """
        try:
            kind, value = self._exchange(job, limits.seconds)
        except TimeoutError:
            self._kill()
            reason = f"no result after {limits.seconds:g} s; allow more with --decode_timeout"
            raise _WorkerLost(reason, final=True) from None
        except (EOFError, OSError):
            code = self.wait()
            raise _WorkerLost(_cause_of_death(code), transient=code in (None, -signal.SIGKILL)) from None
        if kind == ERROR:
            raise value
        if kind == NO_MEMORY:
            self._kill()
            size = f"{limits.memory / 2**30:.3g} GiB"
            raise _WorkerLost(f"its worker ran out of memory ({size}); allow more with --decode_memory")
        return value

    def _exchange(self, job: Parts, seconds: float) -> tuple[int, Any]:
        self._channel.settimeout(None)
        _send(self._stream, job)
        reply: tuple[int, Any] = _unpack(_receive(self._stream))
        # The time limit starts here and not with the request, because a new process first imports the decoder.
        if reply[0] == STARTED:
            self.has_started = True
            self._channel.settimeout(seconds)
            reply = _unpack(_receive(self._stream))
        return reply

    def _kill(self) -> None:
        self.process.kill()
        self.wait()

    def wait(self) -> int | None:
        """Waits for a process that is exiting, and returns its exit code, or None if it does not exit in time."""
        with suppress(OSError):
            self._stream.close()
        self._channel.close()
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(EXIT_SECONDS)
        self.process.kill()
        return self.process.returncode


def _spawn(channel: int, memory: int) -> "subprocess.Popen[bytes]":
    # Children of multiprocessing would import the training script, and torch with it, so this starts plain Python.
    # One BLAS thread is enough: the workers already run in parallel, and each thread would count as memory.
    environment = {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-P", "-c", _COMMAND, *map(str, (channel, memory, os.getpid()))],
        stdin=subprocess.DEVNULL,
        pass_fds=[channel],
        env=os.environ | environment,
        process_group=0,  # so that Ctrl-C and Ctrl-Z in the terminal reach the parent only
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
    """Serves jobs in a worker process until the other end of its socket closes.

    Args:
        channel: File descriptor of the socket that jobs come from and answers go to.
        memory: Most bytes that the data of this process may take.
        parent: Process id of the process that started this one.
    """
    _apply_limits(memory)
    end_with_parent(parent)
    with socket.socket(fileno=channel) as connection, suppress(EOFError, ConnectionError):
        stream = connection.makefile("rwb")
        while True:
            _send(stream, _answer(_receive(stream), stream))


def _answer(job: Parts, stream: BufferedRWPair) -> Parts:
    try:
        function, *arguments = _unpack(job)
        _send(stream, _pack((STARTED, None)))
        return _pack((RESULT, function(*arguments)))
    except Exception as error:
        if _is_out_of_memory(error):
            return _pack((NO_MEMORY, None))
        return _pack((ERROR, _picklable(error)))


def _is_out_of_memory(error: BaseException | None) -> bool:
    """Returns whether an error is, or was caused by, a lack of memory."""
    while error is not None:
        if isinstance(error, MemoryError) or getattr(error, "errno", None) == errno.ENOMEM:
            return True
        error = error.__cause__ or error.__context__
    return False


def _picklable(error: Exception) -> Exception:
    """Returns a copy of an error that can be pickled, with the traceback as a note.

    An error that does not survive pickling is replaced by a RuntimeError with its type and message.
    """
    text = "".join(traceback.format_exception(error))
    try:
        copy: Exception = pickle.loads(pickle.dumps(error))
    except Exception:
        copy = RuntimeError(f"{type(error).__name__}: {error}")
    copy.add_note(f"in a worker process:\n{text}")
    return copy


def ignore_stop_signals() -> None:
    """Ignores the signals that ask a run to stop.

    Some launchers and terminals send them to every process, but only the main process of the run handles them.
    """
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def _apply_limits(memory: int) -> None:
    ignore_stop_signals()
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    # RLIMIT_AS would also count libraries, mapped files and address space that is only reserved.
    _, most = resource.getrlimit(resource.RLIMIT_DATA)
    memory = memory if most == resource.RLIM_INFINITY else min(memory, most)
    resource.setrlimit(resource.RLIMIT_DATA, (memory, memory))
    with suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000")  # when memory runs out, kill this process first


def end_with_parent(parent: int) -> None:
    """Makes the kernel kill this process when the thread that created it ends, for example by kill -9.

    Args:
        parent: Process id of the creator. If that has already ended, this process exits at once.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it ended before prctl was called, so no signal would come
        os._exit(1)


def _pack(value: object) -> Parts:
    """Serializes a value into the parts of a message: a pickle, then each array's buffer, without a copy."""
    arrays: list[pickle.PickleBuffer] = []
    body = pickle.dumps(value, 5, buffer_callback=arrays.append)
    return [body, *(array.raw() for array in arrays)]


def _unpack(parts: Parts) -> Any:
    """Restores a value from the parts of a message."""
    body, *arrays = parts
    return pickle.loads(body, buffers=arrays)


def _send(stream: BufferedRWPair, parts: Parts) -> None:
    """Sends a message: the number of its parts, then the length and the bytes of each part."""
    stream.write(_LENGTH.pack(len(parts)))
    for part in parts:
        stream.write(_LENGTH.pack(len(part)))
        stream.write(part)
    stream.flush()


def _receive(stream: BufferedRWPair) -> Parts:
    """Receives the parts of one message. Raises EOFError if the other end of the socket is closed."""
    return [_receive_part(stream, _receive_length(stream)) for _ in range(_receive_length(stream))]


def _receive_length(stream: BufferedRWPair) -> int:
    length: int = _LENGTH.unpack(_receive_part(stream, _LENGTH.size))[0]
    return length


def _receive_part(stream: BufferedRWPair, length: int) -> bytearray:
    part = bytearray(length)
    if stream.readinto(part) < length:
        raise EOFError
    return part
