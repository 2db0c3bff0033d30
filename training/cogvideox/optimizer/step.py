"""The optimizer step on fp32 master weights, for any optimizer, and the learning rate schedules.

config/optimizers.py decides which optimizer a run uses; ``MasterWeights`` here steps it. Trained parameters stay in the
compute type inside the model. Each backward pass adds their gradients to one flat fp32 buffer. A step averages the
buffer over the ranks, clips it, skips the step if a gradient is not finite, and updates the masters, all on the device.
Only torch's fused optimizers can skip a step there; with any other, the host waits for the device before each step.

Masters and moments are stored as master_weights.py describes: on the device, or on the host, from where they pass
through the device range by range. So do parameters that are stored on the host with their gradients (streaming.py).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import accumulate

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import Parameter

from cogvideox.config.flags import POLYNOMIAL_END, OptimizerFlags
from cogvideox.memory.streaming import HostTrainedBlocks, TransferPipeline, compute_waits_for, norms_of
from cogvideox.optimizer.master_weights import (
    Flat,
    MakeOptimizer,
    Resident,
    as_tensor,
    by_parameter,
    for_file,
    group_numbers,
    layout_of,
)
from cogvideox.tensor_files import Piece, pieces_of

INITIAL_SCALE, GROWTH_INTERVAL = 2.0**16, 2000  # the defaults of torch.amp.GradScaler
SAME_RATE = 1e-3  # relative difference up to which two rates count as equal; a slightly longer run changes less
LOSS_SCALE, GOOD_STEPS = "loss_scale", "good_steps"
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
    if step >= total_steps or math.isclose(then, now, rel_tol=SAME_RATE):
        return None
    return (
        f"the learning rate jumps from {then:.3g} at step {step} to {following:.3g} at step {step + 1}: "
        f"--lr_scheduler {flags.lr_scheduler} is now that of a run of {total_steps} steps with --learning_rate "
        f"{flags.learning_rate:g}"
    )


@dataclass(frozen=True)
class StepResult:
    """Holds the results of one optimizer step on the device, so that the host need not wait for them.

    Attributes:
        values: (4,) fp32: the mean loss, the gradient norm before clipping, whether the step was skipped (0 or 1), and
            the loss scale, which is always 1 except with fp16.
    """

    values: Tensor

    NAMES = ("loss", "grad_norm", "skipped", LOSS_SCALE)

    @property
    def skipped(self) -> Tensor:
        """Returns 1 if the step changed no weight, else 0, as a scalar on the device."""
        return self.values[self.NAMES.index("skipped")]


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
        """Restores what ``state`` returned."""
        self.value.copy_(tensors[LOSS_SCALE])
        self.good_steps.copy_(tensors[GOOD_STEPS])


class MasterWeights:
    """Trains parameters through fp32 master weights with any optimizer whose step needs only gradients.

    Args:
        parameters: The trained parameters by name, in any float type. Each holds its master, rounded to this type.
        make: Makes the optimizer for the masters.
        max_grad_norm: Gradients with a larger norm are scaled down to it; 0 disables clipping.
        dynamic_scale: Whether the loss is scaled so that fp16 gradients do not underflow; an overflow halves the scale.
        state_on_host: Whether masters and moments are stored in pinned host memory and pass through the device in
            ranges at each step. The results are the same bit for bit. Only for fused optimizers.
        host_trained: Which blocks are stored on the host with their gradients, and which of them have masters and
            moments on the device regardless of ``state_on_host``. Only for fused optimizers.
    """

    def __init__(
        self,
        parameters: dict[str, Parameter],
        make: MakeOptimizer,
        max_grad_norm: float,
        dynamic_scale: bool,
        state_on_host: bool = False,
        host_trained: HostTrainedBlocks | None = None,
    ) -> None:
        self.parameters, self.host_trained = parameters, host_trained
        self.names = {p: name for name, p in parameters.items()}
        on_host = {p for block in host_trained.parameters.values() for p in block} if host_trained else set()
        on_device = {name: p for name, p in parameters.items() if p not in on_host}
        self.device = next(iter(on_device.values())).device
        self.max_grad_norm = max_grad_norm
        self.scale = LossScale(dynamic_scale, self.device)
        layout = layout_of(on_device)
        # The last element is the loss, which is averaged by the same all-reduce as the gradients.
        self.buffer = torch.zeros(layout.numbers + 1, device=self.device)
        self.flat, self.loss_sum = self.buffer[: layout.numbers], self.buffer[layout.numbers :]
        self.gradients = dict(zip(on_device, layout.views(self.flat), strict=True))
        self._hooks = [
            p.register_post_accumulate_grad_hook(self._collector(self.gradients[n])) for n, p in on_device.items()
        ]
        passes = state_on_host or host_trained is not None
        self.resident = None if passes else Resident(on_device, list(self.gradients.values()), make)
        self.passing = [Flat(on_device, make, self.device, lambda: self.flat, on_host=state_on_host)] if passes else []
        if host_trained:
            for block, own in host_trained.parameters.items():
                named, gradients = {self.names[p]: p for p in own}, partial(host_trained.gradients.flat, block)
                hosted = block not in host_trained.device_state_blocks
                self.passing.append(Flat(named, make, self.device, gradients, host_trained.flat(block), hosted))
        self.groups = [self.resident] if self.resident else self.passing
        self.transfers = TransferPipeline(self.device) if passes else None
        self.fresh_numbers = group_numbers(self.groups[0].optimizer)

    @staticmethod
    def _collector(gradient: Tensor) -> Callable[[Tensor], None]:
        def collect(parameter: Tensor) -> None:
            assert parameter.grad is not None
            gradient.add_(parameter.grad)
            parameter.grad = None

        return collect

    def backward(self, loss: Tensor) -> None:
        """Adds the gradients of this micro-batch's share of the step's mean loss."""
        if self.transfers:
            # The forward pass has started those updates of the step before that it needed; this starts the others.
            self.transfers.finish()
        self.loss_sum[0] += loss.detach()
        (loss * self.scale.value).backward()

    def step(self, lr: float) -> StepResult:
        """Makes one optimizer step over all ranks. It changes nothing if a gradient is not finite."""
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(self.buffer)
            self.buffer.div_(dist.get_world_size())
        norm = self._norm() / self.scale.value
        skipped, clip = skip_and_clip(norm, self.max_grad_norm)
        self._update(lr, divisor=clip * self.scale.value, skipped=skipped)
        result = StepResult(torch.stack([self.loss_sum[0], norm, skipped, self.scale.value]))
        self.drop()
        self.scale.adapt(skipped)
        return result

    def drop(self) -> None:
        """Drops gradients and losses that no step has used."""
        self.buffer.zero_()
        if self.host_trained:
            self.host_trained.gradients.clear()

    def room_for_state(self) -> Tensor:
        """Allocates as much device memory as the first step will for the optimizer's state; empty if it exists."""
        missing = self.resident.missing_bytes() if self.resident else 0
        return torch.empty(missing, dtype=torch.uint8, device=self.device)

    def _norm(self) -> Tensor:
        """Returns the global gradient norm, summed per parameter so that placement does not change a bit of it."""
        norms = dict(zip(self.gradients, norms_of(list(self.gradients.values())), strict=True))
        if self.host_trained:
            for block, parameters in self.host_trained.parameters.items():
                norms |= zip((self.names[p] for p in parameters), self.host_trained.gradients.norms[block], strict=True)
        return torch.stack([norms[name] for name in self.parameters]).norm()

    def _update(self, lr: float, divisor: Tensor, skipped: Tensor) -> None:
        if self.resident:
            if not self.resident.fused:
                # This waits for the device. Such optimizers count steps on the host, so a step could not be undone.
                if skipped.item():
                    return
                self.flat.div_(divisor)
            self.resident.update(list(self.gradients.values()), lr, divisor, skipped)
        if self.transfers:
            self._start_transfers(self.transfers, lr, divisor, skipped)

    def _start_transfers(self, transfers: TransferPipeline, lr: float, divisor: Tensor, skipped: Tensor) -> None:
        """Starts the updates that pass through the device, in the order in which the next forward pass needs them.

        The compute stream waits only for the parameters that are on the device. A block that is stored on the host is
        updated when the next forward pass is about to fetch its weights, so that its transfers overlap with the blocks
        before it. ``mark_updated`` makes that fetch wait, because it would return the old weights otherwise.
        """
        if self.host_trained:
            self.host_trained.gradients.finish_copies()
        updates = [list(flat.update(lr, divisor, skipped)) for flat in self.passing]
        transfers.start([update for group in updates for update in group], divisor, skipped)
        on_device, *ends = accumulate(map(len, updates))
        compute_waits_for(transfers.issue(on_device))
        if self.host_trained:
            for block, end in zip(self.host_trained.parameters, ends, strict=True):
                self.host_trained.mark_updated(block, partial(transfers.issue, end))
        else:
            transfers.finish()

    def wait(self) -> None:
        """Waits until all transfers have ended, so that masters and parameters can be read and written on the host."""
        if self.transfers:
            self.transfers.synchronize()

    def named_masters(self) -> dict[str, Tensor]:
        """Returns the masters by the names of their parameters. Call ``wait`` before reading masters on the host."""
        masters = {name: master for group in self.groups for name, master in group.named_masters().items()}
        return {name: masters[name] for name in self.parameters}

    def state(self, copy: bool = True) -> dict[str, Tensor]:
        """Returns what a resumed run needs, as plain tensors by name: masters, optimizer state and loss scale.

        Args:
            copy: See ``for_file``.
        """
        return for_file(self.tensors(), copy)

    def pieces(self) -> dict[str, Piece]:
        """Returns the tensors of ``state`` as pieces of a file, to be read one after another before the next step."""
        return pieces_of(self.tensors())

    def tensors(self) -> dict[str, Tensor]:
        """Returns the tensors of ``state`` on their own devices, without a copy."""
        self.wait()
        tensors = self.scale.state()
        for group in self.groups:
            tensors |= group.state()
        for key, value in group_numbers(self.groups[0].optimizer).items():  # They are equal in all groups.
            if self.fresh_numbers.get(key) != value:
                tensors[f"{key}/{ALL}"] = as_tensor(value)
        return tensors

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        """Restores what ``state`` returned, even if its masters were stored on another device."""
        saved = by_parameter(tensors)
        stepped = any(len(saved[name]) > 1 for name in self.parameters)  # Before the first step there are masters only.
        if stepped and self.resident and not self.resident.fused:
            # A step with zero gradients and a zero rate creates the state that is overwritten below.
            self._update(0.0, torch.ones((), device=self.device), torch.zeros((), device=self.device))
            self.buffer.zero_()  # Some optimizers add weight decay to the gradients themselves.
        self.wait()
        self.scale.load_state(tensors)
        numbers = self.fresh_numbers | {key: tensor.item() for key, tensor in saved[ALL].items()}
        for group in self.groups:
            group.load_state(saved, numbers)
