"""Provides locks between processes and hosts: POSIX locks, or lock files where the file system has no locks.

``take`` gets a lock or fails, ``take_later`` waits for it, and ``held`` holds it in a block. A POSIX lock ends with its
process, and child processes do not inherit it. Lustre without its flock option and some FUSE file systems do not
support it. There, a file NAME.owner created with O_EXCL replaces it: the file names host and process, and a thread
touches it while the process lives. The file becomes stale when its process on this machine no longer exists or, if the
process is on another machine, when nobody has touched the file for STALE seconds.
"""

import errno
import fcntl
import json
import os
import socket
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from cogvideox import stopping
from cogvideox.files import age_of, machine_id, warn_once

HEARTBEAT, STALE = 15.0, 300.0  # seconds
FIRST_WAIT, LONGEST_WAIT = 0.002, 0.5  # seconds between attempts to get a lock that another process holds
NO_LOCKS = {errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EINVAL}
TAKEN = {errno.EAGAIN, errno.EACCES}


class HeldError(BlockingIOError):
    """Reports that another process holds a lock.

    Attributes:
        may_be_lost: Whether the holder is on another machine, which may have failed without releasing the lock.
    """

    def __init__(self, holder: str, may_be_lost: bool = False) -> None:
        super().__init__(errno.EAGAIN, holder)
        self.may_be_lost = may_be_lost


class Lock:
    """A lock that this process holds until ``release`` is called, nothing refers to it, or the process ends."""

    def __init__(self, release: Callable[[], None]) -> None:
        self.release = weakref.finalize(self, release)


def take(path: Path, signs: bool = False) -> Lock:
    """Takes a lock without waiting.

    Args:
        path: The file of the lock, in an existing folder.
        signs: Whether the file has no other content, so that its holder can be named there.

    Raises:
        HeldError: Another process holds it.
        OSError: The file cannot be written.
    """
    file = open(path, "ab", buffering=0)  # noqa: SIM115 - open as long as the lock is held
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        file.close()
        if error.errno in TAKEN:
            who, runs = holder_in(content_of(path)) if signs else ("another process", True)
            # The name of a process that no longer exists is from before the holder has written its own.
            raise HeldError("another process" if runs is False else who, may_be_lost=runs is None) from None
        if error.errno not in NO_LOCKS:
            raise
        warn_of_lock_files(path.parent, error)
        return take_file(path.with_name(f".{path.name.removeprefix('.')}.owner"))
    if signs:
        with suppress(OSError):  # on a full disk, the holder has no name
            file.truncate(0)
            file.write(json.dumps(this_process()).encode())
    return Lock(file.close)


def take_later(path: Path, on_wait: Callable[[str], None] | None = None, only_if_lost: bool = False) -> Lock:
    """Takes a lock, waiting for the process that holds it.

    Args:
        path: The file of the lock, in an existing folder.
        on_wait: Called once with a description of the holder, if a lock is not free after half a second. If it is
            given, the file must have no other content, because the holder is named there.
        only_if_lost: Whether to wait only for a holder that may be lost, and for STALE seconds at most. In this time, a
            lock file becomes stale, and a file server releases the POSIX locks of a lost machine.

    Raises:
        HeldError: Another process holds it.
        OSError: The file cannot be written.
    """
    wait, end = FIRST_WAIT, time.monotonic() + STALE + LONGEST_WAIT
    signs = on_wait is not None
    while True:
        try:
            return take(path, signs)
        except HeldError as error:
            if only_if_lost and not (error.may_be_lost and time.monotonic() < end):
                raise
            if on_wait is not None and wait == LONGEST_WAIT:  # a wait of milliseconds is not worth a line
                on_wait(str(error.strerror))
                on_wait = None
        time.sleep(wait)
        wait = min(2 * wait, LONGEST_WAIT)
        stopping.unit("wait for a lock")  # otherwise the other ranks would mistake the wait for a hang


@contextmanager
def held(path: Path, on_wait: Callable[[str], None] | None = None) -> Iterator[None]:
    """Waits for a lock as ``take_later`` does, and holds it in the block."""
    lock = take_later(path, on_wait)
    try:
        yield
    finally:
        lock.release()


