"""Renames the tensors of a LoRA from diffusers' names to those of other programs, and back.

    python scripts/convert_lora.py my-lora my-lora/comfyui.safetensors --to comfyui
    python scripts/convert_lora.py my-lora/comfyui.safetensors my-lora-again --to diffusers

diffusers:  transformer.LAYER.lora_A.weight and lora_B.weight; rank and alpha as JSON in the file's metadata.
comfyui:    lora_unet_LAYER.lora_down.weight, lora_up.weight and alpha (a number; scale = alpha / rank), with _ in place
            of each dot of LAYER, for the CogVideoX that is part of ComfyUI. It calls the layers of a block by other
            names: blocks.0.q is transformer_blocks.0.attn1.to_q. Sources: ComfyUI's comfy/lora.py
            (model_lora_keys_unet), comfy/weight_adapter/lora.py and comfy/ldm/cogvideo/model.py.
videox-fun: the same with diffusers' names of layers. Source: lora_utils.py (merge_lora) of VideoX-Fun.

kijai's ComfyUI-CogVideoXWrapper reads diffusers' file as it is (model_loading.py calls load_lora_weights), and that of
videox-fun. Converting there and back gives the same bits. DoRA cannot be converted: ComfyUI divides by the norms of
other matrices than PEFT does, so merge it with scripts/merge_lora.py.
"""

from __future__ import annotations

import argparse
import json
import math
import re
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from lora_tools import PREFIX, TRAINING_NAME, WEIGHTS_NAME, check_output, lora_file, replace_by

FLAT_PREFIX = "lora_unet_"
CONFIG_NAME = "lora_adapter_metadata"
PARTS = {"lora_A.weight": "lora_down.weight", "lora_B.weight": "lora_up.weight"}
# All linear layers of CogVideoX 1.0 and 1.5. A name in which _ replaces the dots does not tell where the dots were.
IN_BLOCKS = {  # diffusers' names in a block, and those of the CogVideoX in ComfyUI
    "attn1.to_q": "q",
    "attn1.to_k": "k",
    "attn1.to_v": "v",
    "attn1.to_out.0": "attn_out",
    "ff.net.0.proj": "ff_proj",
    "ff.net.2": "ff_out",
    "norm1.linear": "norm1.linear",
    "norm2.linear": "norm2.linear",
}
ELSEWHERE = (
    *("patch_embed.proj", "patch_embed.text_proj", "time_embedding.linear_1", "time_embedding.linear_2"),
    *("ofs_embedding.linear_1", "ofs_embedding.linear_2", "norm_out.linear", "proj_out"),
)
Tensors = dict[str, Any]


def build_parser() -> argparse.ArgumentParser:
    """Returns the parser of the flags."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("input", help=f"safetensors file, or a folder with {WEIGHTS_NAME}")
    parser.add_argument(
        "output", type=Path, help=f"file to write; a name without .safetensors is a folder for {WEIGHTS_NAME}"
    )
    parser.add_argument(
        "--to", required=True, choices=("comfyui", "videox-fun", "diffusers"), help="names of the output"
    )
    return parser


def flattened(layer: str, target: str) -> str:
    """Returns the name that a target ("comfyui" or "videox-fun") has for a layer of diffusers, with _ for each dot.

    Raises:
        ValueError: CogVideoX has no layer of this name.
    """
    match = re.fullmatch(r"transformer_blocks\.(\d+)\.(.+)", layer)
    if (match[2] if match else layer) not in (IN_BLOCKS if match else ELSEWHERE):
        raise ValueError(f"{layer}: is not a linear layer of CogVideoX")
    if match and target == "comfyui":
        layer = f"blocks.{match[1]}.{IN_BLOCKS[match[2]]}"
    return layer.replace(".", "_")


def dotted(flat: str) -> str:
    """Returns diffusers' name of the layer for which ``flattened`` returns a name, whatever its target.

    Raises:
        ValueError: CogVideoX has no layer of this name.
    """
    match = re.fullmatch(r"(transformer_)?blocks_(\d+)_(\w+)", flat)
    prefix = f"transformer_blocks.{match[2]}." if match else ""
    target = "videox-fun" if match is None or match[1] else "comfyui"
    for layer in (prefix + name for name in (IN_BLOCKS if match else ELSEWHERE)):
        if flattened(layer, target) == flat:
            return layer
    raise ValueError(f"{FLAT_PREFIX}{flat}: is not a linear layer of CogVideoX")


def by_pattern(layer: str, patterns: dict[str, Any], otherwise: Any) -> Any:
    """Returns PEFT's value for a layer: that of the first pattern that matches the end of its name."""
    return next((v for p, v in patterns.items() if re.fullmatch(rf"(.*\.)?({p})", layer)), otherwise)


def alpha_of(layer: str, rank: int, config: dict[str, Any]) -> float:
    """Returns the alpha for which alpha / rank is the scale in PEFT's config; without a config, the rank."""
    if not config:
        return float(rank)
    alpha = by_pattern(layer, config.get("alpha_pattern") or {}, config.get("lora_alpha", rank))
    return float(alpha * math.sqrt(rank) if config.get("use_rslora") else alpha)


