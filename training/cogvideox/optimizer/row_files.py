"""Writes and reads safetensors files whose tensors are sharded by rows over the processes of a run.

The file is an ordinary one: the rows of a tensor are one range of its bytes, so each process writes its rows where they
belong, and no process ever holds a complete tensor. The number of processes that read it may be another one. All
processes must see the same folder.

    file       | header | tensor a: rows 0-4 | rows 5-9 | tensor b: rows 0-7 | rows 8-15 |
    written by   rank 0   rank 0               rank 1     rank 0               rank 1
"""

import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

DTYPES = {
    torch.float64: "F64",
    torch.int64: "I64",
    torch.float32: "F32",
    torch.int32: "I32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
LENGTH_BYTES = 8  # of the number in front of the header; also what the start of the data is aligned to
LARGEST_WRITE = 2**30  # bytes; Linux writes at most 2 GiB at a time


@dataclass(frozen=True)
class Rows:
    """This process's rows of a tensor.

    Attributes:
        local: The rows, (rows, ...), on any device; the complete tensor if it is not sharded.
        shape: The shape of the complete tensor.
        first: The index of the first row.
        writes: Whether this process writes them. Of several processes with the same rows, one does.
    """

    local: Tensor
    shape: torch.Size
    first: int = 0
    writes: bool = True

    @property
    def offset(self) -> int:
        """The offset in bytes of the first row."""
        return self.first * self.shape[1:].numel() * self.local.element_size()


RaiseTogether = Callable[[OSError | None], None]


def raise_error(error: OSError | None) -> None:
    """Raises an error if there is one, as ``write_rows`` needs it where no other process takes part."""
    if error is not None:
        raise error


def write_rows(path: Path, tensors: dict[str, Rows], is_main: bool, raise_together: RaiseTogether) -> None:
    """Writes a safetensors file together with all other processes, which must call this with the same names.

    Args:
        path: The file.
        tensors: This process's rows of each tensor.
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


def create(path: Path, head: bytes, tensors: dict[str, Rows]) -> None:
    """Creates a file of its final size with what is in front of the data."""
    with open(path, "wb") as file:
        file.write(head)
        file.truncate(len(head) + sum(size_of(rows) for rows in tensors.values()))


def fill(path: Path, start: int, starts: dict[str, int], tensors: dict[str, Rows]) -> None:
    """Writes this process's rows into a file that exists.

    Args:
        path: The file.
        start: The offset of the data in the file.
        starts: The offset of each tensor in the data.
        tensors: The rows.
    """
    handle = os.open(path, os.O_WRONLY)
    try:
        for name, rows in tensors.items():
            if rows.writes:
                write_at(handle, rows.local, start + starts[name] + rows.offset)
        os.fsync(handle)
    finally:
        os.close(handle)


def header(tensors: dict[str, Rows]) -> tuple[bytes, dict[str, int]]:
    """Returns (the bytes in front of the data, the offset of each tensor in the data)."""
    entries, starts, end = {}, {}, 0
    for name in sorted(tensors, key=lambda name: (-tensors[name].local.element_size(), name)):  # keeps all aligned
        rows = tensors[name]
        starts[name], end = end, end + size_of(rows)
        offsets = [starts[name], end]
        entries[name] = {"dtype": DTYPES[rows.local.dtype], "shape": list(rows.shape), "data_offsets": offsets}
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % LENGTH_BYTES)
    return len(text).to_bytes(LENGTH_BYTES, "little") + text, starts


def size_of(rows: Rows) -> int:
    """Returns the bytes of a complete tensor."""
    return rows.shape.numel() * rows.local.element_size()


def write_at(handle: int, tensor: Tensor, offset: int) -> None:
    """Writes the bytes of a tensor at an offset of an open file."""
    content = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
    while content:
        written = os.pwrite(handle, content[:LARGEST_WRITE], offset)
        content, offset = content[written:], offset + written


def read_rows(path: Path, tensors: dict[str, Rows]) -> Iterator[tuple[str, Tensor]]:
    """Yields the name of each tensor of a safetensors file, and of it the rows that ``tensors`` has.

    Args:
        path: The file.
        tensors: This process's rows by name. A tensor that is not in it is yielded completely.
    """
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        for name in file.keys():  # noqa: SIM118
            rows = tensors.get(name)
            if rows is None or not rows.shape:
                yield name, file.get_tensor(name)
            else:
                yield name, file.get_slice(name)[rows.first : rows.first + len(rows.local)]
