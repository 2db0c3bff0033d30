"""Writes and reads safetensors files whose tensors are sharded over the processes of a run.

The file is an ordinary one. The shard that a process has of a tensor is one range of its elements in row-major order,
such as some rows, and so one range of bytes in the file. Each process writes its shards where they belong, and no
process ever holds a complete tensor. The number of processes that read the file, and their shards, may be others. All
processes must see the same folder.

    file       | header | tensor a: elements 0-49 | elements 50-99 | tensor b: elements 0-7 | elements 8-15 |
    written by   rank 0   rank 0                    rank 1           rank 0                   rank 1
"""

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cogvideox.tensor_files import content_of, header, size_of

LARGEST_WRITE = 2**30  # bytes; Linux writes at most 2 GiB at a time


@dataclass(frozen=True)
class Shard:
    """This process's elements of a tensor, a range of them in row-major order.

    Attributes:
        local: The elements, of any shape and on any device; the complete tensor if it is not sharded.
        shape: The shape of the complete tensor.
        first: The index of the first element in the flattened complete tensor.
        writes: Whether this process writes them. Of several processes with the same elements, one does.
    """

    local: Tensor
    shape: torch.Size
    first: int = 0
    writes: bool = True

    @property
    def dtype(self) -> torch.dtype:
        """The type of the elements."""
        return self.local.dtype

    @property
    def offset(self) -> int:
        """The offset in bytes of the first element."""
        return self.first * self.local.element_size()


RaiseTogether = Callable[[OSError | None], None]


def raise_error(error: OSError | None) -> None:
    """Raises an error if there is one, as ``write_shards`` needs it where no other process takes part."""
    if error is not None:
        raise error


def write_shards(path: Path, tensors: dict[str, Shard], is_main: bool, raise_together: RaiseTogether) -> None:
    """Writes a safetensors file together with all other processes, which must call this with the same names.

    Args:
        path: The file.
        tensors: This process's shard of each tensor.
        is_main: Whether this process creates the file and writes its header.
        raise_together: Waits for the other processes, and raises the error of one of them, if any, in each of them.

    Raises:
        OSError: The disk of a process is full or fails. Each process raises it, so that none waits for another.
    """
    head, starts = header(tensors)
    # Nobody may write into a file that does not exist, or that is about to be truncated.
    raise_together(error_of(partial(create, path, head, tensors)) if is_main else None)
    raise_together(error_of(partial(fill, path, len(head), starts, tensors)))


def error_of(work: Callable[[], None]) -> OSError | None:
    """Does some work, and returns the error of the disk that ended it, or None."""
    try:
        work()
    except OSError as error:
        return error
    return None


def create(path: Path, head: bytes, tensors: dict[str, Shard]) -> None:
    """Creates a file of its final size with what is in front of the data."""
    with open(path, "wb") as file:
        file.write(head)
        file.truncate(len(head) + sum(size_of(shard) for shard in tensors.values()))


def fill(path: Path, start: int, starts: dict[str, int], tensors: dict[str, Shard]) -> None:
    """Writes this process's shards into a file that exists.

    Args:
        path: The file.
        start: The offset of the data in the file.
        starts: The offset of each tensor in the data.
        tensors: The shards.
    """
    handle = os.open(path, os.O_WRONLY)
    try:
        for name, shard in tensors.items():
            if shard.writes:
                write_at(handle, shard.local, start + starts[name] + shard.offset)
        os.fsync(handle)
    finally:
        os.close(handle)


def write_at(handle: int, tensor: Tensor, offset: int) -> None:
    """Writes the bytes of a tensor at an offset of an open file."""
    content = content_of(tensor)
    while content:
        written = os.pwrite(handle, content[:LARGEST_WRITE], offset)
        content, offset = content[written:], offset + written


def read_shards(path: Path, tensors: dict[str, Shard]) -> Iterator[tuple[str, Tensor]]:
    """Yields the name of each tensor of a safetensors file, and of it the elements that ``tensors`` has.

    Args:
        path: The file.
        tensors: This process's shards by name. A tensor that is not in it is yielded completely.
    """
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        for name in file.keys():  # noqa: SIM118
            shard = tensors.get(name)
            if shard is None or not shard.shape:
                yield name, file.get_tensor(name)
            else:
                yield name, elements_of(file.get_slice(name), shard)


def elements_of(stored: Any, shard: Shard) -> Tensor:
    """Returns a shard's elements of a tensor in a file, in the shape of ``shard.local``.

    Args:
        stored: The tensor as safetensors' get_slice returns it. Only the rows that contain the elements are read.
        shard: Which elements.
    """
    width, count = shard.shape[1:].numel(), shard.local.numel()
    top, bottom = shard.first // width, -(-(shard.first + count) // width)
    return stored[top:bottom].flatten()[shard.first - top * width :][:count].view_as(shard.local)
