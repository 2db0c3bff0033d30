"""Tests host_memory.py: the free memory of a host, within control groups of versions 1 and 2."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from cogvideox import host_memory

GIB = 2**30
MACHINE = 100 * GIB


@pytest.fixture(autouse=True)
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Simulates a machine with 100 GiB of free memory and no control groups."""
    monkeypatch.setattr(host_memory.psutil, "virtual_memory", lambda: SimpleNamespace(available=MACHINE))
    monkeypatch.setattr(host_memory, "MOUNT", tmp_path / "cgroup")
    monkeypatch.setattr(host_memory, "MEMBERSHIP", tmp_path / "self")


def member(tmp_path: Path, *lines: str) -> None:
    (tmp_path / "self").write_text("\n".join(lines) + "\n")


def group(folder: Path, limit: str, used: int, cache: int = 0, version: int = 2) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    names = ("memory.max", "memory.current") if version == 2 else ("memory.limit_in_bytes", "memory.usage_in_bytes")
    prefix = "" if version == 2 else "total_"
    own = "" if version == 2 else "active_file 1\n"  # without the groups below it; version 1 also has the totals
    values = [f"{prefix}inactive_file {cache // 2}", f"{prefix}active_file {cache // 2}", f"{prefix}inactive_anon 7"]
    for name, text in zip((*names, "memory.stat"), (limit, str(used), own + "\n".join(values)), strict=True):
        (folder / name).write_text(f"{text}\n")


def test_without_control_groups_the_system_s_figure_counts(tmp_path: Path) -> None:
    assert host_memory.free_host_bytes() == MACHINE
    member(tmp_path, "0::/")
    assert host_memory.free_host_bytes() == MACHINE


def test_a_container_has_its_limit_minus_the_memory_in_use(tmp_path: Path) -> None:
    """Cached pages of files count as used, but can be reclaimed."""
    member(tmp_path, "0::/")
    group(tmp_path / "cgroup", str(32 * GIB), used=12 * GIB, cache=2 * GIB)
    assert host_memory.free_host_bytes() == 22 * GIB


def test_the_smallest_limit_of_a_group_and_its_parents_counts(tmp_path: Path) -> None:
    member(tmp_path, "0::/slurm/job_7/step_0")
    group(tmp_path / "cgroup/slurm/job_7/step_0", "max", used=GIB)
    group(tmp_path / "cgroup/slurm/job_7", str(40 * GIB), used=10 * GIB)
    group(tmp_path / "cgroup/slurm", str(90 * GIB), used=30 * GIB)
    assert host_memory.free_host_bytes() == 30 * GIB


@pytest.mark.parametrize(("limit", "free"), [(16 * GIB, 8 * GIB), (2**63 - 4096, MACHINE), (4 * GIB, 0)])
def test_version_1(limit: int, free: int, tmp_path: Path) -> None:
    """The largest number means that there is no limit. A limit below the memory in use leaves 0 bytes."""
    member(tmp_path, "9:name=systemd:/elsewhere", "4:memory:/docker/abc", "3:cpuset:/")
    group(tmp_path / "cgroup/memory/docker/abc", str(limit), used=10 * GIB, cache=2 * GIB, version=1)
    assert host_memory.free_host_bytes() == free


@pytest.mark.parametrize(("high", "free"), [("max", 22 * GIB), (20 * GIB, 10 * GIB), (60 * GIB, 22 * GIB)])
def test_above_memory_high_a_group_is_slowed_down(tmp_path: Path, high: object, free: int) -> None:
    member(tmp_path, "0::/")
    group(tmp_path / "cgroup", str(32 * GIB), used=12 * GIB, cache=2 * GIB)
    (tmp_path / "cgroup" / "memory.high").write_text(f"{high}\n")
    assert host_memory.free_host_bytes() == free
