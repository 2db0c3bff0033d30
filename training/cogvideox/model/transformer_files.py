"""Divides the weights of a transformer into the files of a folder that from_pretrained reads, as diffusers does."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

LARGEST_FILE = 5 * 10**9  # bytes; what users of diffusers usually give to save_pretrained


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

    folder.mkdir(parents=True)
    transformer.save_config(folder)
    if len(files) > 1:
        weight_map = {name: file for file, names in files.items() for name in names}
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
        (folder / SAFE_WEIGHTS_INDEX_NAME).write_text(json.dumps(index, indent=2, sort_keys=True))
