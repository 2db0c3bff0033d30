"""fp32 master weights and the optimizer's moments: where they are stored, and how a step reaches them.

The model holds its trained parameters in the compute type, such as bf16. Most updates are smaller than the rounding
error of bf16, so each parameter has a master weight in fp32, which the optimizer updates and which is then rounded into
the parameter. Master and two moments take 12 bytes per parameter element, six times the bf16 weight itself. Two classes
store them:

    Resident   one master tensor per parameter, on the device, and one optimizer for all of them
    Flat       one long array each for masters, first moments and second moments, in pinned host memory (or on the
               device). A step handles range after range of them, each at most 64 MiB:

               parameters     |  a  |      b      |   c   |
               masters        |===========|===========|====|      each range is copied to the device, updated there by
               moments        |===========|===========|====|      an optimizer for this range, which sees one tensor,
               ranges            range 0      range 1   2         and copied back, while the next range arrives

Flat computes the same bits as Resident. On a CPU this holds only if every parameter has a multiple of 16 elements, as
those of CogVideoX have, because torch rounds the remainder of a vector loop differently there.

The functions at the end read and write the state of any optimizer as plain tensors by name, for checkpoints.
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

from cogvideox.memory.streaming import ALIGNMENT, Layout, Slice, Transfer, fill, host_buffer, pin

MakeOptimizer = Callable[[Sequence[Parameter]], torch.optim.Optimizer]
STATE_BYTES = 12  # bytes per element: the master and two moments in fp32, as a fused Adam needs them
CHUNK_BYTES = 64 * 2**20  # A copy of this size runs at full speed, and takes little of the device's memory.
MASTER = "master"


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
        kept = state_bytes(self.make, self.masters[0].device) - self.masters[0].element_size()
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


class Flat:
    """Keeps master weights and moments of some parameters in flat fp32 arrays, and updates them range by range.

    Args:
        parameters: The trained parameters by name, on the device or views of ``weights``.
        make: Makes the optimizer of one range; only fused ones are supported.
        device: Where the update runs.
        gradients: Returns one flat array with all gradients, in the order of the parameters. It is stored where the
            parameters are: on the device or on the host.
        weights: One flat host array with all parameters; None if the parameters are on the device.
        on_host: Whether masters and moments are stored in pinned host memory, otherwise on the device.

    Raises:
        ValueError: The optimizer is not fused.
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
        self.arrays: dict[str, Tensor] = {}  # one array of masters, and one of each moment, by key
        self.optimized = [self._create(*own, make) for own in zip(self.ranges, self.pieces, strict=True)]
        if on_host:
            for array in self.arrays.values():
                pin(array)
        self.optimizer = self.optimized[0].optimizer

    @torch.no_grad()
    def _create(self, which: slice, pieces: list[tuple[Tensor, slice]], make: MakeOptimizer) -> Optimized:
        """Creates masters and moments of one range on the device, and copies them to the arrays that store them."""
        master = torch.zeros(which.stop - which.start, device=self.device)
        for numbers, where in pieces:
            master[where] = numbers.to(self.device)
        optimized = Optimized([Parameter(master)], [torch.zeros_like(master)], make)
        if not optimized.fused:
            raise ValueError(f"{type(optimized.optimizer).__name__} cannot pass through the device")
        for key, tensor in optimizer_tensors(optimized).items():
            if key not in self.arrays:
                self.arrays[key] = self.layout.flat(self._allocate(self.layout.num_bytes))
            fill(self.arrays[key][which], tensor)
        # Between steps the optimizer keeps empty tensors, so that the device memory of the range is free again.
        attach_state(optimized, {key: tensor.new_empty(0) for key, tensor in optimizer_tensors(optimized).items()})
        return optimized

    def _allocate(self, num_bytes: int) -> Tensor:
        """Allocates memory for one flat array, as bytes."""
        if self.on_host:
            return host_buffer(num_bytes)
        return torch.empty(num_bytes, dtype=torch.uint8, device=self.device)

    def _pieces(self, which: slice) -> Iterator[tuple[Tensor, slice]]:
        """Yields, for each parameter that overlaps the range, its elements there and their positions in the range."""
        for start, parameter in zip(self.layout.starts, self.parameters.values(), strict=True):
            first, last = max(which.start, start), min(which.stop, start + parameter.numel())
            if first < last:
                numbers = parameter.detach().view(-1)[first - start : last - start]
                yield numbers, slice(first - which.start, last - which.start)

    def update(self, lr: float, divisor: Tensor, skipped: Tensor) -> Iterator[Transfer]:
        """Yields one transfer per range, which brings its host data to the device, updates it and sends it back.

        Nothing runs before the transfers are started. Gradients only arrive, and new weights only leave.
        """
        gradients = self.gradients()
        for number, which in enumerate(self.ranges):
            parts = [Slice(array[which]) for array in self.arrays.values()] if self.on_host else []
            if self.weights is not None:
                parts += [Slice(gradients[which], copy_out=False), Slice(self.weights[which], copy_in=False)]
            yield Transfer(parts, partial(self._update, number, lr, divisor, skipped))

    @torch.no_grad()
    def _update(self, number: int, lr: float, divisor: Tensor, skipped: Tensor, on_device: list[Tensor]) -> None:
        """Makes the step of one range, whose tensors are on the device, and rounds the masters into the parameters."""
        which, optimized, passing = self.ranges[number], self.optimized[number], iter(on_device)
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
        """Yields each parameter's name with views of its master and moments by key."""
        views = {key: self.layout.views(array) for key, array in self.arrays.items()}
        for number, name in enumerate(self.parameters):
            yield name, {key: tensors[number] for key, tensors in views.items()}

    def named_masters(self) -> dict[str, Tensor]:
        """Returns the master weights by the names of their parameters."""
        return {name: views[MASTER] for name, views in self._views()}

    def state(self) -> dict[str, Tensor]:
        """Returns the same as ``Resident.state``; each parameter gets a copy of the common step counter."""
        tensors: dict[str, Tensor] = {}
        for name, views in self._views():
            tensors |= {f"{key}/{name}": tensor for key, tensor in views.items()}
            tensors |= {f"{key}/{name}": tensor for key, tensor in counters(self.optimized[0]).items()}
        return tensors

    @torch.no_grad()
    def load_state(self, saved: dict[str, dict[str, Tensor]], numbers: dict[str, bool | int | float]) -> None:
        """Restores what ``state`` of this class or of ``Resident`` returned."""
        for name, views in self._views():
            for key, view in views.items():
                view.copy_(saved[name][key])
            self.parameters[name].copy_(views[MASTER])
        first = saved[next(iter(self.parameters))]  # All parameters have the same step counter.
        for optimized in self.optimized:
            optimized.optimizer.param_groups[0].update(numbers)
            for key, counter in counters(optimized).items():
                counter.copy_(first[key])


