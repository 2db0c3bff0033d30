"""Makes the disk fail at a chosen moment, for this process only.

    refuse("(open|write|fsync) /some/folder/", 3, errno.ENOSPC)

Each operation on files is described by a line of text: "open PATH w", "write PATH", "fsync PATH", "lockf PATH",
"os.rename FROM TO", "os.mkdir PATH", "os.remove PATH" or "os.rmdir PATH". The nth operation that matches the regular
expression fails. An audit hook sees the operations of Python itself; other libraries are wrapped.
"""

from __future__ import annotations

import builtins
import errno
import fcntl
import io
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

WRITES = os.O_WRONLY | os.O_RDWR
INJECTED = "injected: "  # printed before the failed operation, on standard error
CHANGES = ("os.mkdir", "os.rename", "os.remove", "os.rmdir")


def refuse(moment: str, nth: int, number: int) -> None:
    """Makes the nth operation that matches ``moment`` fail with an error number; 0 means all operations."""
    seen = 0

    def look(what: str) -> None:
        nonlocal seen
        if re.search(moment, what):
            seen += 1
            if nth in (0, seen):
                os.write(2, f"{INJECTED}{what}\n".encode())
                raise OSError(number, os.strerror(number), what.split(" ", 1)[1])

    hook_events(look)
    wrap_writes(look)
    wrap_handles(look)
    wrap_libraries(look)


def hook_events(look: Callable[[str], None]) -> None:
    """Watches files and folders that are opened, renamed, created or removed."""
    import sys

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open" and arguments[2] & WRITES:
            look(f"open {arguments[0]} w")
        elif event in CHANGES:
            look(" ".join((event, *map(str, arguments[: 2 if event == "os.rename" else 1]))))

    sys.addaudithook(hook)


class Watched:
    """Wraps a file and watches its writes."""

    def __init__(self, file: Any, look: Callable[[str], None]) -> None:
        self._file, self._look = file, look

    def write(self, content: Any) -> Any:
        """Writes the content. If this fails, half of it has been written, as on a real disk."""
        try:
            self._look(f"write {self._file.name}")
        except OSError:
            self._file.write(content[: len(content) // 2])
            raise
        return self._file.write(content)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def __enter__(self) -> Watched:
        self._file.__enter__()
        return self

    def __exit__(self, *error: Any) -> Any:
        return self._file.__exit__(*error)

    def __iter__(self) -> Any:
        return iter(self._file)


def wrap_writes(look: Callable[[str], None]) -> None:
    """Watches writes to files that Python opens."""
    real = builtins.open

    def watching(file: Any, mode: str = "r", *more: Any, **named: Any) -> Any:
        opened = real(file, mode, *more, **named)
        by_name = not isinstance(file, int) and not str(file).startswith("/proc")
        return Watched(opened, look) if by_name and set(mode) & set("wax+") else opened

    builtins.open = io.open = watching


def wrap_handles(look: Callable[[str], None]) -> None:
    """Watches fsync and locks."""

    def wrapped(real: Callable[..., Any], name: str) -> Callable[..., Any]:
        def watching(file: Any, *more: Any) -> Any:
            handle = file if isinstance(file, int) else file.fileno()
            look(f"{name} {os.readlink(f'/proc/self/fd/{handle}')}")
            return real(handle, *more)

        return watching

    os.fsync = wrapped(os.fsync, "fsync")
    fcntl.lockf, fcntl.flock = wrapped(fcntl.lockf, "lockf"), wrapped(fcntl.flock, "lockf")


def wrap_libraries(look: Callable[[str], None]) -> None:
    """Watches files that safetensors and FFmpeg write, and raises the errors of these libraries."""
    import av
    import safetensors.torch
    from safetensors import SafetensorError

    serialize: Any = safetensors.torch.serialize_file
    open_container: Any = av.open

    def serialize_file(tensors: Any, name: Any, *more: Any, **named: Any) -> None:
        try:
            look(f"write {name}")
        except OSError as error:
            Path(name).write_bytes(b"torn")
            text = f"Error while serializing: I/O error: {error.strerror} (os error {error.errno})"
            raise SafetensorError(text) from None
        serialize(tensors, name, *more, **named)

    def open_watched(file: Any, mode: str = "r", *more: Any, **named: Any) -> Any:
        if mode == "w":
            try:
                look(f"write {file}")
            except OSError as error:
                Path(file).write_bytes(b"torn")
                av.error.err_check(-(error.errno or 0))
        return open_container(file, mode, *more, **named)

    safetensors.torch.serialize_file = serialize_file  # type: ignore[assignment]
    av.open = open_watched  # type: ignore[assignment]


NO_LOCKS = ("lockf ", 0, errno.ENOLCK)
