"""Writes a transformer whose weights are sharded over the processes as a folder that from_pretrained reads.

Each process writes its own shards (shard_files.py), so no process ever holds the complete weights.
"""

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from cogvideox.model.methods import empty_transformer
from cogvideox.model.transformer_files import create_folder, file_names, groups_of
from cogvideox.optimizer.shard_files import GatherOrRaise, Shard, outcome_of, write_shards


def write_model(
    transformer: Any,
    weights: dict[str, Shard],
    dtype: torch.dtype,
    folder: Path,
    is_main: bool,
    gather_or_raise: GatherOrRaise,
) -> dict[Path, str]:
    """Writes a transformer together with all other processes.

    Args:
        transformer: The transformer, for its config and buffers.
        weights: This process's shards of all its parameters.
        dtype: The type in which they are written.
        folder: The folder, which does not exist yet.
        is_main: Whether this process creates the files.
        gather_or_raise: As for ``write_shards``.

    Returns:
        The SHA-256 of each file with weights, in hex.

    Raises:
        OSError: The disk of a process is full or fails. Each process raises it.
        DiskError: What can be read is not what was written. Each process raises it.
    """
    buffers = {name: Shard(tensor, tensor.shape, writes=is_main) for name, tensor in transformer.named_buffers()}
    sizes = {
        name: weights[name].shape.numel() * dtype.itemsize if name in weights else buffers[name].local.nbytes
        for name in empty_transformer(transformer).state_dict()
    }
    files = file_names(list(groups_of(sizes)))
    gather_or_raise(outcome_of(partial(create_folder, transformer, folder, files, sizes)) if is_main else None)
    hashes = {}
    for file, names in files.items():
        # One file after another, because the shards of all would be another copy of the weights in this type.
        own = {n: replace(weights[n], local=weights[n].local.to(dtype)) for n in names if n in weights}
        shards = own | {n: buffers[n] for n in names if n not in own}
        hashes[folder / file] = write_shards(folder / file, shards, is_main, gather_or_raise)
    return hashes
