"""fp32 master weights with an optimizer of torch or another library, on the device, one tensor per parameter.

The model holds its trained parameters in the compute type, such as bf16. Most updates are smaller than the rounding
error of bf16, so each parameter has a master weight in fp32, which the optimizer updates and which is then rounded into
the parameter. adam_weights.py does the same for Adam, in less memory.

The functions at the end read and write the state of any optimizer as plain tensors by name, for checkpoints.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from cogvideox.memory.streaming import Layout
from cogvideox.optimizer.adam import EXAMPLE, MASTER

MakeOptimizer = Callable[[Sequence[Parameter]], torch.optim.Optimizer]


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


# -- the state of any optimizer ----------------------------------------------------------------------------------------


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


def as_tensor(value: Tensor | bool | int | float) -> Tensor:
    """Returns a number as a tensor without loss of precision; floats become fp64."""
    return torch.tensor(value, dtype=torch.float64) if isinstance(value, float) else torch.as_tensor(value)


def plain_tensors(values: dict[str, Any]) -> Iterator[tuple[str, Tensor]]:
    """Yields an optimizer's state of one parameter as plain tensors by name.

    A number becomes a scalar tensor. A quantized tensor is yielded in its parts, named ``key.part``.
    """
    for key, value in values.items():
        if is_traceable_wrapper_subclass(value):
            yield from ((f"{key}.{part}", getattr(value, part)) for part in value.__tensor_flatten__()[0])
        elif value is not None:
            yield key, as_tensor(value)


def for_file(tensors: dict[str, Tensor], copy: bool) -> dict[str, Tensor]:
    """Returns the tensors on the CPU, contiguous and without shared memory, as safetensors needs them.

    Args:
        tensors: Tensors by name, on any device.
        copy: Whether tensors that are on the CPU already are copied. Without copies the result must be written before
            the next step, but takes no additional memory, which may be most of the host's.
    """
    found: dict[str, Tensor] = {}
    addresses: set[int] = set()
    for name, tensor in tensors.items():
        on_cpu = tensor.cpu().contiguous()
        found[name] = on_cpu.clone() if copy or on_cpu.data_ptr() in addresses else on_cpu
        addresses.add(on_cpu.data_ptr())
    return found


def by_parameter(tensors: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Groups tensors named ``key/parameter`` by parameter, and returns for each its tensors by key."""
    grouped: dict[str, dict[str, Tensor]] = defaultdict(dict)
    for full_name, tensor in tensors.items():
        key, _, name = full_name.partition("/")
        grouped[name][key] = tensor
    return grouped


def overwrite(values: dict[str, Any], tensors: dict[str, Tensor], device: torch.device) -> None:
    """Writes tensors that ``plain_tensors`` yielded back into an optimizer's state of one parameter.

    Args:
        values: The state to overwrite. Quantized tensors must exist in it already, so the optimizer must have stepped.
        tensors: The tensors by name.
        device: Where tensors that the state does not have yet are created.
    """
    for name, tensor in tensors.items():
        key, _, part = name.partition(".")
        value = values.get(key)
        if part:
            getattr(value, part).copy_(tensor)
        elif isinstance(value, Tensor) and value.shape == tensor.shape:
            value.copy_(tensor)
        elif isinstance(value, (bool, int, float)):
            values[key] = type(value)(tensor.item())
        else:
            values[key] = tensor.to(device, copy=True)
