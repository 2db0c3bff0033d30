"""Locks between processes and hosts: POSIX locks, and lock files on file systems that have none.

A POSIX lock ends with its process, and no child holds it. Lustre without its flock option and some FUSE file systems
answer that they have none. There a file NAME.owner made with O_EXCL takes its place: it names host and process, and a
thread touches it as long as the process lives. It counts for nothing once its process on this machine is gone or,
where that cannot be seen from here, once it has not been touched for STALE seconds.
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
from cogvideox.files import age_of, tell_once

HEARTBEAT, STALE = 15.0, 300.0  # seconds
FIRST_WAIT, LONGEST_WAIT = 0.002, 0.5  # seconds between two tries to get a lock that another process has
NO_LOCKS = {errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EINVAL}
TAKEN = {errno.EAGAIN, errno.EACCES}


class Lock:
    """A lock that this process holds until ``release``, until nothing refers to it, or until the process ends."""

    def __init__(self, release: Callable[[], None]) -> None:
        self.release = weakref.finalize(self, release)


def take(path: Path) -> Lock:
    """The lock of that name, in a folder that is there.

    Raises:
        BlockingIOError: another process has it; the text says what is known of that process.
        OSError: the file cannot be written.
    """
    file = open(path, "a")  # noqa: SIM115 - open as long as the lock is held
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        file.close()
        if error.errno in TAKEN:
            raise BlockingIOError(errno.EAGAIN, "another process has it") from None
        if error.errno not in NO_LOCKS:
            raise
        reason = os.strerror(error.errno)
        tell_once(f"{path.parent}: its file system has no locks ({reason}); lock files keep other runs out instead")
        return take_file(path.with_name(f".{path.name.removeprefix('.')}.owner"))
    return Lock(file.close)


@contextmanager
def held(path: Path, on_wait: Callable[[], None] = lambda: None) -> Iterator[None]:
    """The lock of that name, for the block. Waits for it; ``on_wait`` is called once if another process has it."""
    lock, wait = None, FIRST_WAIT
    while lock is None:
        try:
            lock = take(path)
        except BlockingIOError:
            if wait == FIRST_WAIT:
                on_wait()
            time.sleep(wait)
            wait = min(2 * wait, LONGEST_WAIT)
            stopping.unit("wait for a lock")  # the other ranks must not take it for a hang
    try:
        yield
    finally:
        lock.release()


# -- lock files --------------------------------------------------------------------------------------------------------


def take_file(path: Path) -> Lock:
    """A lock file of this process, in place of one whose process is gone. Raises BlockingIOError as ``take``."""
    own = json.dumps(this_process()).encode()
    if not create(path, own):
        there = content_of(path)
        if there == own:  # as with a POSIX lock: a process does not wait for itself
            return Lock(lambda: None)
        if (owner := living(path, there)) is not None:
            raise BlockingIOError(errno.EAGAIN, owner)
        discard(path, there)
        if not create(path, own):
            raise BlockingIOError(errno.EAGAIN, "another process has just taken it")
    stop = threading.Event()
    threading.Thread(target=keep_alive, args=(path, stop), name="heartbeat", daemon=True).start()
    return Lock(FileRelease(path, own, stop))


class FileRelease:
    """Ends a lock file, in the process that made it: a child that ends has no say."""

    def __init__(self, path: Path, own: bytes, stop: threading.Event) -> None:
        self.path, self.own, self.stop, self.process = path, own, stop, os.getpid()

    def __call__(self) -> None:
        if os.getpid() == self.process:
            self.stop.set()
            if content_of(self.path) == self.own:  # else it was taken for stale, and is another process' now
                self.path.unlink(missing_ok=True)


def keep_alive(path: Path, stop: threading.Event) -> None:
    """Touches a lock file until it is released."""
    while not stop.wait(HEARTBEAT):
        with suppress(OSError):
            os.utime(path)


def create(path: Path, content: bytes) -> bool:
    """Makes a file with this content; False if there is one already."""
    try:
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
    except FileExistsError:
        return False
    with open(handle, "wb") as file:
        file.write(content)
    return True


def content_of(path: Path) -> bytes | None:
    """The content of a file; None if it is gone."""
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return None


def discard(path: Path, judged: bytes | None) -> None:
    """Deletes a stale lock file, if it still is the one that was judged: of several processes, one at a time looks."""
    guard = path.with_name(f"{path.name}.guard")
    if not create(guard, b""):
        if (age := age_of(guard)) is not None and age > STALE:  # its process was killed here
            guard.unlink(missing_ok=True)
        raise BlockingIOError(errno.EAGAIN, "another process is just taking it")
    try:
        if content_of(path) == judged:
            path.unlink(missing_ok=True)
    finally:
        guard.unlink(missing_ok=True)


def living(path: Path, content: bytes | None) -> str | None:
    """Says who has a lock file; None if its process is gone."""
    try:
        owner: dict[str, Any] = json.loads(content or b"")
        who = f"process {owner['pid']} on {owner['host']}"
        if owner["machine"] == machine_id():  # its processes can be seen from here
            return who if process_start(owner["pid"]) == owner["started"] else None
    except (ValueError, KeyError, TypeError):  # is not written yet, or could not be
        who = "a process that is just starting"
    age = age_of(path)
    if age is None or age > STALE:
        return None
    return f"{who}, seen {age:.0f} s ago; if it is gone, the folder is free in {STALE - age:.0f} s"


def this_process() -> dict[str, Any]:
    """What a lock file says of its process."""
    pid = os.getpid()
    return {"host": socket.gethostname(), "machine": machine_id(), "pid": pid, "started": process_start(pid)}


def machine_id() -> str:
    """Names the machine since its start and the container: processes of the same are seen under their numbers here.

    A host's name does not suffice: containers may share one, and number their processes alike.
    """
    try:
        start = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{start} {os.stat('/proc/self/ns/pid').st_ino}"
    except OSError:  # not Linux
        return socket.gethostname()


def process_start(pid: int) -> str | None:
    """When a process of this machine was started, to tell it from a later one of the same number; None: it is gone."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return None
        except PermissionError:
            pass
        return ""  # it is there, and no more is known
    return fields[19]
