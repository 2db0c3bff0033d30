"""Engines run the backward pass and the weight update: in this process with fp32 master weights, or in DeepSpeed.

``make_engine`` returns the one that accelerate's configuration asks for. ``Engine`` lists what the training loop needs
of it; a new engine implements that protocol. DeepSpeed saves tensors in its own checkpoint files; all other tensors of
the project are saved as safetensors.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Generic, Protocol, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import Module, Parameter

from cogvideox.config.deepspeed import offload_device
from cogvideox.config.optimizers import host_state_problems, make_optimizer
from cogvideox.config.options import TrainOptions, local_processes
from cogvideox.errors import UsageError
from cogvideox.finite import not_finite
from cogvideox.memory.streaming import HostTrainedBlocks
from cogvideox.model.methods import Method
from cogvideox.optimizer.ema import Ema
from cogvideox.optimizer.master_weights import plain_tensors
from cogvideox.optimizer.offload import OffloadedWeights
from cogvideox.optimizer.shard_files import RaiseTogether, raise_error, read_shards, write_shards
from cogvideox.optimizer.sharded_weights import ShardedWeights, gathered, is_sharded
from cogvideox.optimizer.step import MasterWeights, StepResult
from cogvideox.optimizer.zero3 import complete_weights

if TYPE_CHECKING:
    from accelerate import Accelerator

STATE_NAME, EMA_NAME = "optimizer.safetensors", "ema.safetensors"
DEEPSPEED_TAG = "deepspeed"


class Engine(Protocol):
    """Lists what the training loop needs of an engine.

    ``backward`` adds the gradients of one micro-batch, ``step`` ends the optimizer step with a learning rate, and
    ``rehearse`` allocates what a step needs without any other effect. ``save`` and ``load`` write and read the engine's
    part of a checkpoint folder, on all ranks. In the context of ``averaged`` the model has the weights for validation
    and export. ``not_finite`` returns the names of the tensors of this rank that ``save`` would write and that contain
    NaN or infinity.

    Attributes:
        reduces_in_backward: Whether ranks wait for each other in a backward pass, not only in a step.
        model: The module with which the loss is computed.
    """

    reduces_in_backward: bool
    model: Module

    def backward(self, loss: Tensor) -> None: ...

    def rehearse(self, loss_of: Callable[[Module], Tensor]) -> None: ...

    def step(self, lr: float) -> StepResult: ...

    def save(self, folder: Path) -> None: ...

    def load(self, folder: Path) -> None: ...

    def averaged(self) -> AbstractContextManager[None]: ...

    def not_finite(self) -> list[str]: ...


Masters = TypeVar("Masters", bound=MasterWeights | OffloadedWeights | ShardedWeights)


class MasterEngine(Generic[Masters]):
    """What LocalEngine and ShardedEngine have in common: steps of fp32 master weights, and their average."""

    reduces_in_backward = False

    def __init__(self, model: Module, masters: Masters, writes: bool, ema: Ema | None = None) -> None:
        """Stores the parts of the engine.

        Args:
            model: The module with which the loss is computed.
            masters: The master weights of its trained parameters.
            writes: Whether this rank writes checkpoints.
            ema: The average of the masters, if there is one.
        """
        self.model = model
        self.masters = masters
        self.writes = writes
        self.ema = ema
        self.backward = masters.backward

    def rehearse(self, loss_of: Callable[[Module], Tensor]) -> None:
        """Runs a forward and a backward pass that change nothing, with memory reserved for the optimizer's state."""
        room = self.masters.room_for_state()
        self.backward(loss_of(self.model))
        self.masters.drop()
        del room

    def step(self, lr: float) -> StepResult:
        """Makes one optimizer step over all ranks, and updates the average if there is one."""
        result = self.masters.step(lr)
        if self.ema:
            self.masters.wait()  # The average reads masters on the host, where a transfer may still be writing them.
            self.ema.update(result.skipped)
        return result

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Puts the average, if there is one, into the model while the context lasts.

        Weights that are stored on the host are up to date there inside the context.
        """
        self.masters.wait()
        with self.ema.applied() if self.ema else nullcontext():
            yield
            self.masters.wait()

    def not_finite(self) -> list[str]:
        """Returns the names of weights, masters, moments and averages that are not finite, if this rank saves them."""
        if not self.writes:
            return []
        averages = self.ema.tensors() if self.ema else {}
        parameters = self.masters.parameters.items()
        rounded = {f"weight/{name}": p.detach() for name, p in parameters if p.dtype != torch.float32}
        # A finite master may be too large for fp16, so the rounded weights are checked too.
        return not_finite(self.masters.tensors() | averages | rounded)


class LocalEngine(MasterEngine[MasterWeights | OffloadedWeights]):
    """Keeps the complete trainable state on every rank, and averages gradients over the ranks in fp32."""

    def save(self, folder: Path) -> None:
        """Writes masters, optimizer state and average to the folder, from one rank."""
        from safetensors.torch import save_file

        if self.writes:
            save_file(self.masters.state(copy=False), folder / STATE_NAME)
        if self.writes and self.ema:
            save_file(self.ema.state(copy=False), folder / EMA_NAME)

    def load(self, folder: Path) -> None:
        """Restores what ``save`` wrote."""
        from safetensors.torch import load_file

        self.masters.load_state(load_file(folder / STATE_NAME))
        if self.ema:
            self.ema.load_state(load_file(folder / EMA_NAME))


class ShardedEngine(MasterEngine[ShardedWeights]):
    """Trains weights that FSDP2 shards over the ranks.

    Its checkpoints are those of LocalEngine, so either reads those of the other, with any number of ranks.

    Args:
        transformer: The model after fully_shard.
        masters: Steps this rank's rows of the weights.
        is_main: Whether this rank creates the files.
        raise_together: Waits for the other ranks while files are written; see ``write_shards``.
        ema: The average of this rank's rows.
    """

    reduces_in_backward = True

    def __init__(
        self,
        transformer: Module,
        masters: ShardedWeights,
        is_main: bool,
        raise_together: RaiseTogether,
        ema: Ema | None = None,
    ) -> None:
        super().__init__(transformer, masters, writes=True, ema=ema)
        self.is_main, self.raise_together = is_main, raise_together

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Gives each rank a complete copy of the weights, or of their average, while the context lasts."""
        with super().averaged(), gathered(self.model):
            yield

    def save(self, folder: Path) -> None:
        """Writes masters, optimizer state and average to the folder, each rank its rows."""
        self._write(folder / STATE_NAME, self.masters.tensors())
        if self.ema:
            self._write(folder / EMA_NAME, self.ema.tensors())

    def _write(self, path: Path, tensors: dict[str, Tensor]) -> None:
        write_shards(path, self.masters.shards(tensors), self.is_main, self.raise_together)

    def load(self, folder: Path) -> None:
        """Restores what ``save`` wrote, or what LocalEngine wrote."""
        self.masters.load_state(self._read(folder / STATE_NAME, self.masters.tensors()))
        if self.ema:
            self.ema.load_state(self._read(folder / EMA_NAME, self.ema.tensors()))

    def _read(self, path: Path, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return dict(read_shards(path, self.masters.shards(tensors)))


class DeepSpeedEngine:
    """Runs ZeRO through accelerate's plugin; DeepSpeed handles master weights, clipping and accumulation."""

    reduces_in_backward = True

    def __init__(
        self, accelerator: "Accelerator", transformer: Module, parameters: list[Parameter], options: TrainOptions
    ) -> None:
        """Starts DeepSpeed with the flags of the run, which replace what its configuration says about them.

        Args:
            accelerator: An Accelerator with a DeepSpeed plugin.
            transformer: The module with which the loss is computed.
            parameters: The trained parameters.
            options: The flags of the run.

        """
        train = options.train
        plugin = accelerator.state.deepspeed_plugin
        self.shards_weights = plugin.zero_stage == 3
        self.accumulation = train.gradient_accumulation_steps
        plugin.deepspeed_config.update(
            train_micro_batch_size_per_gpu=train.train_batch_size,
            gradient_accumulation_steps=self.accumulation,
            gradient_clipping=train.max_grad_norm,
            data_types={"grad_accum_dtype": "fp32"},
            communication_data_type="fp32",
            # DeepSpeed's own Adam for the CPU is compiled when a run starts and needs the CUDA toolkit. Torch's is not.
            zero_force_ds_cpu_optimizer=False,
        )
        # By default, ZeRO-3 replaces torch.nn.functional.linear in the complete process by one that rounds differently.
        plugin.deepspeed_config.setdefault("zero_optimization", {})["memory_efficient_linear"] = False
        if offload_device("offload_optimizer") == "cpu":
            # accelerate launch gives each process one thread, and a step on the CPU needs all.
            torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // local_processes()))
        optimizer = make_optimizer(options.optimizer, parameters)
        self.model, _ = accelerator.prepare(transformer, optimizer)
        scaler = getattr(self.model.optimizer, "loss_scaler", None)
        if scaler is not None:
            scaler.raise_error_at_min_scale = False  # Steps that are skipped at a scale of 1 are counted instead.
        self.loss_sum = torch.zeros(1, device=accelerator.device)

    def backward(self, loss: Tensor) -> None:
        """Adds the gradients of a micro-batch. The loss is multiplied because DeepSpeed divides by the accumulation."""
        self.loss_sum[0] += loss.detach()
        self.model.backward(loss * self.accumulation)
        if not self.model.is_gradient_accumulation_boundary():
            self.model.step()

    def rehearse(self, loss_of: Callable[[Module], Tensor]) -> None:
        """Runs a forward and a backward pass that change nothing, without DeepSpeed's hooks.

        DeepSpeed would reduce and count the gradients of a normal backward pass. The gradient of only the first trained
        parameter takes the backward pass through the complete model too, and is not stored.
        """
        module = self.model.module
        first = next(parameter for parameter in module.parameters() if parameter.requires_grad)
        torch.autograd.grad(loss_of(module), first)
        if self.shards_weights:
            self.model.empty_partition_cache()  # Its hooks expect the gradients of every parameter, and wait for them.

    def step(self, lr: float) -> StepResult:
        """Makes the optimizer step after the last micro-batch."""
        for group in self.model.optimizer.param_groups:
            group["lr"] = lr
        scale = torch.as_tensor(float(getattr(self.model.optimizer, "loss_scale", 1.0)), device=self.loss_sum.device)
        self.model.step()
        dist.all_reduce(self.loss_sum)
        self.loss_sum /= dist.get_world_size()
        norm = torch.as_tensor(self.model.get_global_grad_norm() or 0.0, device=self.loss_sum.device).float()
        skipped = (~torch.isfinite(norm)).float() if self.model.was_step_applied() else torch.ones_like(norm)
        result = StepResult(torch.stack([self.loss_sum[0], norm, skipped, scale]))
        self.loss_sum.zero_()
        return result

    def averaged(self) -> AbstractContextManager[None]:
        """Gives each rank the complete trained weights; conflicts.py refuses --use_ema with DeepSpeed."""
        return complete_weights(self.model) if self.shards_weights else nullcontext()

    def masters(self) -> list[list[Tensor]]:
        """Returns this rank's shares of the master weights, by group.

        DeepSpeed joins the parameters of a group into one tensor. With ZeRO-3 it divides a large group further, and the
        optimizer has these tensors only during a step.
        """
        if self.shards_weights:
            return [[master] for master in self.model.optimizer.fp32_partitioned_groups_flat]
        inner = getattr(self.model.optimizer, "optimizer", self.model.optimizer)
        return [group["params"] for group in inner.param_groups]

    def not_finite(self) -> list[str]:
        """Returns what is not finite in this rank's share of the state, by the numbers of the groups."""
        inner = getattr(self.model.optimizer, "optimizer", self.model.optimizer)
        tensors = {}
        for number, group in enumerate(self.masters()):
            for master in group:
                tensors[f"master of parameter group {number}"] = master.detach()
                for key, tensor in plain_tensors(inner.state.get(master, {})):
                    tensors[f"{key} of parameter group {number}"] = tensor
        return not_finite(tensors)

    def save(self, folder: Path) -> None:
        """Writes DeepSpeed's checkpoint, on all ranks."""
        self.model.save_checkpoint(str(folder), tag=DEEPSPEED_TAG, exclude_frozen_parameters=True)

    def load(self, folder: Path) -> None:
        """Restores what ``save`` wrote."""
        loaded, _ = self.model.load_checkpoint(str(folder), tag=DEEPSPEED_TAG, load_module_strict=False)
        if loaded is None:
            raise RuntimeError(f"{folder}: DeepSpeed found nothing to resume from")


def engine_name(accelerator: "Accelerator") -> str:
    """Returns the engine's name for the recipe of a checkpoint.

    An engine reads only its own checkpoints, and DeepSpeed only those of the same number of processes. Those of ZeRO-3
    have other files than those of lower stages.
    """
    plugin = accelerator.state.deepspeed_plugin
    if plugin is None:
        return "local"
    kind = "DeepSpeed ZeRO-3" if plugin.zero_stage == 3 else "DeepSpeed"
    return f"{kind} x {accelerator.num_processes}"


def make_engine(
    accelerator: "Accelerator",
    transformer: Module,
    method: Method,
    options: TrainOptions,
    dtype: torch.dtype,
    state_on_host: bool = False,
    host_trained: HostTrainedBlocks | None = None,
    raise_together: RaiseTogether = raise_error,
) -> Engine:
    """Returns the engine that accelerate's configuration and the placement of the weights ask for.

    Args:
        accelerator: The accelerate.Accelerator of the run.
        transformer: The module with which the loss is computed; it contains the trained parameters.
        method: The training method, whose ``parameters()`` are trained.
        options: The flags of the run.
        dtype: The compute type of the model; fp16 needs a loss scale.
        state_on_host: Whether masters and moments are stored in host memory between steps.
        host_trained: The blocks of the transformer that are stored in host memory with their gradients, if any.
        raise_together: Waits for the other ranks while files are written; see ``write_shards``.

    Raises:
        UsageError: This engine or optimizer cannot store its state in host memory.
    """
    parameters = method.parameters()
    deepspeed = accelerator.state.deepspeed_plugin is not None
    if state_on_host and (problems := list(host_state_problems(options.optimizer, deepspeed))):
        raise UsageError(problems)
    if deepspeed:
        return DeepSpeedEngine(accelerator, transformer, list(parameters.values()), options)
    make = partial(make_optimizer, options.optimizer)
    scaled, loss = dtype == torch.float16, options.loss
    if is_sharded(transformer):
        sharded = ShardedWeights(transformer, make, options.train.max_grad_norm, scaled, accelerator.device)
        ema = Ema(sharded.parameters, sharded.named_masters(), loss.ema_decay) if loss.use_ema else None
        return ShardedEngine(transformer, sharded, accelerator.is_main_process, raise_together, ema)
    masters: MasterWeights | OffloadedWeights
    if options.optimizer.use_cpu_offload_optimizer:
        masters = OffloadedWeights(parameters, make, options.optimizer.offload_gradients)
    else:
        masters = MasterWeights(parameters, make, options.train.max_grad_norm, scaled, state_on_host, host_trained)
    ema = Ema(parameters, masters.named_masters(), loss.ema_decay) if loss.use_ema else None
    return LocalEngine(transformer, masters, accelerator.is_main_process, ema)
