"""fp32 masters and what an optimizer keeps for them.

Resident: a master of each parameter on its device, and one optimizer for all of them.
Flat: masters and moments of some parameters in flat arrays, a master behind the other, in pinned host memory or on the
device; they are updated range by range, and each range has an optimizer of its own, which sees one tensor. Number by
number it does what Resident does, with the same bits; on a CPU if all parameters have multiples of 16 numbers, as those
of CogVideoX do: it rounds other ends in another way.
And what any optimizer keeps, as plain tensors by name.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from cogvideox.memory.streaming import ALIGNMENT, Layout, Slice, Transfer, pinned

MakeOptimizer = Callable[[Sequence[Parameter]], torch.optim.Optimizer]
STATE_BYTES = 12  # of a number: master and two moments, fp32; what a fused Adam moves through the device
CHUNK_BYTES = 64 * 2**20  # large enough that a copy runs at full speed, small beside anything else on the device
MASTER = "master"


class Optimized:
    """Masters and an optimizer for them. Where that is fused, all that it keeps exists from the start."""

    def __init__(self, masters: list[Parameter], gradients: Sequence[Tensor], make: MakeOptimizer) -> None:
        self.masters, self.optimizer = masters, make(masters)
        self.fused = is_fused(self.optimizer)
        if self.fused:  # a step that is skipped makes the moments, of zeros
            one = torch.ones((), device=masters[0].device)
            self.update(gradients, 0.0, divisor=one, skipped=one)

    def update(self, gradients: Sequence[Tensor], lr: float, divisor: Tensor, skipped: Tensor) -> None:
        """One step of the masters; only a fused one divides the gradients, of fp32, and skips itself."""
        if self.fused:
            self.optimizer.grad_scale = divisor
            self.optimizer.found_inf = skipped
        set_rate(self.optimizer, lr)
        for master, gradient in zip(self.masters, gradients, strict=True):
            master.grad = gradient
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


class Resident(Optimized):
    """Parameters with a master each, on their device; one of fp32 is its own. Their gradients are of zeros so far."""

    def __init__(self, parameters: dict[str, Parameter], gradients: Sequence[Tensor], make: MakeOptimizer) -> None:
        self.parameters = parameters
        own = [p if p.dtype == torch.float32 else Parameter(p.detach().float()) for p in parameters.values()]
        super().__init__(own, gradients, make)
        self.make = make

    def update(self, gradients: Sequence[Tensor], lr: float, divisor: Tensor, skipped: Tensor) -> None:
        """One step of the masters, rounded into the model."""
        super().update(gradients, lr, divisor, skipped)
        self._round()

    @torch.no_grad()
    def _round(self) -> None:
        for parameter, master in zip(self.parameters.values(), self.masters, strict=True):
            if parameter is not master:
                parameter.copy_(master)

    def missing_bytes(self) -> int:
        """What the optimizer is going to make at its first step."""
        if self.optimizer.state:
            return 0
        kept = state_bytes(self.make, self.masters[0].device) - self.masters[0].element_size()
        return kept * sum(master.numel() for master in self.masters)

    def named_masters(self) -> dict[str, Tensor]:
        """The masters by their parameters' names."""
        return dict(zip(self.parameters, self.masters, strict=True))

    def state(self) -> dict[str, Tensor]:
        """Masters and what the optimizer keeps for each, as key/parameter."""
        tensors = {}
        for name, master in self.named_masters().items():
            tensors[f"{MASTER}/{name}"] = master.detach()
            for key, tensor in plain_tensors(self.optimizer.state[master]):
                tensors[f"{key}/{name}"] = tensor
        return tensors

    @torch.no_grad()
    def load_state(self, of: dict[str, dict[str, Tensor]], numbers: dict[str, bool | int | float]) -> None:
        """Takes up what ``state`` returned, by parameter, and ``group_numbers``."""
        self.optimizer.param_groups[0].update(numbers)
        for name, master in self.named_masters().items():
            master.copy_(of[name].pop(MASTER))
            overwrite(self.optimizer.state[master], of[name], master.device)
        self._round()


