"""Defines the noise schedule, the training loss and the weights of the loss; everything is computed in fp32.

The main entry points are ``NoiseSchedule.from_config``, ``loss`` and ``loss_weights``. x0 are the VAE's scaled latents,
eps is Gaussian noise, x_t are the noisy latents that the network gets at timestep t, and v is the velocity, which
CogVideoX predicts:

    x_t = sqrt(abar_t) x0 + sqrt(1 - abar_t) eps        (Ho et al. 2020)
    v_t = sqrt(abar_t) eps - sqrt(1 - abar_t) x0        (Salimans & Ho 2022)
    x0_hat = sqrt(abar_t) x_t - sqrt(1 - abar_t) v_hat

abar_t is the product of 1 - beta over timesteps 0 to t: the share of the signal in the variance of x_t. A hat marks a
prediction of the network, or a value that follows from one. The loss is |v_hat - v_t|^2. It equals
|x0_hat - x0|^2 / (1 - abar_t), the form in which the training script of diffusers writes it. Papers state their
weightings for the error of x0 or of eps. With SNR_t = abar_t / (1 - abar_t),

    |v_hat - v_t|^2 = (SNR_t + 1) |x0_hat - x0|^2 = (SNR_t + 1) / SNR_t |eps_hat - eps|^2

so a published weight of the error of x0 is divided by SNR + 1 = 1 / (1 - abar), and one of the error of eps is
multiplied by SNR / (SNR + 1) = abar.

Shapes: B samples, F latent frames, C latent channels, H and W latent rows and columns, T timesteps of the schedule.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cogvideox.config.flags import LossFlags


@dataclass(frozen=True)
class NoiseSchedule:
    """Holds abar_t for t = 0 .. T-1, as an fp32 tensor of shape (T,)."""

    alphas_cumprod: Tensor

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "NoiseSchedule":
        """Builds the schedule of a CogVideoX scheduler_config.json; equals alphas_cumprod of CogVideoXDDIMScheduler.

        The square roots of beta are spaced evenly, and the SNR is divided by ``snr_shift_scale``. Then sqrt(abar) is
        shifted and scaled so that the SNR is zero at the last timestep and unchanged at the first (Lin et al. 2023).

        Args:
            config: The fields of the file with the defaults filled in, as in Geometry.schedule. They must be of the
                only kind that geometry.scheduler_problems() accepts.
        """
        steps = config["num_train_timesteps"]
        roots = torch.linspace(config["beta_start"] ** 0.5, config["beta_end"] ** 0.5, steps, dtype=torch.float64)
        abar = torch.cumprod(1.0 - roots**2, dim=0)  # abar_t = (1 - beta_0) ... (1 - beta_t), (T,)
        shift = config["snr_shift_scale"]
        abar = abar / (shift + (1.0 - shift) * abar)  # SNR / shift, written in abar
        if config["rescale_betas_zero_snr"]:
            root = abar.sqrt()
            # sqrt(abar_t) <- (sqrt(abar_t) - sqrt(abar_T-1)) sqrt(abar_0) / (sqrt(abar_0) - sqrt(abar_T-1))
            abar = ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2
        return cls(abar.float())

    def to(self, device: torch.device) -> "NoiseSchedule":
        """Returns the schedule with its tensor on a device."""
        return NoiseSchedule(self.alphas_cumprod.to(device))

    def __len__(self) -> int:
        return len(self.alphas_cumprod)

    def signal_and_noise(self, timestep_B: Tensor) -> tuple[Tensor, Tensor]:
        """Returns sqrt(abar_t) and sqrt(1 - abar_t), each (B, 1, 1, 1, 1), for timesteps of shape (B,)."""
        abar = self.alphas_cumprod[timestep_B].view(-1, 1, 1, 1, 1)
        return abar.sqrt(), (1.0 - abar).sqrt()

    def add_noise(self, x0_BFCHW: Tensor, noise_BFCHW: Tensor, timestep_B: Tensor) -> Tensor:
        """Returns x_t, fp32, (B, F, C, H, W); equals add_noise of the diffusers scheduler."""
        signal, noise = self.signal_and_noise(timestep_B)
        return signal * x0_BFCHW + noise * noise_BFCHW

    def velocity(self, x0_BFCHW: Tensor, noise_BFCHW: Tensor, timestep_B: Tensor) -> Tensor:
        """Returns v_t, fp32, (B, F, C, H, W); equals get_velocity of the diffusers scheduler."""
        signal, noise = self.signal_and_noise(timestep_B)
        return signal * noise_BFCHW - noise * x0_BFCHW


Predictor = Callable[[Tensor, Tensor], Tensor]
"""Maps (x_t, timesteps of shape (B,)) to the predicted velocity v_hat, which has the shape of x_t."""


def loss(
    schedule: NoiseSchedule, predict: Predictor, x0_BFCHW: Tensor, noise_BFCHW: Tensor, timestep_B: Tensor
) -> Tensor:
    """Returns the mean squared velocity error of each sample.

    Args:
        schedule: The noise schedule, on the device of the latents.
        predict: The network; it may return v_hat in any floating-point type.
        x0_BFCHW: Scaled latents, fp32.
        noise_BFCHW: The noise eps, in the same shape.
        timestep_B: The timestep of each sample.

    Returns:
        The unweighted error, (B,), fp32.
    """
    x_t = schedule.add_noise(x0_BFCHW, noise_BFCHW, timestep_B)
    target = schedule.velocity(x0_BFCHW, noise_BFCHW, timestep_B)
    # Mean of |v_hat - v_t|^2 over frames, channels, rows and columns: (B, F, C, H, W) -> (B,).
    return (predict(x_t, timestep_B).float() - target).square().mean(dim=(1, 2, 3, 4))


def loss_weights(schedule: NoiseSchedule, flags: LossFlags) -> Tensor:
    """Returns the weight of the velocity error at each timestep, (T,), fp32, as --loss_weighting chooses it.

    The formulas are written in abar and not in SNR, so that nothing is divided by zero at the last timestep, where the
    SNR is 0. There, all weightings except none and min_snr_plus_one are 0, as published. The first step of sampling is
    then not trained.
    """
    abar, gamma = schedule.alphas_cumprod, flags.snr_gamma
    noise = 1.0 - abar  # 1 / (SNR + 1)
    if flags.loss_weighting == "min_snr":
        # min(SNR, gamma) / (SNR + 1)                         (Hang et al. 2023, min-SNR-gamma for velocity prediction)
        return torch.minimum(abar, gamma * noise)
    if flags.loss_weighting == "min_snr_plus_one":
        # min(SNR + 1, gamma) / (SNR + 1)                     (min_snr_value of CogVideo's own training code)
        return (gamma * noise).clamp(max=1.0)
    if flags.loss_weighting == "soft_min_snr":
        # SNR gamma / (SNR + gamma) / (SNR + 1)               (Crowson et al. 2024, soft-min-SNR, error of x0)
        return gamma * abar * noise / (abar + gamma * noise)
    if flags.loss_weighting == "debiased":
        # SNR / (SNR + 1) / sqrt(SNR)                         (Yu et al. 2023, 1 / sqrt(SNR), error of eps)
        return (abar * noise).sqrt()
    if flags.loss_weighting == "p2":
        # SNR / (SNR + 1) / (k + SNR)^gamma                   (Choi et al. 2022, 1 / (k + SNR)^gamma, error of eps)
        return abar * (noise / (flags.p2_k * noise + abar)) ** flags.p2_gamma
    return torch.ones_like(abar)
