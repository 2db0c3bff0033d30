"""Encodes clips and first frames with the VAE, and captions with T5.

Data preparation, validation and benchmarks all call these functions, so that one input always has one encoding. The
main entry points are ``video_moments``, ``image_moments`` and ``prompt_embeds``; ``AsyncCopy`` brings results to the
CPU while the device computes the next ones.

Shapes: F frames, H and W pixel rows and columns, K encodings of one image; C latent channels, f, h and w latent frames,
rows and columns; B captions, L text tokens, D text channels.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from cogvideox.data.dataset import standard_normal

# (mean, deviation) of the noise on first frames with which CogVideoX was trained: for pixels from -1 to 1, the standard
# deviation of the noise is exp(s) with s drawn from N(mean, deviation).
IMAGE_NOISE = (-3.0, 0.5)


def video_moments(vae: Any, frames_FHWC: np.ndarray) -> Tensor:
    """Encodes one clip. Does not wait for a GPU, so that the next clip can be copied while the GPU computes.

    Args:
        vae: The VAE.
        frames_FHWC: The frames, uint8 RGB, (F, H, W, 3).

    Returns:
        Mean and log variance of the VAE's posterior, not multiplied by the scaling factor, (2C, f, h, w).
    """
    return posterior_moments(vae, pixels_of(frames_FHWC, vae.device))


def image_moments(vae: Any, frame_HWC: np.ndarray, draws: Sequence[tuple[object, ...]]) -> Tensor:
    """Encodes one image several times, each time with different noise on its pixels.

    Args:
        vae: The VAE.
        frame_HWC: The image, uint8 RGB, (H, W, 3).
        draws: One key per encoding. The noise is a function of the key.

    Returns:
        Mean and log variance of the VAE's posterior for each key, (K, 2C, h, w).
    """
    image_CFHW = pixels_of(frame_HWC[None], vae.device)
    mean, deviation = IMAGE_NOISE
    moments = []
    # One at a time, so that this needs no more memory than a clip, and the result of a key does not depend on K.
    for draw in draws:
        sigma = (mean + deviation * standard_normal((), *draw, "sigma")).exp().item()
        noise_CFHW = standard_normal(tuple(image_CFHW.shape), *draw, "pixels").to(vae.device)
        moments.append(posterior_moments(vae, image_CFHW + sigma * noise_CFHW)[:, 0])
    return torch.stack(moments)


def pixels_of(frames_FHWC: np.ndarray, device: torch.device) -> Tensor:
    """Converts uint8 RGB to what the VAE takes: fp32 from -1 to 1, (3, F, H, W), on the device."""
    frames = torch.from_numpy(frames_FHWC)
    # A copy from memory that is not pinned would block the host until the device has finished all earlier work.
    frames = frames.pin_memory() if device.type == "cuda" else frames
    return frames.to(device, non_blocking=True).permute(3, 0, 1, 2).float() / 127.5 - 1.0


@torch.no_grad()
def posterior_moments(vae: Any, video_CFHW: Tensor) -> Tensor:
    """Returns mean and log variance of the VAE's posterior for one clip, (3, F, H, W) -> (2C, f, h, w)."""
    parameters: Tensor = vae.encode(video_CFHW.to(vae.dtype).unsqueeze(0)).latent_dist.parameters
    return parameters[0]


class AsyncCopy:
    """Copies tensors from the device to the CPU while the device continues computing.

    The copies run after the work that computes the tensors. Call ``wait`` before reading them, because until then their
    memory on the CPU has undefined content.
    """

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self.tensors = {name: tensor.to("cpu", non_blocking=True) for name, tensor in tensors.items()}
        devices = {tensor.device for tensor in tensors.values() if tensor.is_cuda}
        self.events = [torch.cuda.current_stream(device).record_event() for device in devices]

    def wait(self) -> dict[str, Tensor]:
        """Waits until the copies are complete, and returns the tensors by name, on the CPU."""
        for event in self.events:
            event.synchronize()
        return {name: tensor.contiguous() for name, tensor in self.tensors.items()}


@torch.no_grad()
def prompt_embeds(tokenizer: Any, text_encoder: nn.Module, captions: Sequence[str], length: int) -> Tensor:
    """Encodes captions with T5, as the pipelines of diffusers do.

    T5 gets no attention mask, so padding influences all tokens, and a different length gives different embeddings.

    Args:
        tokenizer: The tokenizer of T5.
        text_encoder: The T5 encoder.
        captions: The B captions.
        length: The number of tokens L to which captions are padded or truncated.

    Returns:
        The last hidden states, (B, L, D), on the CPU.
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
