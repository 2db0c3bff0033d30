"""Writes files atomically, and turns errors of disks into one line that says what to do.

``write_atomically`` leaves a complete file or the old one, whenever the process dies. ``disk_errors_converted`` and
``what_is_safe`` convert errors of a disk into a DiskError with the folder, the reason and the space. The functions
below them delete temporary files of processes that died. This module imports only the standard library, and modules of
this project that do the same.
"""

import errno
import functools
import hashlib
import os
import re
import shutil
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from shlex import quote

from cogvideox import stopping
from cogvideox.errors import DiskError, plural

LOCK_NAME = ".lock"  # name of the lock file of a folder to which one process at a time writes
TEMPORARY = re.compile(r"\..+\..+\.(\d+)\.tmp")  # see temporary_of
LFS_POINTER = b"version https://git-lfs.github.com/spec/"  # the start of every pointer file of Git LFS
LFS_LONGEST = 1024  # largest size of a pointer in bytes, by the specification of Git LFS
# Seconds after its last change at which a temporary file of another machine counts as abandoned.
ABANDONED_AFTER = 3600.0
MARK_WITHIN = 65536  # bytes at the start of a file in which has_mark looks for its mark
REPORT_NAME = "report.html"  # the page about a run or a prepared folder
PAGE_MARK = b'<meta name="generator" content="cogvideox-finetuning">'  # in the head of such pages (report.html)
MACHINE_DIGITS = 12  # hexadecimal digits in the name of a machine
# Errors of a file system or a disk that the user can do something about.
DISK_ERRORS = {
    *(errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS, errno.EACCES, errno.EPERM, errno.EFBIG, errno.ENAMETOOLONG),
    *(errno.EEXIST, errno.ENOTDIR, errno.EISDIR, errno.ENOENT, errno.ENODEV, errno.ENXIO),
    *(errno.ESTALE, errno.ENOTCONN, errno.EREMOTEIO),  # errors of a network or FUSE file system
}
FULL = {errno.ENOSPC, errno.EDQUOT}
# Errors of file systems that cannot fsync a folder: CIFS, 9p, some FUSE file systems.
NO_FOLDER_FSYNC = {errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EACCES, errno.EPERM, errno.EISDIR}
NO_FOLDER_FSYNC |= {errno.EBADF, errno.ENOTTY}


def is_lfs_pointer(path: str | os.PathLike[str], size: int) -> bool:
    """Returns whether a file is the pointer that Git LFS leaves in place of a file that was not downloaded.

    Args:
        path: A regular file.
        size: Its size in bytes; only small files are opened.

    Raises:
        OSError: The file cannot be read.
    """
    if not len(LFS_POINTER) < size <= LFS_LONGEST:
        return False
    with open(path, "rb") as file:
        return file.read(len(LFS_POINTER)) == LFS_POINTER


def lfs_rule(folder: str | os.PathLike[str] = "") -> str:
    """Returns the message for a Git LFS pointer, with the folder in which to run the command if it is known."""
    where = f" -C {quote(os.fspath(folder))}" if folder else ""
    return f"is a Git LFS pointer, not the file itself; run: git{where} lfs pull"


def machine_id() -> str:
    """Returns an identifier of the running machine and container, within which process ids are unique.

    The host name is not enough: containers may share it and use the same process ids.
    """
    try:
        start = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{start} {os.stat('/proc/self/ns/pid').st_ino}"
    except OSError:  # not Linux
        return socket.gethostname()


def machine_name() -> str:
    """Returns ``machine_id`` in a form that file names can contain."""
    return hashlib.sha256(machine_id().encode()).hexdigest()[:MACHINE_DIGITS]


def temporary_of(path: Path) -> Path:
    """Returns the path under which this process writes a file until it is complete. No other process has the same."""
    return path.with_name(f".{path.name}.{machine_name()}.{os.getpid()}.tmp")


