"""Runs a script in a process with a small /dev/shm.

python small_shm.py BYTES SCRIPT [FLAG ...]    ends with NO_PRIVILEGE if mounts are not allowed
"""

from __future__ import annotations

import ctypes
import os
import runpy
import sys
from collections.abc import Callable
from pathlib import Path

SHM_FOLDER = "/dev/shm"
NEW_NAMESPACE, PRIVATE = 0x20000, 0x44000  # CLONE_NEWNS; MS_REC | MS_PRIVATE
NO_PRIVILEGE = 77  # exit status


def mount_small(size: int) -> None:
    """Gives this process a private /dev/shm with ``size`` bytes."""
    libc = ctypes.CDLL(None, use_errno=True)
    steps: tuple[Callable[[], int], ...] = (
        lambda: libc.unshare(NEW_NAMESPACE),
        lambda: libc.mount(b"none", b"/", None, PRIVATE, None),
        lambda: libc.mount(b"tmpfs", SHM_FOLDER.encode(), b"tmpfs", 0, f"size={size}".encode()),
    )
    for step in steps:
        if step() != 0:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def main(size: str, script: str, *flags: str) -> None:
    """Mounts the small /dev/shm, and runs the script as if Python had been started with it."""
    try:
        mount_small(int(size))
    except PermissionError as error:
        print(error)
        sys.exit(NO_PRIVILEGE)
    sys.argv = [script, *flags]
    sys.path[0] = str(Path(script).parent)
    runpy.run_path(script, run_name="__main__")


if __name__ == "__main__":
    main(*sys.argv[1:])
