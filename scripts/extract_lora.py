"""Makes a LoRA out of a full fine-tune: of what training changed, the part of a given rank that holds the most.

    python scripts/extract_lora.py --base_model THUDM/CogVideoX-5b --tuned_model my-sft --rank 64 --output_dir my-lora

Every linear layer's change is split by an SVD: B A = U S V^T up to the rank, half of each singular value in A and B.
Prints the share of the change's energy (sum of squares) that the rank holds, and what no LoRA can hold: changes of
biases, norms and embeddings.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from lora_tools import WEIGHTS_NAME, check_output, load_transformer, replace_by, stored_dtype, transformer_folder


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base_model", required=True, help="CogVideoX pipeline or transformer: a folder, or a hub id")
    parser.add_argument("--tuned_model", required=True, help="the same after a full fine-tune, such as --output_dir")
    parser.add_argument("--rank", type=int, default=64, help="rank of the LoRA (64)")
    parser.add_argument("--layers", default=".*", help="regular expression for whole names of linear layers (all)")
    parser.add_argument("--device", default="cpu", help="where the SVDs run, such as cuda (cpu)")
    parser.add_argument("--output_dir", required=True, type=Path, help=f"new folder for {WEIGHTS_NAME}")
    return parser


def split(change: Any, rank: int) -> tuple[Any, Any, float]:
    """(A, B, share of the energy that they hold) of an (out, in) matrix; rows and columns beyond its own rank are 0."""
    import torch

    left, values, right = torch.linalg.svd(change, full_matrices=False)
    held = min(rank, len(values))
    roots = values[:held].sqrt()
    down, up = torch.zeros(rank, change.shape[1]), torch.zeros(change.shape[0], rank)
    down[:held] = roots[:, None] * right[:held]
    up[:, :held] = left[:, :held] * roots
    return down, up, (values[:held].square().sum() / values.square().sum()).item()


def changes(base: Any, tuned: Any, layers: str) -> Iterator[tuple[str, Any]]:
    """(name, change in fp32) of every linear layer whose weights training changed.

    Raises:
        ValueError: the models differ in shape, or the expression is none.
    """
    import torch

    shapes = [{name: p.shape for name, p in model.named_parameters()} for model in (base, tuned)]
    if shapes[0] != shapes[1]:
        raise ValueError("the two models have other layers; give a fine-tune and the model that it began with")
    tuned_modules = dict(tuned.named_modules())
    for name, module in base.named_modules():
        if isinstance(module, torch.nn.Linear) and re.fullmatch(layers, name):
            change = tuned_modules[name].weight.float() - module.weight.float()
            if change.any():
                yield name, change


def left_out(base: Any, tuned: Any, held: Sequence[str]) -> float:
    """Share of the energy of all changes that lies outside the weights of the layers."""
    inside = {f"{name}.weight" for name in held}
    tuned_parameters = dict(tuned.named_parameters())
    energy = {n: (tuned_parameters[n].float() - p.float()).square().sum().item() for n, p in base.named_parameters()}
    return sum(value for name, value in energy.items() if name not in inside) / (sum(energy.values()) or 1.0)


def extract(base: Any, tuned: Any, rank: int, layers: str = ".*", device: str = "cpu") -> dict[str, Any]:
    """The LoRA in PEFT's names, in the base's type; prints what it holds.

    Raises:
        ValueError: no linear layer changed.
    """
    lora: dict[str, Any] = {}
    total = kept = 0.0
    names = []
    for name, change in changes(base, tuned, layers):
        down, up, share = split(change.to(device), rank)
        energy = change.square().sum().item()
        total, kept = total + energy, kept + share * energy
        print(f"{name:50} {share:7.2%} of its change, size {energy**0.5:.3g}")
        lora[f"{name}.lora_A.weight"], lora[f"{name}.lora_B.weight"] = down.to(base.dtype), up.to(base.dtype)
        names.append(name)
    if not names:
        raise ValueError(f"no linear layer that {layers} means has changed; is this the fine-tune?")
    print(f"rank {rank} holds {kept / total:.2%} of the change of {len(names)} layers")
    print(f"{left_out(base, tuned, names):.2%} of all changes are elsewhere and are left out")
    return lora


def save(lora: dict[str, Any], rank: int, folder: Path) -> None:
    """Writes it as diffusers loads it; alpha is the rank."""
    from diffusers import CogVideoXPipeline
    from peft import LoraConfig

    layers = sorted({name.rsplit(".lora_", 1)[0] for name in lora})
    config = LoraConfig(r=rank, lora_alpha=rank, target_modules=layers).to_dict()
    config["target_modules"] = layers
    CogVideoXPipeline.save_lora_weights(
        str(folder), lora, weight_name=WEIGHTS_NAME, transformer_lora_adapter_metadata=config
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Extracts and writes."""
    parser = build_parser()
    given = parser.parse_args(argv)
    try:
        if given.rank < 1:
            raise ValueError(f"--rank {given.rank}: must be at least 1")
        folders = [transformer_folder(model) for model in (given.base_model, given.tuned_model)]
        check_output(given.output_dir, folders, folder=True)
        base, tuned = (load_transformer(folder, stored_dtype(folder)) for folder in folders)
        lora = extract(base, tuned, given.rank, given.layers, given.device)
        replace_by(given.output_dir, lambda path: save(lora, given.rank, path))
    except re.error as error:
        parser.error(f"--layers {given.layers}: is no regular expression: {error}")
    except ValueError as error:
        parser.error(str(error))
    print(given.output_dir / WEIGHTS_NAME)


if __name__ == "__main__":
    main()
