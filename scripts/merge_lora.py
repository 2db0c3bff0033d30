"""Merges a LoRA into its base model, and writes a transformer that from_pretrained loads without a LoRA.

    python scripts/merge_lora.py --base_model THUDM/CogVideoX-5b --lora my-lora --output_dir merged-transformer

Use it with CogVideoXPipeline.from_pretrained(BASE, transformer=CogVideoXTransformer3DModel.from_pretrained(DIR)).
DoRA and rsLoRA are merged as well. The sums are computed in fp32 on the CPU, which needs 4 bytes of memory per
parameter: 22 GB for 5b.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lora_tools import (
    DTYPES,
    PREFIX,
    check_output,
    load_transformer,
    lora_file,
    read_header,
    replace_by,
    stored_dtype,
    torch_dtype,
    transformer_folder,
)

SHARED_DIMENSIONS = {"A": 1, "B": 0}  # lora_A is (rank, in) and lora_B (out, rank); the weight is (out, in)


def build_parser() -> argparse.ArgumentParser:
    """Returns the parser of the flags."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base_model", required=True, help="CogVideoX pipeline or transformer: a folder, or a hub id")
    parser.add_argument("--lora", required=True, help="safetensors file in diffusers' names, or the folder of one")
    parser.add_argument(
        "--lora_scale", type=float, default=1.0, help="strength of the LoRA (1: the strength of training)"
    )
    parser.add_argument("--dtype", choices=DTYPES, help="type of the merged weights (that of the base model's files)")
    parser.add_argument("--output_dir", required=True, type=Path, help="new folder for the merged transformer")
    return parser


def check_fit(lora: Path, transformer: Any) -> None:
    """Checks that the matrices of a LoRA belong to layers of the transformer, and have their sizes.

    Raises:
        ValueError: The LoRA was trained on another model, or the file is damaged.
    """
    weights = transformer.state_dict()
    for name, (_, shape) in read_header(lora).items():
        layer, _, part = name.removesuffix(".weight").removeprefix(PREFIX).rpartition(".lora_")
        if name.startswith(PREFIX) and part in SHARED_DIMENSIONS:
            dimension, weight = SHARED_DIMENSIONS[part], weights.get(f"{layer}.weight")
            if weight is None or weight.shape[dimension] != shape[dimension]:
                rule = f"layer {layer} of the base model {'has another size' if weight is not None else 'is missing'}"
                raise ValueError(f"{lora}: does not fit, because {rule}; give the model that it was trained on")


def merge(transformer: Any, lora: Path, scale: float) -> Any:
    """Adds the LoRA to the weights of the transformer, and returns the transformer.

    Raises:
        ValueError: The file has no LoRA for the layers of the transformer, or is damaged.
    """
    from diffusers import CogVideoXPipeline

    check_fit(lora, transformer)
    parts: Any = dict.fromkeys(("tokenizer", "text_encoder", "vae", "scheduler"))
    pipeline = CogVideoXPipeline(**parts, transformer=transformer)
    pipeline.load_lora_weights(str(lora.parent), weight_name=lora.name, adapter_name="merged", use_safetensors=True)
    if not getattr(transformer, "peft_config", None):
        raise ValueError(f"{lora}: has no LoRA with diffusers' names; convert it with scripts/convert_lora.py")
    pipeline.fuse_lora(components=["transformer"], lora_scale=scale, safe_fusing=True)
    pipeline.unload_lora_weights()
    return transformer


def main(argv: Sequence[str] | None = None) -> None:
    """Merges a LoRA and writes the transformer."""
    parser = build_parser()
    given = parser.parse_args(argv)
    try:
        lora, folder = lora_file(given.lora), transformer_folder(given.base_model)
        check_output(given.output_dir, [lora, folder], folder=True)
        dtype = given.dtype or stored_dtype(folder)
        merged = merge(load_transformer(folder, "fp32"), lora, given.lora_scale)
        result = merged.type(torch_dtype(dtype))  # diffusers' `to` would warn that it casts all modules
        replace_by(given.output_dir, lambda path: result.save_pretrained(path, max_shard_size="5GB"))
    except ValueError as error:
        parser.error(str(error))
    print(f"{given.output_dir}: {lora} at strength {given.lora_scale:g} in {folder}, {dtype}")


if __name__ == "__main__":
    main()
