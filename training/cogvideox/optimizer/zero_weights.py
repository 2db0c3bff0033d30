"""Trains weights through DeepSpeed's ZeRO, and finds each weight in the flat tensors into which ZeRO joins their state.

ZeRO gives each process some elements of the fp32 masters and moments, joined into flat tensors:

    weights              |    a    |      b      |   c   |
    elements in ZeRO-2   |== rank 0 =====|== rank 1 =====|     of all weights one range
    elements in ZeRO-3   |==0=|==1=|===0==|===1==|=0=|=1=|     of each weight one range

So what a process has of a weight is one range of its elements, a ``Fragment``. ``ZeroWeights`` names these as
``MasterWeights`` names its complete tensors. Their checkpoints are therefore the same, for any number of processes, and
no process ever has the complete state. DeepSpeed's own checkpoint files are not used.
"""

import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import Module, Parameter

from cogvideox.config.deepspeed import ZERO_BUCKET, offload_device, sums_gradients, zero_stage
from cogvideox.config.flags import TrainFlags
from cogvideox.config.optimizers import make_optimizer
from cogvideox.config.options import TrainOptions, launched_processes
from cogvideox.optimizer.adam import MASTER
from cogvideox.optimizer.resident_weights import MakeOptimizer, Optimized
from cogvideox.optimizer.shard_files import Shard
from cogvideox.optimizer.step import (
    GOOD_STEPS,
    GROWTH_INTERVAL,
    INITIAL_SCALE,
    LOSS_SCALE,
    UNMEASURED,
    RankNumbers,
    StepNumbers,
    StepResult,
)

if TYPE_CHECKING:
    from accelerate import Accelerator