def config_of(metadata: dict[str, str]) -> dict[str, Any]:
    """Returns the fields of PEFT's config from a file's metadata, without their prefix."""
    fields = json.loads(metadata.get(CONFIG_NAME, "{}"))
    return {name.removeprefix(PREFIX): value for name, value in fields.items()}


def from_diffusers(tensors: Tensors, metadata: dict[str, str], target: str) -> tuple[Tensors, dict[str, str]]:
    """Returns (tensors, metadata) with the names of a target, "comfyui" or "videox-fun".

    The metadata is unchanged, so that the file can be converted back.

    Raises:
        ValueError: A tensor is not part of a plain LoRA, or CogVideoX does not have its layer.
    """
    import torch

    config, made = config_of(metadata), {}
    for key, tensor in tensors.items():
        match = re.fullmatch(rf"{re.escape(PREFIX)}(.+)\.(lora_[AB]\.weight)", key)
        if match is None:
            dora = (
                "ComfyUI computes DoRA differently; merge it with scripts/merge_lora.py, and for a LoRA of the change, "
                "give the result to scripts/extract_lora.py"
            )
            raise ValueError(
                f"{key}: {dora if 'magnitude' in key else f'is not of the form {PREFIX}LAYER.lora_A.weight'}"
            )
        layer = f"{FLAT_PREFIX}{flattened(match[1], target)}"
        made[f"{layer}.{PARTS[match[2]]}"] = tensor
        if match[2].startswith("lora_A"):
            made[f"{layer}.alpha"] = torch.tensor(alpha_of(match[1], len(tensor), config))
    return made, metadata


def to_diffusers(tensors: Tensors, metadata: dict[str, str]) -> tuple[Tensors, dict[str, str]]:
    """Returns (tensors, metadata) with diffusers' names.

    Raises:
        ValueError: A tensor is not part of a plain LoRA for CogVideoX in the names of "comfyui" or "videox-fun".
    """
    back, made, alphas, ranks = {new: old for old, new in PARTS.items()}, {}, {}, {}
    for key, tensor in tensors.items():
        match = re.fullmatch(rf"{FLAT_PREFIX}(\w+)\.(lora_down\.weight|lora_up\.weight|alpha)", key)
        if match is None:
            raise ValueError(f"{key}: is not of the form {FLAT_PREFIX}LAYER.lora_down.weight, lora_up.weight or alpha")
        layer = dotted(match[1])
        if match[2] == "alpha":
            alphas[layer] = tensor.item()
        else:
            made[f"{PREFIX}{layer}.{back[match[2]]}"] = tensor
        if match[2] == "lora_down.weight":
            ranks[layer] = len(tensor)
    return made, with_config(metadata, ranks, alphas)


def with_config(metadata: dict[str, str], ranks: dict[str, int], alphas: dict[str, float]) -> dict[str, str]:
    """Returns metadata with which diffusers scales each layer by alpha / rank.

    Metadata that already does so is returned unchanged. If another program has changed the scales, the entry about the
    training is dropped.
    """
    import torch

    config = config_of(metadata)
    wanted = {layer: alphas.get(layer, float(rank)) for layer, rank in ranks.items()}
    stated = {layer: torch.tensor(alpha_of(layer, rank, config)).item() for layer, rank in ranks.items()}
    if stated == wanted:
        return metadata
    rank, alpha = max(ranks.values()), max(wanted.values())
    fields: dict[str, Any] = {"peft_type": "LORA", "r": rank, "lora_alpha": alpha, "target_modules": sorted(ranks)}
    fields["rank_pattern"] = {f"^{re.escape(layer)}": r for layer, r in ranks.items() if r != rank}
    fields["alpha_pattern"] = {f"^{re.escape(layer)}": a for layer, a in wanted.items() if a != alpha}
    text = json.dumps({f"{PREFIX}{name}": value for name, value in fields.items()}, indent=2, sort_keys=True)
    return {name: value for name, value in metadata.items() if name != TRAINING_NAME} | {CONFIG_NAME: text}


def main(argv: Sequence[str] | None = None) -> None:
    """Reads a LoRA, renames its tensors, and writes it."""
    parser = build_parser()
    given = parser.parse_args(argv)
    from safetensors import SafetensorError, safe_open
    from safetensors.torch import save_file

    try:
        source = lora_file(given.input)
        output = given.output if given.output.suffix == ".safetensors" else given.output / WEIGHTS_NAME
        check_output(output, [source], folder=False)
        with safe_open(source, "pt") as file:
            tensors, metadata = {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}  # noqa: SIM118
        to_target = to_diffusers if given.to == "diffusers" else partial(from_diffusers, target=given.to)
        made, about = to_target(tensors, metadata)
        replace_by(output, lambda path: save_file(made, path, {"format": "pt"} | about))
    except (ValueError, SafetensorError) as error:
        parser.error(f"{given.input}: {error}")
    print(f"{output}: {len(made)} tensors")


if __name__ == "__main__":
    main()
