"""Files that are whole or not there, whenever the process dies."""

import os
import socket
from pathlib import Path


def temporary_of(path: Path) -> Path:
    """The name under which this process writes a file before it is whole."""
    return path.with_name(f".{path.name}.{socket.gethostname()}.{os.getpid()}.tmp")


def write_atomically(path: Path, content: bytes) -> None:
    """The file has either its old content or all of the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_of(path)
    with open(temporary, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def stamp_of(path: str | os.PathLike[str]) -> list[int]:
    """Changes when a file is written: its size and time; empty if there is none."""
    try:
        status = os.stat(path)
    except OSError:
        return []
    return [status.st_size, status.st_mtime_ns]


def remove_stale_temporaries(folder: Path) -> None:
    """Deletes temporary files under ``folder`` whose process on this machine is gone."""
    for path in folder.rglob(".*.tmp"):
        owner, _, pid = path.name.removesuffix(".tmp").rpartition(".")
        if owner.endswith(f".{socket.gethostname()}") and not Path(f"/proc/{pid}").exists():
            path.unlink(missing_ok=True)
