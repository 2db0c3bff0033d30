"""Quantizes frozen weights to int8, fp8 or nf4, and dequantizes them just before each matrix product.

Each byte is an index into a table, which holds the one number (int8, fp8) or two numbers (nf4) that the byte stands
for. A number is multiplied by the fp32 scale of its group: a row of the matrix in int8 and fp8, 64 numbers of a row in
nf4. So the same few operations, which torch compiles, dequantize every kind, also on GPUs without fp8:

    number[o, i] = table[byte[o, i]] * scale[o, group of i]

int8 is symmetric (-127 to 127), fp8 is float8_e4m3fn, and nf4 is the 4-bit normal float of QLoRA (arXiv:2305.14314),
packed byte for byte as bitsandbytes does.
"""

from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch.nn import functional as F

KINDS = ("int8", "fp8", "nf4")
GROUP = 64  # numbers of a row that share one scale in nf4
LARGEST = {"int8": 127.0, "fp8": 448.0, "nf4": 1.0}  # the value to which the largest number of a group is scaled
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
"""The 16 levels of nf4: quantiles of the normal distribution, scaled to [-1, 1], one of them exactly zero."""


class Quantized(NamedTuple):
    """Stores a quantized matrix of shape (out, in)."""

    data: Tensor  # (out, in / numbers per byte), uint8
    scale: Tensor  # (out, groups), fp32
    table: Tensor  # (256, numbers per byte), fp32: the numbers that each byte stands for


Weight: TypeAlias = Tensor | Quantized


def quantize(weight: Tensor, kind: str) -> Quantized:
    """Quantizes a matrix on the device where it is stored.

    Args:
        weight: The matrix, (out, in), of any floating-point type.
        kind: One of KINDS.

    Raises:
        ValueError: ``kind`` is nf4 and the length of a row is not a multiple of the group size.
    """
    if kind == "nf4" and weight.shape[1] % GROUP:
        raise ValueError(f"nf4 requires rows of a multiple of {GROUP} numbers, not {weight.shape[1]}")
    # (out, in) -> (out, groups, numbers of a group)
    groups = weight.float().unflatten(1, (-1, GROUP if kind == "nf4" else weight.shape[1]))
    scale = groups.abs().amax(2) / LARGEST[kind]
    # A group of zeros has scale 0; the smallest positive number in its place avoids 0 / 0.
    scaled = groups / scale.clamp(min=torch.finfo(torch.float32).tiny)[..., None]
    return Quantized(as_bytes(scaled.flatten(1), kind), scale, table_of(kind).to(weight.device))


def as_bytes(scaled: Tensor, kind: str) -> Tensor:
    """Rounds scaled numbers, (out, in), to those of the table; returns their bytes, (out, in / numbers per byte)."""
    if kind == "int8":
        return scaled.round().to(torch.int8).view(torch.uint8)
    if kind == "fp8":
        return scaled.to(torch.float8_e4m3fn).view(torch.uint8)
    levels = torch.tensor(NF4)
    nearest = torch.bucketize(scaled, ((levels[1:] + levels[:-1]) / 2).to(scaled.device), out_int32=True)
    first, second = nearest.to(torch.uint8).unflatten(1, (-1, 2)).unbind(2)
    return first << 4 | second  # two numbers per byte, the first one in the high bits


def table_of(kind: str) -> Tensor:
    """Returns the numbers that each of the 256 bytes stands for, (256, numbers per byte), fp32."""
    every = torch.arange(256, dtype=torch.uint8)
    if kind == "nf4":
        levels = torch.tensor(NF4)
        return torch.stack([levels[(every >> 4).int()], levels[(every & 15).int()]], dim=1)
    return every.view({"int8": torch.int8, "fp8": torch.float8_e4m3fn}[kind]).float()[:, None]


def dequantize(weight: Weight, dtype: torch.dtype) -> Tensor:
    """Returns the matrix, (out, in).

    Args:
        weight: A plain matrix, which is returned unchanged, or a quantized one.
        dtype: The type of the result, if ``weight`` is quantized.
    """
    if isinstance(weight, Tensor):
        return weight
    # The lookup: (out, bytes) -> (out, bytes, numbers per byte) -> (out, in). Then one scale per group.
    numbers = F.embedding(weight.data.int(), weight.table).flatten(1)
    scaled = numbers.unflatten(1, (weight.scale.shape[1], -1)) * weight.scale[..., None]
    return scaled.flatten(1).to(dtype)
