"""The optimizer step on fp32 master weights, for any optimizer, and the learning rate schedules.

config/optimizers.py decides which optimizer a run uses; ``MasterWeights`` here steps it. Trained parameters stay in the
compute type inside the model. Each backward pass adds their gradients to flat arrays. A step averages these over the
ranks, clips them, skips the step if a gradient is not finite, and updates the masters, all on the device.

Adam is stepped by adam.py, and its state is stored as adam_weights.py describes: on the device, or on the host, from
where it passes through the device while the next forward pass computes. The state of any other optimizer is on the
device (master_weights.py), and the host waits for the device before each of its steps, unless it is fused.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import Parameter

from cogvideox.config.flags import POLYNOMIAL_END, OptimizerFlags
from cogvideox.config.optimizers import make_optimizer
from cogvideox.errors import plural
from cogvideox.memory.streaming import (
    STAGES,
    TRANSFER_SLOTS,
    Event,
    TrainedBlocks,
    TransferPipeline,
    compute_waits_for,
    norms_of,
    slot_bytes,
)
from cogvideox.optimizer.adam import EXAMPLE, MASTER, Adam, adam_of
from cogvideox.optimizer.adam_weights import Group, Masters
from cogvideox.optimizer.master_weights import (
    MakeOptimizer,
    Resident,
    as_tensor,
    by_parameter,
    example_state,
    for_file,
    group_numbers,
    layout_of,
    measured_state_bytes,
)
from cogvideox.tensor_files import Piece, file_order, pieces_of

INITIAL_SCALE, GROWTH_INTERVAL = 2.0**16, 2000  # the defaults of torch.amp.GradScaler
SAME_RATE = 1e-3  # relative difference up to which two rates count as equal; a slightly longer run changes less
LOSS_SCALE, GOOD_STEPS = "loss_scale", "good_steps"
STEP = "step"  # the number of steps, by the name that torch's Adam gives it in its state
ALL = "*"  # takes the place of the parameter in the names of tensors that belong to all parameters


def learning_rate(flags: OptimizerFlags, step: int, total_steps: int, global_batch: int) -> float:
    """Returns the learning rate of an optimizer step, counted from 0, in a run of ``total_steps`` steps."""
    peak = flags.learning_rate * (global_batch if flags.scale_lr else 1)
    return peak * schedule_factor(flags, step, total_steps, peak) if peak else 0.0


def schedule_factor(flags: OptimizerFlags, step: int, total_steps: int, peak: float) -> float:
    """Returns the factor, 0 to 1, of the peak rate at a step, as the schedulers of diffusers.optimization do."""
    name, warmup = flags.lr_scheduler, flags.lr_warmup_steps
    if name == "constant":
        return 1.0
    if step < warmup:
        return step / warmup
    if name == "constant_with_warmup":
        return 1.0
    progress = (step - warmup) / max(1, total_steps - warmup)
    if name == "linear":
        return max(0.0, 1.0 - progress)
    if name == "cosine":
        return max(0.0, 0.5 * (1.0 + math.cos(math.pi * progress)))
    if name == "cosine_with_restarts":
        return 0.0 if progress >= 1.0 else 0.5 * (1.0 + math.cos(math.pi * (flags.lr_num_cycles * progress % 1.0)))
    if step > total_steps:
        return POLYNOMIAL_END / peak
    remaining = 1.0 - (step - warmup) / max(1, total_steps - warmup)
    return ((peak - POLYNOMIAL_END) * remaining**flags.lr_power + POLYNOMIAL_END) / peak


def warm_up_note(flags: OptimizerFlags, total_steps: int, global_batch: int) -> str | None:
    """Returns a line for the user if a run ends before its learning rate has reached the peak, else None.

    Args:
        flags: The flags of the optimizer.
        total_steps: The length of the run.
        global_batch: Samples per step over all ranks.
    """
    warmup = flags.lr_warmup_steps
    if flags.lr_scheduler == "constant" or not flags.learning_rate or total_steps > warmup:
        return None
    last, peak = (learning_rate(flags, step, warmup + 1, global_batch) for step in (total_steps - 1, warmup))
    return (
        f"the learning rate rises to {last:.3g} and never reaches {peak:.3g}: --lr_warmup_steps {warmup} is not less "
        f"than the {plural(total_steps, 'step')} of this run; give --lr_warmup_steps {total_steps // 10}"
    )


def rate_jump(flags: OptimizerFlags, then: float, step: int, total_steps: int, global_batch: int) -> str | None:
    """Returns a line for the user if a resumed run does not continue its learning rate schedule, else None.

    Args:
        flags: The flags of the optimizer now.
        then: The learning rate that the last step of the run had.
        step: The number of steps that are done.
        total_steps: The length of the run now, which may differ from before.
        global_batch: Samples per step over all ranks.
    """
    now, following = (learning_rate(flags, number, total_steps, global_batch) for number in (step - 1, step))
    if step >= total_steps or any(math.isclose(then, rate, rel_tol=SAME_RATE) for rate in (now, following)):
        return None
    return (
        f"the learning rate jumps from {then:.3g} at step {step} to {following:.3g} at step {step + 1}: "
        f"--lr_scheduler {flags.lr_scheduler} is now that of a run of {total_steps} steps with --learning_rate "
        f"{flags.learning_rate:g}"
    )


class RankNumbers(NamedTuple):
    """What the host of one rank has measured for an optimizer step; see ``StepNumbers`` for how ranks combine it.

    Attributes:
        bad_clips: How many clips this rank has failed to read since the start.
        loading_seconds: How long this rank waited for its batches.
        peak_gib: The peak of the memory that tensors used, 0 without a GPU.
        reserved_gib: The peak of the memory that torch reserved, 0 without a GPU.
    """

    bad_clips: int = 0
    loading_seconds: float = 0.0
    peak_gib: float = 0.0
    reserved_gib: float = 0.0


UNMEASURED = RankNumbers()


class StepNumbers:
    """Collects the numbers of a rank's step on the device, and combines them over the ranks in one all-reduce.

    A sum is the only reduction that serves all of them. So a number of which the largest is wanted has an element for
    each rank, which is zero on the other ranks.

    Attributes:
        loss: Where each micro-batch's share of the step's mean loss is added, a scalar.
    """

    def __init__(self, device: torch.device) -> None:
        connected = dist.is_available() and dist.is_initialized()
        self.rank, self.world = (dist.get_rank(), dist.get_world_size()) if connected else (0, 1)
        self.connected = connected
        self.of_all = torch.zeros(2 + (len(RankNumbers._fields) - 1) * self.world, device=device)
        self.loss, self.bad_clips = self.of_all[0], self.of_all[1]
        self.largest = self.of_all[2:].view(-1, self.world)

    def reduce(self, own: RankNumbers) -> tuple[Tensor, Tensor]:
        """Combines the numbers of all ranks, and clears those of this rank; the host does not wait for the device.

        Args:
            own: The numbers of this rank.

        Returns:
            The mean loss, and the numbers of ``RankNumbers`` over all ranks: the sum of the first, and the largest of
            each other.
        """
        bad_clips, *largest = own
        self.bad_clips.fill_(bad_clips)
        for row, number in zip(self.largest, largest, strict=True):
            row[self.rank].fill_(number)
        if self.connected:
            dist.all_reduce(self.of_all)
        loss = self.loss / self.world
        combined = torch.cat([self.bad_clips[None], self.largest.amax(dim=1)])
        self.of_all.zero_()
        return loss, combined


@dataclass(frozen=True)
class StepResult:
    """Holds the results of one optimizer step on the device, so that the host need not wait for them.

    Attributes:
        values: (8,) fp32: the mean loss, the gradient norm before clipping, whether the step was skipped (0 or 1), the
            loss scale, which is always 1 except with fp16, and the numbers of ``RankNumbers`` over all ranks.
    """

    values: Tensor

    NAMES = ("loss", "grad_norm", "skipped", LOSS_SCALE, *RankNumbers._fields)

    @classmethod
    def of(cls, reduced: tuple[Tensor, Tensor], norm: Tensor, skipped: Tensor, scale: Tensor) -> "StepResult":
        """Joins what ``StepNumbers.reduce`` returned with the other results of a step, which are scalars."""
        loss, of_ranks = reduced
        return cls(torch.cat([torch.stack([loss, norm, skipped, scale]), of_ranks]))

    @property
    def skipped(self) -> Tensor:
        """Returns 1 if the step changed no weight, else 0, as a scalar on the device."""
        return self.values[self.NAMES.index("skipped")]


def rule_of(flags: OptimizerFlags) -> Adam | MakeOptimizer:
    """Returns the optimizer that the flags select, in the form that ``MasterWeights`` takes."""
    return adam_of(flags) or partial(make_optimizer, flags)


def state_bytes(flags: OptimizerFlags, dtype: torch.dtype, device: torch.device) -> float:
    """Returns the bytes of master and optimizer state per trained weight, beside the weight itself.

    Args:
        flags: The flags of the optimizer.
        dtype: The type of the weights.
        device: Where a step of an optimizer other than Adam is made, to measure its state.
    """
    rule = rule_of(flags)
    if isinstance(rule, Adam):
        return rule.state_bytes(dtype)
    return measured_state_bytes(rule, device) + (4 if dtype != torch.float32 else 0)


def bytes_before_masters(flags: OptimizerFlags, device: torch.device) -> float:
    """Returns the bytes of state per trained fp32 weight that a file has before the masters."""
    rule = rule_of(flags)
    state = rule.example_state(torch.float32) if isinstance(rule, Adam) else example_state(rule, device)
    order = file_order(state | {MASTER: torch.empty(EXAMPLE, device="meta")})
    return sum(state[name].nbytes for name in order[: order.index(MASTER)]) / EXAMPLE


def gradients_are_sums(rule: Adam | MakeOptimizer, passes: int, ranks: int) -> bool:
    """Returns whether gradients on the device are added up in fp32; otherwise they have the type of the weights."""
    return passes > 1 or ranks > 1 or not isinstance(rule, Adam)


def skip_and_clip(norm: Tensor, max_grad_norm: float) -> tuple[Tensor, Tensor]:
    """Decides on the device what a step does with its gradients.

    Args:
        norm: The global gradient norm, a scalar.
        max_grad_norm: The largest norm that is not clipped; 0 disables clipping.

    Returns:
        (1 if the step must change nothing because the norm is not finite, else 0; the divisor of the gradients).
    """
    clip = (norm / max_grad_norm).clamp(min=1.0) if max_grad_norm else torch.ones_like(norm)
    return (~torch.isfinite(norm)).float(), clip


class LossScale:
    """The factor of the loss with which fp16 gradients do not underflow; it stays on the device.

    Args:
        dynamic: Whether the factor adapts; without it is 1.
        device: Where the loss is computed.
    """

    def __init__(self, dynamic: bool, device: torch.device) -> None:
        self.dynamic = dynamic
        self.value = torch.tensor(INITIAL_SCALE if dynamic else 1.0, device=device)
        self.good_steps = torch.zeros((), device=device)

    def adapt(self, skipped: Tensor) -> None:
        """Halves the factor after an overflow, doubles it after many good steps; does not wait for the device.

        Args:
            skipped: Scalar on the device, 1 if a gradient of the step overflowed, else 0.
        """
        if not self.dynamic:
            return
        self.good_steps = torch.where(skipped > 0, 0.0, self.good_steps + 1)
        grown = self.good_steps >= GROWTH_INTERVAL
        self.value = self.value * torch.where(skipped > 0, 0.5, torch.where(grown, 2.0, 1.0))
        self.good_steps = torch.where(grown, 0.0, self.good_steps)

    def state(self) -> dict[str, Tensor]:
        """Returns what a resumed run needs, by name."""
        return {LOSS_SCALE: self.value, GOOD_STEPS: self.good_steps}

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        """Restores what ``state`` returned. Earlier versions did not save it under torchao's optimizer on the host."""
        self.value.copy_(tensors.get(LOSS_SCALE, self.value))
        self.good_steps.copy_(tensors.get(GOOD_STEPS, self.good_steps))


