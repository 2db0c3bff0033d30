"""Extracts a LoRA from a full fine-tune: the best approximation of a given rank to what training changed.

    python scripts/extract_lora.py --base_model THUDM/CogVideoX-5b --tuned_model my-sft --rank 64 --output_dir my-lora

The change of every linear layer is split by an SVD: B A = U S V^T up to the rank, where A and B each get the square
root of the singular values. The script prints the share of the energy (sum of squares) of the changes that the LoRA
holds, and the share that no LoRA can hold, which is in biases, norms and embeddings.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from lora_tools import WEIGHTS_NAME, check_output, load_transformer, replace_by, stored_dtype, transformer_folder


def build_parser() -> argparse.ArgumentParser:
    """Returns the parser of the flags."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base_model", required=True, help="CogVideoX pipeline or transformer: a folder, or a hub id")
    parser.add_argument(
        "--tuned_model", required=True, help="the same model after a full fine-tune, such as its --output_dir"
    )
    parser.add_argument("--rank", type=int, default=64, help="rank of the LoRA (64)")
    parser.add_argument(
        "--layers", default=".*", help="regular expression that matches complete names of linear layers (all)"
    )
    parser.add_argument("--device", default="cpu", help="where the SVDs run, such as cuda (cpu)")
    parser.add_argument("--output_dir", required=True, type=Path, help=f"new folder for {WEIGHTS_NAME}")
    return parser


def split(change: Any, rank: int) -> tuple[Any, Any, float]:
    """Approximates a matrix by B A with an SVD.

    Args:
        change: (out, in).
        rank: Rank of the approximation. If it is larger than the matrix allows, the other rows and columns are 0.

    Returns:
        A, (rank, in); B, (out, rank); the share of the energy of the matrix that they hold.
    """
    import torch

    left, values, right = torch.linalg.svd(change, full_matrices=False)
    held = min(rank, len(values))
    roots = values[:held].sqrt()
    down, up = torch.zeros(rank, change.shape[1]), torch.zeros(change.shape[0], rank)
    down[:held] = roots[:, None] * right[:held]
    up[:, :held] = left[:, :held] * roots
    return down, up, (values[:held].square().sum() / values.square().sum()).item()


def changes(base: Any, tuned: Any, layers: str) -> Iterator[tuple[str, Any]]:
    """Yields (name, change in fp32) for every linear layer whose weights were changed by training.

    Raises:
        ValueError: The models have different parameters.
        re.error: ``layers`` is not a valid regular expression.
    """
    import torch

    shapes = [{name: p.shape for name, p in model.named_parameters()} for model in (base, tuned)]
    if shapes[0] != shapes[1]:
        raise ValueError(
            "the two models have different layers; give a fine-tune and the model that it was trained from"
        )
    tuned_modules = dict(tuned.named_modules())
    for name, module in base.named_modules():
        if isinstance(module, torch.nn.Linear) and re.fullmatch(layers, name):
            change = tuned_modules[name].weight.float() - module.weight.float()
            if change.any():
                yield name, change


def left_out(base: Any, tuned: Any, held: Sequence[str]) -> float:
    """Returns the share of the energy of all changes that is outside the weights of these layers."""
    inside = {f"{name}.weight" for name in held}
    tuned_parameters = dict(tuned.named_parameters())
    energy = {n: (tuned_parameters[n].float() - p.float()).square().sum().item() for n, p in base.named_parameters()}
    return sum(value for name, value in energy.items() if name not in inside) / (sum(energy.values()) or 1.0)


def extract(base: Any, tuned: Any, rank: int, layers: str = ".*", device: str = "cpu") -> dict[str, Any]:
    """Returns the LoRA with PEFT's names, in the type of the base model, and prints how much of the changes it holds.

    Raises:
        ValueError: No linear layer has changed.
    """
    lora: dict[str, Any] = {}
    total = kept = 0.0
    names = []
    for name, change in changes(base, tuned, layers):
        down, up, share = split(change.to(device), rank)
        energy = change.square().sum().item()
        total, kept = total + energy, kept + share * energy
        print(f"{name:50} {share:7.2%} of its change, norm {energy**0.5:.3g}")
        lora[f"{name}.lora_A.weight"], lora[f"{name}.lora_B.weight"] = down.to(base.dtype), up.to(base.dtype)
        names.append(name)
    if not names:
        raise ValueError(f"no linear layer that matches {layers} has changed; is --tuned_model the fine-tune?")
    print(f"rank {rank} holds {kept / total:.2%} of the change of {len(names)} layers")
    print(f"{left_out(base, tuned, names):.2%} of all changes are in other parameters and are not part of the LoRA")
    return lora


def save(lora: dict[str, Any], rank: int, folder: Path) -> None:
    """Writes a LoRA in the form that diffusers loads. Its alpha is its rank."""
    from diffusers import CogVideoXPipeline
    from peft import LoraConfig

    layers = sorted({name.rsplit(".lora_", 1)[0] for name in lora})
    config = LoraConfig(r=rank, lora_alpha=rank, target_modules=layers).to_dict()
    config["target_modules"] = layers
    CogVideoXPipeline.save_lora_weights(
        str(folder), lora, weight_name=WEIGHTS_NAME, transformer_lora_adapter_metadata=config
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Extracts a LoRA and writes it."""
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
        parser.error(f"--layers {given.layers}: is not a valid regular expression: {error}")
    except ValueError as error:
        parser.error(str(error))
    print(given.output_dir / WEIGHTS_NAME)


if __name__ == "__main__":
    main()
