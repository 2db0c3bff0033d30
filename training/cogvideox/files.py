"""Files that are whole or not there, whenever the process dies; and what a disk refuses, in one line."""

import errno
import functools
import os
import re
import shutil
import socket
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from shlex import quote

from cogvideox.errors import DiskError

LOCK_NAME = ".lock"  # in a folder that one process at a time writes to
TEMPORARY = re.compile(r"\..+\..+\.(\d+)\.tmp")  # see temporary_of
LFS_POINTER = b"version https://git-lfs.github.com/spec/"  # how each of Git LFS's pointer files begins
LFS_LONGEST = 1024  # bytes of a pointer, by Git LFS's specification
STALE = 3600.0  # seconds after which nobody writes a temporary file any more
# Of a file system or a disk; the user can do something about them.
DISK_ERRORS = {
    *(errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS, errno.EACCES, errno.EPERM, errno.EFBIG, errno.ENAMETOOLONG),
    *(errno.EEXIST, errno.ENOTDIR, errno.EISDIR, errno.ENOENT, errno.ENODEV, errno.ENXIO),
    *(errno.ESTALE, errno.ENOTCONN, errno.EREMOTEIO),  # of a network or a FUSE file system
}
FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
# What file systems that cannot fsync a folder answer: CIFS, 9p, some FUSE.
NO_FOLDER_FSYNC = {errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EACCES, errno.EPERM, errno.EISDIR}
NO_FOLDER_FSYNC |= {errno.EBADF, errno.ENOTTY}


def is_lfs_pointer(path: str | os.PathLike[str], size: int) -> bool:
    """Whether a regular file of so many bytes is the text that Git LFS leaves in the place of a file not downloaded.

    Only small files are opened. Raises OSError.
    """
    if not len(LFS_POINTER) < size <= LFS_LONGEST:
        return False
    with open(path, "rb") as file:
        return file.read(len(LFS_POINTER)) == LFS_POINTER


def lfs_rule(folder: str | os.PathLike[str] = "") -> str:
    """What to say of a Git LFS pointer; with the folder, if it is known, in which the command must be run."""
    where = f" -C {quote(os.fspath(folder))}" if folder else ""
    return f"is a Git LFS pointer, not the file itself; run: git{where} lfs pull"


def temporary_of(path: Path) -> Path:
    """The name under which this process writes a file before it is whole."""
    return path.with_name(f".{path.name}.{socket.gethostname()}.{os.getpid()}.tmp")


def write_atomically(path: Path, content: bytes) -> None:
    """The file has either its old content or all of the new one.

    Raises:
        DiskError: the disk is full, fails or refuses; the old content is as it was.
    """
    temporary = temporary_of(path)
    with disk_errors_told(path.parent, len(content)), removed_on_failure(temporary):
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)


@contextmanager
def removed_on_failure(temporary: Path) -> Iterator[None]:
    """A temporary file or folder does not stay where making it fails: the disk may be full."""
    try:
        yield
    except BaseException:
        with suppress(OSError):
            shutil.rmtree(temporary) if temporary.is_dir() else temporary.unlink(missing_ok=True)
        raise


def fsync(path: Path) -> None:
    """Makes the disk have a file or folder. A file system that cannot do that for folders is passed over."""
    try:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
    except OSError as error:
        if error.errno not in NO_FOLDER_FSYNC or not path.is_dir():
            raise
        reason = os.strerror(error.errno)
        tell_once(f"the file system cannot fsync a folder ({reason}); after a power cut the last file may be missing")


@functools.cache
def tell_once(text: str) -> None:
    """A line for the user about the machine, once a process."""
    print(text, file=sys.stderr)


# -- what a disk refuses -----------------------------------------------------------------------------------------------


@contextmanager
def disk_errors_told(folder: Path, needed: int | None = None) -> Iterator[None]:
    """Inside, an error of the disk becomes a DiskError: the folder, the reason, the bytes needed and free.

    safetensors, PyTorch and FFmpeg have error types of their own for that.
    """
    try:
        yield
    except DiskError:
        raise
    except Exception as error:
        number = disk_errno(error)
        if number is None:
            raise
        named = Path(os.fsdecode(getattr(error, "filename", None) or folder))
        inside = folder.absolute() in (named.absolute(), *named.absolute().parents)
        raise disk_error(folder if inside else named, number, needed) from error


