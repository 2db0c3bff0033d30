"""Copies the files of a checkpoint to host memory, and writes them in a thread while training goes on.

    training     step N | add, add, add | step N+1 | step N+2 | ...      waits only while tensors are copied
    thread                              | write, verify, rename |         needs the time of the disk

The next optimizer step changes what a checkpoint contains, so training waits until everything is copied. What is copied
are the parts as they are stored; the thread puts them together. All copies of a run use the same memory, which a
``Reserve`` makes ready before the first one. Where that has room for only a part of the copy, the thread first writes
the originals of the other part, for which training waits. Without a copy, training waits until everything is written,
and the thread reads it back, verifies and renames it.
"""

import os
import sys
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from cogvideox.finite import not_finite
from cogvideox.memory.buffers import aligned, fill, host_buffer
from cogvideox.tensor_files import Piece, Pieces, file_order, write_tensors

CHUNK = 2**24  # elements that are copied at a time from a device, through one pinned buffer of torch
NICE = 10  # lowers the priority of the thread, because training needs the cores more
ARENA = 2**30  # bytes that are allocated at a time; a mapping for each tensor would have few huge pages
WAIT = 0.1  # seconds after which a thread that waits for an event of another one looks whether that has ended
PAGE, TOUCHED = 2**12, 2**26  # bytes of the smallest page, and of the pages that are created at a time
Address = tuple[torch.device, int, torch.dtype]


def lower_priority() -> None:
    """Lowers the priority of this thread, on Linux, where each thread has its own and its threads inherit it."""
    if sys.platform == "linux":
        with suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICE)


