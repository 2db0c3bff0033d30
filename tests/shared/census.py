"""Counts the bytes of all tensors of a process, which shows whether an engine really divides its state."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import torch


def tensor_bytes() -> int:
    """Returns the bytes of the storages of all tensors that Python knows; a storage that several share counts once."""
    gc.collect()
    tensors = (found for found in gc.get_objects() if isinstance(found, torch.Tensor) and not found.is_meta)
    storages = [tensor.untyped_storage() for tensor in tensors if type(tensor).__name__ != "DTensor"]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def report_at_saves(path: Path) -> None:
    """Makes each checkpoint append to a file how many bytes of tensors there are when it begins."""
    from cogvideox.runtime.checkpoint import Saver

    save = Saver.save

    def counted(saver: Any, step: int) -> None:
        with open(path, "a") as file:
            file.write(f"{tensor_bytes()}\n")
        save(saver, step)

    Saver.save = counted  # type: ignore[method-assign]
