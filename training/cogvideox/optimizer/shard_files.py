"""Writes and reads safetensors files whose tensors are sharded over the processes of a run.

The file is an ordinary one. The shard that a process has of a tensor is one range of its elements in row-major order,
such as some rows, and so one range of bytes in the file. Each process writes its shards where they belong, and no
process ever holds a complete tensor. The number of processes that read the file, and their shards, may be others. All
processes must see the same folder.

    file       | header | tensor a: elements 0-49 | elements 50-99 | tensor b: elements 0-7 | elements 8-15 |
    written by   rank 0   rank 0                    rank 1           rank 0                   rank 1
"""

import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol, TypeAlias, TypeVar

import torch
from torch import Tensor

from cogvideox import stopping
from cogvideox.errors import DISK_LOSES, DiskError
from cogvideox.tensor_files import content_of, hashed_meanwhile, header, size_of

LARGEST_WRITE = 2**30  # bytes; Linux writes at most 2 GiB at a time
READ_BYTES = 2**24  # that are read at a time


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


@dataclass(frozen=True)
class Part:
    """What one process has written of a file.

    Attributes:
        ranges: Offset and size of each range of bytes, in the order of the file.
        sha256: The SHA-256 of these bytes, in hex.
    """

    ranges: list[tuple[int, int]]
    sha256: str


T = TypeVar("T")
Outcome: TypeAlias = T | OSError | DiskError  # what some work returned, or the error of the disk that ended it


class GatherOrRaise(Protocol):
    """Returns the outcomes of all processes, in the order of ranks. If some are errors, each process raises one."""

    def __call__(self, outcome: Outcome[T], /) -> list[T]: ...


def raise_errors(outcomes: Sequence[Outcome[T]]) -> list[T]:
    """Returns outcomes without an error; otherwise raises the first error."""
    found = []
    for outcome in outcomes:
        if isinstance(outcome, (OSError, DiskError)):
            raise outcome
        found.append(outcome)
    return found


def own_or_raise(outcome: Outcome[T]) -> list[T]:
    """Returns an outcome or raises its error, as ``write_shards`` needs it where no other process takes part."""
    return raise_errors([outcome])


def write_shards(path: Path, tensors: dict[str, Shard], is_main: bool, gather_or_raise: GatherOrRaise) -> str:
    """Writes a safetensors file together with all other processes, which must call this with the same names.

    The main process reads the file and compares it with what each process has written, because the disk of another
    machine may lose a part of it without an error.

    Args:
        path: The file.
        tensors: This process's shard of each tensor.
        is_main: Whether this process creates the file, writes its header, and reads it.
        gather_or_raise: See GatherOrRaise.

    Returns:
        The SHA-256 of the file, in hex.

    Raises:
        OSError: The disk of a process is full or fails. Each process raises it, so that none waits for another.
        DiskError: What can be read is not what was written. Each process raises it.
    """
    head, starts = header(tensors)
    # Nobody may write into a file that does not exist, or that is about to be truncated.
    created = outcome_of(partial(create, path, head, tensors)) if is_main else None
    parts = [part for part in gather_or_raise(created) if part]
    parts += gather_or_raise(outcome_of(partial(fill, path, len(head), starts, tensors)))
    found = outcome_of(partial(hash_if_written, path, parts)) if is_main else ""
    return "".join(gather_or_raise(found))


def outcome_of(work: Callable[[], T]) -> Outcome[T]:
    """Does some work on the disk, and returns what it returns, or the error of the disk that ended it."""
    try:
        with stopping.disk_work():
            return work()
    except (OSError, DiskError) as error:
        return error


def create(path: Path, head: bytes, tensors: dict[str, Shard]) -> Part:
    """Creates a file of its final size with what is in front of the data, and returns that."""
    with open(path, "wb") as file:
        file.write(head)
        file.truncate(len(head) + sum(size_of(shard) for shard in tensors.values()))
    return Part([(0, len(head))], hashlib.sha256(head).hexdigest())


def fill(path: Path, start: int, starts: dict[str, int], tensors: dict[str, Shard]) -> Part:
    """Writes this process's shards into a file that exists, and returns what it has written.

    Args:
        path: The file.
        start: The offset of the data in the file.
        starts: The offset of each tensor in the data, in the order of the file.
        tensors: The shards.
    """
    ranges, digest = list[tuple[int, int]](), hashlib.sha256()
    handle = os.open(path, os.O_WRONLY)
    try:
        for name in starts:
            if tensors[name].writes:
                content, offset = content_of(tensors[name].local), start + starts[name] + tensors[name].offset
                ranges.append((offset, len(content)))
                with hashed_meanwhile(digest, content):
                    write_at(handle, content, offset)
        os.fsync(handle)
    finally:
        os.close(handle)
    return Part(ranges, digest.hexdigest())


def write_at(handle: int, content: memoryview, offset: int) -> None:
    """Writes bytes at an offset of an open file."""
    while content:
        written = os.pwrite(handle, content[:LARGEST_WRITE], offset)
        content, offset = content[written:], offset + written


def hash_if_written(path: Path, parts: Sequence[Part]) -> str:
    """Returns the SHA-256 of a file, in hex.

    Args:
        path: The file.
        parts: What each process has written of it.

    Raises:
        DiskError: The file has something else.
    """
    whole, digests = hashlib.sha256(), [hashlib.sha256() for _ in parts]
    ranges = [(place, digest) for digest, part in zip(digests, parts, strict=True) for place in part.ranges]
    with open(path, "rb") as file:
        for (_, left), digest in sorted(ranges, key=lambda item: item[0]):
            while content := memoryview(file.read(min(left, READ_BYTES))):
                left -= len(content)
                with hashed_meanwhile(whole, content):
                    digest.update(content)
    if any(digest.hexdigest() != part.sha256 for digest, part in zip(digests, parts, strict=True)):
        raise DiskError(f"{path}: is not what was written", DISK_LOSES)
    return whole.hexdigest()


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