@contextmanager
def what_is_safe(folder: Path, safe: Callable[[], str]) -> Iterator[None]:
    """Inside, every error of a disk becomes a DiskError that says what has not been lost; ``folder`` is where most is
    written.
    """
    try:
        with disk_errors_told(folder):
            yield
    except DiskError as error:
        raise error.knowing(safe()) from error


def disk_errno(error: BaseException) -> int | None:
    """The number of the system's error behind an exception; None: it is not about a disk."""
    number = getattr(error, "errno", None)
    if isinstance(number, int):
        return number if number in DISK_ERRORS else None
    if type(error).__name__ == "SafetensorError" and (found := re.search(r"\(os error (\d+)\)", str(error))):
        return int(found[1])
    if isinstance(error, RuntimeError) and re.search("PytorchStreamWriter|inline_container", str(error)):
        behind = error.__context__
        return (disk_errno(behind) if behind else None) or errno.EIO
    return None


def disk_error(folder: Path, number: int, needed: int | None = None) -> DiskError:
    """The line about a folder in which writing failed."""
    about, fix = os.strerror(number), "find out why and run the same command again"
    if number in FULL:
        fix = "free some space and run the same command again"
        about += "".join(f", {size_text(size)} {what}" for size, what in sizes(folder, needed))
    elif number in (errno.EACCES, errno.EPERM, errno.EROFS):
        fix = "make it writable and run the same command again"
    return DiskError(f"{folder}: {about}", fix)


def sizes(folder: Path, needed: int | None) -> Iterator[tuple[int, str]]:
    """The bytes needed and free, as far as they are known."""
    if needed is not None:
        yield needed, "needed"
    free = free_disk_bytes(folder)
    if free is not None:
        yield free, "free"


def free_disk_bytes(folder: Path) -> int | None:
    """The bytes that may still be written under a folder, which need not be there yet; None: not known."""
    for place in (folder, *folder.absolute().parents):
        with suppress(OSError):
            return shutil.disk_usage(place).free
    return None


def size_text(number: int) -> str:
    """A number of bytes as people say it: 120 bytes, 3.4 MiB, 1.2 GiB."""
    for size, unit in ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if number >= size:
            return f"{number / size:.1f} {unit}"
    return f"{number} bytes"


def check_room(folder: Path, needed: int) -> None:
    """Raises DiskError where a folder's disk has less room than ``needed`` bytes."""
    free = free_disk_bytes(folder)
    if free is not None and free < needed:
        raise disk_error(folder, errno.ENOSPC, needed)


# -- what others left --------------------------------------------------------------------------------------------------


def stamp_of(path: str | os.PathLike[str]) -> list[int]:
    """Changes when a file is written: its size and time; empty if there is none."""
    try:
        status = os.stat(path)
    except OSError:
        return []
    return [status.st_size, status.st_mtime_ns]


def remove_temporaries(folder: Path) -> None:
    """Deletes the temporary files of every process and host under a folder. For whoever holds the folder's lock.

    Folders inside that have a lock of their own are left alone.
    """
    for place, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not Path(place, name, LOCK_NAME).exists()]
        for name in names:
            if TEMPORARY.fullmatch(name):
                Path(place, name).unlink(missing_ok=True)


def remove_stale_temporaries(folder: Path) -> None:
    """Deletes temporary files under a folder that others may write to as well: those whose process on this machine is
    gone, and those of other hosts that have not been written to for an hour.
    """
    paths = [(path, match) for path in folder.rglob(".*.tmp") if (match := TEMPORARY.fullmatch(path.name))]
    for path, match in paths:
        here = path.name.endswith(f".{socket.gethostname()}.{match[1]}.tmp")
        gone = not Path("/proc", match[1]).exists() if here else (age_of(path) or 0.0) > STALE
        if gone:
            path.unlink(missing_ok=True)


def age_of(path: Path) -> float | None:
    """Seconds since a file was written or touched, by the clock of its file system, which may be another than this
    machine's; None: it is gone.
    """
    probe = path.with_name(f".{socket.gethostname()}.{os.getpid()}.now")
    try:
        probe.touch()
        return probe.stat().st_mtime - path.stat().st_mtime
    except FileNotFoundError:
        return None
    finally:
        probe.unlink(missing_ok=True)
