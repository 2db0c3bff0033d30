"""fp32 master weights of a model of which each process has all weights, for any optimizer.

The model holds its trained parameters in the compute type, such as bf16. Most updates are smaller than the rounding
error of bf16, so each parameter has a master weight in fp32, which the optimizer updates and which is then rounded into
the parameter. Each backward pass adds the gradients to arrays of the subclass. A step averages these over the ranks,
clips them, skips the step if a gradient is not finite, and updates the masters, all on the device.

``AdamWeights`` (adam_weights.py) and ``ResidentWeights`` (resident_weights.py, any other optimizer) say how masters are
stored and updated. sharded_weights.py and zero_weights.py are their counterparts where processes have parts of weights.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import Parameter

from cogvideox.memory.streaming import norms_of
from cogvideox.optimizer.state_tensors import for_file
from cogvideox.optimizer.step import UNMEASURED, LossScale, RankNumbers, StepNumbers, StepResult, skip_and_clip
from cogvideox.tensor_files import Piece


class MasterWeights(ABC):
    """Trains parameters through fp32 master weights.

    Args:
        parameters: The trained parameters by name, in any float type. Each holds its master, rounded to this type.
        device: Where gradients are averaged and clipped.
        max_grad_norm: Gradients with a larger norm are scaled down to it; 0 disables clipping.
        dynamic_scale: Whether the loss is scaled so that fp16 gradients do not underflow; an overflow halves the scale.
    """

    def __init__(
        self, parameters: dict[str, Parameter], device: torch.device, max_grad_norm: float, dynamic_scale: bool
    ) -> None:
        self.parameters, self.device, self.max_grad_norm = parameters, device, max_grad_norm
        self.scale = LossScale(dynamic_scale, device)
        self.numbers = StepNumbers(device)
        self.gradients: dict[str, Tensor] = {}  # on the device, by the names of their parameters
        self.used = False  # whether a step has used the gradients, so that the next backward pass clears them

    def collect(self, gradients: dict[str, Tensor]) -> None:
        """Adds what backward passes compute to these gradients from now on.

        Args:
            gradients: Views of the arrays that ``collected`` returns, by the names of their parameters.
        """
        self.gradients = gradients
        for name, gradient in gradients.items():
            self.parameters[name].register_post_accumulate_grad_hook(self._collector(gradient))

    @staticmethod
    def _collector(gradient: Tensor) -> Callable[[Tensor], None]:
        def collect(parameter: Tensor) -> None:
            assert parameter.grad is not None
            gradient.add_(parameter.grad)
            parameter.grad = None

        return collect

    # -- the step ------------------------------------------------------------------------------------------------------

    def backward(self, loss: Tensor) -> None:
        """Adds the gradients of this micro-batch's share of the step's mean loss."""
        self.finish_updates()
        if self.used:
            self.clear_gradients()
        self.numbers.loss += loss.detach()
        (loss * self.scale.value).backward()

    def step(self, lr: float, own: RankNumbers = UNMEASURED) -> StepResult:
        """Makes one optimizer step over all ranks. It changes nothing if a gradient is not finite."""
        if self.numbers.connected:
            for total in self.collected():
                dist.all_reduce(total)
                total.div_(self.numbers.world)
        reduced = self.numbers.reduce(own)
        # Summed per parameter, in their order, so that placement does not change a bit of it.
        norms = self.norms()
        norm = torch.stack([norms[name] for name in self.parameters]).norm() / self.scale.value
        skipped, clip = skip_and_clip(norm, self.max_grad_norm)
        self.update(lr, divisor=clip * self.scale.value, skipped=skipped)
        result = StepResult.of(reduced, norm, skipped, self.scale.value)
        self.drop()
        self.scale.adapt(skipped)
        return result

    def drop(self) -> None:
        """Drops gradients and losses that no step has used. Updates may still read them until the next ``backward``."""
        self.numbers.loss.zero_()
        self.used = True

    def clear_gradients(self) -> None:
        """Fills the gradients with zeros."""
        for gradients in self.collected():
            gradients.zero_()
        self.used = False

    def norms(self) -> dict[str, Tensor]:
        """Returns the norm of each parameter's gradient by its name."""
        return dict(zip(self.gradients, norms_of(list(self.gradients.values())), strict=True))

    @abstractmethod
    def collected(self) -> Sequence[Tensor]:
        """Returns the arrays of gradients on the device, which ranks sum."""

    @abstractmethod
    def update(self, lr: float, divisor: Tensor, skipped: Tensor) -> None:
        """Updates the masters, and rounds them into the parameters.

        Args:
            lr: The learning rate.
            divisor: Scalar on the device by which gradients are divided (loss scale times clipping).
            skipped: Scalar on the device; where it is 1, nothing changes.
        """

    @abstractmethod
    def finish_updates(self) -> None:
        """Orders later compute after all updates."""

    @abstractmethod
    def wait(self) -> None:
        """Waits until masters and parameters can be read and written on the host."""

    def room_for_state(self) -> Tensor:
        """Allocates as much device memory as the first step will for the optimizer's state; empty if it exists."""
        return torch.empty(0, dtype=torch.uint8, device=self.device)

    # -- masters and files ---------------------------------------------------------------------------------------------

    @abstractmethod
    def named_masters(self) -> Mapping[str, Tensor]:
        """Returns the masters by the names of their parameters. Call ``wait`` before reading masters on the host."""

    @abstractmethod
    def pieces(self) -> dict[str, Piece]:
        """Returns the tensors of ``state`` as pieces of a file, to be read one after another before the next step."""

    @abstractmethod
    def load_state(self, tensors: dict[str, Tensor]) -> None:
        """Restores what ``state`` returned, even if its masters were stored on another device."""

    def state(self, copy: bool = True) -> dict[str, Tensor]:
        """Returns what a resumed run needs, as plain tensors by name: masters, optimizer state and loss scale.

        Args:
            copy: See ``for_file``.
        """
        return for_file(self.tensors(), copy)

    def tensors(self) -> dict[str, Tensor]:
        """Returns the tensors of ``state`` on their own devices; masters that are put together are new."""
        return {name: piece.read() for name, piece in self.pieces().items()}
