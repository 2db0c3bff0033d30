"""Clips, first frames and captions into tensors: one copy for every caller.

Shapes: F frames, H and W pixels; K encodings of one image; C latent channels, f, h, w latent sizes; L text tokens, D
text channels.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cogvideox.data.dataset import normal

# Of the noise on first frames, as CogVideoX was trained: its standard deviation is exp(N(mean, deviation)), of pixels
# from -1 to 1.
IMAGE_NOISE = (-3.0, 0.5)


def video_moments(vae: Any, frames_FHWC: np.ndarray) -> Tensor:
    """The VAE's posterior of one clip, unscaled: mean and log variance, (2C, f, h, w).

    ``frames`` are uint8 RGB. A GPU is not waited for: the next clip can be on its way while it works.
    """
    return moments_of(vae, pixels_of(frames_FHWC, vae.device))


def image_moments(vae: Any, frame_HWC: np.ndarray, draws: Sequence[tuple[object, ...]]) -> Tensor:
    """The same of one image with noise on its pixels, once for each of ``draws``, which the noise is a function of:
    (K, 2C, h, w).
    """
    image_CFHW = pixels_of(frame_HWC[None], vae.device)
    mean, deviation = IMAGE_NOISE
    moments = []
    for draw in draws:  # one by one: no more memory than for a clip, and K has no effect on an encoding
        sigma = (mean + deviation * normal((), *draw, "sigma")).exp().item()
        noise_CFHW = normal(tuple(image_CFHW.shape), *draw, "pixels").to(vae.device)
        moments.append(moments_of(vae, image_CFHW + sigma * noise_CFHW)[:, 0])
    return torch.stack(moments)


def pixels_of(frames_FHWC: np.ndarray, device: torch.device) -> Tensor:
    """uint8 RGB as the VAE takes it: fp32 from -1 to 1, (3, F, H, W)."""
    frames = torch.from_numpy(frames_FHWC)
    frames = frames.pin_memory() if device.type == "cuda" else frames  # else the copy waits for the clip before
    return frames.to(device, non_blocking=True).permute(3, 0, 1, 2).float() / 127.5 - 1.0


@torch.no_grad()
def moments_of(vae: Any, video_CFHW: Tensor) -> Tensor:
    """The VAE's posterior, (2C, f, h, w)."""
    parameters: Tensor = vae.encode(video_CFHW.to(vae.dtype).unsqueeze(0)).latent_dist.parameters
    return parameters[0]


class AsyncCopy:
    """Tensors on their way from the device to the CPU."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self.tensors = {name: tensor.to("cpu", non_blocking=True) for name, tensor in tensors.items()}
        devices = {tensor.device for tensor in tensors.values() if tensor.is_cuda}
        self.events = [torch.cuda.current_stream(device).record_event() for device in devices]

    def wait(self) -> dict[str, Tensor]:
        """The tensors, when they are there."""
        for event in self.events:
            event.synchronize()
        return {name: tensor.contiguous() for name, tensor in self.tensors.items()}


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