class MasterWeights:
    """Trains parameters through fp32 master weights with Adam, or any other optimizer whose step needs only gradients.

    Args:
        parameters: The trained parameters by name, in any float type. Each holds its master, rounded to this type.
        rule: The settings of Adam, or a function that makes another optimizer for fp32 masters on the device.
        max_grad_norm: Gradients with a larger norm are scaled down to it; 0 disables clipping.
        dynamic_scale: Whether the loss is scaled so that fp16 gradients do not underflow; an overflow halves the scale.
        state_on_host: Whether the state of parameters outside ``blocks`` is stored in pinned host memory, and passes
            through the device in ranges at each step. The results are the same bit for bit. Only for Adam.
        blocks: The blocks of which all weights are trained, with the places of their weights and state. Only for Adam.
        passes: The number of ``backward`` calls before a ``step``. If there are several, or several ranks, gradients on
            the device are added up in fp32; otherwise they keep the type of the weights.
    """

    def __init__(
        self,
        parameters: dict[str, Parameter],
        rule: Adam | MakeOptimizer,
        max_grad_norm: float,
        dynamic_scale: bool,
        state_on_host: bool = False,
        blocks: TrainedBlocks | None = None,
        passes: int = 1,
    ) -> None:
        self.parameters, self.blocks = parameters, blocks
        inside = {p for own in blocks.parameters.values() for p in own} if blocks else set()
        outside = {name: p for name, p in parameters.items() if p not in inside}
        self.device = next(iter(outside.values())).device
        self.max_grad_norm = max_grad_norm
        self.scale = LossScale(dynamic_scale, self.device)
        self.numbers = StepNumbers(self.device)
        self.steps = torch.zeros((), dtype=torch.float64, device=self.device)  # that changed something
        self.used = False  # whether a step has used the gradients, so that the next backward pass clears them
        self.adam = rule if isinstance(rule, Adam) else None
        self.resident: Resident | None = None
        self.groups: list[Group] = []
        self.block_groups: dict[int, Group] = {}  # those of blocks, by block
        if isinstance(rule, Adam):
            self._make_groups(outside, rule, state_on_host, sums=gradients_are_sums(rule, passes, self.numbers.world))
            on_device = [group for group in self.groups if group.collected is not None]
            gradients = {name: gradient for group in on_device for name, gradient in group.named_gradients().items()}
        else:
            layout = layout_of(parameters)
            self.flat = torch.zeros(layout.numbers, device=self.device)
            gradients = dict(zip(parameters, layout.views_of(self.flat), strict=True))
            self.resident = Resident(parameters, list(gradients.values()), rule)
            self.fresh_numbers = group_numbers(self.resident.optimizer)
        self.gradients = gradients
        for name, gradient in gradients.items():
            parameters[name].register_post_accumulate_grad_hook(self._collector(gradient))
        owners = {name: group for group in self.groups for name in group.parameters}
        self.owners = {name: owners[name] for name in parameters if name in owners}
        self.passing = [group for group in self.groups if group.state_on_host or group.collected is None]
        into = blocks.ring.side if blocks and blocks.ring else None
        count = TRANSFER_SLOTS if blocks else STAGES
        self.transfers = TransferPipeline(self.device, into, count) if self.passing else None

    def _make_groups(self, outside: dict[str, Parameter], adam: Adam, state_on_host: bool, sums: bool) -> None:
        """Divides the parameters into groups: those outside blocks by type, and one for each block."""
        names = {p: name for name, p in self.parameters.items()}
        rest: dict[torch.dtype, dict[str, Parameter]] = {}
        for name, p in outside.items():
            rest.setdefault(p.dtype, {})[name] = p
        self.groups = [Group(own, adam, self.device, state_on_host, sums=sums) for own in rest.values()]
        if not self.blocks:
            return
        for block, own in self.blocks.parameters.items():
            gradients = partial(self.blocks.gradients.flat, block) if self.blocks.on_host(block) else None
            named, weights = {names[p]: p for p in own}, self.blocks.weights[block]
            on_host = block in self.blocks.state_on_host
            self.block_groups[block] = Group(named, adam, self.device, on_host, weights, gradients, sums)
        self.groups += self.block_groups.values()

    @staticmethod
    def _collector(gradient: Tensor) -> Callable[[Tensor], None]:
        def collect(parameter: Tensor) -> None:
            assert parameter.grad is not None
            gradient.add_(parameter.grad)
            parameter.grad = None

        return collect

    def backward(self, loss: Tensor) -> None:
        """Adds the gradients of this micro-batch's share of the step's mean loss."""
        self._finish_transfers()
        if self.used:
            self._clear_gradients()
        self.numbers.loss += loss.detach()
        (loss * self.scale.value).backward()

    def _finish_transfers(self) -> None:
        """Issues the updates that no forward pass has needed, and orders later compute after all of them."""
        if self.blocks:
            self.blocks.finish()
        if self.transfers:
            self.transfers.finish()

    def step(self, lr: float, own: RankNumbers = UNMEASURED) -> StepResult:
        """Makes one optimizer step over all ranks. It changes nothing if a gradient is not finite."""
        if self.numbers.connected:
            for total in self._collected():
                dist.all_reduce(total)
                total.div_(self.numbers.world)
        reduced = self.numbers.reduce(own)
        norm = self._norm() / self.scale.value
        skipped, clip = skip_and_clip(norm, self.max_grad_norm)
        self._update(lr, divisor=clip * self.scale.value, skipped=skipped)
        result = StepResult.of(reduced, norm, skipped, self.scale.value)
        self.drop()
        self.scale.adapt(skipped)
        return result

    def _collected(self) -> list[Tensor]:
        """Returns the arrays of gradients on the device."""
        return [self.flat] if self.resident else [g.collected for g in self.groups if g.collected is not None]

    def drop(self) -> None:
        """Drops gradients and losses that no step has used. Updates may still read them until the next ``backward``."""
        self.numbers.loss.zero_()
        self.used = True

    def _clear_gradients(self) -> None:
        for gradients in self._collected():
            gradients.zero_()
        if self.blocks:
            self.blocks.gradients.clear()
        self.used = False

    def room_for_state(self) -> Tensor:
        """Allocates as much device memory as the first step will for the optimizer's state; empty if it exists."""
        missing = self.resident.missing_bytes() if self.resident else 0
        return torch.empty(missing, dtype=torch.uint8, device=self.device)

    def _norm(self) -> Tensor:
        """Returns the global gradient norm, summed per parameter so that placement does not change a bit of it."""
        norms = dict(zip(self.gradients, norms_of(list(self.gradients.values())), strict=True))
        if self.blocks:
            for block, found in self.blocks.gradients.norms.items():
                norms |= zip(self.block_groups[block].parameters, found, strict=True)
        return torch.stack([norms[name] for name in self.parameters]).norm()

    def _update(self, lr: float, divisor: Tensor, skipped: Tensor) -> None:
        if self.resident:
            if not self.resident.fused:
                # This waits for the device. Such optimizers count steps on the host, so a step could not be undone.
                if skipped.item():
                    return
                self.flat.div_(divisor)
            self.resident.update(list(self.gradients.values()), lr, divisor, skipped)
        if self.adam:
            self.steps += 1 - skipped
            scalars = self.adam.scalars(lr, divisor, skipped, self.steps)
            for group in self.groups:
                if group not in self.passing:
                    group.update(scalars)
            if self.transfers:
                self._start_transfers(self.transfers, scalars)

    def _start_transfers(self, transfers: TransferPipeline, scalars: Tensor) -> None:
        """Starts the updates that pass through the device, in the order in which the next forward pass needs them.

        The compute stream waits for parameters outside the blocks. Those of blocks are updated while it computes the
        blocks before them.
        """
        if self.blocks:
            self.blocks.gradients.finish_copies()
        firsts = (next(group.transfers(group.weights, scalars)) for group in self.passing)
        transfers.start(slot_bytes(firsts), scalars)
        blocks = set(self.block_groups.values())
        for group in self.passing:
            if group not in blocks:
                compute_waits_for(self._pass(transfers, group, scalars, group.weights, None)[0])
        if self.blocks:
            hosted = {block: group for block, group in self.block_groups.items() if group in self.passing}
            self.blocks.schedule({b: partial(self._pass, transfers, g, scalars) for b, g in hosted.items()})

    @staticmethod
    def _pass(
        transfers: TransferPipeline, group: Group, scalars: Tensor, weights: Tensor, arrived: Event
    ) -> tuple[Event, Event]:
        """Issues the update of a group; see ``streaming.Update``."""
        updated = arrived
        for transfer in group.transfers(weights, scalars):
            updated = transfers.run(transfer, arrived)
        written = updated if weights is group.weights else transfers.copy_out(group.weights, weights, updated)
        return updated, written

    def wait(self) -> None:
        """Waits until all transfers have ended, so that masters and parameters can be read and written on the host."""
        self._finish_transfers()
        if self.transfers:
            self.transfers.synchronize()

    def named_masters(self) -> Mapping[str, Tensor]:
        """Returns the masters by the names of their parameters. Call ``wait`` before reading masters on the host."""
        return self.resident.named_masters() if self.resident else Masters(self.owners)

    def state(self, copy: bool = True) -> dict[str, Tensor]:
        """Returns what a resumed run needs, as plain tensors by name: masters, optimizer state and loss scale.

        Args:
            copy: See ``for_file``.
        """
        return for_file(self.tensors(), copy)

    def tensors(self) -> dict[str, Tensor]:
        """Returns the tensors of ``state`` on their own devices; masters that are put together are new."""
        return {name: piece.read() for name, piece in self.pieces().items()}

    def pieces(self) -> dict[str, Piece]:
        """Returns the tensors of ``state`` as pieces of a file, to be read one after another before the next step."""
        self.wait()
        tensors = self.scale.state()
        if self.resident:
            tensors |= self.resident.state()
            for key, value in group_numbers(self.resident.optimizer).items():
                if self.fresh_numbers.get(key) != value:
                    tensors[f"{key}/{ALL}"] = as_tensor(value)
        pieces = pieces_of(tensors)
        for name, group in self.owners.items():
            own = group.pieces(name) | pieces_of({STEP: self.steps.float()})
            pieces |= {f"{key}/{name}": piece for key, piece in own.items()}
        return pieces

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        """Restores what ``state`` returned, even if its masters were stored on another device."""
        saved = by_parameter(tensors)
        stepped = any(len(saved[name]) > 1 for name in self.parameters)  # Before the first step there are masters only.
        if stepped and self.resident and not self.resident.fused:
            # A step with zero gradients and a zero rate creates the state that is overwritten below.
            self._update(0.0, torch.ones((), device=self.device), torch.zeros((), device=self.device))
            self._clear_gradients()  # Some optimizers add weight decay to the gradients themselves.
        self.wait()
        self.scale.load_state(tensors)
        if self.resident:
            numbers = self.fresh_numbers | {key: tensor.item() for key, tensor in saved[ALL].items()}
            self.resident.load_state(saved, numbers)
        for name, group in self.owners.items():
            group.load_state(name, saved[name])
            self.steps.copy_(saved[name].get(STEP, torch.zeros(())))
