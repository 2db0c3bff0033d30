"""Renames the tensors of a LoRA from diffusers' names to those that ComfyUI reads, and back.

    python scripts/convert_lora.py my-lora my-lora/comfyui.safetensors --to comfyui
    python scripts/convert_lora.py my-lora/comfyui.safetensors my-lora-again --to diffusers

diffusers: transformer.LAYER.lora_A.weight and lora_B.weight; rank and alpha as JSON in the file's metadata.
ComfyUI:   lora_unet_LAYER.lora_down.weight, lora_up.weight and alpha (a number; scale = alpha / rank), with _ in place
of each dot of LAYER. Sources of these names: ComfyUI's comfy/lora.py (model_lora_keys_unet) and
comfy/weight_adapter/lora.py, and kijai's ComfyUI-CogVideoXWrapper, lora_utils.py (merge_lora, for Fun models). For
THUDM's models that wrapper's model_loading.py calls diffusers' own load_lora_weights: give it diffusers' file.

Converting there and back gives the same bits. ComfyUI has no names for DoRA: merge it with scripts/merge_lora.py.
"""

from __future__ import annotations

import argparse
import json
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lora_tools import PREFIX, WEIGHTS_NAME, check_output, lora_file, replace_by

COMFY_PREFIX = "lora_unet_"
CONFIG_NAME = "lora_adapter_metadata"
TRAINING_NAME = "cogvideox_training"  # metadata entry with the scale that this suite trained with
PARTS = {"lora_A.weight": "lora_down.weight", "lora_B.weight": "lora_up.weight"}
# All linear layers of CogVideoX 1.0 and 1.5. A name in which _ replaces the dots does not tell where the dots were.
IN_BLOCKS = (
    *("attn1.to_q", "attn1.to_k", "attn1.to_v", "attn1.to_out.0"),
    *("ff.net.0.proj", "ff.net.2", "norm1.linear", "norm2.linear"),
)
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
    parser.add_argument("--to", required=True, choices=("comfyui", "diffusers"), help="names of the output")
    return parser


def dotted(flat: str) -> str:
    """Returns the dotted name of a layer whose ComfyUI name has _ in place of each dot.

    Raises:
        ValueError: CogVideoX has no layer of this name.
    """
    match = re.fullmatch(r"transformer_blocks_(\d+)_(\w+)", flat)
    known, prefix, rest = (IN_BLOCKS, f"transformer_blocks.{match[1]}.", match[2]) if match else (ELSEWHERE, "", flat)
    for name in known:
        if name.replace(".", "_") == rest:
            return prefix + name
    raise ValueError(f"{COMFY_PREFIX}{flat}: is not a linear layer of CogVideoX")


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


def to_comfyui(tensors: Tensors, metadata: dict[str, str]) -> tuple[Tensors, dict[str, str]]:
    """Returns (tensors, metadata) with ComfyUI's names. The metadata is unchanged, so that it can be converted back.

    Raises:
        ValueError: A tensor is not part of a plain LoRA, or CogVideoX does not have its layer.
    """
    import torch

    config, made = config_of(metadata), {}
    for key, tensor in tensors.items():
        match = re.fullmatch(rf"{re.escape(PREFIX)}(.+)\.(lora_[AB]\.weight)", key)
        if match is None:
            dora = "DoRA has no counterpart in ComfyUI, merge it with scripts/merge_lora.py"
            raise ValueError(
                f"{key}: {dora if 'magnitude' in key else f'is not of the form {PREFIX}LAYER.lora_A.weight'}"
            )
        layer, flat = match[1], match[1].replace(".", "_")
        if dotted(flat) != layer:
            raise ValueError(f"{key}: is not a linear layer of CogVideoX")
        made[f"{COMFY_PREFIX}{flat}.{PARTS[match[2]]}"] = tensor
        if match[2].startswith("lora_A"):
            made[f"{COMFY_PREFIX}{flat}.alpha"] = torch.tensor(alpha_of(layer, len(tensor), config))
    return made, metadata


def to_diffusers(tensors: Tensors, metadata: dict[str, str]) -> tuple[Tensors, dict[str, str]]:
    """Returns (tensors, metadata) with diffusers' names.

    Raises:
        ValueError: A tensor is not part of a plain LoRA for CogVideoX in ComfyUI's names.
    """
    back, made, alphas, ranks = {new: old for old, new in PARTS.items()}, {}, {}, {}
    for key, tensor in tensors.items():
        match = re.fullmatch(rf"{COMFY_PREFIX}(\w+)\.(lora_down\.weight|lora_up\.weight|alpha)", key)
        if match is None:
            raise ValueError(f"{key}: is not of the form {COMFY_PREFIX}LAYER.lora_down.weight, lora_up.weight or alpha")
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
        convert = to_comfyui if given.to == "comfyui" else to_diffusers
        made, about = convert(tensors, metadata)
        replace_by(output, lambda path: save_file(made, path, {"format": "pt"} | about))
    except (ValueError, SafetensorError) as error:
        parser.error(f"{given.input}: {error}")
    print(f"{output}: {len(made)} tensors")


if __name__ == "__main__":
    main()