@dataclass(frozen=True)
class Fragment:
    """The elements of a weight that this process has: a range of one of ZeRO's flat tensors.

    Attributes:
        flat: The flat fp32 tensor of masters. The optimizer has flat moments of the same layout for it.
        where: The range in these tensors; it is empty if this process has no element of the weight.
        first: The index of the first element in the flattened weight.
        shape: The shape of the complete weight.
    """

    flat: Tensor
    where: slice
    first: int
    shape: torch.Size

    def tensors(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Returns the elements of master and moments by key, and scalars as they are.

        Args:
            state: The optimizer's state of ``flat``.
        """
        parts = {key: tensor[self.where] if tensor.shape else tensor for key, tensor in state.items()}
        return {MASTER: self.flat.detach()[self.where]} | parts


def fragment_of_zero_2(optimizer: Any, parameter: Any) -> Fragment:
    """Returns the fragment of a weight in DeepSpeed's optimizer of ZeRO-2."""
    found, masters = parameter._hp_mapping, optimizer.single_partition_of_fp32_groups
    if found is None:
        return Fragment(masters[0], slice(0), 0, parameter.shape)
    start, length = found.hp_fragment_address.start, found.hp_fragment_address.numel
    where = slice(start, start + length)
    return Fragment(masters[found.param_group_index], where, found.lp_fragment_address.start, parameter.shape)


def fragment_of_zero_3(optimizer: Any, parameter: Any) -> Fragment:
    """Returns the fragment of a weight in DeepSpeed's optimizer of ZeRO-3, without the padding at the weight's end."""
    group, start, padded = optimizer.grad_position[optimizer.get_param_id(parameter)]
    first = min(dist.get_rank() * padded, parameter.ds_numel)
    where = slice(start, start + min(padded, parameter.ds_numel - first))
    return Fragment(optimizer.fp32_partitioned_groups_flat[group], where, first, parameter.ds_shape)


class ZeroWeights:
    """Trains parameters through ZeRO-2 or ZeRO-3; DeepSpeed accumulates, clips, skips and steps.

    Args:
        accelerator: An Accelerator with a DeepSpeed plugin.
        transformer: The module with which the loss is computed.
        named: The trained parameters by name.
        options: The flags of the run, which replace what DeepSpeed's configuration says about them.

    Attributes:
        engine: What deepspeed.initialize returned; it runs the transformer.
        parameters: This process's elements of the masters by name.
    """

    def __init__(
        self, accelerator: "Accelerator", transformer: Module, named: dict[str, Parameter], options: TrainOptions
    ) -> None:
        plugin = accelerator.state.deepspeed_plugin
        self.divides_weights, self.accumulation = plugin.zero_stage == 3, options.train.gradient_accumulation_steps
        configure(plugin.deepspeed_config, options.train, sum(map(num_elements, named.values())))
        make = partial(make_optimizer, options.optimizer)
        self.engine, _ = accelerator.prepare(transformer, make(list(named.values())))
        self.optimizer: Any = self.engine.optimizer
        self.scaler: Any = self.optimizer.loss_scaler
        self.scaler.raise_error_at_min_scale = False  # Steps that are skipped at a scale of 1 are counted instead.
        self.device, self.numbers = accelerator.device, StepNumbers(accelerator.device)
        find = fragment_of_zero_3 if self.divides_weights else fragment_of_zero_2
        self.fragments = {name: find(self.optimizer, parameter) for name, parameter in named.items()}
        self.state: dict[Tensor, dict[str, Tensor]] = self.optimizer.optimizer.state
        self._create_state(make)
        self.parameters = {name: fragment.tensors({})[MASTER] for name, fragment in self.fragments.items()}

    def _create_state(self, make: MakeOptimizer) -> None:
        """Creates the state that the optimizer would create in its first step: counters, and moments of zero."""
        for flat in {fragment.flat: None for fragment in self.fragments.values()}:
            example = Parameter(flat.detach().new_zeros(1))
            state = Optimized([example], [torch.zeros_like(example)], make).optimizer.state[example]
            moments = {key: torch.zeros_like(flat.detach()) for key, value in state.items() if value.shape}
            self.state[flat] = state | moments

    def backward(self, loss: Tensor) -> None:
        """Adds the gradients of a micro-batch. The loss is multiplied because DeepSpeed divides by the accumulation."""
        self.numbers.loss += loss.detach()
        self.engine.backward(loss * self.accumulation)
        if not self.engine.is_gradient_accumulation_boundary():
            self.engine.step()

    def step(self, lr: float, own: RankNumbers = UNMEASURED) -> StepResult:
        """Makes the optimizer step after the last micro-batch. It changes nothing if a gradient is not finite."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        scale = torch.as_tensor(float(self.scaler.loss_scale), device=self.device)
        self.engine.step()
        reduced = self.numbers.reduce(own)
        norm = torch.as_tensor(self.engine.get_global_grad_norm() or 0.0, device=self.device).float()
        skipped = (~torch.isfinite(norm)).float() if self.engine.was_step_applied() else torch.ones_like(norm)
        return StepResult.of(reduced, norm, skipped, scale)

    def drop(self) -> None:
        """Drops losses that no step has used, and copies of the weights that ZeRO-3 gathered."""
        self.numbers.loss.zero_()
        if self.divides_weights:
            self.engine.empty_partition_cache()  # Its hooks expect the gradients of every parameter, and wait for them.

    def room_for_state(self) -> Tensor:
        """Returns an empty tensor: the optimizer's state exists already."""
        return torch.empty(0)

    def wait(self) -> None:
        """Does nothing: no transfer runs between steps."""

    def named_masters(self) -> dict[str, Tensor]:
        """Returns this process's elements of the masters by the names of their weights."""
        return self.parameters

    def tensors(self) -> dict[str, Tensor]:
        """Returns what a resumed run needs, by name, with this process's elements of each tensor."""
        good_steps = self.scaler.cur_iter - self.scaler.last_overflow_iter - 1 if self.scaler.dynamic else 0
        found = {LOSS_SCALE: torch.tensor(float(self.scaler.loss_scale)), GOOD_STEPS: torch.tensor(float(good_steps))}
        for name, fragment in self.fragments.items():
            parts = fragment.tensors(self.state[fragment.flat])
            found |= {f"{key}/{name}": tensor for key, tensor in parts.items()}
        return found

    def shards(self, tensors: dict[str, Tensor]) -> dict[str, Shard]:
        """Describes tensors that are named ``key/parameter`` for a file that all processes write together."""
        return {name: self._shard(name.partition("/")[2], tensor) for name, tensor in tensors.items()}

    def _shard(self, name: str, tensor: Tensor) -> Shard:
        if name not in self.fragments or not tensor.shape:
            return Shard(tensor, tensor.shape, writes=dist.get_rank() == 0)
        return Shard(tensor, self.fragments[name].shape, self.fragments[name].first)

    @torch.no_grad()
    def load_state(self, tensors: dict[str, Tensor]) -> None:
        """Restores what ``tensors`` returned, from the elements of any number of processes."""
        for name, tensor in self.tensors().items():
            tensor.copy_(tensors[name])
        if self.scaler.dynamic:
            self.scaler.cur_scale = tensors[LOSS_SCALE].item()
            self.scaler.last_overflow_iter, self.scaler.cur_iter = -1, int(tensors[GOOD_STEPS])
        self.round()

    @torch.no_grad()
    def round(self) -> None:
        """Rounds the masters of all processes into the weights of the model."""
        if not self.divides_weights:
            self.optimizer.update_lp_params()
            return
        for number in range(len(self.optimizer.fp32_partitioned_groups_flat)):
            self.optimizer._reassign_or_swap_out_partitioned_parameters(number)
        if small := self.optimizer.persistent_parameters:  # ZeRO-3 keeps complete copies of these
            small[0].partition(small)
            small[0].all_gather(small)

    def gathered(self) -> AbstractContextManager[None]:
        """Gives each process a complete copy of all weights, rounded from the masters, while the context lasts."""
        self.round()
        return complete_weights(self.engine) if self.divides_weights else nullcontext()


def configure(settings: dict[str, Any], train: TrainFlags, elements: int) -> None:
    """Writes into a configuration of DeepSpeed what the flags decide, and what it would otherwise do differently.

    Args:
        settings: The configuration.
        train: The flags.
        elements: The number of trained elements.
    """
    offloads = offload_device("offload_optimizer") == "cpu"
    passes = train.gradient_accumulation_steps
    sums = zero_stage() != "2" or sums_gradients(launched_processes(), passes, offloads)
    settings.update(
        train_micro_batch_size_per_gpu=train.train_batch_size,
        gradient_accumulation_steps=passes,
        gradient_clipping=train.max_grad_norm,
        # Without these, the types are those of the gradients, which changes no bit if none are summed.
        data_types={"grad_accum_dtype": "fp32" if sums else None},
        communication_data_type="fp32" if sums else None,
        # DeepSpeed's own Adam for the CPU is compiled when a run starts and needs the CUDA toolkit. Torch's is not.
        zero_force_ds_cpu_optimizer=False,
    )
    zero = settings.setdefault("zero_optimization", {})
    zero.setdefault("reduce_bucket_size", min(ZERO_BUCKET, elements))  # DeepSpeed allocates it as a whole.
    # By default, ZeRO-3 replaces torch.nn.functional.linear in the complete process by one that rounds differently.
    zero["memory_efficient_linear"] = False
    # The loss scale is that of LossScale; it has no hysteresis, so an overflow lowers it at once.
    scale = {
        "initial_scale_power": int(math.log2(INITIAL_SCALE)),
        "loss_scale_window": GROWTH_INTERVAL,
        "hysteresis": 1,
    }
    # auto_cast would round all inputs of the model to fp16, also positions and timesteps.
    settings["fp16"] = {**scale, **settings.get("fp16", {}), "auto_cast": False}


@contextmanager
def complete_weights(engine: Any) -> Iterator[None]:
    """Gives each process a complete copy of all weights that ZeRO-3 divides, while the context lasts.

    Inside, processes may run any number of forward passes of the module, each on its own. A copy that is changed there
    is lost.

    Args:
        engine: What deepspeed.initialize returned for ZeRO-3.
    """
    from deepspeed.runtime.zero import GatheredParameters

    offload = engine.optimizer.parameter_offload
    # DeepSpeed's hooks would free the weights after the first forward pass, and wait for all processes before it.
    offload._remove_module_hooks()
    offload.forward_hooks, offload.backward_hooks = [], []
    try:
        with GatheredParameters(list(engine.module.parameters()), modifier_rank=None):
            yield
    finally:
        offload.setup_zero_stage3_hooks()


def num_elements(parameter: Parameter) -> int:
    """Returns the number of elements of a complete parameter, of which ZeRO-3 leaves an empty tensor in the model."""
    return int(getattr(parameter, "ds_numel", parameter.numel()))
