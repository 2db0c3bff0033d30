"""Compares diffusion.py with the diffusers schedulers of the published models, in fp32."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import CogVideoXDDIMScheduler, CogVideoXDPMScheduler
from diffusers.training_utils import compute_snr

from cogvideox.config.flags import WEIGHTINGS, LossFlags
from cogvideox.model.diffusion import NoiseSchedule, loss, loss_weights

PUBLISHED = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "prediction_type": "v_prediction",
    "rescale_betas_zero_snr": True,
    "timestep_spacing": "trailing",
    "set_alpha_to_one": True,
    "clip_sample": False,
}
SCHEDULERS = {"5b": (CogVideoXDPMScheduler, 1.0), "2b": (CogVideoXDDIMScheduler, 3.0)}
TIMESTEPS = torch.tensor([0, 1, 2, 20, 500, 998, 999])
SHAPE = (len(TIMESTEPS), 3, 4, 5, 6)


def scheduler(kind: str, **changes: Any) -> Any:
    of, shift = SCHEDULERS[kind]
    return of(**PUBLISHED, snr_shift_scale=shift, **changes)


def schedule(kind: str) -> NoiseSchedule:
    return NoiseSchedule.from_config(dict(scheduler(kind).config))


@pytest.fixture
def draws() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return torch.randn(3, *SHAPE, generator=torch.Generator().manual_seed(0)).unbind()


@pytest.mark.parametrize("kind", SCHEDULERS)
def test_alphas_are_the_scheduler_s(kind: str) -> None:
    ours, theirs = schedule(kind).alphas_cumprod, scheduler(kind).alphas_cumprod
    assert ours.dtype == torch.float32
    assert len(schedule(kind)) == 1000
    assert torch.equal(ours, theirs.float())
    assert ours[-1] == 0


def test_the_two_models_differ() -> None:
    assert not torch.equal(schedule("5b").alphas_cumprod, schedule("2b").alphas_cumprod)


def test_without_zero_terminal_snr() -> None:
    reference = CogVideoXDDIMScheduler(**PUBLISHED | {"rescale_betas_zero_snr": False}, snr_shift_scale=3.0)
    ours = NoiseSchedule.from_config(dict(reference.config))
    assert torch.equal(ours.alphas_cumprod, reference.alphas_cumprod.float())
    assert ours.alphas_cumprod[-1] > 0


@pytest.mark.parametrize("kind", SCHEDULERS)
def test_noise_and_velocity_are_the_scheduler_s(kind: str, draws: tuple[torch.Tensor, ...]) -> None:
    x0, noise, _ = draws
    ours, theirs = schedule(kind), scheduler(kind)
    assert torch.equal(ours.add_noise(x0, noise, TIMESTEPS), theirs.add_noise(x0, noise, TIMESTEPS))
    assert torch.equal(ours.velocity(x0, noise, TIMESTEPS), theirs.get_velocity(x0, noise, TIMESTEPS))


@pytest.mark.parametrize("kind", SCHEDULERS)
def test_the_true_velocity_gives_x0_back(kind: str, draws: tuple[torch.Tensor, ...]) -> None:
    x0, noise, _ = draws
    ours = schedule(kind)
    x_t, velocity = ours.add_noise(x0, noise, TIMESTEPS), ours.velocity(x0, noise, TIMESTEPS)
    signal, scale = ours.signal_and_noise(TIMESTEPS)
    torch.testing.assert_close(signal * x_t - scale * velocity, x0)


@pytest.mark.parametrize("kind", SCHEDULERS)
def test_loss_is_the_error_of_x0_over_one_minus_alpha(kind: str, draws: tuple[torch.Tensor, ...]) -> None:
    x0, noise, predicted = draws
    ours = schedule(kind)
    losses = loss(ours, lambda x_t, t: predicted, x0, noise, TIMESTEPS)
    x_t = scheduler(kind).add_noise(x0.double(), noise.double(), TIMESTEPS)
    abar = scheduler(kind).alphas_cumprod[TIMESTEPS].view(-1, 1, 1, 1, 1)
    x0_hat = abar.sqrt() * x_t - (1 - abar).sqrt() * predicted.double()
    weighted = ((x0_hat - x0.double()) ** 2 / (1 - abar)).mean(dim=(1, 2, 3, 4))
    torch.testing.assert_close(losses.double(), weighted, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(losses[0], weighted[0].float(), rtol=1e-4, atol=0)


def test_loss_is_per_sample(draws: tuple[torch.Tensor, ...]) -> None:
    x0, noise, predicted = draws
    ours = schedule("5b")

    def alone(i: int) -> torch.Tensor:
        one = slice(i, i + 1)
        return loss(ours, lambda x_t, t: predicted[one], x0[one], noise[one], TIMESTEPS[one])[0]

    losses = loss(ours, lambda x_t, t: predicted, x0, noise, TIMESTEPS)
    assert losses.shape == (len(TIMESTEPS),)
    torch.testing.assert_close(losses, torch.stack([alone(i) for i in range(len(TIMESTEPS))]), rtol=1e-6, atol=0)
    right = ours.velocity(x0, noise, TIMESTEPS)
    right[3] += 1.0
    losses = loss(ours, lambda x_t, t: right, x0, noise, TIMESTEPS)
    torch.testing.assert_close(losses, torch.tensor([0.0, 0, 0, 1, 0, 0, 0]))


def test_loss_is_fp32_whatever_the_network_returns(draws: tuple[torch.Tensor, ...]) -> None:
    x0, noise, predicted = draws
    seen = []

    def predict(x_t: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        seen.append((x_t.dtype, timestep))
        return predicted.bfloat16()

    ours = schedule("5b")
    losses = loss(ours, predict, x0, noise, TIMESTEPS)
    assert losses.dtype == torch.float32
    assert seen[0][0] == torch.float32
    assert torch.equal(seen[0][1], TIMESTEPS)
    rounded = predicted.bfloat16().float()
    assert torch.equal(losses, loss(ours, lambda x_t, t: rounded, x0, noise, TIMESTEPS))


def test_bf16_latents_do_not_round_the_schedule(draws: tuple[torch.Tensor, ...]) -> None:
    x0, noise, _ = (draw.bfloat16() for draw in draws)
    ours = schedule("5b")
    assert ours.add_noise(x0, noise, TIMESTEPS).dtype == torch.float32
    assert torch.equal(
        ours.add_noise(x0, noise, TIMESTEPS), scheduler("5b").add_noise(x0.float(), noise.float(), TIMESTEPS)
    )
    signal, sigma = ours.signal_and_noise(torch.arange(1000))
    assert len(sigma.unique()) == 1000
    assert (sigma > 0).all()
    torch.testing.assert_close(signal**2 + sigma**2, torch.ones_like(signal))


def test_to_keeps_the_numbers() -> None:
    moved = schedule("2b").to(torch.device("cpu"))
    assert torch.equal(moved.alphas_cumprod, schedule("2b").alphas_cumprod)


# -- weightings --------------------------------------------------------------------------------------------------------

GAMMA, K = 3.0, 0.5
# The published weightings as functions of the signal-to-noise ratio, for the error of x0, of eps or of v.
PUBLISHED_WEIGHTS = {
    "min_snr": ("x0", lambda snr: snr.clamp(max=GAMMA)),
    "min_snr_plus_one": ("x0", lambda snr: (snr + 1).clamp(max=GAMMA)),
    "soft_min_snr": ("x0", lambda snr: snr * GAMMA / (snr + GAMMA)),
    "debiased": ("eps", lambda snr: 1 / snr.sqrt()),
    "p2": ("eps", lambda snr: 1 / (K + snr) ** 2),
    "none": ("v", torch.ones_like),
}


def weights(kind: str, weighting: str) -> torch.Tensor:
    flags = LossFlags(loss_weighting=weighting, snr_gamma=GAMMA, p2_gamma=2.0, p2_k=K)
    return loss_weights(schedule(kind), flags)


@pytest.mark.parametrize("kind", SCHEDULERS)
@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_weighted_velocity_errors_are_the_published_losses(
    kind: str, weighting: str, draws: tuple[torch.Tensor, ...]
) -> None:
    """Compares all timesteps except the last, where eps does not follow from v and ratios of SNR are infinite."""
    x0, noise, predicted = (draw.double()[:1].expand(999, -1, -1, -1, -1) for draw in draws)
    of = scheduler(kind)
    timesteps = torch.arange(999)
    abar = of.alphas_cumprod.double()[timesteps].view(-1, 1, 1, 1, 1)
    x_t, v = of.add_noise(x0, noise, timesteps), of.get_velocity(x0, noise, timesteps)
    errors = {
        "x0": abar.sqrt() * x_t - (1 - abar).sqrt() * predicted - x0,
        "eps": abar.sqrt() * predicted + (1 - abar).sqrt() * x_t - noise,
        "v": predicted - v,
    }
    name, published = PUBLISHED_WEIGHTS[weighting]
    expected = published(compute_snr(of, timesteps).double()) * errors[name].square().mean(dim=(1, 2, 3, 4))
    ours = weights(kind, weighting)[:-1] * errors["v"].square().mean(dim=(1, 2, 3, 4))
    torch.testing.assert_close(ours, expected, rtol=2e-3, atol=1e-7)  # in fp32, 1 - abar is imprecise if abar is near 1


@pytest.mark.parametrize("kind", SCHEDULERS)
@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_weights_are_finite_where_there_is_no_signal(kind: str, weighting: str) -> None:
    found = weights(kind, weighting)
    assert (found.shape, found.dtype) == ((1000,), torch.float32)
    assert torch.isfinite(found).all()
    assert (found[:-1] > 0).all()
    assert found[-1] == (1.0 if weighting in ("none", "min_snr_plus_one") else 0.0)


def test_weights_follow_their_parameters() -> None:
    of = schedule("5b")

    def made(**flags: Any) -> torch.Tensor:
        return loss_weights(of, LossFlags(**flags))

    assert LossFlags().loss_weighting == "none"
    assert made().eq(1).all()
    gammas = [made(loss_weighting="min_snr", snr_gamma=gamma) for gamma in (1.0, 5.0, 1e9)]
    assert (gammas[0] <= gammas[1]).all()
    torch.testing.assert_close(gammas[2], of.alphas_cumprod)  # without a cap, it is the error of eps
    assert made(loss_weighting="p2", p2_gamma=0.0).equal(of.alphas_cumprod)
    assert not made(loss_weighting="p2", p2_k=2.0).equal(made(loss_weighting="p2"))
