"""Measures the host memory that this process may still allocate.

That is the available memory of the machine, or less if a container or a job has a limit. The system reports only the
memory of the machine, and a process that pins more than its limit allows is killed.
"""

from collections.abc import Iterator
from pathlib import Path

import psutil

MOUNT, MEMBERSHIP = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")
CGROUP_FILES = (  # (limits, use, prefix of the statistics that include subgroups) of cgroup v2, then of v1
    # Above memory.high, the system takes memory away from the group and slows it down, so it counts as a limit too.
    (("memory.max", "memory.high"), "memory.current", ""),
    (("memory.limit_in_bytes",), "memory.usage_in_bytes", "total_"),
)
CACHE = ("inactive_file", "active_file")  # cached pages of files, which the system can free


def free_host_bytes() -> int:
    """Returns the bytes of host memory that this process may still allocate."""
    limited = (left_in(group) for group in groups())
    return max(0, min([psutil.virtual_memory().available, *(left for left in limited if left is not None)]))


def groups() -> Iterator[Path]:
    """Yields the folders of the control groups of this process and of all groups that contain them."""
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
    """Returns the bytes that the limit of a group leaves, or None if it has no limit."""
    for limits, use, prefix in CGROUP_FILES:
        try:
            most = [(group / limit).read_text().strip() for limit in limits if (group / limit).exists()]
            used = int((group / use).read_text())
            lines = [line.split() for line in (group / "memory.stat").read_text().splitlines()]
        except OSError:  # files of the other cgroup version, or the root group
            continue
        cached = sum(int(value) for name, value in lines if name in {prefix + n for n in CACHE})
        numbers = [int(text) for text in most if text != "max"]
        return min(numbers) - used + cached if numbers else None
    return None