class Flat:
    """Parameters whose masters and moments are numbers in a row.

    Args:
        parameters: on the device, or views of ``weights``.
        weights: all numbers of the parameters on the host, as Layout places them; None where they are on the device.
        gradients: all numbers of the gradients, placed alike; on the device, or on the host where the parameters are.
        device: where they are updated.
        on_host: masters and moments are in pinned host memory; else they are on the device too.
    """

    def __init__(
        self,
        parameters: dict[str, Parameter],
        make: MakeOptimizer,
        device: torch.device,
        gradients: Callable[[], Tensor],
        weights: Tensor | None = None,
        on_host: bool = True,
    ) -> None:
        self.on_host = on_host
        self.parameters, self.device, self.gradients, self.weights = parameters, device, gradients, weights
        self.layout, step = layout_of(parameters), CHUNK_BYTES // STATE_BYTES // ALIGNMENT * ALIGNMENT
        self.ranges = [slice(i, min(i + step, self.layout.numbers)) for i in range(0, self.layout.numbers, step)]
        self.pieces = [list(self._pieces(which)) for which in self.ranges]
        self.arrays: dict[str, Tensor] = {}  # by key: masters, moments
        self.optimized = [self._start(*own, make) for own in zip(self.ranges, self.pieces, strict=True)]
        self.optimizer = self.optimized[0].optimizer

    @torch.no_grad()
    def _start(self, which: slice, pieces: list[tuple[Tensor, slice]], make: MakeOptimizer) -> Optimized:
        """Masters and moments of a range, made on the device and brought to where they rest."""
        master = torch.zeros(which.stop - which.start, device=self.device)
        for numbers, where in pieces:
            master[where] = numbers.to(self.device)
        optimized = Optimized([Parameter(master)], [torch.zeros_like(master)], make)
        if not optimized.fused:
            raise ValueError(f"{type(optimized.optimizer).__name__} cannot pass through the device")
        for key, tensor in optimizer_tensors(optimized).items():
            if key not in self.arrays:
                self.arrays[key] = self.layout.flat(self._room(self.layout.num_bytes))
            self.arrays[key][which].copy_(tensor)
        attach_state(optimized, {key: tensor.new_empty(0) for key, tensor in optimizer_tensors(optimized).items()})
        return optimized

    def _room(self, num_bytes: int) -> Tensor:
        """Memory for an array."""
        return pinned(num_bytes) if self.on_host else torch.empty(num_bytes, dtype=torch.uint8, device=self.device)

    def _pieces(self, which: slice) -> Iterator[tuple[Tensor, slice]]:
        """What parameters have in a range: the numbers, and where in the range they are."""
        for start, parameter in zip(self.layout.starts, self.parameters.values(), strict=True):
            first, last = max(which.start, start), min(which.stop, start + parameter.numel())
            if first < last:
                numbers = parameter.detach().view(-1)[first - start : last - start]
                yield numbers, slice(first - which.start, last - which.start)

    def update(self, lr: float, divisor: Tensor, skipped: Tensor) -> Iterator[Transfer]:
        """One step, range by range: what is on the host passes through the device."""
        gradients = self.gradients()
        for number, which in enumerate(self.ranges):
            parts = [Slice(array[which]) for array in self.arrays.values()] if self.on_host else []
            if self.weights is not None:
                parts += [Slice(gradients[which], leaves=False), Slice(self.weights[which], comes=False)]
            yield Transfer(parts, partial(self._update, number, lr, divisor, skipped))

    @torch.no_grad()
    def _update(self, number: int, lr: float, divisor: Tensor, skipped: Tensor, load: list[Tensor]) -> None:
        """One step of a range, whose load is on the device, rounded into the parameters there."""
        which, optimized, passing = self.ranges[number], self.optimized[number], iter(load)
        state = {key: next(passing) if self.on_host else array[which] for key, array in self.arrays.items()}
        if self.weights is None:
            gradient, rounded = self.gradients()[which], self.pieces[number]
        else:
            gradient, rounded = next(passing), [(next(passing), slice(None))]
        attach_state(optimized, state)
        optimized.update([gradient.float()], lr, divisor, skipped)
        attach_state(optimized, {key: tensor.new_empty(0) for key, tensor in state.items()})
        for numbers, where in rounded:
            numbers.copy_(state[MASTER][where])

    def _views(self) -> Iterator[tuple[str, dict[str, Tensor]]]:
        """Of each parameter its master and moments, by key."""
        views = {key: self.layout.views(array) for key, array in self.arrays.items()}
        for number, name in enumerate(self.parameters):
            yield name, {key: tensors[number] for key, tensors in views.items()}

    def named_masters(self) -> dict[str, Tensor]:
        """The masters by their parameters' names."""
        return {name: views[MASTER] for name, views in self._views()}

    def state(self) -> dict[str, Tensor]:
        """As ``Resident.state``: of the counter, which is the same in all ranges, each parameter has one."""
        tensors: dict[str, Tensor] = {}
        for name, views in self._views():
            tensors |= {f"{key}/{name}": tensor for key, tensor in views.items()}
            tensors |= {f"{key}/{name}": tensor for key, tensor in counters(self.optimized[0]).items()}
        return tensors

    @torch.no_grad()
    def load_state(self, of: dict[str, dict[str, Tensor]], numbers: dict[str, bool | int | float]) -> None:
        """As ``Resident.load_state``."""
        for name, views in self._views():
            for key, view in views.items():
                view.copy_(of[name][key])
            self.parameters[name].copy_(views[MASTER])
        any_of_them = of[next(iter(self.parameters))]
        for optimized in self.optimized:
            optimized.optimizer.param_groups[0].update(numbers)
            for key, counter in counters(optimized).items():
                counter.copy_(any_of_them[key])


