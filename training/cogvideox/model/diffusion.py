"""The noise schedule and the loss, in fp32. x0 are scaled latents; v is the velocity that CogVideoX predicts.

    x_t = sqrt(abar_t) x0 + sqrt(1 - abar_t) eps        (Ho et al. 2020, eq. 4)
    v_t = sqrt(abar_t) eps - sqrt(1 - abar_t) x0        (Salimans & Ho 2022, appendix D)
    x0_hat = sqrt(abar_t) x_t - sqrt(1 - abar_t) v_hat

The loss is |v_hat - v_t|^2. It equals |x0_hat - x0|^2 / (1 - abar_t), the form in which the CogVideoX papers write it.
Weightings of that error were published for the error of x0 or eps; with SNR_t = abar_t / (1 - abar_t),

    |v_hat - v_t|^2 = (SNR_t + 1) |x0_hat - x0|^2 = (SNR_t + 1) / SNR_t |eps_hat - eps|^2

so a weight of x0's error is divided by SNR + 1 = 1 / (1 - abar), and one of eps' error multiplied by
SNR / (SNR + 1) = abar.
Shapes: B samples, F latent frames, C channels, H and W latents.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cogvideox.config.flags import LossFlags


@dataclass(frozen=True)
class NoiseSchedule:
    """abar_t for t = 0 .. T-1, fp32, shape (T,)."""

    alphas_cumprod: Tensor

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "NoiseSchedule":
        """The schedule of a CogVideoX scheduler_config.json.

        Scaled-linear betas, SNR shift by ``snr_shift_scale``, then zero terminal SNR (Lin et al. 2023, algorithm 1).
        ``config`` is whole, as in Geometry.schedule, and of the kind that geometry.scheduler_problems() asks for.
        """
        steps = config["num_train_timesteps"]
        roots = torch.linspace(config["beta_start"] ** 0.5, config["beta_end"] ** 0.5, steps, dtype=torch.float64)
        abar = torch.cumprod(1.0 - roots**2, dim=0)
        shift = config["snr_shift_scale"]
        abar = abar / (shift + (1.0 - shift) * abar)
        if config["rescale_betas_zero_snr"]:
            root = abar.sqrt()
            abar = ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2
        return cls(abar.float())

    def to(self, device: torch.device) -> "NoiseSchedule":
        """The same schedule on a device."""
        return NoiseSchedule(self.alphas_cumprod.to(device))

    def __len__(self) -> int:
        return len(self.alphas_cumprod)

    def signal_and_noise(self, timestep_B: Tensor) -> tuple[Tensor, Tensor]:
        """sqrt(abar_t) and sqrt(1 - abar_t), each (B, 1, 1, 1, 1)."""
        abar = self.alphas_cumprod[timestep_B].view(-1, 1, 1, 1, 1)
        return abar.sqrt(), (1.0 - abar).sqrt()

    def add_noise(self, x0_BFCHW: Tensor, noise_BFCHW: Tensor, timestep_B: Tensor) -> Tensor:
        """x_t, fp32."""
        signal, noise = self.signal_and_noise(timestep_B)
        return signal * x0_BFCHW + noise * noise_BFCHW

    def velocity(self, x0_BFCHW: Tensor, noise_BFCHW: Tensor, timestep_B: Tensor) -> Tensor:
        """v_t, fp32."""
        signal, noise = self.signal_and_noise(timestep_B)
        return signal * noise_BFCHW - noise * x0_BFCHW


Predictor = Callable[[Tensor, Tensor], Tensor]


def loss(
    schedule: NoiseSchedule, predict: Predictor, x0_BFCHW: Tensor, noise_BFCHW: Tensor, timestep_B: Tensor
) -> Tensor:
    """Mean squared velocity error of each sample, shape (B,), fp32.

    ``predict(x_t, timestep)`` returns v_hat in any float type.
    """
    x_t = schedule.add_noise(x0_BFCHW, noise_BFCHW, timestep_B)
    target = schedule.velocity(x0_BFCHW, noise_BFCHW, timestep_B)
    return (predict(x_t, timestep_B).float() - target).square().mean(dim=(1, 2, 3, 4))


def loss_weights(schedule: NoiseSchedule, flags: LossFlags) -> Tensor:
    """The weight of the velocity error at each timestep, shape (T,), fp32.

    Written in abar, which leaves no division by zero where SNR is 0 (the last timestep). Every weighting but none and
    min_snr_plus_one is 0 there, as published: the first step of sampling is then not trained.
    """
    abar, gamma = schedule.alphas_cumprod, flags.snr_gamma
    noise = 1.0 - abar  # 1 / (SNR + 1)
    if flags.loss_weighting == "min_snr":
        # min(SNR, gamma) / (SNR + 1)                         (Hang et al. 2023, for velocity prediction)
        return torch.minimum(abar, gamma * noise)
    if flags.loss_weighting == "min_snr_plus_one":
        # min(SNR + 1, gamma) / (SNR + 1)                     (min_snr_value of CogVideo's own training code)
        return (gamma * noise).clamp(max=1.0)
    if flags.loss_weighting == "soft_min_snr":
        # SNR gamma / (SNR + gamma) / (SNR + 1)               (Crowson et al. 2024, soft-min-SNR of x0's error)
        return gamma * abar * noise / (abar + gamma * noise)
    if flags.loss_weighting == "debiased":
        # SNR / (SNR + 1) / sqrt(SNR)                         (Yu et al. 2023, 1 / sqrt(SNR) of eps' error)
        return (abar * noise).sqrt()
    if flags.loss_weighting == "p2":
        # SNR / (SNR + 1) / (k + SNR)^gamma                   (Choi et al. 2022, eq. 8, of eps' error)
        return abar * (noise / (flags.p2_k * noise + abar)) ** flags.p2_gamma
    return torch.ones_like(abar)
