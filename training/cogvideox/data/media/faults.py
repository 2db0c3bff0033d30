"""Defines the error for files that cannot be used, and the limits that apply to all of them.

A ``VideoError`` has one line: the file, the reason, and after "; " what the user can do. ``errors_naming`` turns errors
of libraries into it. Errors of the file system or the machine stay OSError or MemoryError, because the file may be
fine.
"""

import errno
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager

MAX_SIDE = 16384  # pixels

AGAIN = "download it again or re-encode it"
RE_ENCODE = "re-encode it: `ffmpeg -i IN OUT.mp4`"

# Errors that the file system or the machine causes and not the file, so a later attempt may succeed.
MACHINE_ERRORS = {errno.EACCES, errno.EPERM, errno.EIO, errno.ESTALE, errno.ENOMEM, errno.EMFILE, errno.ENFILE}

_PATH_ERRORS = {errno.ENOENT, errno.EISDIR, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG}
# FFmpeg reports these for damaged files as well. In that case all bytes of the file can be read.
_AMBIGUOUS_ERRORS = {errno.EIO, errno.EPERM}
_PLACE_IN_DECORD = re.compile(r"\[\d\d:\d\d:\d\d\] \S+:\d+: ")


class VideoError(ValueError):
    """Reports a video or picture that cannot be used, with the reason in one line."""


@contextmanager
def errors_naming(path: str | os.PathLike[str], *errors: type[Exception]) -> Iterator[None]:
    """Adds the name of the file to the errors of the block, and turns those that the file causes into VideoErrors.

    OSErrors of the machine (MACHINE_ERRORS) get the name as well but stay OSErrors. MemoryErrors pass unchanged.

    Args:
        path: The file that the block reads.
        errors: Further exception types that become VideoErrors.
    """
    try:
        yield
    except MemoryError:
        raise
    except VideoError as error:
        raise type(error)(f"{path}: {error}") from error
    except OSError as error:
        if error.errno in MACHINE_ERRORS and not (error.errno in _AMBIGUOUS_ERRORS and _is_readable(path)):
            raise OSError(error.errno, f"{path}: {error.strerror}") from None
        fix = "check the path" if error.errno in _PATH_ERRORS else AGAIN
        raise VideoError(f"{path}: cannot be read: {_reason(error)}; {fix}") from error
    except errors as error:
        # FFmpeg has no other message for a format that it knows and may not read, see packets.py.
        is_foreign = getattr(error, "errno", None) == errno.EINVAL
        rest = "its format is not supported; convert it to mp4" if is_foreign else f"{_reason(error)}; {AGAIN}"
        raise VideoError(f"{path}: cannot be read: {rest}") from error


def check_size(height: int, width: int) -> None:
    """Raises VideoError for a picture with a side of more than MAX_SIDE pixels."""
    if max(width, height) > MAX_SIDE:
        raise VideoError(f"is {width}x{height}; at most {MAX_SIDE} pixels per side are supported; make it smaller")


def _is_readable(path: str | os.PathLike[str]) -> bool:
    try:
        with open(path, "rb") as file:
            while file.read(1 << 20):
                pass
    except OSError:
        return False
    return True


def _reason(error: Exception) -> str:
    """Returns the first line of an error's message, without the places in decord's code.

    Decord writes time, file and line before each message, and adds its call stack in further lines.
    """
    message = getattr(error, "strerror", None) or str(error).strip() or type(error).__name__
    return _PLACE_IN_DECORD.sub("", str(message).splitlines()[0])