def warn_of_lock_files(folder: Path, error: OSError) -> None:
    """Says once that lock files are used in a folder, because taking a POSIX lock there has raised this error."""
    reason = os.strerror(error.errno or 0)
    warn_once(f"{folder}: its file system has no locks ({reason}); lock files keep other runs out instead")


# -- lock files --------------------------------------------------------------------------------------------------------


def take_file(path: Path) -> Lock:
    """Takes a lock file, replacing a stale one.

    Raises:
        HeldError: Another process holds it.
    """
    own = json.dumps(this_process()).encode()
    if not create(path, own):
        there = content_of(path)
        if there == own:  # A process does not wait for itself, as with a POSIX lock.
            return Lock(lambda: None)
        if (holder := living(path, there)) is not None:
            raise holder
        discard_stale(path, there)
        if not create(path, own):
            raise HeldError("another process that has just taken it")
    stop = threading.Event()
    threading.Thread(target=keep_alive, args=(path, stop), name="heartbeat", daemon=True).start()
    return Lock(FileRelease(path, own, stop))


class FileRelease:
    """Releases a lock file, but only in the process that created it: the exit of a child must not release it."""

    def __init__(self, path: Path, own: bytes, stop: threading.Event) -> None:
        self.path, self.own, self.stop, self.process = path, own, stop, os.getpid()

    def __call__(self) -> None:
        if os.getpid() == self.process:
            self.stop.set()
            if content_of(self.path) == self.own:  # else it was judged stale, and now belongs to another process
                self.path.unlink(missing_ok=True)


def keep_alive(path: Path, stop: threading.Event) -> None:
    """Touches a lock file regularly until it is released."""
    while not stop.wait(HEARTBEAT):
        with suppress(OSError):
            os.utime(path)


def create(path: Path, content: bytes) -> bool:
    """Creates a file with this content. Returns False if the file already exists."""
    try:
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
    except FileExistsError:
        return False
    with open(handle, "wb") as file:
        file.write(content)
    return True


def content_of(path: Path) -> bytes | None:
    """Returns the content of a file, or None if it does not exist."""
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return None


def discard_stale(path: Path, judged: bytes | None) -> None:
    """Deletes a stale lock file if its content is still ``judged``. A guard file lets one process at a time do so.

    Raises:
        HeldError: Another process is doing so.
    """
    guard = path.with_name(f"{path.name}.guard")
    if not create(guard, b""):
        if (age := age_of(guard)) is not None and age > STALE:  # its process was killed between these lines
            guard.unlink(missing_ok=True)
        raise HeldError("another process that is just taking it")
    try:
        if content_of(path) == judged:
            path.unlink(missing_ok=True)
    finally:
        guard.unlink(missing_ok=True)


def living(path: Path, content: bytes | None) -> HeldError | None:
    """Returns an error that describes the process that holds a lock file, or None if that process no longer exists."""
    who, runs = holder_in(content)
    if runs is not None:
        return HeldError(who) if runs else None
    age = age_of(path)
    if age is None or age > STALE:
        return None
    free = f"if it is gone, the folder is free in {STALE - age:.0f} s"
    return HeldError(f"{who}, seen {age:.0f} s ago; {free}", may_be_lost=True)


def holder_in(content: bytes | None) -> tuple[str, bool | None]:
    """Returns (the process that the file of a lock names, whether it exists; None if it is on another machine)."""
    try:
        owner: dict[str, Any] = json.loads(content or b"")
        who = f"process {owner['pid']} on {owner['host']}"
        is_here = owner["machine"] == machine_id()  # where the process can be checked
        return who, process_start(owner["pid"]) == owner["started"] if is_here else None
    except (ValueError, KeyError, TypeError):  # the content is not written yet, or could not be written
        return "a process that is just starting", None


def this_process() -> dict[str, Any]:
    """Returns the content of a lock file of this process."""
    pid = os.getpid()
    return {"host": socket.gethostname(), "machine": machine_id(), "pid": pid, "started": process_start(pid)}


def process_start(pid: int) -> str | None:
    """Returns when a process of this machine was started, or None if it does not exist.

    The start distinguishes it from a later process with the same id. The text is empty where the start is not known.
    """
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return None
        except PermissionError:
            pass
        return ""  # the process exists, but its start is not known
    return fields[19]
