"""Copies the files of a checkpoint to host memory, and writes them in a thread while training goes on.

    training     step N | add, add, add | step N+1 | step N+2 | ...      waits only while tensors are copied
    thread                              | not_finite, write, rename |    needs the time of the disk

The next optimizer step changes what a checkpoint contains, so training waits until everything is copied.
"""

import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from cogvideox.finite import not_finite
from cogvideox.memory.streaming import Layout, fill, host_buffer
from cogvideox.tensor_files import Piece, Pieces, ReadPieces, pieces_of, write_tensors

CHUNK = 2**24  # elements that are copied at a time from a device, through one pinned buffer of torch


class Snapshot:
    """Keeps copies of tensors until their files are written. The memory of a file is freed when it is complete."""

    def __init__(self) -> None:
        self.files: list[tuple[Path, dict[str, Piece], Mapping[str, str]]] = []

    def add(self, path: Path, pieces: Pieces, metadata: Mapping[str, str]) -> None:
        """Copies the tensors of a file, with all cores. It has the arguments of ``write_tensors``."""
        layout = Layout([torch.empty(piece.shape, dtype=piece.dtype, device="meta") for piece in pieces.values()])
        copies = dict(zip(pieces, layout.views(host_buffer(layout.num_bytes)), strict=True))
        for name, piece in pieces.items():
            source = piece.read().reshape(-1)
            for part, values in zip(copies[name].view(-1).split(CHUNK), source.split(CHUNK), strict=True):
                fill(part, values)
        self.files.append((path, pieces_of(copies), metadata))

    def not_finite(self) -> list[str]:
        """Returns the names of the tensors that contain NaN or infinity."""
        return [bad for _, pieces, _ in self.files for bad in not_finite(ReadPieces(pieces))]

    def write(self) -> dict[Path, str]:
        """Writes the files, and returns the SHA-256 of each.

        Raises:
            OSError: The disk is full or fails.
        """
        hashes = {}
        while self.files:
            path, pieces, metadata = self.files.pop(0)
            hashes[path] = write_tensors(path, pieces, metadata)
        return hashes


class Writing:
    """Runs the thread that writes a checkpoint.

    Attributes:
        step: The step of the checkpoint.
        waited: Seconds for which training waited, while the checkpoint was copied.
    """

    def __init__(self, step: int, waited: float, work: Callable[[], None]) -> None:
        """Starts the thread.

        Args:
            step: The step of the checkpoint.
            waited: Seconds for which training waited.
            work: What the thread does.
        """
        self.step, self.waited, self.work = step, waited, work
        self.error: BaseException | None = None
        self.seconds = 0.0
        # It is not a daemon, so the process does not end before the checkpoint is complete.
        self.thread = threading.Thread(target=self._run, name=f"checkpoint of step {step}")
        self.thread.start()

    def _run(self) -> None:
        started = time.monotonic()
        try:
            self.work()
        except BaseException as error:
            self.error = error
        self.seconds = time.monotonic() - started

    @property
    def runs(self) -> bool:
        """Returns whether the thread has not ended yet."""
        return self.thread.is_alive()

    def result(self) -> float:
        """Waits for the thread, and returns the seconds that it took. Raises its error if it had one."""
        self.thread.join()
        if self.error is not None:
            raise self.error
        return self.seconds
