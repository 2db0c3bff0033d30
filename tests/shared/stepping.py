"""Provides parameters, losses and steps for the tests of optimizers. Libraries quantize only the largest tensor.

The size of each tensor is a multiple of a CPU's vector length, as in CogVideoX. A CPU rounds incomplete vectors
differently.
"""

from __future__ import annotations

import torch
from torch.nn import Parameter

from cogvideox.optimizer.step import MasterWeights, StepResult

ADAM_CLASSES = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}  # by --optimizer
SHAPES: dict[str, tuple[int, ...]] = {"down": (64, 64), "up": (6, 8), "bias": (16,)}


def parameters(
    dtype: torch.dtype = torch.float32, seed: int = 0, shapes: dict[str, tuple[int, ...]] = SHAPES
) -> dict[str, Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return {name: Parameter(torch.randn(shape, generator=generator).to(dtype)) for name, shape in shapes.items()}


def factors(step: int, size: float = 1.0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(100 + step)
    return {name: size * torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


def loss_of(params: dict[str, Parameter], step: int, size: float = 1.0) -> torch.Tensor:
    """Returns a loss whose gradients differ from step to step."""
    weights = factors(step, size)
    return sum(((p.float() - weights[name].to(p.device)) ** 2).sum() for name, p in params.items())  # type: ignore[return-value]


def rate(step: int) -> float:
    return 0.01 * (1 + step % 3)


def train(engine: MasterWeights, params: dict[str, Parameter], first: int, last: int) -> list[StepResult]:
    results = []
    for step in range(first, last):
        engine.backward(loss_of(params, step))
        results.append(engine.step(rate(step)))
    return results


def values(result: StepResult) -> dict[str, float]:
    return dict(zip(StepResult.NAMES, result.values.tolist(), strict=True))


def state_equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor], ignore: tuple[str, ...] = ()) -> bool:
    assert one.keys() == other.keys()
    return all(torch.equal(one[name], other[name]) for name in one if name not in ignore)
