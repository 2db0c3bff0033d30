"""Counts the bytes of all tensors of a process, and those that it reads of checkpoints.

They show whether an engine really divides its state.
"""

from __future__ import annotations

import gc
import hashlib
import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch


def tensor_bytes() -> int:
    """Returns the bytes of the storages of all tensors that Python knows; a storage that several share counts once."""
    gc.collect()
    found = {}
    for tensor in gc.get_objects():
        if type(tensor) in (torch.Tensor, torch.nn.Parameter) and not tensor.is_meta:  # a DTensor contains another one
            with suppress(NotImplementedError):  # what the compiler leaves has no storage
                found[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
    return sum(found.values())


def report_at_saves(path: Path) -> None:
    """Makes each checkpoint append to a file how many bytes of tensors there are when it begins."""
    from cogvideox.runtime.checkpoint import Saver

    save = Saver.save

    def counted(saver: Any, step: int) -> None:
        with open(path, "a") as file:
            file.write(f"{tensor_bytes()}\n")
        save(saver, step)

    Saver.save = counted  # type: ignore[assignment, method-assign]


def report_reads(path: Path) -> None:
    """Makes this process append to a file the bytes of all files that it hashes, and of all shards that it loads."""
    from cogvideox.optimizer import engine

    digest, read = hashlib.file_digest, engine.read_shards

    def report(source: object, count: int) -> None:
        with open(path, "a") as file:
            file.write(f"{count} {source}\n")

    def hashed(source: Any, *arguments: Any) -> Any:
        report(source.name, os.fstat(source.fileno()).st_size)
        return digest(source, *arguments)

    def loaded(source: Path, shards: Any) -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in read(source, shards):
            report(source, tensor.nbytes)
            yield name, tensor

    hashlib.file_digest = hashed  # type: ignore[assignment]
    engine.read_shards = loaded  # type: ignore[assignment]
