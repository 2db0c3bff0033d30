"""Keeps what makes later runs start faster, such as compiled kernels, in a private folder of the user.

``use_caches`` must be called before torch is imported. It tells the libraries to use the folder, through environment
variables that processes started later inherit; a variable that is already set is left alone. Everything in the folder
can be deleted at any time and is then made again. This module needs only the standard library.
"""

import hashlib
import importlib.util
import os
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

from cogvideox.errors import DiskError
from cogvideox.files import write_atomically

PRIVATE = 0o700
# Kernels of torch.compile (and of Triton, in a folder inside), and kernels of FlashAttention 4.
FOLDERS = {
    "TORCHINDUCTOR_CACHE_DIR": "inductor",
    "FLASH_ATTENTION_CUTE_DSL_CACHE_DIR": "flash-attention",
}
SWITCHES = {"FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED": "1"}  # FlashAttention 4 writes no cache by default
SETTLED = 2.0  # seconds; after so long the next change of a file gets another time, however coarse the clock is


def cache_folder() -> Path | None:
    """Returns the suite's folder below $XDG_CACHE_HOME or ~/.cache, which only this user can read and write.

    Returns None if the user has no home, or if the folder cannot be created or belongs to another user. Compiled
    kernels are executed when they are loaded, so a folder that others can write to must not be used.
    """
    root = os.environ.get("XDG_CACHE_HOME", "")
    if not os.path.isabs(root):  # the specification of the variable says that a relative path is ignored
        root = os.path.expanduser("~/.cache")
    if not os.path.isabs(root):  # no HOME is set, and the system does not know this user
        return None
    folder = Path(root) / "cogvideox"
    try:
        folder.mkdir(mode=PRIVATE, parents=True, exist_ok=True)
        status = folder.stat()
        if status.st_uid != os.getuid():
            return None
        if status.st_mode & 0o777 != PRIVATE:
            folder.chmod(PRIVATE)
    except OSError:
        return None
    return folder if os.access(folder, os.W_OK | os.X_OK) else None


def use_caches() -> None:
    """Sets the environment variables with which libraries keep their compiled kernels in ``cache_folder``."""
    folder = cache_folder()
    if folder is None:
        return
    for name, part in FOLDERS.items():
        os.environ.setdefault(name, str(folder / part))
    for name, value in SWITCHES.items():
        os.environ.setdefault(name, value)
    keep_bytecode(folder / "bytecode")


def keep_bytecode(folder: Path) -> None:
    """Makes Python keep the bytecode of all modules in a folder if it otherwise compiles them again in every process.

    That is so in many containers: packages are installed without bytecode, and Python is told not to write any, which
    costs each start of a script more than ten seconds.
    """
    if not sys.dont_write_bytecode or sys.pycache_prefix is not None or has_bytecode("torch"):
        return
    sys.dont_write_bytecode, sys.pycache_prefix = False, str(folder)
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    os.environ["PYTHONPYCACHEPREFIX"] = str(folder)


def has_bytecode(package: str) -> bool:
    """Returns whether the bytecode of a package is stored next to it, or the package is not installed."""
    spec = importlib.util.find_spec(package)
    return spec is None or spec.cached is None or os.path.exists(spec.cached)


def remembered(kind: str, files: Sequence[Path], compute: Callable[[], str]) -> str:
    """Returns a text that depends only on the content of files, from the cache if none of them has changed.

    Args:
        kind: What the text is; names its folder in the cache.
        files: The files. Path, size, inode, and the times of the last change of content and of attributes decide for
            each whether it has changed. The latter cannot be set back, as tools that copy files do with the former.
        compute: Computes the text.
    """
    folder = cache_folder()
    states = [(path.resolve(), path.stat()) for path in files]
    identity = [(str(path), s.st_dev, s.st_ino, s.st_size, s.st_mtime_ns, s.st_ctime_ns) for path, s in states]
    if folder is None or any(time.time() - status.st_ctime < SETTLED for _, status in states):
        return compute()
    entry = folder / kind / hashlib.sha256(repr(identity).encode()).hexdigest()
    with suppress(OSError):
        return entry.read_text()
    text = compute()
    with suppress(OSError, DiskError):
        write_atomically(entry, text.encode())
    return text