def write_atomically(path: Path, content: bytes) -> None:
    """Writes a file so that it always has either its old content or all of the new content.

    Raises:
        DiskError: The disk is full, fails or refuses to be written; the old content is unchanged.
    """
    temporary = temporary_of(path)
    with disk_errors_converted(path.parent, len(content)), removed_on_failure(temporary), stopping.disk_work():
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)


def has_mark(path: Path, mark: bytes) -> bool:
    """Returns whether a file exists and has the mark of this project near its start."""
    try:
        with open(path, "rb") as file:
            return mark in file.read(MARK_WITHIN)
    except OSError:
        return False


def foreign_problem(flag: str, path: Path, is_own: bool) -> str | None:
    """Returns, as a message, why a file or folder must not be replaced: it is not empty, and it is not our own.

    Args:
        flag: The flag that names it or its folder.
        path: Its path; it need not exist.
        is_own: Whether its content shows that this project wrote it.
    """
    if is_own or not path.exists() or (path.is_file() and path.stat().st_size == 0):
        return None
    return f"{path}: was not written by this script and would be replaced; move it away, or give another {flag}"


@contextmanager
def removed_on_failure(temporary: Path) -> Iterator[None]:
    """Deletes a temporary file or folder if creating it fails, because the disk may be full."""
    try:
        yield
    except BaseException:
        with suppress(OSError):
            shutil.rmtree(temporary) if temporary.is_dir() else temporary.unlink(missing_ok=True)
        raise


def fsync(path: Path) -> None:
    """Flushes a file or folder to the disk. Folders on file systems that cannot do so are skipped with a warning."""
    try:
        with stopping.disk_work():
            handle = os.open(path, os.O_RDONLY)
            try:
                os.fsync(handle)
            finally:
                os.close(handle)
    except OSError as error:
        if error.errno not in NO_FOLDER_FSYNC or not path.is_dir():
            raise
        reason = os.strerror(error.errno)
        warn_once(f"the file system cannot fsync a folder ({reason}); after a power cut the last file may be missing")


@functools.cache
def warn_once(text: str) -> None:
    """Prints a line to stderr, once per process however often it is called with this line; see ``print_once``."""
    stopping.print_once(text)


# -- errors of disks ---------------------------------------------------------------------------------------------------


@contextmanager
def disk_errors_converted(folder: Path, needed: int | None = None) -> Iterator[None]:
    """Converts errors of a disk into DiskError, including those of safetensors, PyTorch and FFmpeg.

    Args:
        folder: Where the block writes; the message names it.
        needed: The bytes that the block writes, or None if not known.
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
    """Converts errors of a disk into DiskError with a note of what has not been lost.

    Args:
        folder: Where the block writes most of its files.
        safe: Returns the note, such as "the tensors encoded so far are safe".
    """
    try:
        with disk_errors_converted(folder):
            yield
    except DiskError as error:
        raise error.knowing(safe()) from error


def disk_errno(error: BaseException) -> int | None:
    """Returns the error number of the system behind an exception, or None if it is not an error of a disk."""
    number = getattr(error, "errno", None)
    libraries = ("SafetensorError", "RuntimeError")  # of libraries in Rust: safetensors, the downloads of the hub
    if type(error).__name__ in libraries and (found := re.search(r"\(os error (\d+)\)", str(error))):
        number = int(found[1])
    if isinstance(number, int):
        return number if number in DISK_ERRORS else None
    if isinstance(error, RuntimeError) and re.search("PytorchStreamWriter|inline_container", str(error)):
        behind = error.__context__
        return (disk_errno(behind) if behind else None) or errno.EIO
    return None


def disk_error(folder: Path, number: int, needed: int | None) -> DiskError:
    """Returns the error for a folder in which writing failed.

    Args:
        folder: The folder.
        number: The error number of the system.
        needed: The bytes that were to be written, or None if not known.
    """
    about, fix = os.strerror(number), "find out why"
    if number in FULL:
        fix = "free some space"
        about += "".join(f", {size_text(size)} {what}" for size, what in sizes(folder, needed))
    elif number == errno.EFBIG:
        fix = "raise the limit of the size of a file (ulimit -f), or use a file system that stores larger files"
    elif number in (errno.EACCES, errno.EPERM, errno.EROFS):
        fix = f"make it {'writable' if is_readable(folder) else 'readable'}"
    return DiskError(f"{folder}: {about}", f"{fix} and run the same command again")


def is_readable(path: Path) -> bool:
    """Returns whether a file or folder can be read. If there is none, the nearest folder above it is checked."""
    found = next(place for place in (path, *path.absolute().parents) if os.path.lexists(place))
    return os.access(found, os.R_OK | os.X_OK if found.is_dir() else os.R_OK)


def check_readable(path: Path) -> None:
    """Checks that a file can be opened, before safetensors does, which reports each problem as a file that is missing.

    Raises:
        OSError: The file cannot be opened.
    """
    with open(path, "rb"):
        pass


def file_hash(path: str | os.PathLike[str]) -> str:
    """Returns the SHA-256 of the content of a file, in hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sizes(folder: Path, needed: int | None) -> Iterator[tuple[int, str]]:
    """Yields (bytes, "needed") and (bytes, "free"), as far as they are known."""
    if needed is not None:
        yield needed, "needed"
    free = free_disk_bytes(folder)
    if free is not None:
        yield free, "free"


