"""A forward and a backward pass of the largest bucket before the first step, where no plan bounds the memory.

Buckets come in any order, so without a plan the one that does not fit may come after a night. Its gradients are
dropped, and nothing of the run changes: dropout, timesteps and noise are functions of the step, not of what ran before.
Covered: weights, masters, what the optimizer keeps (room is held for what its first step makes), activations and
gradients. Not covered: under DeepSpeed its own buffers of gradients, which its first backward pass makes.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from cogvideox import stopping
from cogvideox.data.dataset import Batch, LatentDataset, collate
from cogvideox.data.sampler import Visit
from cogvideox.errors import first_line
from cogvideox.optimizer.engine import Engine
from cogvideox.planning.execution import Plan
from cogvideox.planning.plan import ModulePlan
from cogvideox.runtime.run import Run


def has_no_bound(plan: Plan, device: torch.device) -> bool:
    """Whether nothing has compared what a run needs with the memory of its GPU."""
    return isinstance(plan, ModulePlan) and device.type == "cuda"


def largest_batch(dataset: LatentDataset, samples: int) -> Batch:
    """A batch of the bucket with the most tokens: the first of its clips, as often as a micro-batch has samples."""
    buckets = [sample.bucket for sample in dataset.index.samples]
    first = max(range(len(buckets)), key=lambda place: dataset.geometry.tokens(buckets[place]))
    return collate([dataset[Visit(first, 0)]] * samples)


def warm_up(
    run: Run, engine: Engine, dataset: LatentDataset, samples: int, losses_of: Callable[[Any, Batch], Tensor]
) -> None:
    """Runs it on all ranks; ``losses_of`` is the loss of each sample of a batch on the device, of a model.

    Raises:
        OutOfMemoryError: the memory of one rank does not suffice; on every rank, so that none waits for another.
    """
    batch = largest_batch(dataset, samples)
    shape = "x".join(map(str, batch.x0_BFCHW.shape))
    run.say(f"no plan bounds the memory: one pass of the largest bucket, latents {shape}, shows now whether it fits")
    lacking = []
    with run.ranks.together():
        try:
            engine.rehearse(lambda model: losses_of(model, batch.to(run.device)).mean())
            stopping.unit("warm-up")
        except torch.OutOfMemoryError as error:
            lacking.append(first_line(error))
    if reasons := run.ranks.gather(lacking):
        raise torch.OutOfMemoryError(f"largest bucket, latents {shape}: {reasons[0]}")
