"""Writes a transformer whose weights are sharded over the processes as a folder that from_pretrained reads.

Each process writes its own shards (shard_files.py), so no process ever holds the complete weights.
"""

import json
from collections.abc import Iterable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from cogvideox.model.methods import empty_transformer
from cogvideox.optimizer.shard_files import RaiseTogether, Shard, error_of, write_shards

LARGEST_FILE = 5 * 10**9  # bytes, as save_pretrained is called for other engines


def write_model(
    transformer: Any,
    weights: dict[str, Shard],
    dtype: torch.dtype,
    folder: Path,
    is_main: bool,
    raise_together: RaiseTogether,
) -> None:
    """Writes a transformer together with all other processes.

    Args:
        transformer: The transformer, for its config and buffers.
        weights: This process's shards of all its parameters.
        dtype: The type in which they are written.
        folder: The folder, which does not exist yet.
        is_main: Whether this process creates the files.
        raise_together: As for ``write_shards``.

    Raises:
        OSError: The disk of a process is full or fails. Each process raises it.
    """
    buffers = {name: Shard(tensor, tensor.shape, writes=is_main) for name, tensor in transformer.named_buffers()}
    sizes = {
        name: weights[name].shape.numel() * dtype.itemsize if name in weights else buffers[name].local.nbytes
        for name in empty_transformer(transformer).state_dict()
    }
    files = file_names(list(groups_of(sizes)))
    raise_together(error_of(partial(create_folder, transformer, folder, files, sizes)) if is_main else None)
    for file, names in files.items():
        # One file after another, because the shards of all would be another copy of the weights in this type.
        own = {n: replace(weights[n], local=weights[n].local.to(dtype)) for n in names if n in weights}
        write_shards(folder / file, own | {n: buffers[n] for n in names if n not in own}, is_main, raise_together)


def groups_of(sizes: dict[str, int]) -> Iterable[list[str]]:
    """Yields the names of the tensors of each file, in order; a file has at most LARGEST_FILE bytes if possible."""
    group: list[str] = []
    for name, size in sizes.items():
        if group and sum(sizes[other] for other in group) + size > LARGEST_FILE:
            yield group
            group = []
        group.append(name)
    yield group


def file_names(groups: list[list[str]]) -> dict[str, list[str]]:
    """Returns the names of the tensors of each file by the name that diffusers gives the file."""
    from diffusers.utils import SAFETENSORS_WEIGHTS_NAME

    if len(groups) == 1:
        return {SAFETENSORS_WEIGHTS_NAME: groups[0]}
    stem, suffix = SAFETENSORS_WEIGHTS_NAME.rsplit(".", 1)
    return {f"{stem}-{i:05}-of-{len(groups):05}.{suffix}": group for i, group in enumerate(groups, 1)}


def create_folder(transformer: Any, folder: Path, files: dict[str, list[str]], sizes: dict[str, int]) -> None:
    """Creates the folder with the config and, if there are several files, their index."""
    from diffusers.utils import SAFE_WEIGHTS_INDEX_NAME

    folder.mkdir()
    transformer.save_config(folder)
    if len(files) > 1:
        weight_map = {name: file for file, names in files.items() for name in names}
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
        (folder / SAFE_WEIGHTS_INDEX_NAME).write_text(json.dumps(index, indent=2, sort_keys=True))
