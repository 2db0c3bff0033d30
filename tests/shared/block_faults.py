"""Plants faults in blocks.py. With each of them, a block still trains, but differs from the block of diffusers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from cogvideox.model import blocks

Function = Callable[..., Any]


def other_way(right: Function, x: Any, norm: Any, rotary: Any) -> Any:
    return right(x, norm, rotary and (rotary[0], -rotary[1]))


def text_and_video_swapped(right: Function, p: Any, shared: Any, length: int) -> Any:
    """Swaps the modulations of text and video, which are the two halves of the layer's output."""
    halves = [None if part is None else part.unflatten(0, (2, -1)).flip(0).flatten(0, 1) for part in (p.weight, p.bias)]
    return right(p._replace(weight=halves[0], bias=halves[1]), shared, length)


def not_gated(right: Function, p: Any, shared: Any, length: int) -> Any:
    shift, scale, gate = right(p, shared, length)
    return shift, scale, torch.ones_like(gate)


BLOCK_FAULTS: dict[str, tuple[str, Function]] = {
    "rotary embedding turns the other way": ("rotate", other_way),
    "text and video have each other's modulation": ("modulations", text_and_video_swapped),
    "no gates": ("modulations", not_gated),
    "another activation": ("gelu", lambda _, f: torch.nn.functional.silu(f)),
}


def plant(patch: pytest.MonkeyPatch, fault: str) -> None:
    """Replaces a function of blocks.py by one with the fault."""
    name, wrong = BLOCK_FAULTS[fault]
    right = getattr(blocks, name)
    patch.setattr(blocks, name, lambda *arguments: wrong(right, *arguments))