def layout_of(parameters: dict[str, Parameter]) -> Layout:
    """Returns a layout with one fp32 element per parameter element."""
    return Layout([torch.empty_like(p, dtype=torch.float32, device="meta") for p in parameters.values()])


# -- the state of a fused optimizer ------------------------------------------------------------------------------------


def optimizer_tensors(optimized: Optimized) -> dict[str, Tensor]:
    """Returns the single master of a range and its moments by key."""
    (master,) = optimized.masters
    values = optimized.optimizer.state[master]
    return {MASTER: master.detach()} | {key: value for key, value in values.items() if value.shape}


def attach_state(optimized: Optimized, tensors: dict[str, Tensor]) -> None:
    """Replaces the master and the moments of a range by other tensors of the same keys."""
    (master,) = optimized.masters
    moments = {key: tensor for key, tensor in tensors.items() if key != MASTER}
    master.data = tensors[MASTER]
    optimized.optimizer.state[master].update(moments)


def counters(optimized: Optimized) -> dict[str, Tensor]:
    """Returns the scalar state, the step counter. It stays on the device, where the fused kernel advances it."""
    (master,) = optimized.masters
    return {key: value for key, value in optimized.optimizer.state[master].items() if not value.shape}


def is_fused(optimizer: torch.optim.Optimizer) -> bool:
    """Returns whether the optimizer divides gradients and skips a step on the device, as torch's fused Adam does.

    torch's SGD claims this too, but leaves its momentum undefined if the first step is skipped, so it does not count.
    """
    adam = isinstance(optimizer, (torch.optim.Adam, torch.optim.AdamW))
    # torch.amp.GradScaler reads the same attribute.
    return adam and getattr(optimizer, "_step_supports_amp_scaling", False)


# -- the state of any optimizer ----------------------------------------------------------------------------------------


def state_bytes(make: MakeOptimizer, device: torch.device) -> int:
    """Returns the bytes per trained element: its fp32 master and the optimizer's state.

    The state is measured with one step on a parameter of 2**20 elements.
    """
    parameter = Parameter(torch.ones(1024, 1024, device=device))
    parameter.grad = torch.ones_like(parameter)
    optimizer = make([parameter])
    optimizer.step()
    kept = sum(tensor.nbytes for _, tensor in plain_tensors(optimizer.state[parameter]))
    # Subtracting 0.1 leaves out tables and counters, whose size does not depend on that of the parameter.
    return parameter.element_size() + math.ceil(kept / parameter.numel() - 0.1)


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
