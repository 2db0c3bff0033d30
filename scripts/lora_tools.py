"""What the LoRA scripts share: the transformer of a model, and files that are whole or not there.

Needs diffusers, peft and safetensors, and nothing of training/.
"""

from __future__ import annotations

import json
import os
import shutil
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

WEIGHTS_NAME = "pytorch_lora_weights.safetensors"  # diffusers' name
PREFIX = "transformer."  # diffusers' prefix of a LoRA's keys and of its metadata
DTYPES = {"fp32": "F32", "fp16": "F16", "bf16": "BF16"}  # as the header of a safetensors file says it


def transformer_folder(model: str) -> Path:
    """The folder of a transformer's config.json: in a pipeline's folder, itself, or downloaded.

    Raises:
        ValueError: a folder is there, but holds none.
    """
    for folder in (Path(model) / "transformer", Path(model)):
        if (folder / "config.json").is_file():
            return folder
    if Path(model).exists():
        raise ValueError(f"{model}: has no transformer/config.json; give a CogVideoX pipeline, or its transformer")
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(model, allow_patterns=["transformer/*"])) / "transformer"


def stored_dtype(folder: Path) -> str:
    """fp32, fp16 or bf16: what most tensors of a folder's safetensors files are.

    Raises:
        ValueError: it has no such files.
    """
    found: Counter[str] = Counter()
    for path in folder.glob("*.safetensors"):
        with open(path, "rb") as file:
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        found.update(entry["dtype"] for name, entry in header.items() if name != "__metadata__")
    names = [name for name, stored in DTYPES.items() if found and stored == found.most_common(1)[0][0]]
    if not names:
        raise ValueError(f"{folder}: has no weights in safetensors files of fp32, fp16 or bf16")
    return names[0]


def load_transformer(folder: Path, dtype: str) -> Any:
    """A transformer on the CPU."""
    from diffusers import CogVideoXTransformer3DModel

    return CogVideoXTransformer3DModel.from_pretrained(
        folder, dtype=torch_dtype(dtype), use_safetensors=True
    ).requires_grad_(False)


def torch_dtype(name: str) -> Any:
    """torch's type of fp32, fp16 or bf16."""
    import torch

    return {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[name]


def lora_file(given: str) -> Path:
    """A LoRA's file: itself, or the one in a folder.

    Raises:
        ValueError: there is none, or it is no safetensors file.
    """
    path = Path(given) / WEIGHTS_NAME if Path(given).is_dir() else Path(given)
    if path.suffix != ".safetensors" or not path.is_file():
        raise ValueError(f"{given}: is no .safetensors file and no folder with {WEIGHTS_NAME}")
    return path


def check_output(target: Path, inputs: Sequence[Path], folder: bool) -> None:
    """Refuses an output, before any work, that would replace what is read, or that cannot be written.

    Args:
        target: what is going to be written.
        inputs: files and folders that are read; links to them, and other names of them, count as well.
        folder: whether the target is to be a folder.

    Raises:
        ValueError: the output is one of the inputs, a folder with something in it, or a file where a folder is to be.
    """
    for source in inputs:
        if target.exists() and target.samefile(source):
            raise ValueError(f"{target}: is the same as the input {source}; give another output")
    if target.is_dir() and (not folder or any(target.iterdir())):
        raise ValueError(f"{target}: is a folder{' that is not empty' if folder else ''}; give another output")
    if folder and target.exists() and not target.is_dir():
        raise ValueError(f"{target}: is a file; give a new folder")


def replace_by(target: Path, write: Callable[[Path], Any]) -> None:
    """Lets ``write`` make a file or folder under another name, and gives it its own name once it is whole.

    A target that is a link stays one: what it leads to is written.

    Raises:
        ValueError: the disk is full, fails or refuses; what was there is as it was, and nothing else is left.
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
    """Makes the disk have a file, or all files of a folder."""
    for part in path.rglob("*") if path.is_dir() else [path]:
        if part.is_file():
            with open(part, "rb") as file:
                os.fsync(file.fileno())