def layout_of(parameters: dict[str, Parameter]) -> Layout:
    """Of an fp32 number for each of theirs."""
    return Layout([torch.empty_like(p, dtype=torch.float32, device="meta") for p in parameters.values()])


# -- what a fused optimizer keeps --------------------------------------------------------------------------------------


def optimizer_tensors(optimized: Optimized) -> dict[str, Tensor]:
    """The only master and its moments, by key."""
    (master,) = optimized.masters
    values = optimized.optimizer.state[master]
    return {MASTER: master.detach()} | {key: value for key, value in values.items() if value.shape}


def attach_state(optimized: Optimized, tensors: dict[str, Tensor]) -> None:
    """Puts others in their place."""
    (master,) = optimized.masters
    moments = {key: tensor for key, tensor in tensors.items() if key != MASTER}
    master.data = tensors[MASTER]
    optimized.optimizer.state[master].update(moments)


def counters(optimized: Optimized) -> dict[str, Tensor]:
    """What it keeps beside: a step counter. That stays on the device, as it is small, and the kernel's."""
    (master,) = optimized.masters
    return {key: value for key, value in optimized.optimizer.state[master].items() if not value.shape}


def is_fused(optimizer: torch.optim.Optimizer) -> bool:
    """Whether its step skips itself. torch's SGD says so too, but leaves its momentum undefined when the first does."""
    adam = isinstance(optimizer, (torch.optim.Adam, torch.optim.AdamW))
    return adam and getattr(optimizer, "_step_supports_amp_scaling", False)  # as torch.amp.GradScaler asks


# -- what any optimizer keeps ------------------------------------------------------------------------------------------


def state_bytes(make: MakeOptimizer, device: torch.device) -> int:
    """Bytes of a trained number: its fp32 master, and what the optimizer keeps, as a step on many numbers shows."""
    parameter = Parameter(torch.ones(1024, 1024, device=device))
    parameter.grad = torch.ones_like(parameter)
    optimizer = make([parameter])
    optimizer.step()
    kept = sum(tensor.nbytes for _, tensor in plain_tensors(optimizer.state[parameter]))
    return parameter.element_size() + math.ceil(kept / parameter.numel() - 0.1)  # tables and counters are small change


def set_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """The learning rate of the next step; torchao's must stay the tensor that it is."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(lr)
        else:
            group["lr"] = lr


def group_numbers(optimizer: torch.optim.Optimizer) -> dict[str, bool | int | float]:
    """What an optimizer counts for all parameters together, as prodigy its step size; and its settings."""
    group = optimizer.param_groups[0]
    return {key: value for key, value in group.items() if isinstance(value, (bool, int, float)) and key != "lr"}


def as_tensor(value: Tensor | bool | int | float) -> Tensor:
    """A number as a tensor that holds all of it."""
    return torch.tensor(value, dtype=torch.float64) if isinstance(value, float) else torch.as_tensor(value)


def plain_tensors(values: dict[str, Any]) -> Iterator[tuple[str, Tensor]]:
    """What an optimizer keeps for a parameter, as tensors by name: numbers too, and quantized ones in their parts."""
    for key, value in values.items():
        if is_traceable_wrapper_subclass(value):
            yield from ((f"{key}.{part}", getattr(value, part)) for part in value.__tensor_flatten__()[0])
        elif value is not None:
            yield key, as_tensor(value)


def for_file(tensors: dict[str, Tensor], copy: bool) -> dict[str, Tensor]:
    """Tensors on the CPU, each in memory of its own.

    Args:
        copy: if not, what is there already stays where it is, as it may take most of the memory: to be written at once.
    """
    found: dict[str, Tensor] = {}
    taken: set[int] = set()
    for name, tensor in tensors.items():
        here = tensor.cpu().contiguous()
        found[name] = here.clone() if copy or here.data_ptr() in taken else here
        taken.add(here.data_ptr())
    return found


def by_parameter(tensors: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Tensors named key/parameter, as key -> tensor for each parameter."""
    of: dict[str, dict[str, Tensor]] = defaultdict(dict)
    for full, tensor in tensors.items():
        key, _, name = full.partition("/")
        of[name][key] = tensor
    return of


def overwrite(values: dict[str, Any], tensors: dict[str, Tensor], device: torch.device) -> None:
    """Puts what ``plain_tensors`` gave into the values of an optimizer that has made a step."""
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
