"""Frozen weights in fewer bits: quantized once, when they are placed, and made whole just before each product.

A byte is a number or two, looked up in a table, times the scale of its group: a row in int8 and fp8, 64 numbers of a
row in nf4. So one short function, of operations that torch compiles, makes any kind whole, on cards without fp8 too.
int8 is symmetric, fp8 is float8_e4m3fn; nf4 is that of QLoRA (arXiv:2305.14314, appendix E), byte for byte as
bitsandbytes packs it.
"""

from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch.nn import functional as F

KINDS = ("int8", "fp8", "nf4")
GROUP = 64  # numbers of a row under one scale in nf4
LARGEST = {"int8": 127.0, "fp8": 448.0, "nf4": 1.0}  # what the largest number of a group becomes
NF4 = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)
"""Quantiles of the normal distribution, scaled to [-1, 1], with a zero."""


class Quantized(NamedTuple):
    """A matrix, (out, in), in fewer bits."""

    data: Tensor  # (out, in / numbers a byte), uint8
    scale: Tensor  # (out, groups), fp32
    table: Tensor  # (256, numbers a byte), fp32: what a byte means


Weight: TypeAlias = Tensor | Quantized


def quantize(weight: Tensor, kind: str) -> Quantized:
    """A matrix in one of KINDS, where it lies.

    Raises:
        ValueError: nf4, and rows are not made of whole groups.
    """
    if kind == "nf4" and weight.shape[1] % GROUP:
        raise ValueError(f"nf4 takes rows of multiples of {GROUP} numbers, not {weight.shape[1]}")
    groups = weight.float().unflatten(1, (-1, GROUP if kind == "nf4" else weight.shape[1]))
    scale = groups.abs().amax(2) / LARGEST[kind]
    scaled = groups / scale.clamp(min=torch.finfo(torch.float32).tiny)[..., None]
    return Quantized(as_bytes(scaled.flatten(1), kind), scale, table_of(kind).to(weight.device))


def as_bytes(scaled: Tensor, kind: str) -> Tensor:
    """Scaled numbers, rounded to those of the table."""
    if kind == "int8":
        return scaled.round().to(torch.int8).view(torch.uint8)
    if kind == "fp8":
        return scaled.to(torch.float8_e4m3fn).view(torch.uint8)
    levels = torch.tensor(NF4)
    nearest = torch.bucketize(scaled, ((levels[1:] + levels[:-1]) / 2).to(scaled.device), out_int32=True)
    first, second = nearest.to(torch.uint8).unflatten(1, (-1, 2)).unbind(2)
    return first << 4 | second


def table_of(kind: str) -> Tensor:
    """What each of the 256 bytes means, (256, numbers a byte)."""
    every = torch.arange(256, dtype=torch.uint8)
    if kind == "nf4":
        levels = torch.tensor(NF4)
        return torch.stack([levels[(every >> 4).int()], levels[(every & 15).int()]], dim=1)
    return every.view({"int8": torch.int8, "fp8": torch.float8_e4m3fn}[kind]).float()[:, None]


def dequantize(weight: Weight, dtype: torch.dtype) -> Tensor:
    """The matrix, (out, in): in a type if it was quantized, else as it is."""
    if isinstance(weight, Tensor):
        return weight
    numbers = F.embedding(weight.data.int(), weight.table).flatten(1)
    scaled = numbers.unflatten(1, (weight.scale.shape[1], -1)) * weight.scale[..., None]
    return scaled.flatten(1).to(dtype)
