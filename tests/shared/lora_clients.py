"""Imitates programs that load a LoRA file, from the key rules of their sources. No code of theirs is here.

The CogVideoX of ComfyUI: comfy/ldm/cogvideo/model.py names the layers, comfy/lora.py (model_lora_keys_unet, load_lora)
finds their tensors in a file, and comfy/weight_adapter/lora.py adds them to the weights. ComfyUI-CogVideoXWrapper:
model_loading.py gives files with lora_B to diffusers, and others to merge_lora of lora_utils.py, which VideoX-Fun has
as well.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

# diffusers' names of weights, and what ComfyUI calls these parts of them
RENAMED_IN_COMFYUI = (
    (r"^transformer_blocks\.", "blocks."),
    (r"\.attn1\.to_out\.0\.", ".attn_out."),
    (r"\.attn1\.to_([qkv])\.", r".\1."),
    (r"\.attn1\.norm_([qk])\.", r".norm_\1."),
    (r"\.ff\.net\.0\.proj\.", ".ff_proj."),
    (r"\.ff\.net\.2\.", ".ff_out."),
    (r"^(time|ofs)_embedding\.linear_", r"\1_embedding_linear_"),
)


def comfyui_name(name: str) -> str:
    """Returns ComfyUI's name of a weight of diffusers' transformer."""
    for pattern, new in RENAMED_IN_COMFYUI:
        name = re.sub(pattern, new, name)
    return f"diffusion_model.{name}"


def merge_in_comfyui(transformer: Any, file: Path, strength: float = 1.0) -> list[str]:
    """Adds a LoRA file to the weights of a transformer as ComfyUI does; returns the keys that it would not load."""
    lora = load_file(file)
    used: set[str] = set()
    for name, weight in transformer.state_dict().items():
        theirs = comfyui_name(name)
        if not theirs.endswith(".weight"):
            continue
        generic = theirs.removesuffix(".weight")
        for key in (f"lora_unet_{generic.removeprefix('diffusion_model.').replace('.', '_')}", generic):
            for up, down in (("lora_up.weight", "lora_down.weight"), ("lora_B.weight", "lora_A.weight")):
                if f"{key}.{up}" in lora:
                    weight += strength * change(lora, key, up, down).reshape(weight.shape)
                    used |= {f"{key}.{up}", f"{key}.{down}", f"{key}.alpha"}
    return sorted(lora.keys() - used)


def change(lora: dict[str, Tensor], key: str, up: str, down: str) -> Tensor:
    """Returns alpha / rank * up @ down of a layer; without alpha, the scale is 1."""
    matrix_up, matrix_down = lora[f"{key}.{up}"], lora[f"{key}.{down}"]
    scale = lora[f"{key}.alpha"].item() / len(matrix_down) if f"{key}.alpha" in lora else 1.0
    return scale * matrix_up @ matrix_down


def load_in_wrapper(pipeline: Any, file: Path, strength: float = 1.0, fuse: bool = False) -> None:
    """Loads a LoRA file into a pipeline as ComfyUI-CogVideoXWrapper does."""
    ranks = [tensor.shape[1] for key, tensor in load_file(file).items() if "lora_B" in key]
    if not ranks:
        merge_by_walking(pipeline.transformer, file, strength)
        return
    name = file.name.split(".")[0]
    pipeline.load_lora_weights(str(file), weight_name=file.name, lora_rank=ranks[0], adapter_name=name)
    pipeline.set_adapters([name], adapter_weights=[strength])
    if fuse:
        pipeline.fuse_lora(lora_scale=1, components=["transformer"])
        pipeline.delete_adapters([name])


def merge_by_walking(transformer: Any, file: Path, strength: float = 1.0) -> None:
    """Adds a LoRA file to the weights as merge_lora does, which finds a layer by walking down the tree of modules."""
    lora = load_file(file)
    for key in {key.split(".", 1)[0] for key in lora}:
        layer = walk(transformer, iter(key.split("lora_unet_")[-1].split("_")))
        layer.weight.data += strength * change(lora, key, "lora_up.weight", "lora_down.weight")


def walk(module: nn.Module, parts: Iterator[str]) -> Any:
    """Returns the module that the parts of a name lead to. At each step, the shortest name of a child is taken."""
    name = ""
    for part in parts:
        name = f"{name}_{part}".lstrip("_")
        if name in dict(module.named_children()):
            module, name = module.get_submodule(name), ""
    if name:
        raise KeyError(f"no layer {name}")
    return module


@torch.no_grad()
def merged_by_diffusers(pipeline: Any, folder: Path, strength: float = 1.0) -> dict[str, Tensor]:
    """Returns the weights into which diffusers has merged a LoRA."""
    pipeline.load_lora_weights(str(folder), adapter_name="merged")
    pipeline.fuse_lora(components=["transformer"], lora_scale=strength)
    pipeline.unload_lora_weights()
    weights: dict[str, Tensor] = pipeline.transformer.state_dict()
    return weights
