"""Writes safetensors files tensor by tensor, so that at most one tensor exists twice.

    file   | header: name, type, shape and place of each tensor | tensor | tensor | ...

``write_tensors`` needs only shapes and types before it writes, so a ``Piece`` may compute its tensor, or copy it from a
device, when its turn comes.
"""

import ctypes
import hashlib
import json
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import torch
from safetensors import safe_open
from torch import Tensor

from cogvideox import stopping

DTYPES = {
    torch.float64: "F64",
    torch.int64: "I64",
    torch.float32: "F32",
    torch.int32: "I32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
LENGTH_BYTES = 8  # of the number in front of the header; also what the start of the data is aligned to


class Described(Protocol):
    """What has the shape and the type of a tensor: a Tensor, a Piece, or a Shard."""

    @property
    def shape(self) -> torch.Size:
        """The shape of the complete tensor."""

    @property
    def dtype(self) -> torch.dtype:
        """The type of its elements."""


@dataclass(frozen=True)
class Piece:
    """A tensor of a file that is put together from its parts only when it is written.

    Attributes:
        shape: Its shape.
        dtype: Its type.
        parts: The tensors from which it is made, on any device. The next optimizer step changes them.
        put_together: Makes it from the parts, or from copies of them, and reads nothing else that a step changes.
    """

    shape: torch.Size
    dtype: torch.dtype
    parts: tuple[Tensor, ...]
    put_together: Callable[..., Tensor]

    def read(self) -> Tensor:
        """Returns the tensor, on any device."""
        return self.put_together(*self.parts)


class ReadPieces(Mapping[str, Tensor]):
    """Gives the tensors of pieces by name, and reads each one only when it is asked for.

    Args:
        pieces: The pieces by the names of the tensors.
    """

    def __init__(self, pieces: Mapping[str, Piece]) -> None:
        self.pieces = pieces

    def __getitem__(self, name: str) -> Tensor:
        """Reads a tensor."""
        return self.pieces[name].read()

    def __iter__(self) -> Iterator[str]:
        """Returns the names."""
        return iter(self.pieces)

    def __len__(self) -> int:
        """Returns the number of tensors."""
        return len(self.pieces)


Pieces = Mapping[str, Piece]  # by the names of the tensors in the file
# Writes a file of these tensors and metadata, now or later; ``write_tensors`` is one.
WriteTensors = Callable[[Path, Pieces, Mapping[str, str]], object]


def pieces_of(tensors: Mapping[str, Tensor]) -> dict[str, Piece]:
    """Returns tensors that exist already as pieces of a file."""
    return {name: Piece(t.shape, t.dtype, (t.detach(),), Tensor.detach) for name, t in tensors.items()}


def size_of(tensor: Described) -> int:
    """Returns the bytes of a complete tensor."""
    return tensor.shape.numel() * tensor.dtype.itemsize


def file_order(tensors: Mapping[str, Described]) -> list[str]:
    """Returns the names of tensors in the order in which a file has them, which keeps all of them aligned."""
    return sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))


def header(tensors: Mapping[str, Described], metadata: Mapping[str, str] | None = None) -> tuple[bytes, dict[str, int]]:
    """Returns (the bytes in front of the data, the offset in the data of each tensor, in the order of the file)."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"} | dict(metadata or {})}  # as save_pretrained writes it
    starts, end = {}, 0
    for name in file_order(tensors):
        tensor = tensors[name]
        starts[name], end = end, end + size_of(tensor)
        offsets = [starts[name], end]
        entries[name] = {"dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": offsets}
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % LENGTH_BYTES)
    return len(text).to_bytes(LENGTH_BYTES, "little") + text, starts


def shapes_in(path: Path) -> dict[str, torch.Size]:
    """Returns the shapes of the tensors in a file by name, from its header."""
    with safe_open(path, "pt") as file:
        return {name: torch.Size(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118


def content_of(tensor: Tensor) -> memoryview:
    """Returns the bytes of a tensor, in host memory.

    Tensor.numpy is not used, because torch refuses to resize the memory of a tensor after that call. FSDP2 frees
    gathered weights by resizing their memory to zero.
    """
    whole = tensor.detach().cpu().contiguous()
    memory = (ctypes.c_ubyte * whole.nbytes).from_address(whole.data_ptr())
    memory.owner = whole  # type: ignore[attr-defined]  # so that the memory exists as long as the view
    return memoryview(memory).cast("B")


def write_tensors(
    path: Path,
    pieces: Pieces,
    metadata: Mapping[str, str] | None = None,
    written: Callable[[], None] = lambda: None,
) -> str:
    """Writes a safetensors file, and returns the SHA-256 of what was to be written, in hex.

    Args:
        path: The file.
        pieces: Its tensors.
        metadata: Texts by name, for the header.
        written: Called after each tensor.

    Raises:
        OSError: The disk is full or fails; the file is incomplete.
    """
    head, starts = header(pieces, metadata)
    digest = hashlib.sha256(head)
    with stopping.disk_work(), open(path, "wb") as file:
        file.write(head)
        for name in starts:
            write_hashed(file, content_of(pieces[name].read()), digest)
            written()
    return digest.hexdigest()


def write_hashed(file: BinaryIO, content: memoryview, digest: "hashlib._Hash") -> None:
    """Writes to a file and adds the content to a hash. Reading the file again for its hash would take as long."""
    with hashed_meanwhile(digest, content):
        file.write(content)


@contextmanager
def hashed_meanwhile(digest: "hashlib._Hash", content: memoryview) -> Iterator[None]:
    """Adds content to a hash at the same time as the context writes or hashes it; neither holds Python."""
    hashing = threading.Thread(target=digest.update, args=(content,))
    hashing.start()
    try:
        yield
    finally:
        hashing.join()
