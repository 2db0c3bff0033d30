"""Provides parameters, losses and steps for the tests of optimizers. Libraries quantize only the largest tensor.

The size of each tensor is a multiple of a CPU's vector length, as in CogVideoX. A CPU rounds incomplete vectors
differently.
"""

from __future__ import annotations

import torch
from torch.nn import Parameter

from cogvideox.optimizer.master_weights import MasterWeights
from cogvideox.optimizer.step import StepResult

ADAM_CLASSES = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}  # by --optimizer
SHAPES: dict[str, tuple[int, ...]] = {"down": (64, 64), "up": (6, 8), "bias": (16,)}


def parameters(
    dtype: torch.dtype = torch.float32, seed: int = 0, shapes: dict[str, tuple[int, ...]] = SHAPES
) -> dict[str, Parameter]:
    """Returns random parameters by name."""
    generator = torch.Generator().manual_seed(seed)
    return {name: Parameter(torch.randn(shape, generator=generator).to(dtype)) for name, shape in shapes.items()}


def targets(step: int, size: float = 1.0) -> dict[str, torch.Tensor]:
    """Returns the random tensors from which ``loss_of`` measures the distance at a step."""
    generator = torch.Generator().manual_seed(100 + step)
    return {name: size * torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


def loss_of(params: dict[str, Parameter], step: int, size: float = 1.0) -> torch.Tensor:
    """Returns a loss whose gradients differ from step to step."""
    wanted = targets(step, size)
    return sum(((p.float() - wanted[name].to(p.device)) ** 2).sum() for name, p in params.items())  # type: ignore[return-value]


def rate(step: int) -> float:
    """Returns a learning rate that changes from step to step."""
    return 0.01 * (1 + step % 3)


def train(engine: MasterWeights, params: dict[str, Parameter], first: int, last: int) -> list[StepResult]:
    """Makes the steps from ``first`` up to but not including ``last``."""
    results = []
    for step in range(first, last):
        engine.backward(loss_of(params, step))
        results.append(engine.step(rate(step)))
    return results


def values(result: StepResult) -> dict[str, float]:
    """Returns the numbers of a step by name."""
    return dict(zip(StepResult.NAMES, result.values.tolist(), strict=True))


def state_equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor], ignore: tuple[str, ...] = ()) -> bool:
    """Returns whether two states have the same tensors, except for those named in ``ignore``."""
    assert one.keys() == other.keys()
    return all(torch.equal(one[name], other[name]) for name in one if name not in ignore)