def nearest_folder(folder: Path) -> Path:
    """Returns the folder if it exists, or else the nearest folder that will contain it."""
    return next(place for place in (folder, *folder.absolute().parents) if place.is_dir())


def free_disk_bytes(folder: Path) -> int | None:
    """Returns the free bytes on the disk of a folder, which need not exist yet, or None if not known."""
    for place in (folder, *folder.absolute().parents):
        with suppress(OSError):
            return shutil.disk_usage(place).free
    return None


def size_text(number: int) -> str:
    """Formats a number of bytes: 120 bytes, 3.4 MiB, 1.2 GiB."""
    for size, unit in ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if number >= size:
            return f"{number / size:.1f} {unit}"
    return plural(number, "byte")


def check_room(folder: Path, needed: int) -> None:
    """Checks that the disk of a folder has room for ``needed`` bytes.

    Raises:
        DiskError: It has less room.
    """
    free = free_disk_bytes(folder)
    if free is not None and free < needed:
        raise disk_error(folder, errno.ENOSPC, needed)


# -- files of other processes ------------------------------------------------------------------------------------------


def stamp_of(path: str | os.PathLike[str]) -> list[int]:
    """Returns the size and the modification time (ns) of a file, or [] if there is none."""
    try:
        status = os.stat(path)
    except OSError:
        return []
    return [status.st_size, status.st_mtime_ns]


def remove_temporaries(folder: Path) -> None:
    """Deletes the temporary files of all processes and hosts under a folder. The caller must hold its lock.

    Subfolders that have their own lock are skipped.
    """
    for place, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not Path(place, name, LOCK_NAME).exists()]
        for name in names:
            if TEMPORARY.fullmatch(name):
                Path(place, name).unlink(missing_ok=True)


def remove_stale_temporaries(folder: Path) -> None:
    """Deletes abandoned temporary files under a folder that other processes may be writing to.

    Files of this machine are abandoned when their process no longer exists, files of other machines and containers when
    nobody has written to them for ABANDONED_AFTER seconds.
    """
    paths = [(path, match) for path in folder.rglob(".*.tmp") if (match := TEMPORARY.fullmatch(path.name))]
    for path, match in paths:
        here = path.name.endswith(f".{machine_name()}.{match[1]}.tmp")
        gone = not Path("/proc", match[1]).exists() if here else (age_of(path) or 0.0) > ABANDONED_AFTER
        if gone:
            path.unlink(missing_ok=True)


def age_of(path: Path) -> float | None:
    """Returns the seconds since a file was written or touched, or None if it does not exist.

    The clock is that of the file system, which may differ from that of this machine.
    """
    probe = path.with_name(f".{machine_name()}.{os.getpid()}.now")
    try:
        probe.touch()
        return probe.stat().st_mtime - path.stat().st_mtime
    except FileNotFoundError:
        return None
    finally:
        probe.unlink(missing_ok=True)
