"""Finds memory that processes share, in the files of /proc."""

from pathlib import Path

from cogvideox.memory.shared import NAME


def shared_mappings(process: int) -> set[str]:
    """Returns the inodes of the shared weights that a process has mapped; none if the process has ended."""
    try:
        lines = [line.split() for line in Path(f"/proc/{process}/maps").read_text().splitlines()]
    except OSError:
        return set()
    return {fields[4] for fields in lines if NAME in " ".join(fields[5:]) and "s" in fields[1]}
