"""Allocates host memory that all processes (ranks) of one machine share: the frozen weights of streamed blocks.

The memory is an anonymous file of the kernel (a memfd), which needs neither a file system nor room in /dev/shm. The
first process of the machine creates it and tells the others its process id and file descriptor, through which they map
the same pages. The file is closed as soon as everyone has mapped it, so the pages are freed with the last mapping, also
if processes are killed:

    first process  create, map    close    fill the blocks    pin
    the others              map            wait               pin
"""

import ctypes
import mmap
import os
from collections.abc import Callable
from contextlib import suppress
from typing import Any, NamedTuple
from uuid import uuid4

import torch
from torch import Tensor

from cogvideox.memory.buffers import ADVICE, pin

NAME = "cogvideox-weights"


class Neighbors(NamedTuple):
    """Describes the ranks of a run that are on this machine; launchers number them consecutively."""

    first: int  # number of the first rank of this machine
    number: int  # of the ranks of this machine
    own: int  # number of this rank
    gather: Callable[[list[Any]], list[Any]]  # returns the items of all ranks of the run, in their order

    def gather_here(self, item: Any) -> list[Any]:
        """Returns the items of the ranks of this machine. All ranks of the run must call this."""
        return self.gather([item])[self.first : self.first + self.number]


class SharedBuffers:
    """Holds equal buffers that the ranks of this machine share. The first rank fills them; all call ``publish``.

    Attributes:
        buffers: The buffers, zeroed, uint8, (num_bytes,) each.
        filled_here: Whether this rank fills the buffers. No other rank may write them.
    """

    def __init__(self, memory: Tensor, num_bytes: int, neighbors: Neighbors) -> None:
        self.buffers = list(memory.split(num_bytes))
        self.filled_here = neighbors.own == neighbors.first
        self._memory, self._neighbors = memory, neighbors

    def publish(self) -> None:
        """Waits until the buffers are filled, and pins them for this rank's device. They must not change afterwards.

        Raises:
            MemoryError: The system does not allow that much memory to be pinned. All ranks raise it.
        """
        self._neighbors.gather([None])
        failure = ""
        try:
            pin(self._memory)
        except MemoryError as error:
            failure = str(error)
        for number, text in enumerate(self._neighbors.gather([failure])):
            if text:
                raise MemoryError(f"process {number}: {text}")


def share_buffers(count: int, num_bytes: int, neighbors: Neighbors) -> SharedBuffers | None:
    """Allocates buffers that the ranks of this machine share. All ranks of the run must call this.

    Args:
        count: The number of buffers.
        num_bytes: The size of each.
        neighbors: The ranks of this machine.

    Returns:
        The buffers, or None on all ranks of the run if one of them cannot map the memory.
    """
    file, name = None, f"{NAME}-{uuid4().hex}"
    if neighbors.own == neighbors.first:
        with suppress(AttributeError, OSError):  # a system or kernel without memfd
            file = os.memfd_create(name)
            os.ftruncate(file, count * num_bytes)
    try:
        process, number, name = neighbors.gather_here((os.getpid(), file, name))[0]
        memory = None
        with suppress(OSError, RuntimeError):
            memory = map_shared(process, number, name, count * num_bytes)
        if not all(neighbors.gather([memory is not None])):
            return None
    finally:
        if file is not None:
            os.close(file)
    assert memory is not None
    return SharedBuffers(memory, num_bytes, neighbors)


def map_shared(process: int, file: int | None, name: str, num_bytes: int) -> Tensor:
    """Maps a memfd of another process of the same user into this process.

    Args:
        process: The id of the process that created the memfd.
        file: Its file descriptor there; None if it could not be created.
        name: The name of the memfd.
        num_bytes: The number of bytes to map.

    Returns:
        A uint8 tensor of shape (num_bytes,). The memory is unmapped with its last view.

    Raises:
        OSError: The process cannot be seen from here, or has no such file.
        RuntimeError: The file cannot be opened or mapped.
    """
    path = f"/proc/{process}/fd/{file}"
    if name not in os.readlink(path):  # in another container, another process may have this id
        raise OSError(f"{path} is not {name}")
    # torch closes the file after mapping it. Python's mmap would keep it open, and worker processes would inherit it.
    memory = torch.from_file(path, shared=True, size=num_bytes, dtype=torch.uint8)
    advise = ctypes.CDLL(None, use_errno=True).madvise
    for advice in ADVICE:
        with suppress(AttributeError):  # advice that this system does not know; a kernel returns an error
            advise(ctypes.c_void_p(memory.data_ptr()), ctypes.c_size_t(num_bytes), getattr(mmap, advice))
    return memory
