"""Cached tensors -> batches. Everything random about a sample is drawn here, on the CPU, from (seed, visit, id).

Visit -> moments of this visit's variant -> x0 (posterior sampled, scaled, padded), noise, timestep, prompt -> Batch.
Shapes: B samples, F latent frames (padding included), C channels, H and W latents, L text tokens, D text channels.
"""

import signal
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from cogvideox.data.cache import CacheIndex, TensorCache
from cogvideox.data.sampler import BucketBatchSampler, Visit
from cogvideox.draws import key_of, uniform
from cogvideox.geometry import Geometry


@dataclass(frozen=True)
class Batch:
    """One micro-batch, or one sample of it without the leading dimension."""

    x0_BFCHW: Tensor  # fp32, scaled
    noise_BFCHW: Tensor  # fp32
    timestep_B: Tensor  # int64
    prompt_BLD: Tensor  # as cached
    ids: tuple[str, ...]

    def tensors(self) -> dict[str, Tensor]:
        """The tensors by field name."""
        return {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}

    def to(self, device: torch.device) -> "Batch":
        """The batch on a device."""
        return Batch(ids=self.ids, **{n: t.to(device, non_blocking=True) for n, t in self.tensors().items()})

    def pin_memory(self) -> "Batch":
        """The batch in page-locked memory; the DataLoader calls it."""
        return Batch(ids=self.ids, **{n: t.pin_memory() for n, t in self.tensors().items()})


def collate(samples: Sequence[Batch]) -> Batch:
    """Samples of one bucket, stacked."""
    names = samples[0].tensors()
    stacked = {name: torch.stack([sample.tensors()[name] for sample in samples]) for name in names}
    return Batch(ids=tuple(id for sample in samples for id in sample.ids), **stacked)


def normal(shape: tuple[int, ...], *draw: object) -> Tensor:
    """Standard normal numbers, fp32, drawn on the CPU so that they do not depend on the device."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(key_of(*draw)))


def sample_posterior(moments_CFHW: Tensor, noise_CFHW: Tensor) -> Tensor:
    """A draw from the VAE's posterior, fp32, unscaled. ``moments`` holds mean and log variance, (2C, F, H, W)."""
    mean, log_variance = moments_CFHW.float().chunk(2)
    # the bounds of AutoencoderKLCogVideoX's DiagonalGaussianDistribution
    return mean + (0.5 * log_variance.clamp(-30.0, 20.0)).exp() * noise_CFHW


def pad_front(latents_FCHW: Tensor, frames: int) -> Tensor:
    """The first latent frame repeated in front, as the pipelines of 1.5 drop it after sampling."""
    return torch.cat([latents_FCHW[:1].expand(frames, -1, -1, -1), latents_FCHW]) if frames else latents_FCHW


class LatentDataset(Dataset[Batch]):
    """Samples by Visit. Reading checks the checksums and raises CacheError."""

    def __init__(
        self, cache: TensorCache, index: CacheIndex, geometry: Geometry, seed: int, caption_dropout: float
    ) -> None:
        self.cache = cache
        self.index = index
        self.geometry = geometry
        self.seed = seed
        self.caption_dropout = caption_dropout
        self.timesteps = int(geometry.schedule["num_train_timesteps"])

    def __getitem__(self, visit: Visit) -> Batch:
        sample = self.index.samples[visit.index]
        draw = (self.seed, visit.visit, sample.id)
        moments = self.cache.read(sample.video_keys[visit.visit % len(sample.video_keys)])["moments_CFHW"]
        channels, *rest = moments.shape
        latents = sample_posterior(moments, normal((channels // 2, *rest), *draw, "posterior"))
        x0 = latents.mul_(self.geometry.scaling_factor).transpose(0, 1).contiguous()
        x0 = pad_front(x0, self.geometry.padding_frames(len(x0)))
        dropped = uniform(*draw, "caption") < self.caption_dropout
        prompt_key = self.index.empty_prompt_key if dropped else sample.prompt_key
        return Batch(
            x0_BFCHW=x0,
            noise_BFCHW=normal(tuple(x0.shape), *draw, "noise"),
            timestep_B=torch.tensor(int(uniform(*draw, "timestep") * self.timesteps)),
            prompt_BLD=self.cache.read(prompt_key)["prompt_LD"],
            ids=(sample.id,),
        )


def ignore_signals(_worker: int) -> None:
    """A signal to the whole group asks the training process for a checkpoint; it needs its workers until then."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)


def build_loader(dataset: LatentDataset, sampler: BucketBatchSampler, workers: int, pin: bool) -> DataLoader[Batch]:
    """A DataLoader over the rank's micro-batches, in order."""
    return DataLoader(
        dataset,
        batch_sampler=sampler,
        num_workers=workers,
        collate_fn=collate,
        pin_memory=pin,
        persistent_workers=False,
        worker_init_fn=ignore_signals,
    )
