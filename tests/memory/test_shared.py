"""Tests shared.py: processes share pages, and the memory is freed with the last process, also if it is killed."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from mappings import shared_mappings

from cogvideox.memory import shared
from cogvideox.memory.shared import NAME, Neighbors, SharedBuffers, share_buffers

COUNT, SIZE = 3, 4096
OTHER = """
import sys, json
sys.path.insert(0, sys.argv[1])
from cogvideox.memory.shared import map_shared
memory = map_shared(*json.loads(sys.argv[2]))
print(int(memory[5]), flush=True)
sys.stdin.readline()
"""


def alone() -> Neighbors:
    """Returns a machine of one rank that fills the memory, which is enough to allocate it."""
    return Neighbors(0, 1, 0, list)


def shared_files() -> list[str]:
    """Returns the memory that this process has open as a file."""
    links = [os.readlink(entry.path) for entry in os.scandir("/proc/self/fd") if os.path.lexists(entry.path)]
    return [link for link in links if NAME in link]


def test_buffers_are_zeroed_shared_and_freed_with_the_last_view() -> None:
    found = share_buffers(COUNT, SIZE, alone())
    assert found is not None
    assert found.filled_here
    assert [len(buffer) for buffer in found.buffers] == [SIZE] * COUNT
    assert not any(buffer.any() for buffer in found.buffers)
    assert len(shared_mappings(os.getpid())) == 1
    assert shared_files() == []  # the file is closed; only the mapping holds the memory
    found.publish()
    view = found.buffers[1][7:]
    del found
    view += 1
    assert len(shared_mappings(os.getpid())) == 1
    del view
    assert shared_mappings(os.getpid()) == set()


def test_a_fork_does_not_inherit_shared_memory() -> None:
    """The workers that load data must not hold the memory of a rank that was killed."""
    found = share_buffers(COUNT, SIZE, alone())
    child = os.fork()
    if not child:
        os._exit(len(shared_mappings(os.getpid())))
    assert os.waitpid(child, 0)[1] == 0
    assert found is not None


def test_another_process_sees_the_pages_and_keeps_them_when_the_first_one_is_gone() -> None:
    """Two processes map the memory; its bytes and its inode are the same, and a killed process leaves nothing."""
    name = f"{NAME}-test"
    file = os.memfd_create(name)
    os.ftruncate(file, SIZE)
    memory = shared.map_shared(os.getpid(), file, name, SIZE)
    memory[5] = 42
    arguments = json.dumps([os.getpid(), file, name, SIZE])
    training = str(Path(shared.__file__).parents[2])
    command = [sys.executable, "-c", OTHER, training, arguments]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "42\n"
        (inode,) = shared_mappings(os.getpid())
        assert shared_mappings(other.pid) == {inode}
        os.close(file)
        other.send_signal(signal.SIGKILL)
    assert shared_mappings(os.getpid()) == {inode}
    assert int(memory[5]) == 42
    del memory
    assert shared_mappings(os.getpid()) == set()


def test_a_memfd_of_another_name_is_not_mapped() -> None:
    """In another container, another process may have the id of the first rank."""
    file = os.memfd_create("other")
    os.ftruncate(file, SIZE)
    try:
        with pytest.raises(OSError, match=re.escape(f"fd/{file} is not {NAME}")):
            shared.map_shared(os.getpid(), file, f"{NAME}-1", SIZE)
    finally:
        os.close(file)


def test_nothing_is_shared_if_a_rank_cannot_map_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    def blind(*_: Any) -> torch.Tensor:
        raise RuntimeError("unable to open file")

    monkeypatch.setattr(shared, "map_shared", blind)
    assert share_buffers(COUNT, SIZE, alone()) is None
    assert shared_files() == []
    monkeypatch.undo()
    others = Neighbors(0, 2, 0, lambda items: [*items, False] if isinstance(items[0], bool) else items)
    assert share_buffers(COUNT, SIZE, others) is None
    assert shared_mappings(os.getpid()) == set()
    monkeypatch.delattr(os, "memfd_create")
    assert share_buffers(COUNT, SIZE, alone()) is None


@pytest.mark.parametrize("number", [0, 1])
def test_memory_that_one_rank_cannot_pin_is_an_error_on_all(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(buffer: torch.Tensor) -> None:
        if number == 0:
            raise MemoryError("no more")

    monkeypatch.setattr(shared, "pin", refuse)
    failures = ["no more" if rank == number else "" for rank in range(2)]

    def gather(items: list[Any]) -> list[Any]:
        if items == [None]:
            return [None] * 2
        assert items == failures[:1]
        return failures

    with pytest.raises(MemoryError, match=rf"^process {number}: no more"):
        SharedBuffers(torch.zeros(SIZE, dtype=torch.uint8), SIZE, Neighbors(0, 2, 0, gather)).publish()
