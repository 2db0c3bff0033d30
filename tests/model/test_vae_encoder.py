"""Compares the optimized encoder with that of diffusers: the same moments, and few graphs for all sizes."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKLCogVideoX
from torch import Tensor

from cogvideox.config.flags import ModelFlags
from cogvideox.model import vae_encoder
from cogvideox.model.models import load_vae

SIZES = [(1, 48, 64), (9, 32, 40), (16, 24, 16), (17, 48, 64), (21, 16, 16)]  # frames, height, width


@pytest.fixture
def vae(tiny: Callable[[str], Path]) -> Any:
    """Returns a tiny VAE with three widths, as that of CogVideoX, and with norms that are not the identity."""
    generator = torch.Generator().manual_seed(0)
    config = load_vae(ModelFlags(str(tiny("5b"))), torch.float32).config
    with torch.random.fork_rng():
        torch.manual_seed(0)
        vae = AutoencoderKLCogVideoX.from_config({**config, "block_out_channels": (8, 16, 16, 32)})
    vae.requires_grad_(False).eval()
    for module in vae.encoder.modules():
        if isinstance(module, torch.nn.GroupNorm):
            for parameter in module.parameters():
                parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator)
    return vae


def quick(vae: Any, compiled: bool = False) -> Any:
    """Returns an optimized copy."""
    copied = copy.deepcopy(vae)
    vae_encoder.optimize_encoder(copied, compiled)
    return copied


def clip(frames: int, height: int, width: int) -> Tensor:
    generator = torch.Generator().manual_seed(frames)
    return torch.randn(1, 3, frames, height, width, generator=generator)


@torch.no_grad()
def moments(vae: Any, x: Tensor) -> Tensor:
    """Returns the moments of encode.posterior_moments in fp32."""
    return vae.encode(x.to(vae.device, vae.dtype)).latent_dist.parameters.float().cpu()  # type: ignore[no-any-return]


def apart(found: Tensor, right: Tensor) -> float:
    """Returns the largest difference relative to the largest value."""
    return float((found - right).abs().max() / right.abs().max())


@pytest.mark.parametrize("size", SIZES)
def test_moments_are_those_of_diffusers(vae: Any, size: tuple[int, int, int]) -> None:
    x = clip(*size)
    assert apart(moments(quick(vae), x), moments(vae, x)) < 1e-5


def test_in_tiles_too(vae: Any) -> None:
    x = clip(9, 96, 64)
    copied = quick(vae)
    for each in (vae, copied):
        each.enable_tiling(32, 32)
    assert apart(moments(copied, x), moments(vae, x)) < 1e-5


def test_a_large_offset_does_not_reduce_precision(vae: Any) -> None:
    """Variances are computed around the mean; a difference of large squares would lose all digits."""
    x = 300 + clip(4, 8, 8).expand(1, 3, 4, 8, 8)[:, :1].repeat(1, 32, 1, 1, 1)
    norm = torch.nn.GroupNorm(8, 32).requires_grad_(False)
    functions = vae_encoder.scale_and_shift, vae_encoder.activate_into
    found = vae_encoder.padded(x, norm, None, functions)[:, :, 2:]
    right = torch.nn.functional.silu(norm.double()(x.double()))
    assert apart(found.double(), right) < 1e-4


def test_bf16_is_no_farther_from_fp32(vae: Any) -> None:
    x = clip(17, 48, 64)
    exact = moments(vae, x)
    rough = vae.to(torch.bfloat16)
    stock, optimized = moments(rough, x), moments(quick(rough), x)
    assert (optimized - exact).norm() <= 1.05 * (stock - exact).norm()


def test_two_graphs_for_each_number_of_channels(vae: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The functions are traced, but no kernels are compiled."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    resnets = [resnet for block in vae.encoder.down_blocks for resnet in block.resnets]
    channels = {norm.num_channels for resnet in resnets for norm in (resnet.norm1, resnet.norm2)}
    copied = quick(vae, compiled=True)
    for size in SIZES:
        assert apart(moments(copied, clip(*size)), moments(vae, clip(*size))) < 1e-5
    assert len(channels) == 3
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1 + 2 * len(
        channels
    )  # one graph is that of the test whether the compiler works


def test_weights_and_names_stay(vae: Any) -> None:
    copied = quick(vae).state_dict()
    assert list(copied) == list(vae.state_dict())
    assert all(copied[name].equal(tensor) for name, tensor in vae.state_dict().items())


def test_the_encoder_is_unchanged_if_the_compiler_fails(vae: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_compiler(function: Any, **_: Any) -> Any:
        raise RuntimeError("no compiler")

    monkeypatch.setattr(torch, "compile", no_compiler)
    strides = [tensor.stride() for tensor in vae.state_dict().values()]
    with pytest.raises(RuntimeError, match="no compiler"):
        vae_encoder.optimize_encoder(vae)
    assert [tensor.stride() for tensor in vae.state_dict().values()] == strides
    assert not any("forward" in vars(module) for module in vae.modules())


def test_two_clips_at_once_are_refused(vae: Any) -> None:
    with pytest.raises(ValueError, match="takes one clip"):
        moments(quick(vae), clip(9, 32, 40).repeat(2, 1, 1, 1, 1))


def test_another_encoder_is_refused(vae: Any) -> None:
    vae.encoder.mid_block.resnets[0].conv1.pad_mode = "replicate"
    with pytest.raises(ValueError, match="not those of CogVideoX"):
        vae_encoder.optimize_encoder(vae)


@pytest.mark.gpu
@pytest.mark.parametrize("size", SIZES)
def test_on_a_gpu(vae: Any, size: tuple[int, int, int]) -> None:
    x = clip(*size)
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        stock = moments(vae.cuda(), x)
        assert apart(moments(quick(vae, compiled=True), x), stock) < 1e-4
