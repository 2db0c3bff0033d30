"""Detects video files that were joined end to end, by the structure of the container.

``second_file`` returns the byte at which a second file begins. FFmpeg reads only the first part of such mp4, flv and
wmv files, and reads both parts of avi and gif files as one clip. Containers that store times are not handled here,
because there the timestamps start again, which packets.py notices.
"""

import mmap
import os
import struct
from collections.abc import Callable
from typing import BinaryIO

_ASF_HEADER = bytes.fromhex("3026b2758e66cf11a6d900aa0062ce6c")


def second_file(path: str | os.PathLike[str], container: str) -> int | None:
    """Returns the offset in bytes at which a second file begins inside a file.

    Args:
        path: The file.
        container: FFmpeg's name of its format, which may be several names separated by commas.

    Returns:
        The offset, or None if there is no second file or the format is not handled here.
    """
    find = next((find for name, find in _FINDERS.items() if name in container.split(",")), None)
    if find is None:
        return None
    with open(path, "rb") as file:
        return find(file)


def _second_mp4(file: BinaryIO) -> int | None:
    """Finds the second "ftyp" box, which begins a file. Each box begins with its length and its type."""

    def box(head: bytes) -> tuple[bytes, int]:
        size, kind, long_size = struct.unpack(">I4sQ", head)
        return kind, long_size if size == 1 else size

    return _second_part(file, box, b"ftyp")


def _second_avi(file: BinaryIO) -> int | None:
    """Finds the second "RIFF AVI " part, which begins a file. Further parts of a large file have another name."""

    def part(head: bytes) -> tuple[bytes, int]:
        mark, size, kind = struct.unpack("<4sI4s4x", head)
        return mark + kind, 8 + size + size % 2

    return _second_part(file, part, b"RIFFAVI ")


def _second_asf(file: BinaryIO) -> int | None:
    """Finds the second header object. Each object begins with its kind and its length."""
    return _second_part(file, lambda head: (head[:16], struct.unpack_from("<Q", head, 16)[0]), _ASF_HEADER, 24)


def _second_part(
    file: BinaryIO, read_head: Callable[[bytes], tuple[bytes, int]], first_kind: bytes, num_bytes: int = 16
) -> int | None:
    """Returns where the second part of a kind begins, in a file of parts with a header of kind and length.

    Args:
        file: The open file.
        read_head: Returns the kind and the length in bytes of a part from its first bytes.
        first_kind: The kind of part that begins a file.
        num_bytes: How many bytes ``read_head`` needs.
    """
    at, num_found = 0, 0
    while len(head := _bytes_at(file, at, num_bytes)) == num_bytes:
        kind, size = read_head(head)
        num_found += kind == first_kind
        if num_found == 2:
            return at
        if size < 8:
            return None
        at += size
    return None


def _second_flv(file: BinaryIO) -> int | None:
    """Finds an flv header after the tags of the first file. Each tag ends with its length."""
    at = 13
    while len(head := _bytes_at(file, at, 4)) == 4:
        if head[:3] == b"FLV":
            return at
        at += 11 + int.from_bytes(head[1:], "big") + 4
    return None


def _second_gif(file: BinaryIO) -> int | None:
    """Finds a gif header right after the end of a last block."""
    if not os.fstat(file.fileno()).st_size:
        return None
    with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        found = data.find(b"\0;GIF8")
    return found + 2 if found >= 0 else None


def _bytes_at(file: BinaryIO, at: int, count: int) -> bytes:
    file.seek(min(at, 1 << 62))
    return file.read(count)


_FINDERS: dict[str, Callable[[BinaryIO], int | None]] = {
    "mov": _second_mp4,
    "avi": _second_avi,
    "asf": _second_asf,
    "flv": _second_flv,
    "gif": _second_gif,
}
