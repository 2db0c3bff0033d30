"""fp32 master weights with an optimizer of torch or another library, on the device, one tensor per parameter.

adam_weights.py does the same for Adam, in less memory. The host waits for the device before each step, unless the
optimizer is fused.
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import Parameter

from cogvideox.memory.buffers import Layout
from cogvideox.optimizer.adam import EXAMPLE, MASTER
from cogvideox.optimizer.master_weights import MasterWeights
from cogvideox.optimizer.state_tensors import as_tensor, by_parameter, overwrite, plain_tensors
from cogvideox.tensor_files import Piece, pieces_of

MakeOptimizer = Callable[[Sequence[Parameter]], torch.optim.Optimizer]
ALL = "*"  # takes the place of the parameter in the names of tensors that belong to all parameters


class Optimized:
    """Joins master weights with their optimizer.

    The state of a fused optimizer is created in the constructor, that of any other at the first step.
    """

    def __init__(self, masters: list[Parameter], gradients: Sequence[Tensor], make: MakeOptimizer) -> None:
        """Makes the optimizer.

        Args:
            masters: The fp32 master weights.
            gradients: One fp32 gradient per master; their values do not matter.
            make: Makes the optimizer for the masters.
        """
        self.masters, self.optimizer = masters, make(masters)
        self.fused = is_fused(self.optimizer)
        if self.fused:
            # A skipped step creates the moments, filled with zeros, and changes nothing.
            one = torch.ones((), device=masters[0].device)
            self.update(gradients, 0.0, divisor=one, skipped=one)

    def update(self, gradients: Sequence[Tensor], lr: float, divisor: Tensor, skipped: Tensor) -> None:
        """Makes one optimizer step on the master weights.

        Args:
            gradients: One fp32 gradient per master.
            lr: The learning rate.
            divisor: Scalar on the device by which a fused optimizer divides the gradients (loss scale times clipping).
            skipped: Scalar on the device; a fused optimizer changes nothing where it is 1. For any other optimizer the
                caller divides and skips.
        """
        if self.fused:
            # The fused kernel reads these attributes of the optimizer, as torch.amp.GradScaler sets them.
            vars(self.optimizer).update(grad_scale=divisor, found_inf=skipped)
        set_rate(self.optimizer, lr)
        for master, gradient in zip(self.masters, gradients, strict=True):
            master.grad = gradient
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


class Resident(Optimized):
    """Keeps master weights on the device, one tensor per parameter. An fp32 parameter is its own master.

    Args:
        parameters: The trained parameters by name.
        gradients: One fp32 gradient per parameter, in the same order; all are zero at this point.
        make: Makes the optimizer for the masters.
    """

    def __init__(self, parameters: dict[str, Parameter], gradients: Sequence[Tensor], make: MakeOptimizer) -> None:
        self.parameters = parameters
        own = [p if p.dtype == torch.float32 else Parameter(p.detach().float()) for p in parameters.values()]
        super().__init__(own, gradients, make)
        self.make = make

    def update(self, gradients: Sequence[Tensor], lr: float, divisor: Tensor, skipped: Tensor) -> None:
        """Makes one step as ``Optimized.update`` does, then rounds the masters into the parameters."""
        super().update(gradients, lr, divisor, skipped)
        self._round()

    @torch.no_grad()
    def _round(self) -> None:
        for parameter, master in zip(self.parameters.values(), self.masters, strict=True):
            if parameter is not master:
                parameter.copy_(master)

    def missing_bytes(self) -> int:
        """Returns how many bytes of state the optimizer will allocate at its first step."""
        if self.optimizer.state:
            return 0
        kept = measured_state_bytes(self.make, self.masters[0].device)
        return kept * sum(master.numel() for master in self.masters)

    def named_masters(self) -> dict[str, Tensor]:
        """Returns the master weights by the names of their parameters."""
        return dict(zip(self.parameters, self.masters, strict=True))

    def state(self) -> dict[str, Tensor]:
        """Returns the masters and the optimizer's state as plain tensors named ``key/parameter``."""
        tensors = {}
        for name, master in self.named_masters().items():
            tensors[f"{MASTER}/{name}"] = master.detach()
            for key, tensor in plain_tensors(self.optimizer.state[master]):
                tensors[f"{key}/{name}"] = tensor
        return tensors

    @torch.no_grad()
    def load_state(self, saved: dict[str, dict[str, Tensor]], numbers: dict[str, bool | int | float]) -> None:
        """Restores what ``state`` returned.

        Args:
            saved: For each parameter its tensors by key, as ``by_parameter`` groups them.
            numbers: Settings and counters of the parameter group, as ``group_numbers`` returns them.
        """
        self.optimizer.param_groups[0].update(numbers)
        for name, master in self.named_masters().items():
            master.copy_(saved[name].pop(MASTER))
            overwrite(self.optimizer.state[master], saved[name], master.device)
        self._round()


