"""Runs one forward and backward pass of the largest bucket before the first step, if no plan bounds the memory.

Buckets come in random order, so without a plan a bucket that does not fit might first appear after hours. ``warm_up``
finds it before the first step. Its gradients are dropped, and it does not change the run, because dropout, timesteps
and noise are functions of the step. It covers weights, master weights, optimizer state (it reserves what the first
optimizer step will allocate), activations and gradients. It does not cover the gradient buffers of DeepSpeed's first
backward pass.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from cogvideox import stopping
from cogvideox.data.dataset import Batch, LatentDataset, collate
from cogvideox.data.sampler import Visit
from cogvideox.errors import first_line
from cogvideox.optimizer.engine import Engine
from cogvideox.planning.execution import Plan
from cogvideox.planning.plan import ModulePlan
from cogvideox.runtime.run import Run


def has_no_bound(plan: Plan, device: torch.device) -> bool:
    """Returns whether no plan has compared the needs of a run with the memory of its GPU."""
    return isinstance(plan, ModulePlan) and device.type == "cuda"


def largest_batch(dataset: LatentDataset, samples: int) -> Batch:
    """Returns a batch of the bucket with the most tokens: its first clip, repeated to the size of a micro-batch."""
    buckets = [sample.bucket for sample in dataset.index.samples]
    first = max(range(len(buckets)), key=lambda place: dataset.geometry.tokens(buckets[place]))
    return collate([dataset[Visit(first, 0)]] * samples)


def warm_up(
    run: Run, engine: Engine, dataset: LatentDataset, samples: int, losses_of: Callable[[nn.Module, Batch], Tensor]
) -> None:
    """Runs the pass on all ranks.

    Args:
        run: The run.
        engine: The engine, which has the model and runs the backward pass.
        dataset: The training samples.
        samples: The number of samples in a micro-batch.
        losses_of: A function of a model and a batch on the device that returns the loss of each sample, (B,).

    Raises:
        OutOfMemoryError: The memory of one rank is not sufficient. It is raised on every rank, so that none waits for
            another forever.
    """
    batch = largest_batch(dataset, samples)
    shape = "x".join(map(str, batch.x0_BFCHW.shape))
    run.say(f"no plan bounds the memory: testing one pass of the largest bucket, latents {shape}")
    lacking = []
    with run.ranks.together():
        try:
            engine.rehearse(lambda model: losses_of(model, batch.to(run.device)).mean())
            stopping.unit("warm-up")
        except torch.OutOfMemoryError as error:
            lacking.append(first_line(error))
    if reasons := run.ranks.gather(lacking):
        raise torch.OutOfMemoryError(f"largest bucket, latents {shape}: {reasons[0]}")
