"""Lets a script continue when its messages cannot be written.

The reader of a pipe may have ended, as ``head`` does, a terminal may be closed, and the disk of a log may be full. Such
an error must not end hours of work that has nothing to do with it. This module needs only the standard library.
"""

import errno
import io
import os
import select
import sys
from typing import Any


class ConsoleFile(io.FileIO):
    """Writes to the standard output or the standard error, and discards what cannot be written.

    Attributes:
        error: The first error of the system, or None.
    """

    def __init__(self, number: int) -> None:
        super().__init__(number, "w", closefd=False)
        self.error: OSError | None = None

    def write(self, data: Any) -> int:
        """Returns the number of bytes that were written or discarded."""
        try:
            while (written := super().write(data)) is None:  # a full pipe that another program has made non-blocking
                select.select((), (self,), ())
            return written
        except OSError as error:
            self.error = self.error or error
            return len(data)


def protect_output() -> None:
    """Makes the standard output and the standard error discard what cannot be written, and escape odd characters.

    Closed ones lead to /dev/null from now on. Otherwise the next file that the script opens, such as a
    checkpoint, would get their number, and libraries would print into it.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
    if sys.stdout is sys.__stdout__:
        sys.stdout = _protected(sys.stdout, 1)
    if sys.stderr is sys.__stderr__:
        sys.stderr = _protected(sys.stderr, 2)


def _protected(stream: Any, number: int) -> io.TextIOWrapper:
    """Returns a stream with the settings of another, which is None if it was closed."""
    return io.TextIOWrapper(
        io.BufferedWriter(ConsoleFile(number)),
        encoding=stream.encoding if stream else "utf-8",
        errors="backslashreplace",
        line_buffering=stream is not None and (stream.line_buffering or stream.write_through),
    )


def output_problem() -> str:
    """Returns why a part of the standard output is missing, or "" if it is complete or its reader has ended."""
    sys.stdout.flush()
    file = getattr(getattr(sys.stdout, "buffer", None), "raw", None)
    number = file.error.errno if isinstance(file, ConsoleFile) and file.error else None
    return "" if number in (None, errno.EPIPE) else os.strerror(number)
