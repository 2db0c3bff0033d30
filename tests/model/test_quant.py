"""Compares quantized matrices with those of bitsandbytes, torchao and torch."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from cogvideox.model.quant import GROUP, KINDS, LARGEST, NF4, Quantized, dequantize, quantize


def matrix(dtype: torch.dtype = torch.float32) -> Tensor:
    """Returns random numbers, each row of a different magnitude, and one row of zeros."""
    generator = torch.Generator().manual_seed(0)
    sizes = torch.logspace(-3, 2, 96)[:, None]
    weight = torch.randn(96, 320, generator=generator) * sizes
    weight[7] = 0
    return weight.to(dtype)


def in_groups(weight: Tensor, stored: Quantized) -> Tensor:
    """Returns the numbers as (rows, groups with one scale each, numbers of a group)."""
    return weight.unflatten(1, (stored.scale.shape[1], -1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_the_error_of_a_number(kind: str, dtype: torch.dtype) -> None:
    """The error is at most half the distance to the next level, in units of the group's scale."""
    weight = matrix(dtype)
    stored = quantize(weight, kind)
    right = in_groups(weight.float(), stored) / stored.scale.clamp(min=1e-30)[..., None]
    found = in_groups(dequantize(stored, torch.float32), stored) / stored.scale.clamp(min=1e-30)[..., None]
    if kind == "fp8":  # 3 bits after the leading one, subnormal below 2^-6
        half = torch.exp2(torch.floor(torch.log2(right.abs().clamp(min=2**-6))) - 4)
    else:
        half = torch.tensor(0.5 if kind == "int8" else max(b - a for a, b in itertools.pairwise(NF4)) / 2)
    assert ((found - right).abs() <= half * 1.0001).all()
    assert (dequantize(stored, torch.float32)[7] == 0).all()
    torch.testing.assert_close(
        found.abs().amax(2)[:7], torch.full_like(stored.scale[:7], LARGEST[kind]), rtol=1e-5, atol=0
    )


@pytest.mark.parametrize(("kind", "most"), [("int8", 0.01), ("fp8", 0.03), ("nf4", 0.1)])
def test_the_error_of_normal_numbers(kind: str, most: float) -> None:
    weight = torch.randn(256, 512, generator=torch.Generator().manual_seed(0))
    error = (dequantize(quantize(weight, kind), torch.float32) - weight).norm() / weight.norm()
    assert most / 2 < error < most


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nf4_is_that_of_bitsandbytes(dtype: torch.dtype) -> None:
    from bitsandbytes import functional

    weight = matrix(dtype)
    stored = quantize(weight, "nf4")
    data, state = functional.quantize_4bit(weight, blocksize=GROUP, quant_type="nf4")
    assert stored.data.flatten().equal(data.flatten())
    assert stored.scale.flatten().equal(state.absmax)
    assert dequantize(stored, dtype).equal(functional.dequantize_4bit(data, state))


def test_int8_is_that_of_torchao() -> None:
    from torchao.quantization import quant_primitives as torchao

    weight, block = matrix(), (1, 320)
    arguments: Any = (torchao.MappingType.SYMMETRIC, block, torch.int8, -127, 127)
    scale, zero = torchao.choose_qparams_affine(weight, *arguments, scale_dtype=torch.float32)
    data = torchao.quantize_affine(weight, block, scale, zero, torch.int8, -127, 127)
    stored = quantize(weight, "int8")
    differences = (stored.data.view(torch.int8).int() - data.int()).abs()
    assert differences.max() <= 1  # it multiplies by 1 / scale, so halves may be rounded in the other direction
    assert differences.float().mean() < 1e-3
    rows = torch.arange(96) != 7
    torch.testing.assert_close(stored.scale[rows], scale.view(96, 1)[rows])


def test_fp8_is_that_of_torch() -> None:
    weight = matrix()
    stored = quantize(weight, "fp8")
    numbers = stored.data.view(torch.float8_e4m3fn)
    assert numbers.float().isfinite().all()
    assert dequantize(stored, torch.float32).equal(numbers.float() * stored.scale)
    assert numbers.float()[8:].equal((weight / stored.scale).to(torch.float8_e4m3fn).float()[8:])


@pytest.mark.parametrize(("kind", "bits"), [("int8", 8), ("fp8", 8), ("nf4", 4.5)])
def test_the_bits_of_a_number(kind: str, bits: float) -> None:
    """The size is also known on the meta device, where plans compute it."""
    for device in ("cpu", "meta"):
        stored = (
            quantize(torch.empty(3072, 12288, device=device), kind) if device == "meta" else quantize(matrix(), kind)
        )
        numbers = stored.data.shape[0] * stored.data.shape[1] * (2 if kind == "nf4" else 1)
        share = 8 * (stored.data.nbytes + stored.scale.nbytes) / numbers
        assert share == pytest.approx(bits, rel=0.02)


def test_rows_that_are_not_multiples_of_a_group() -> None:
    with pytest.raises(ValueError, match="multiple of 64 numbers, not 96"):
        quantize(torch.zeros(4, 96), "nf4")
    assert quantize(torch.zeros(4, 96), "int8").data.shape == (4, 96)
