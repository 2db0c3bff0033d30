"""Merges a LoRA into its base model: the transformer that from_pretrained reads, with no LoRA left to load.

    python scripts/merge_lora.py --base_model THUDM/CogVideoX-5b --lora my-lora --output_dir merged-transformer

Use it with CogVideoXPipeline.from_pretrained(BASE, transformer=CogVideoXTransformer3DModel.from_pretrained(DIR)).
Takes DoRA and rsLoRA as well. Sums in fp32 on the CPU: that takes 4 bytes a parameter of memory, 22 GB for 5b.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lora_tools import (
    DTYPES,
    check_output,
    load_transformer,
    lora_file,
    replace_by,
    stored_dtype,
    torch_dtype,
    transformer_folder,
)


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base_model", required=True, help="CogVideoX pipeline or transformer: a folder, or a hub id")
    parser.add_argument("--lora", required=True, help="safetensors file in diffusers' names, or the folder of one")
    parser.add_argument("--lora_scale", type=float, default=1.0, help="strength of the LoRA (1: as it was trained)")
    parser.add_argument("--dtype", choices=DTYPES, help="type of the merged weights (what the base is stored in)")
    parser.add_argument("--output_dir", required=True, type=Path, help="new folder for the merged transformer")
    return parser


def merged(transformer: Any, lora: Path, scale: float) -> Any:
    """The transformer with the LoRA in its weights.

    Raises:
        ValueError: the file has none of the transformer's layers.
    """
    from diffusers import CogVideoXPipeline

    parts: Any = dict.fromkeys(("tokenizer", "text_encoder", "vae", "scheduler"))
    pipeline = CogVideoXPipeline(**parts, transformer=transformer)
    pipeline.load_lora_weights(str(lora.parent), weight_name=lora.name, adapter_name="merged", use_safetensors=True)
    if not getattr(transformer, "peft_config", None):
        raise ValueError(f"{lora}: holds no LoRA in diffusers' names; scripts/convert_lora.py makes them")
    pipeline.fuse_lora(components=["transformer"], lora_scale=scale, safe_fusing=True)
    pipeline.unload_lora_weights()
    return transformer


def main(argv: Sequence[str] | None = None) -> None:
    """Merges and writes."""
    parser = build_parser()
    given = parser.parse_args(argv)
    try:
        lora, folder = lora_file(given.lora), transformer_folder(given.base_model)
        check_output(given.output_dir, [lora, folder], folder=True)
        dtype = given.dtype or stored_dtype(folder)
        result = merged(load_transformer(folder, "fp32"), lora, given.lora_scale).to(torch_dtype(dtype))
        replace_by(given.output_dir, lambda path: result.save_pretrained(path, max_shard_size="5GB"))
    except ValueError as error:
        parser.error(str(error))
    print(f"{given.output_dir}: {lora} at strength {given.lora_scale:g} in {folder}, {dtype}")


if __name__ == "__main__":
    main()
