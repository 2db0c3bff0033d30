"""Trains fp32 weights that FSDP2 shards over the processes, and gathers them for work that each process does alone.

FSDP2 (torch.distributed.fsdp.fully_shard) keeps rows of each parameter on each process, gathers the parameters of a
block in the compute type just before the block needs them, and sums gradients in fp32 into the rows. So the rows are
the master weights. ``ShardedWeights`` steps an optimizer on them; only the gradient norm and the loss cross processes.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torch.nn import Parameter

from cogvideox.optimizer.resident_weights import MakeOptimizer, Resident, group_numbers
from cogvideox.optimizer.shard_files import Shard
from cogvideox.optimizer.state_tensors import by_parameter
from cogvideox.optimizer.step import UNMEASURED, LossScale, RankNumbers, StepNumbers, StepResult, skip_and_clip


def gathered_modules(transformer: Any) -> list[FSDPModule]:
    """Returns the modules that FSDP2 gathers as one: each block, and the transformer for everything else."""
    return [module for module in transformer.modules() if isinstance(module, FSDPModule)]


def is_sharded(transformer: Any) -> bool:
    """Returns whether FSDP2 shards the transformer."""
    return isinstance(transformer, FSDPModule)


def free_gathered(transformer: Any) -> None:
    """Frees gathered copies of the weights, so that the next pass gathers them again."""
    for module in gathered_modules(transformer):
        module.reshard()


@contextmanager
def gathered(transformer: Any) -> Iterator[None]:
    """Gives each process a complete copy of all weights, in the compute type, while the context lasts.

    Inside, processes may run any number of forward passes, each on its own. A copy that is changed there is lost.
    """
    modules = gathered_modules(transformer)
    for module in modules:
        module.set_reshard_after_forward(False, recurse=False)
        module.unshard()
    try:
        yield
    finally:
        for module in modules:
            module.set_reshard_after_forward(module is not transformer, recurse=False)
            module.reshard()


class ShardedWeights:
    """Steps an optimizer on this process's rows of parameters that FSDP2 shards.

    It does for them what ``MasterWeights`` does for parameters of which each process has a copy, with the same results
    up to the order of sums, and with state of the same names. It works for optimizers that treat each number on its
    own.

    Args:
        transformer: The model after fully_shard.
        make: Makes the optimizer; only torch's fused ones are supported.
        max_grad_norm: Gradients with a larger norm are scaled down to it; 0 disables clipping.
        dynamic_scale: Whether the loss is scaled so that fp16 gradients do not underflow.
        device: Where losses are computed. The rows may be on the host.
    """

    def __init__(
        self, transformer: Any, make: MakeOptimizer, max_grad_norm: float, dynamic_scale: bool, device: torch.device
    ) -> None:
        self.transformer, self.device, self.max_grad_norm = transformer, device, max_grad_norm
        free_gathered(transformer)  # a forward pass leaves what belongs to no block gathered
        self.sharded: dict[str, DTensor] = dict(transformer.named_parameters())
        self.parameters = {name: Parameter(sharded.to_local().detach()) for name, sharded in self.sharded.items()}
        first = next(iter(self.sharded.values()))
        self.group = first.device_mesh.get_group(first.device_mesh.ndim - 1)  # HSDP: the ranks that share one copy
        self.numbers = StepNumbers(device)
        self.scale = LossScale(dynamic_scale, device)
        zeros = [torch.zeros_like(parameter) for parameter in self.parameters.values()]
        self.resident = Resident(self.parameters, zeros, make)
        del zeros
        self.fresh_numbers = group_numbers(self.resident.optimizer)

    def backward(self, loss: Tensor) -> None:
        """Adds the gradients of this micro-batch's share of the step's mean loss; FSDP2 averages over the ranks."""
        self.numbers.loss += loss.detach()
        (loss * self.scale.value).backward()

    def step(self, lr: float, own: RankNumbers = UNMEASURED) -> StepResult:
        """Makes one optimizer step over all ranks. It changes nothing if a gradient is not finite."""
        gradients = [self._gradient(name) for name in self.sharded]
        squares = torch.stack([norm.to(self.device) for norm in torch._foreach_norm(gradients)]).square().sum()
        dist.all_reduce(squares, group=self.group)
        reduced = self.numbers.reduce(own)
        norm = squares.sqrt() / self.scale.value
        skipped, clip = skip_and_clip(norm, self.max_grad_norm)
        where = gradients[0].device
        self.resident.update(gradients, lr, (clip * self.scale.value).to(where), skipped.to(where))
        result = StepResult.of(reduced, norm, skipped, self.scale.value)
        self.scale.adapt(skipped)
        self.drop()
        return result

    def _gradient(self, name: str) -> Tensor:
        gradient = self.sharded[name].grad
        assert isinstance(gradient, DTensor), f"{name} has no gradient"
        return gradient.to_local()

    def drop(self) -> None:
        """Drops gradients and losses, and copies of the weights that FSDP2 gathered before they changed."""
        self.numbers.loss.zero_()
        for sharded in self.sharded.values():
            sharded.grad = None
        free_gathered(self.transformer)

    def room_for_state(self) -> Tensor:
        """Returns an empty tensor: the optimizer's state exists already."""
        return torch.empty(0)

    def gathered(self) -> AbstractContextManager[None]:
        """Gives each process a complete copy of all weights while the context lasts."""
        return gathered(self.transformer)

    def wait(self) -> None:
        """Does nothing: no transfer runs between steps."""

    def named_masters(self) -> dict[str, Tensor]:
        """Returns this process's rows of the masters by the names of their parameters."""
        return self.resident.named_masters()

    def tensors(self) -> dict[str, Tensor]:
        """Returns what a resumed run needs, by name, with this process's rows of each sharded tensor."""
        return self.scale.state() | self.resident.state()

    def shards(self, tensors: dict[str, Tensor]) -> dict[str, Shard]:
        """Describes tensors that are named ``key/parameter`` for a file that all processes write together."""
        return {name: self._shard(name.partition("/")[2], tensor) for name, tensor in tensors.items()}

    def _shard(self, name: str, tensor: Tensor) -> Shard:
        if name not in self.sharded or not tensor.shape:
            return Shard(tensor, tensor.shape, writes=dist.get_rank() == 0)
        sharded = self.sharded[name]
        mesh = sharded.device_mesh
        _, offset = compute_local_shape_and_global_offset(sharded.shape, mesh, sharded.placements)
        coordinate = mesh.get_coordinate()
        assert coordinate is not None
        first = offset[0] * sharded.shape[1:].numel()
        return Shard(tensor, sharded.shape, first, writes=mesh.ndim == 1 or coordinate[0] == 0)

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        """Restores what ``tensors`` returned, from rows of any number of processes."""
        of = by_parameter(tensors)
        self.scale.load_state(tensors)
        self.resident.load_state(of, self.fresh_numbers)
        self.drop()
