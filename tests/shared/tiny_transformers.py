"""Random tiny transformers of every kind, with a LoRA or with all weights trained, and inputs for them."""

from __future__ import annotations

from typing import Any

import tiny_cogvideox
import torch
from peft import LoraConfig
from tiny_cogvideox import is_image_to_video, is_version_1_5
from torch import Tensor

TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2"]


def make_with_lora(kind: str, depth: int = 3, targets: list[str] = TARGETS, heads: int = 2, **lora: Any) -> Any:
    """Returns a random tiny transformer with a nonzero LoRA. Every call returns the same weights."""
    with torch.random.fork_rng():
        transformer = make_trainable(kind, depth, heads).requires_grad_(False)
        transformer.add_adapter(LoraConfig(r=4, lora_alpha=8, target_modules=targets, init_lora_weights=False, **lora))
    return transformer


def make_trainable(kind: str, depth: int = 3, heads: int = 2) -> Any:
    """Returns a random tiny transformer whose weights are all trained. Every call returns the same weights.

    The function seeds torch's global generator and draws from it.
    """
    from diffusers import CogVideoXTransformer3DModel

    torch.manual_seed(0)
    config = dict(tiny_cogvideox._transformer(kind).config) | {"num_layers": depth, "num_attention_heads": heads}
    return CogVideoXTransformer3DModel.from_config(config)


def arguments_of(kind: str, frames: int = 4, samples: int = 2) -> dict[str, Any]:
    """Returns random arguments for the forward pass of a transformer."""
    generator = torch.Generator().manual_seed(1)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    angles = randn(frames * 24 // (2 if is_version_1_5(kind) else 1), 32)
    return {
        "hidden_states": randn(samples, frames, 32 if is_image_to_video(kind) else 16, 8, 12),
        "encoder_hidden_states": randn(samples, 32, 32),
        "timestep": torch.tensor([3, 700][:samples]),
        "image_rotary_emb": None if kind == "2b" else (angles.cos(), angles.sin()),
        "ofs": torch.full((1,), 2.0) if kind == "1.5-5b-i2v" else None,
        "return_dict": False,
    }
