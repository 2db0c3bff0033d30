"""Engines run the backward pass and the weight update, and write and read their part of a checkpoint.

``make_engine`` returns the one that accelerate's configuration asks for. ``Engine`` lists what the training loop needs
of it; a new engine implements that protocol. All of them write the same safetensors files, so a run can be resumed
with another engine and another number of processes.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Generic, Protocol, TypeVar

import torch
from torch import Tensor
from torch.nn import Module

from cogvideox.config.optimizers import host_state_problems, make_optimizer
from cogvideox.config.options import TrainOptions
from cogvideox.errors import UsageError, plural
from cogvideox.finite import not_finite
from cogvideox.memory.streaming import TrainedBlocks
from cogvideox.model.methods import FullFinetune, Method
from cogvideox.optimizer.adam import LOW, MASTER, WEIGHT, join
from cogvideox.optimizer.ema import AVERAGE, STEPS_NAME, Ema
from cogvideox.optimizer.master_weights import MasterWeights
from cogvideox.optimizer.model_files import write_model
from cogvideox.optimizer.rule import make_masters, rule_of
from cogvideox.optimizer.shard_files import GatherOrRaise, Shard, own_or_raise, read_shards, write_shards
from cogvideox.optimizer.sharded_weights import ShardedWeights, is_sharded
from cogvideox.optimizer.step import UNMEASURED, RankNumbers, StepResult
from cogvideox.optimizer.zero_weights import ZeroWeights
from cogvideox.tensor_files import Piece, Pieces, ReadPieces, WriteTensors, pieces_of, shapes_in, write_tensors

if TYPE_CHECKING:
    from accelerate import Accelerator

STATE_NAME, EMA_NAME = "optimizer.safetensors", "ema.safetensors"
Hashes = dict[Path, str]  # the SHA-256 of files, in hex


class Engine(Protocol):
    """Lists what the training loop needs of an engine.

    ``backward`` adds the gradients of one micro-batch, ``step`` ends the optimizer step with a learning rate, and
    ``rehearse`` allocates what a step needs without any other effect. ``save`` and ``load`` write and read the engine's
    part of a checkpoint folder, on all ranks, and ``save_weights`` writes the weights that users load. ``write`` writes
    the files of which one rank has all tensors. Both return the hashes of the files that the ranks write together. In
    the context of ``averaged`` the model has the weights for validation and export. ``not_finite`` returns the names of
    the tensors of this rank that ``save`` would write and that contain NaN or infinity.

    Attributes:
        reduces_in_backward: Whether ranks wait for each other in a backward pass, not only in a step.
        model: The module with which the loss is computed.
        ema: The average that ``averaged`` puts into the model, if there is one.
        refers: Whether ``save`` writes only the lower bits of masters whose upper bits ``save_weights`` writes.
        shares_files: Whether every rank writes its part of each file of a checkpoint.
    """

    reduces_in_backward: bool
    refers: bool
    shares_files: bool
    model: Module
    ema: Ema | None

    def backward(self, loss: Tensor) -> None: ...

    def rehearse(self, loss_of: Callable[[Module], Tensor]) -> None: ...

    def step(self, lr: float, own: RankNumbers = UNMEASURED) -> StepResult: ...

    def save(self, folder: Path, write: WriteTensors = write_tensors) -> Hashes: ...

    def save_weights(self, method: Method, folder: Path, write: WriteTensors = write_tensors) -> Hashes: ...

    def load(self, folder: Path) -> None: ...

    def averaged(self) -> AbstractContextManager[None]: ...

    def not_finite(self) -> list[str]: ...


Masters = TypeVar("Masters", bound=MasterWeights | ShardedWeights | ZeroWeights)
Sharded = TypeVar("Sharded", bound=ShardedWeights | ZeroWeights)


class MasterEngine(Generic[Masters]):
    """What all engines have in common: steps of fp32 master weights, and their average."""

    reduces_in_backward = False
    refers = False
    shares_files = False

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

    def step(self, lr: float, own: RankNumbers = UNMEASURED) -> StepResult:
        """Makes one optimizer step over all ranks, and updates the average if there is one.

        Args:
            lr: The learning rate.
            own: Numbers of this rank, which the result has over all ranks.
        """
        result = self.masters.step(lr, own)
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

    def save_weights(self, method: Method, folder: Path, write: WriteTensors = write_tensors) -> Hashes:
        """Writes the weights, or their average, as ``method`` does, on all ranks."""
        with self.averaged():
            if self.writes:
                method.save(folder, write)
        return {}

    def not_finite(self) -> list[str]:
        """Returns the names of weights, masters, moments and averages that are not finite, if this rank saves them."""
        if not self.writes:
            return []
        averages = self.ema.tensors() if self.ema else {}
        parameters = self.masters.parameters.items()
        rounded = {f"weight/{name}": p.detach() for name, p in parameters if p.dtype != torch.float32}
        # A finite master may be too large for fp16, so the rounded weights are checked too.
        return not_finite(self._state()) + not_finite(averages | rounded)

    def _state(self) -> Mapping[str, Tensor]:
        """Returns the masters and the optimizer's state by name."""
        return self.masters.tensors()


