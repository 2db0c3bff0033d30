"""Holds what the LoRA scripts share: finding and loading transformers, and writing files completely or not at all.

It needs diffusers, peft and safetensors, but nothing from training/.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

WEIGHTS_NAME = "pytorch_lora_weights.safetensors"  # diffusers' name
TRAINING_NAME = "cogvideox_training"  # metadata entry with the scale that this suite trained with
PREFIX = "transformer."  # diffusers' prefix of a LoRA's keys and of its metadata
# These packages, if they are installed, warn about extras that are not used here. The training scripts quiet them, too.
NOISY = ("bitsandbytes", "torchao", "torch.utils._pytree", "diffusers.quantizers.torchao.torchao_quantizer")
for noisy in NOISY:
    logging.getLogger(noisy).setLevel(logging.ERROR)
DTYPES = {"fp32": "F32", "fp16": "F16", "bf16": "BF16"}  # as safetensors names them


def transformer_folder(model: str) -> Path:
    """Returns the folder of a transformer.

    Args:
        model: Folder of a pipeline or a transformer, or a hub id, whose transformer is downloaded.

    Raises:
        ValueError: The folder exists but has no transformer, or the hub id cannot be downloaded.
    """
    for folder in (Path(model) / "transformer", Path(model)):
        if is_transformer(folder):
            return folder
    if Path(model).exists():
        raise ValueError(f"{model}: has no transformer/config.json of CogVideoX; give a pipeline, or its transformer")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(model, allow_patterns=["transformer/*"])) / "transformer"
    except (OSError, ValueError) as error:  # offline, no such repository, no access, not a hub id
        reason = str(error).partition("\n")[0]
        raise ValueError(f"{model}: no such folder, and it cannot be downloaded from the hub ({reason})") from error


def is_transformer(folder: Path) -> bool:
    """Returns whether a folder has the config of a CogVideoX transformer. Runs have a config.json of another kind."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(config, dict) and config.get("_class_name") == "CogVideoXTransformer3DModel"


def stored_dtype(folder: Path) -> str:
    """Returns the type that most tensors of a folder's safetensors files have: fp32, fp16 or bf16.

    Raises:
        ValueError: The folder has no such files, or one cannot be read.
    """
    found: Counter[str] = Counter()
    for path in folder.glob("*.safetensors"):
        found.update(dtype for dtype, _ in read_header(path).values())
    names = [name for name, stored in DTYPES.items() if found and stored == found.most_common(1)[0][0]]
    if not names:
        raise ValueError(f"{folder}: has no weights in safetensors files of fp32, fp16 or bf16")
    return names[0]


def read_header(path: Path) -> dict[str, tuple[str, list[int]]]:
    """Returns the type, such as F32, and the shape of each tensor of a safetensors file.

    Raises:
        ValueError: The file is damaged.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            return {name: (tensor.get_dtype(), tensor.get_shape()) for name, tensor in tensors.items()}
    except SafetensorError as error:
        raise ValueError(f"{path}: is not a complete safetensors file ({error})") from error


def load_transformer(folder: Path, dtype: str) -> Any:
    """Loads a transformer on the CPU, without gradients."""
    from diffusers import CogVideoXTransformer3DModel

    return CogVideoXTransformer3DModel.from_pretrained(
        folder, dtype=torch_dtype(dtype), use_safetensors=True
    ).requires_grad_(False)


def torch_dtype(name: str) -> Any:
    """Returns the torch dtype for fp32, fp16 or bf16."""
    import torch

    return {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[name]


def lora_file(given: str) -> Path:
    """Returns the path of a LoRA file, given the file or its folder.

    Raises:
        ValueError: The file does not exist, or is not a safetensors file.
    """
    path = Path(given) / WEIGHTS_NAME if Path(given).is_dir() else Path(given)
    if path.suffix != ".safetensors" or not path.is_file():
        raise ValueError(f"{given}: is neither a .safetensors file nor a folder with {WEIGHTS_NAME}")
    return path


def check_output(target: Path, inputs: Sequence[Path], folder: bool) -> None:
    """Checks before any work that the output can be written and does not replace an input or somebody else's file.

    Args:
        target: The output.
        inputs: Files and folders that are read. Links to them and other names of them count as well.
        folder: Whether the output will be a folder.

    Raises:
        ValueError: The output is one of the inputs, a folder that is not empty, of the other kind, or a file without
            the metadata that this project writes into a LoRA.
    """
    for source in inputs:
        if target.exists() and target.samefile(source):
            raise ValueError(f"{target}: is the same as the input {source}; give another output")
    if target.is_dir() and (not folder or any(target.iterdir())):
        raise ValueError(f"{target}: is a folder{' that is not empty' if folder else ''}; give another output")
    if folder and target.exists() and not target.is_dir():
        raise ValueError(f"{target}: is a file; give a new folder")
    if target.is_file() and target.stat().st_size and TRAINING_NAME not in metadata_of(target):
        rule = "has no metadata of a LoRA of this project and would be replaced"
        raise ValueError(f"{target}: {rule}; move it away, or give another output")


def metadata_of(path: Path) -> dict[str, str]:
    """Returns the metadata of a safetensors file, or {} if it has none or is another file."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            return file.metadata() or {}
    except (OSError, SafetensorError):
        return {}


def replace_by(target: Path, write: Callable[[Path], Any]) -> None:
    """Writes a file or folder under a temporary name, and renames it when it is complete.

    If the target is a symbolic link, the link is kept, and the file that it points to is replaced.

    Args:
        target: The output.
        write: Writes the output to the path that it gets.

    Raises:
        ValueError: The disk is full, fails or refuses the write. The previous output is unchanged, and no temporary
            file remains.
    """
    from safetensors import SafetensorError

    target = target.resolve()
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        write(temporary)
        fsync(temporary)
        os.replace(temporary, target)
    except (OSError, SafetensorError) as error:
        if temporary.is_dir():
            shutil.rmtree(temporary, ignore_errors=True)
        else:
            temporary.unlink(missing_ok=True)
        raise ValueError(f"{target}: cannot be written ({error}); free some space, or give another place") from error


def fsync(path: Path) -> None:
    """Flushes a file, or all files of a folder, to the disk."""
    for part in path.rglob("*") if path.is_dir() else [path]:
        if part.is_file():
            with open(part, "rb") as file:
                os.fsync(file.fileno())