class Reserve:
    """Keeps host memory for copies, and creates its pages in a thread.

    The system creates a page when it is first written, which takes several times as long as copying to it.

    Attributes:
        num_bytes: The size of the memory; 0 if the system refused it.
    """

    def __init__(self, num_bytes: int) -> None:
        try:
            self._memory = host_buffer(num_bytes)
        except OSError:  # a limit of the process, such as ulimit -v
            self._memory = torch.empty(0, dtype=torch.uint8)
        self.num_bytes = self._memory.numel()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._create_pages, name="memory of checkpoints", daemon=True)
        self._thread.start()

    def _create_pages(self) -> None:
        lower_priority()
        pages = self._memory.numpy()[::PAGE]
        for start in range(0, len(pages), TOUCHED // PAGE):
            if self._ended.is_set():
                return
            pages[start : start + TOUCHED // PAGE] = 0

    def memory(self) -> Tensor:
        """Ends the thread, and returns the memory, (num_bytes,) uint8. Copying creates the pages that are missing."""
        self._ended.set()
        self._thread.join()
        return self._memory


def address_of(tensor: Tensor) -> Address:
    """Returns what tensors have in common that begin with the same elements in memory."""
    return tensor.device, tensor.data_ptr(), tensor.dtype


class Snapshot:
    """Keeps copies of tensors until the files that contain them are written.

    Attributes:
        only_copies: Happens when no original is needed any more, so that training may change them.
        not_finite: The names of the tensors written so far that contain NaN or infinity.

    Args:
        shares: Whether a tensor that is part of several files is copied once. This is wrong if its values change before
            all files have been added, as weights do that are replaced by their average.
        memory: Host memory for the copies, uint8. More is allocated if it is not enough.
        left_out: The bytes of tensors that are not copied, which are those that are written first. What is left out is
            left out of all files, so training also waits for what is written in between.
    """

    def __init__(self, shares: bool, memory: Tensor | None = None, left_out: int = 0) -> None:
        self.shares, self.left_out = shares, left_out
        self.added = 0  # tensors of files
        self.originals = 0  # tensors of files that are still to be written, up to the last one that was not copied
        self.not_copied: set[Address] = set()
        self.only_copies = threading.Event()
        self.not_finite: list[str] = []
        self.files: list[tuple[Path, Pieces, Mapping[str, str]]] = []
        # What is left of the memory, or of the newest allocation.
        self.arena = torch.empty(0, dtype=torch.uint8) if memory is None else memory
        # The original and its flat copy, by address. An original is kept so that no other tensor gets its address.
        self.copies: dict[Address, tuple[Tensor, Tensor]] = {}

    def add(self, path: Path, pieces: Pieces, metadata: Mapping[str, str]) -> None:
        """Copies the tensors of a file, with all cores. It has the arguments of ``write_tensors``."""
        self.files.append((path, {name: self._kept(pieces[name]) for name in file_order(pieces)}, metadata))

    def _kept(self, piece: Piece) -> Piece:
        """Returns a piece with copied parts, or the piece itself if it is left out."""
        self.added += 1
        parts = {address_of(part): part.nbytes for part in piece.parts}
        if self.left_out > 0 or parts.keys() & self.not_copied:
            self.left_out -= sum(size for address, size in parts.items() if address not in self.not_copied)
            self.not_copied |= parts.keys()
            self.originals = self.added
            return piece
        return replace(piece, parts=tuple(map(self._copy, piece.parts)))

    def _copy(self, part: Tensor) -> Tensor:
        """Returns a copy of a tensor in host memory."""
        source = part.reshape(-1)
        key = address_of(source)
        _, target = self.copies.get(key, (None, None))
        if target is None or target.numel() < source.numel():
            target = self._allocate(source.nbytes).view(source.dtype)
            for piece, values in zip(target.split(CHUNK), source.split(CHUNK), strict=True):
                fill(piece, values)
            if self.shares:
                self.copies[key] = source, target
        return target[: source.numel()].view(part.shape)

    def _allocate(self, num_bytes: int) -> Tensor:
        """Returns host memory, whose pages do not exist yet, so that all cores create them while they copy."""
        if self.arena.numel() < aligned(num_bytes):
            self.arena = host_buffer(max(ARENA, aligned(num_bytes)))
        memory, self.arena = self.arena[:num_bytes], self.arena[aligned(num_bytes) :]
        return memory

    def write(self) -> dict[Path, str]:
        """Writes the files, and returns the SHA-256 of each. ``not_finite`` is complete then.

        Raises:
            OSError: The disk is full or fails.
        """
        hashes = {}
        self._count(0)
        self.copies.clear()  # so that memory is free when the last file that needs it is complete
        self.arena = torch.empty(0, dtype=torch.uint8)
        while self.files:
            path, pieces, metadata = self.files.pop(0)
            checked = {
                name: replace(piece, put_together=partial(self._read, name, piece)) for name, piece in pieces.items()
            }
            hashes[path] = write_tensors(path, checked, metadata, partial(self._count, 1))
        return hashes

    def _read(self, name: str, piece: Piece, *parts: Tensor) -> Tensor:
        """Puts a tensor together, and notes whether it contains NaN or infinity."""
        tensor = piece.put_together(*parts)
        self.not_finite += not_finite({name: tensor})
        return tensor

    def _count(self, written: int) -> None:
        """Counts tensors that are written, and lets training go on after the last original."""
        self.originals -= written
        if self.originals <= 0:
            self.only_copies.set()


class Writing:
    """Runs the thread that writes a checkpoint, or the part of that for which training does not wait.

    Attributes:
        step: The step of the checkpoint.
        said: What to say about it when the thread has ended, before the seconds that this took.
    """

    def __init__(self, step: int, work: Callable[[], None], said: str = "") -> None:
        """Starts the thread.

        Args:
            step: The step of the checkpoint.
            work: What the thread does.
            said: See above.
        """
        self.step, self.work, self.said = step, work, said
        self.error: BaseException | None = None
        self.seconds = 0.0
        # It is not a daemon, so the process does not end before the checkpoint is complete.
        self.thread = threading.Thread(target=self._run, name=f"checkpoint of step {step}")
        self.thread.start()

    def _run(self) -> None:
        started = time.monotonic()
        lower_priority()
        try:
            self.work()
        except BaseException as error:
            self.error = error
        self.seconds = time.monotonic() - started

    @property
    def runs(self) -> bool:
        """Returns whether the thread has not ended yet."""
        return self.thread.is_alive()

    def wait_for(self, event: threading.Event) -> None:
        """Waits until the thread has set an event, or has ended."""
        while self.runs and not event.wait(WAIT):
            pass

    def result(self) -> float:
        """Waits for the thread, and returns the seconds that it took. Raises its error if it had one."""
        self.thread.join()
        if self.error is not None:
            raise self.error
        return self.seconds
