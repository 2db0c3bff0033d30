"""Memory of the host that may still be taken: what is free there, or less where a container or a job has a limit.

What the system calls available is that of the whole machine; who pins more than a limit leaves is killed.
"""

from collections.abc import Iterator
from pathlib import Path

import psutil

MOUNT, MEMBERSHIP = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")
NAMES = (  # limit, use, and the prefix of statistics over all that is below: of cgroup v2, of v1
    ("memory.max", "memory.current", ""),
    ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_"),
)
CACHE = ("inactive_file", "active_file")  # pages of files, which make room


def free_host_bytes() -> int:
    """Bytes that may still be taken."""
    limited = (left_in(group) for group in groups())
    return max(0, min([psutil.virtual_memory().available, *(left for left in limited if left is not None)]))


def groups() -> Iterator[Path]:
    """The folders of the control groups of this process, each with all that it is in."""
    try:
        lines = MEMBERSHIP.read_text().splitlines()
    except OSError:  # not Linux
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers in ("", "memory"):
            root = MOUNT / controllers
            group = root / path.lstrip("/")
            yield from (folder for folder in (group, *group.parents) if folder.is_relative_to(root))


def left_in(group: Path) -> int | None:
    """Bytes under the limit of one group; None if it has none."""
    for limit, use, prefix in NAMES:
        try:
            most, used = (group / limit).read_text().strip(), int((group / use).read_text())
            lines = [line.split() for line in (group / "memory.stat").read_text().splitlines()]
        except OSError:  # of the other version, or the root
            continue
        if most != "max":
            return int(most) - used + sum(int(value) for name, value in lines if name in {prefix + n for n in CACHE})
    return None
