"""Weights that Adam trains, in flat arrays beside their state: on the device, or in host memory between steps.

A ``Group`` has all weights of one place: those of a transformer block, or those outside the blocks. Weights, low bits
of masters, moments and gradients are one array each, in the order of the parameters, which are views of the array:

    parameters       |  a  |      b      |   c   |
    weights          |===========================|
    gradients        |===========================|
    state            |===========|===========|===|     state on the host passes through the device range by range:
    ranges              range 0      range 1   2       it is copied in, updated there, and copied back

State on the device is updated by one call of ``adam.update``; where that is not compiled, as on a CPU, it is made range
by range too, because its operations need memory for what lies between them. Either way gives the same bits.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor
from torch.nn import Parameter

from cogvideox.memory.buffers import ALIGNMENT, Layout, host_buffer, pin
from cogvideox.memory.streaming import Slice, Transfer
from cogvideox.optimizer.adam import (
    FIRST,
    GROUP,
    LOW,
    MASTER,
    SCALE,
    SECOND,
    WEIGHT,
    Adam,
    hashed,
    is_compiled,
    join,
    read_master,
    read_moments,
    split,
    stored_moments,
    update_on,
    write_master,
)
from cogvideox.tensor_files import Piece, ReadPieces, pieces_of

BITSANDBYTES_GROUP = 256  # elements that share a scale in moments of bitsandbytes
RANGE_BYTES = 64 * 2**20  # A copy of this size runs at full speed, and takes little of the device's memory.
assert ALIGNMENT % GROUP == 0  # so that parameters do not share a group, and all ranges have complete groups


class Group:
    """Keeps the weights of some parameters, all of one type, with the state of Adam.

    Args:
        parameters: The parameters by name. Without ``weights`` they become views of a new array on the device.
        adam: The settings of Adam.
        device: Where the updates run.
        state_on_host: Whether the state is stored in pinned host memory.
        weights: The array whose views the parameters are, on the device or on the host.
        gradients: Returns the array of all gradients, which is on the host. By default the group keeps gradients
            itself, on the device.
        sums: Whether gradients of several passes or processes are added up, for which those on the device are in fp32.
            Otherwise they have the type of the weights.
    """

    def __init__(
        self,
        parameters: dict[str, Parameter],
        adam: Adam,
        device: torch.device,
        state_on_host: bool = False,
        weights: Tensor | None = None,
        gradients: Callable[[], Tensor] | None = None,
        sums: bool = True,
    ) -> None:
        self.parameters, self.adam, self.device, self.state_on_host = parameters, adam, device, state_on_host
        self.layout = Layout(list(parameters.values()))
        self.starts = dict(zip(parameters, self.layout.starts, strict=True))  # of each parameter in the arrays
        self.weights = self._flatten() if weights is None else weights
        self.types = adam.state_types(self.weights.dtype)
        self.arrays = {name: self._array(name) for name in self.types}
        if MASTER in self.arrays:
            self.arrays[MASTER].copy_(self.weights)
        if state_on_host:
            for array in self.arrays.values():
                pin(array)  # after it was written: that creates pages with all cores
        self.collected: Tensor | None = None
        if gradients is None:
            self.collected = torch.zeros(
                self.layout.numbers, dtype=torch.float32 if sums else self.weights.dtype, device=device
            )
        self._gradients = gradients
        self._ranges = self._divide()

    @torch.no_grad()
    def _flatten(self) -> Tensor:
        """Moves the parameters into one array on the device."""
        buffer = torch.zeros(self.layout.num_bytes, dtype=torch.uint8, device=self.device)
        for parameter, view in zip(self.parameters.values(), self.layout.views(buffer), strict=True):
            view.copy_(parameter)
            parameter.data = view
        return self.layout.flat(buffer)

    def _array(self, name: str) -> Tensor:
        """Returns an array of zeros for a part of the state."""
        numbers, dtype = self.layout.numbers // (GROUP if name.endswith(SCALE) else 1), self.types[name]
        if not self.state_on_host:
            return torch.zeros(numbers, dtype=dtype, device=self.device)
        return host_buffer(numbers * dtype.itemsize).view(dtype).zero_()

    def _divide(self) -> list[slice]:
        """Divides the array into the ranges that are updated one after another."""
        whole = is_compiled(self.device.type) and not self.state_on_host and self.collected is not None
        size = self.layout.numbers if whole else int(RANGE_BYTES / (self.transfer_bytes or 1)) // GROUP * GROUP
        return [slice(i, min(i + size, self.layout.numbers)) for i in range(0, self.layout.numbers, max(size, GROUP))]

    def gradients(self) -> Tensor:
        """Returns the array of all gradients, on the device or on the host."""
        if self.collected is not None:
            return self.collected
        assert self._gradients is not None
        return self._gradients()

    @property
    def transfer_bytes(self) -> float:
        """Returns the bytes per weight that pass through a slot of the device, or would."""
        gradient = 4 if self.collected is None else 0
        return self.adam.state_bytes(self.weights.dtype) + gradient

    def named_gradients(self) -> dict[str, Tensor]:
        """Returns the gradients on the device by the names of their parameters."""
        assert self.collected is not None
        views = self.layout.views_of(self.collected)
        return dict(zip(self.parameters, views, strict=True))

    # -- the step ------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def update(self, scalars: Tensor) -> None:
        """Updates weights whose state and gradients are on the device, on the current stream."""
        for which in self._ranges:
            self._update(self.weights, which, scalars, self._part(which), self.gradients()[which])

    def transfers(self, weights: Tensor, scalars: Tensor) -> Iterator[Transfer]:
        """Yields the transfers that update weights on the device, with state or gradients of the host.

        Args:
            weights: The array of weights on the device: this group's, or a copy of it.
            scalars: What ``Adam.scalars`` returned.
        """
        for which in self._ranges:
            part = self._part(which)
            pieces = [Slice(tensor) for tensor in part.values()] if self.state_on_host else []
            if self.collected is None:
                pieces.append(Slice(self.gradients()[which], copy_out=False))
            yield Transfer(pieces, partial(self._update_passing, weights, which, scalars))

    def _update_passing(self, weights: Tensor, which: slice, scalars: Tensor, passing: Sequence[Tensor]) -> None:
        """Updates a range of weights with the tensors of a transfer."""
        arrived = iter(passing)
        state = {name: next(arrived) for name in self.arrays} if self.state_on_host else self._part(which)
        self._update(weights, which, scalars, state, next(arrived, None))

    @torch.no_grad()
    def _update(
        self, weights: Tensor, which: slice, scalars: Tensor, state: Mapping[str, Tensor], gradient: Tensor | None
    ) -> None:
        gradient = self.gradients()[which] if gradient is None else gradient
        grouped = {name: t if name.endswith(SCALE) else t.view(-1, GROUP) for name, t in state.items()}
        step = update_on(self.device.type, self.adam)
        step(weights[which].view(-1, GROUP), gradient.view(-1, GROUP), grouped, scalars)

    def _part(self, which: slice) -> dict[str, Tensor]:
        """Returns the state of a range by name."""
        groups = slice(which.start // GROUP, which.stop // GROUP)
        return {name: array[groups if name.endswith(SCALE) else which] for name, array in self.arrays.items()}

    # -- by parameter --------------------------------------------------------------------------------------------------

    def _of(self, name: str) -> tuple[Tensor, dict[str, Tensor]]:
        """Returns a parameter's weights and state, each (groups, GROUP) or, for scales, (groups,)."""
        start = self.starts[name]
        which = slice(start, start + -(-self.parameters[name].numel() // GROUP) * GROUP)
        state = {key: t if key.endswith(SCALE) else t.view(-1, GROUP) for key, t in self._part(which).items()}
        return self.weights[which].view(-1, GROUP), state

    def _shaped(self, name: str, grouped: Tensor) -> Tensor:
        """Returns numbers of a parameter, (groups, GROUP), without padding in its shape; scales stay as they are."""
        parameter = self.parameters[name]
        return grouped.view(-1)[: parameter.numel()].view(parameter.shape) if grouped.dim() > 1 else grouped

    def _grouped(self, tensor: Tensor) -> Tensor:
        """Returns the inverse of ``_shaped``, padded with zeros."""
        flat = tensor.reshape(-1)
        return torch.nn.functional.pad(flat, (0, -flat.numel() % GROUP)).view(-1, GROUP)

    @torch.no_grad()
    def write_master(self, name: str, value: Tensor) -> None:
        """Stores a master, and rounds it into the parameter."""
        weight, state = self._of(name)
        write_master(self._grouped(value.to(weight.device, torch.float32)), weight, state)

    def pieces(self, name: str) -> dict[str, Piece]:
        """Returns the master and the moments of a parameter by name, as a checkpoint stores them.

        The names are those of torch.optim.Adam. The codes of 8-bit moments have the parameter's shape.
        """
        weight, state = self._of(name)
        stored = pieces_of({key: self._shaped(name, tensor) for key, tensor in state.items() if key != LOW})
        if MASTER in stored:
            return stored
        lower = {key: state[key] for key in (LOW,) if key in state}

        def put_together(weight: Tensor, *tensors: Tensor) -> Tensor:
            here = weight.to(tensors[0].device) if tensors else weight
            return self._shaped(name, read_master(here, dict(zip(lower, tensors, strict=True)))).detach()

        master = Piece(self.parameters[name].shape, torch.float32, (weight.detach(), *lower.values()), put_together)
        return {MASTER: master} | stored

    @torch.no_grad()
    def load_state(self, name: str, saved: Mapping[str, Tensor]) -> None:
        """Restores what ``pieces`` describe, or a state whose moments have another format.

        In place of a master there may be the weight and the lower bits. The moments may be those of bitsandbytes.
        """
        saved = dict(saved) | moments_of_bitsandbytes(saved)
        self.write_master(name, saved[MASTER] if MASTER in saved else join(saved[WEIGHT], saved[LOW]))
        _, state = self._of(name)
        names = [key for key in saved if key.startswith((FIRST, SECOND))]
        given = {key: saved[key] if key.endswith(SCALE) else self._grouped(saved[key]) for key in names}
        if FIRST not in given:  # of weights that never made a step
            given = dict.fromkeys((FIRST, SECOND), torch.zeros_like(state[FIRST], dtype=torch.float32))
        if given[FIRST].dtype != state[FIRST].dtype:
            moments = read_moments(given)
            given = stored_moments(*moments, state[FIRST].dtype, hashed(torch.zeros(()), *moments))
        for key, tensor in given.items():
            state[key].copy_(tensor)


def moments_of_bitsandbytes(saved: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns the moments in fp32 by the names of ``Group.pieces`` if bitsandbytes stored them; otherwise nothing.

    Earlier versions trained with its optimizers, whose moments of small tensors are in fp32. 8-bit codes are numbers of
    entries in a table, and BITSANDBYTES_GROUP of them share a scale.
    """
    found = {}
    for key, number in ((FIRST, 1), (SECOND, 2)):
        if (stored := saved.get(f"state{number}")) is None:
            continue
        found[key] = stored.float()
        if f"qmap{number}" in saved:
            values, scales = saved[f"qmap{number}"][stored.long()], saved[f"absmax{number}"]
            each = scales.repeat_interleave(BITSANDBYTES_GROUP)[: values.numel()]
            found[key] = values * each.view(values.shape)
    return found


class Masters(ReadPieces):
    """The fp32 masters of groups by the names of their parameters. Each access may put a new tensor together.

    Args:
        owners: The group of each parameter.
    """

    def __init__(self, owners: dict[str, Group]) -> None:
        super().__init__({name: group.pieces(name)[MASTER] for name, group in owners.items()})
        self.owners = owners

    def write(self, name: str, value: Tensor) -> None:
        """Stores a master, and rounds it into its parameter."""
        self.owners[name].write_master(name, value)

    def swap(self, name: str, value: Tensor) -> None:
        """Exchanges a master with an fp32 value, and rounds it into its parameter. A second call undoes this exactly.

        A bf16 weight without a master takes the upper bits of the value, whose lower bits stay where they are.
        """
        trained, new, group = self[name].clone(), value, self.owners[name]
        if group.adam.rounds_at_random(group.weights.dtype):
            new, low = split(value)
            trained = join(trained.bfloat16(), low)
        self.write(name, new)
        value.copy_(trained)