class ResidentWeights(MasterWeights):
    """Trains parameters through fp32 master weights with an optimizer whose step needs only gradients.

    Args:
        parameters: See ``MasterWeights``, also for the last two.
        make: Makes the optimizer for the masters.
        max_grad_norm: See there.
        dynamic_scale: See there.
    """

    def __init__(
        self, parameters: dict[str, Parameter], make: MakeOptimizer, max_grad_norm: float, dynamic_scale: bool
    ) -> None:
        super().__init__(parameters, next(iter(parameters.values())).device, max_grad_norm, dynamic_scale)
        layout = layout_of(parameters)
        self.flat = torch.zeros(layout.numbers, device=self.device)  # gradients in fp32
        self.collect(dict(zip(parameters, layout.views_of(self.flat), strict=True)))
        self.resident = Resident(parameters, list(self.gradients.values()), make)
        self.fresh_numbers = group_numbers(self.resident.optimizer)

    def collected(self) -> list[Tensor]:
        """See ``MasterWeights``."""
        return [self.flat]

    def room_for_state(self) -> Tensor:
        """See ``MasterWeights``."""
        return torch.empty(self.resident.missing_bytes(), dtype=torch.uint8, device=self.device)

    def update(self, lr: float, divisor: Tensor, skipped: Tensor) -> None:
        """See ``MasterWeights``."""
        if not self.resident.fused:
            # This waits for the device. Such optimizers count steps on the host, so a step could not be undone.
            if skipped.item():
                return
            self.flat.div_(divisor)
        self.resident.update(list(self.gradients.values()), lr, divisor, skipped)

    def finish_updates(self) -> None:
        """Does nothing: the updates are on the stream that computes."""

    def wait(self) -> None:
        """Does nothing: reading a tensor of the device waits for its updates."""

    def named_masters(self) -> dict[str, Tensor]:
        """See ``MasterWeights``."""
        return self.resident.named_masters()

    def pieces(self) -> dict[str, Piece]:
        """See ``MasterWeights``."""
        tensors = self.scale.state() | self.resident.state()
        for key, value in group_numbers(self.resident.optimizer).items():
            if self.fresh_numbers.get(key) != value:
                tensors[f"{key}/{ALL}"] = as_tensor(value)
        return pieces_of(tensors)

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        """See ``MasterWeights``."""
        saved = by_parameter(tensors)
        stepped = any(len(saved[name]) > 1 for name in self.parameters)  # Before the first step there are masters only.
        if stepped and not self.resident.fused:
            # A step with zero gradients and a zero rate creates the state that is overwritten below.
            self.update(0.0, torch.ones((), device=self.device), torch.zeros((), device=self.device))
            self.clear_gradients()  # Some optimizers add weight decay to the gradients themselves.
        self.scale.load_state(tensors)
        numbers = self.fresh_numbers | {key: tensor.item() for key, tensor in saved[ALL].items()}
        self.resident.load_state(saved, numbers)


def layout_of(parameters: dict[str, Parameter]) -> Layout:
    """Returns a layout with one fp32 element per parameter element."""
    return Layout([torch.empty_like(p, dtype=torch.float32, device="meta") for p in parameters.values()])


def is_fused(optimizer: torch.optim.Optimizer) -> bool:
    """Returns whether the optimizer divides gradients and skips a step on the device, as torch's fused Adam does.

    torch's SGD claims this too, but leaves its momentum undefined if the first step is skipped, so it does not count.
    """
    adam = isinstance(optimizer, (torch.optim.Adam, torch.optim.AdamW))
    # torch.amp.GradScaler reads the same attribute.
    return adam and getattr(optimizer, "_step_supports_amp_scaling", False)


def example_state(make: MakeOptimizer, device: torch.device) -> dict[str, Tensor]:
    """Returns the optimizer's state by name, without its master, after one step on a parameter of EXAMPLE elements."""
    parameter = Parameter(torch.ones(EXAMPLE // 1024, 1024, device=device))
    parameter.grad = torch.ones_like(parameter)
    optimizer = make([parameter])
    optimizer.step()
    return dict(plain_tensors(optimizer.state[parameter]))


def measured_state_bytes(make: MakeOptimizer, device: torch.device) -> int:
    """Returns the bytes of the optimizer's state per trained element, without its master."""
    kept = sum(tensor.nbytes for tensor in example_state(make, device).values())
    # Subtracting 0.1 leaves out tables and counters, whose size does not depend on that of the parameter.
    return math.ceil(kept / EXAMPLE - 0.1)


def set_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Sets the learning rate of the next step.

    torchao's optimizers keep the rate in a tensor that their compiled step reads, so it is filled in place.
    """
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(lr)
        else:
            group["lr"] = lr


def group_numbers(optimizer: torch.optim.Optimizer) -> dict[str, bool | int | float]:
    """Returns the numbers of the parameter group except the rate: settings, and state such as prodigy's step size."""
    group = optimizer.param_groups[0]
    return {key: value for key, value in group.items() if isinstance(value, (bool, int, float)) and key != "lr"}
