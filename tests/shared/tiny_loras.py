"""LoRAs of tiny models, as the training scripts create them, and the outputs of their transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from fakes import options_of

from cogvideox.config.flags import ModelFlags
from cogvideox.model.methods import Lora
from cogvideox.model.models import load_transformer


def lora(model: Path, *flags: object, seed: int = 1, dtype: torch.dtype = torch.float32) -> Lora:
    """Returns the LoRA that a training script with these flags creates."""
    options = options_of(Path("x"), "--pretrained_model_name_or_path", model, "--seed", seed, *flags)
    return Lora(load_transformer(options.model, dtype), options)


def disturb(method: Any) -> None:
    """Makes all weights nonzero, as after training; initially, half of them are zero."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in method.parameters().values():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))


def stock(model: Path, dtype: torch.dtype = torch.float32) -> Any:
    """Returns the model without a LoRA."""
    return load_transformer(ModelFlags(str(model)), dtype)


def outputs(transformer: Any) -> torch.Tensor:
    """Returns the output of a transformer for fixed inputs."""
    generator = torch.Generator().manual_seed(3)
    latents = torch.randn(2, 3, 16, 8, 12, generator=generator)
    prompt = torch.randn(2, 32, 32, generator=generator)
    rotary = (torch.ones(72, 32), torch.zeros(72, 32))
    with torch.no_grad():
        return transformer(latents, prompt, torch.tensor([5, 900]), image_rotary_emb=rotary, return_dict=False)[0]