class LocalEngine(MasterEngine[MasterWeights]):
    """Keeps the complete trainable state on every rank, and averages gradients over the ranks in fp32.

    Args:
        model: The module with which the loss is computed.
        masters: The master weights of its trained parameters.
        writes: Whether this rank writes checkpoints.
        ema: The average of the masters, if there is one.
        refers: Whether the weights that users load are the upper bits of the masters. A checkpoint then has only the
            lower bits beside them.
    """

    def __init__(
        self, model: Module, masters: MasterWeights, writes: bool, ema: Ema | None = None, refers: bool = False
    ) -> None:
        super().__init__(model, masters, writes, ema)
        self.refers = refers

    def _state(self) -> Mapping[str, Tensor]:
        """Returns the masters and the optimizer's state by name; what must be computed exists one after another."""
        return ReadPieces(self.masters.pieces())

    def save(self, folder: Path, write: WriteTensors = write_tensors) -> Hashes:
        """Writes masters, optimizer state and average to the folder, from one rank."""
        if self.writes:
            pieces = self.masters.pieces()
            write(folder / STATE_NAME, lower_bits(pieces) if self.refers else pieces, {})
        if self.writes and self.ema:
            write(folder / EMA_NAME, pieces_of(self.ema.tensors()), {})
        return {}

    def load(self, folder: Path) -> None:
        """Restores what ``save`` wrote."""
        from safetensors.torch import load_file

        check_state(folder, {name: p.shape for name, p in self.masters.parameters.items()}, self.ema is not None)
        tensors = load_file(folder / STATE_NAME)
        if any(name.startswith(f"{LOW}/") for name in tensors):
            for path in weight_files(folder):
                tensors |= {f"{WEIGHT}/{name}": weight for name, weight in load_file(path).items()}
        self.masters.load_state(tensors)
        if self.ema:
            self.ema.load_state(load_file(folder / EMA_NAME))


def lower_bits(pieces: Pieces) -> dict[str, Piece]:
    """Returns the pieces of a checkpoint with the lower bits of masters in place of masters whose weights are bf16."""
    found = {}
    for name, piece in pieces.items():
        key, _, parameter = name.partition("/")
        if key == MASTER and piece.parts[0].dtype == torch.bfloat16:
            shaped = partial(first_elements, shape=piece.shape)
            found[f"{LOW}/{parameter}"] = Piece(piece.shape, torch.int16, piece.parts[1:], shaped)
        else:
            found[name] = piece
    return found


def first_elements(*padded: Tensor, shape: torch.Size) -> Tensor:
    """Returns the first elements of low bits in a shape. Weights without masters have none, which means zeros."""
    return padded[0].reshape(-1)[: shape.numel()].view(shape) if padded else torch.zeros(shape, dtype=torch.int16)


def weight_files(folder: Path) -> list[Path]:
    """Returns the files with the trained weights of a checkpoint."""
    return sorted((folder / FullFinetune.result).glob("*.safetensors"))


def check_state(folder: Path, shapes: Mapping[str, torch.Size], averaged: bool) -> None:
    """Checks that the files of a checkpoint have the master and, if needed, the average of each trained weight.

    Only their headers are read.

    Args:
        folder: The checkpoint.
        shapes: The shapes of the trained weights by name.
        averaged: Whether the run averages its weights.

    Raises:
        UsageError: A file has other names or shapes.
    """
    state = shapes_in(folder / STATE_NAME)
    lower = {name for name in shapes if f"{LOW}/{name}" in state}
    masters = {f"{LOW if name in lower else MASTER}/{name}": shape for name, shape in shapes.items()}
    check_shapes(folder / STATE_NAME, state, masters)
    if lower:
        weights = {name: shape for path in weight_files(folder) for name, shape in shapes_in(path).items()}
        check_shapes(folder / FullFinetune.result, weights, {name: shapes[name] for name in lower})
    if averaged:
        averages = {STEPS_NAME: torch.Size(), **{f"{AVERAGE}/{name}": shape for name, shape in shapes.items()}}
        check_shapes(folder / EMA_NAME, shapes_in(folder / EMA_NAME), averages)


