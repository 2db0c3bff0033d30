"""Clips and captions into tensors: one copy for every caller.

Shapes: F frames, H and W pixels; C latent channels, f, h, w latent sizes; L text tokens, D text channels.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor


@torch.no_grad()
def video_moments(vae: Any, frames_FHWC: np.ndarray) -> Tensor:
    """The VAE's posterior of one clip, unscaled: mean and log variance, (2C, f, h, w), on the CPU.

    ``frames`` are uint8 RGB.
    """
    pixels = torch.from_numpy(frames_FHWC).to(vae.device).permute(3, 0, 1, 2)
    video_BCFHW = (pixels.float() / 127.5 - 1.0).to(vae.dtype).unsqueeze(0)
    return vae.encode(video_BCFHW).latent_dist.parameters[0].cpu()


@torch.no_grad()
def prompt_embeds(tokenizer: Any, text_encoder: Any, captions: Sequence[str], length: int) -> Tensor:
    """T5's last hidden states, (B, L, D), on the CPU, padded to ``length`` tokens as the pipelines do.

    The padding is attended to and carries state: another length gives other embeddings.
    """
    tokens = tokenizer(
        list(captions),
        padding="max_length",
        max_length=length,
        truncation=True,
        add_special_tokens=True,
        return_tensors="pt",
    )
    return text_encoder(tokens.input_ids.to(text_encoder.device))[0].cpu()


def token_counts(tokenizer: Any, captions: Sequence[str]) -> list[int]:
    """Tokens of each caption, the one for its end included, however many T5 will see."""
    return [len(ids) for ids in tokenizer(list(captions), truncation=False, verbose=False).input_ids]
