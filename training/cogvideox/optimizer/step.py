"""What an optimizer step of any engine needs: its numbers, clipping, skipping, and the scale of the loss.

All of it stays on the device, so that the host need not wait.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

INITIAL_SCALE, GROWTH_INTERVAL = 2.0**16, 2000  # the defaults of torch.amp.GradScaler
LOSS_SCALE, GOOD_STEPS = "loss_scale", "good_steps"


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