def check_shapes(path: Path, found: Mapping[str, torch.Size], wanted: Mapping[str, torch.Size]) -> None:
    """Raises UsageError if wanted tensors are not found in their shapes, or masters or averages of others are found."""
    odd = [name for name, shape in wanted.items() if found.get(name) != shape]
    odd += [name for name in found if name.startswith((f"{MASTER}/", f"{LOW}/", f"{AVERAGE}/")) and name not in wanted]
    if odd:
        name = odd[0]
        fault = "is missing" if name not in found else f"has the shape {tuple(found[name])}"
        expected = f"this model has {tuple(wanted[name])}" if name in wanted else "this model has no such weight"
        rule = f"{plural(len(odd), 'tensor does', 'tensors do')} not fit: {name} {fault}, and {expected}"
        raise UsageError(f"{path}: {rule}; give another checkpoint with --resume_from_checkpoint")


class ShardedEngine(MasterEngine[Sharded]):
    """Trains weights whose state is sharded over the ranks.

    Its checkpoints are those of LocalEngine, so either reads those of the other, with any number of ranks.

    Args:
        model: The module with which the loss is computed.
        masters: Steps this rank's shards of the weights.
        is_main: Whether this rank creates the files.
        gather_or_raise: Waits for the other ranks while files are written; see ``write_shards``.
        dtype: The compute type. Masters that are too large for it are not saved.
        ema: The average of this rank's shards.
    """

    reduces_in_backward = True
    shares_files = True

    def __init__(
        self,
        model: Module,
        masters: Sharded,
        is_main: bool,
        gather_or_raise: GatherOrRaise,
        dtype: torch.dtype,
        ema: Ema | None = None,
    ) -> None:
        super().__init__(model, masters, writes=True, ema=ema)
        self.is_main, self.gather_or_raise, self.dtype = is_main, gather_or_raise, dtype

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Gives each rank a complete copy of the weights, or of their average, while the context lasts."""
        with super().averaged(), self.masters.gathered():
            yield

    def not_finite(self) -> list[str]:
        """Returns the names of this rank's shards that are not finite, also those that are too large for ``dtype``."""
        found = super().not_finite()
        if self.dtype == torch.float32:
            return found
        weights = {f"weight/{name}": shard.detach() for name, shard in self.masters.parameters.items()}
        return found + not_finite(weights, self.dtype)

    def save(self, folder: Path, _write: WriteTensors = write_tensors) -> Hashes:
        """Writes masters, optimizer state and average to the folder, each rank its shards."""
        hashes = self._write(folder / STATE_NAME, self.masters.tensors())
        return hashes | self._write(folder / EMA_NAME, self.ema.tensors()) if self.ema else hashes

    def save_weights(self, method: Method, folder: Path, write: WriteTensors = write_tensors) -> Hashes:
        """Writes the weights, or their average, on all ranks. No rank gathers them, except those of a LoRA."""
        if not isinstance(method, FullFinetune):
            with self.averaged():
                if self.is_main:
                    method.save(folder, write)
            return {}
        values = self.ema.averages if self.ema else self.masters.named_masters()
        shards = self.masters.shards({f"weight/{name}": tensor.detach() for name, tensor in values.items()})
        weights = {name.removeprefix("weight/"): shard for name, shard in shards.items()}
        target = folder / method.result
        return write_model(method.transformer, weights, self.dtype, target, self.is_main, self.gather_or_raise)

    def _write(self, path: Path, tensors: dict[str, Tensor]) -> Hashes:
        return {path: write_shards(path, self.masters.shards(tensors), self.is_main, self.gather_or_raise)}

    def load(self, folder: Path) -> None:
        """Restores what ``save`` wrote, or what LocalEngine wrote."""
        shards = self.masters.shards(self.masters.tensors())
        shapes = {name.removeprefix(f"{MASTER}/"): s.shape for name, s in shards.items() if name.startswith(MASTER)}
        check_state(folder, shapes, self.ema is not None)
        self.masters.load_state(self._read_state(folder, shards))
        if self.ema:
            self.ema.load_state(self._read(folder / EMA_NAME, self.ema.tensors()))

    def _read_state(self, folder: Path, shards: dict[str, Shard]) -> dict[str, Tensor]:
        """Returns the state by name; masters of which a checkpoint has the lower bits are joined with its weights."""
        masters = {name.removeprefix(f"{MASTER}/"): shard for name, shard in shards.items() if name.startswith(MASTER)}
        lows = {f"{LOW}/{name}": shard for name, shard in masters.items()}
        found = dict(read_shards(folder / STATE_NAME, shards | lows))
        if found.keys() & lows.keys():
            for path in weight_files(folder):
                for name, weight in read_shards(path, masters):
                    if f"{LOW}/{name}" in found:
                        found[f"{MASTER}/{name}"] = join(weight, found.pop(f"{LOW}/{name}"))
        return found

    def _read(self, path: Path, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return dict(read_shards(path, self.masters.shards(tensors)))


class DeepSpeedEngine(ShardedEngine[ZeroWeights]):
    """Trains weights whose state DeepSpeed's ZeRO divides between the ranks."""

    def rehearse(self, loss_of: Callable[[Module], Tensor]) -> None:
        """Runs a forward and a backward pass that change nothing, without DeepSpeed's hooks.

        DeepSpeed would reduce and count the gradients of a normal backward pass. The gradient of only the first trained
        parameter takes the backward pass through the complete model too, and is not stored.
        """
        module = self.masters.engine.module
        first = next(parameter for parameter in module.parameters() if parameter.requires_grad)
        torch.autograd.grad(loss_of(module), first)
        self.masters.drop()

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Gives each rank a complete copy of the weights, or of their average, while the context lasts."""
        with super().averaged():
            yield
        self.masters.round()


def make_engine(
    accelerator: "Accelerator",
    transformer: Module,
    method: Method,
    options: TrainOptions,
    dtype: torch.dtype,
    state_on_host: bool = False,
    trained_blocks: TrainedBlocks | None = None,
    gather_or_raise: GatherOrRaise = own_or_raise,
) -> Engine:
    """Returns the engine that accelerate's configuration and the placement of the weights ask for.

    Args:
        accelerator: The accelerate.Accelerator of the run.
        transformer: The module with which the loss is computed; it contains the trained parameters.
        method: The training method, whose ``parameters()`` are trained.
        options: The flags of the run.
        dtype: The compute type of the model; fp16 needs a loss scale.
        state_on_host: Whether masters and moments are stored in host memory between steps.
        trained_blocks: The blocks of which all weights are trained, if a plan places them.
        gather_or_raise: Waits for the other ranks while files are written; see ``write_shards``.

    Raises:
        UsageError: This engine or optimizer cannot store its state in host memory.
    """
    parameters = method.parameters()
    deepspeed = accelerator.state.deepspeed_plugin is not None
    if state_on_host and (problems := list(host_state_problems(options.optimizer, deepspeed))):
        raise UsageError(problems)
    make = partial(make_optimizer, options.optimizer)
    scaled, loss = dtype == torch.float16, options.loss
    if deepspeed:
        zero = ZeroWeights(accelerator, transformer, parameters, options)
        ema = Ema(zero.parameters, zero.named_masters(), loss.ema_decay) if loss.use_ema else None
        return DeepSpeedEngine(zero.engine, zero, accelerator.is_main_process, gather_or_raise, dtype, ema)
    if is_sharded(transformer):
        sharded = ShardedWeights(transformer, make, options.train.max_grad_norm, scaled, accelerator.device)
        ema = Ema(sharded.parameters, sharded.named_masters(), loss.ema_decay) if loss.use_ema else None
        return ShardedEngine(transformer, sharded, accelerator.is_main_process, gather_or_raise, dtype, ema)
    passes, norm = options.train.gradient_accumulation_steps, options.train.max_grad_norm
    rule = rule_of(options.optimizer)
    masters = make_masters(parameters, rule, norm, scaled, state_on_host, trained_blocks, passes)
    ema = Ema(parameters, masters.named_masters(), loss.ema_decay) if loss.use_ema else None
    refers = isinstance(method, FullFinetune) and ema is None
    return LocalEngine(transformer, masters, accelerator.is_main_process, ema, refers)
