"""What a file that cannot be used says: VideoError, one line that names it, why, and after "; " what to do; and limits.

Refusals of the file system or the machine stay OSErrors (and MemoryErrors), since the file may be fine.
"""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager

MAX_SIDE = 16384  # pixels

AGAIN = "download it again or re-encode it"

# Of the file system or the machine, not of the file: tried again another time
MACHINE_ERRORS = {errno.EACCES, errno.EPERM, errno.EIO, errno.ESTALE, errno.ENOMEM, errno.EMFILE, errno.ENFILE}

_PATH_ERRORS = {errno.ENOENT, errno.EISDIR, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG}
# FFmpeg says these of damaged files too; then every byte can be read.
_AMBIGUOUS_ERRORS = {errno.EIO, errno.EPERM}


class VideoError(ValueError):
    """A video that cannot be used, with a reason of one line."""


@contextmanager
def errors_naming(path: str | os.PathLike[str], *errors: type[Exception]) -> Iterator[None]:
    """Inside the block VideoErrors get the name of the file, and OSErrors and `errors` become VideoErrors.

    OSErrors of the machine (MACHINE_ERRORS) get the name too and stay OSErrors; MemoryErrors pass as they are.
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
        raise VideoError(f"{path}: cannot be read: {_reason(error)}; {AGAIN}") from error


def check_size(height: int, width: int) -> None:
    """Raises VideoError for a picture with a side of more than MAX_SIDE pixels."""
    if max(width, height) > MAX_SIDE:
        raise VideoError(f"is {width}x{height}; at most {MAX_SIDE} pixels a side are read; make it smaller")


def _is_readable(path: str | os.PathLike[str]) -> bool:
    try:
        with open(path, "rb") as file:
            while file.read(1 << 20):
                pass
    except OSError:
        return False
    return True


def _reason(error: Exception) -> str:
    said = getattr(error, "strerror", None) or str(error).strip() or type(error).__name__
    return str(said).splitlines()[0]  # decord adds its call stack
