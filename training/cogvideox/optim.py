"""The learning rate, and the fp32 masters that every optimizer works on.

Trainable parameters stay in the compute type inside the model. Each backward pass adds their gradients to one flat fp32
buffer; a step averages it over the ranks, clips, skips what is not finite and updates fp32 masters, all on the device.
Only fused optimizers of torch can skip a step there: before a step of any other, this process waits for the device.
The masters and what the optimizer keeps are one chunk on the device, or many on the host that pass through the device.
Parameters that live on the host themselves, with their gradients (streaming.Away), pass through it with their masters.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import Parameter
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from cogvideox.flags import POLYNOMIAL_END, OptimizerFlags
from cogvideox.streaming import Away, Conveyor, Layout, Part, norms_of, pinned

MakeOptimizer = Callable[[Sequence[Parameter]], torch.optim.Optimizer]
INITIAL_SCALE, GROWTH_INTERVAL = 2.0**16, 2000  # of torch.amp.GradScaler
STATE_BYTES = 12  # of a number: master and two moments, fp32; what a fused Adam moves through the device
CHUNK_BYTES = 64 * 2**20  # large enough that a copy runs at full speed, small beside anything else on the device
ALL = "*"  # in the names of tensors, instead of a parameter


def learning_rate(flags: OptimizerFlags, step: int, total_steps: int, global_batch: int) -> float:
    """The learning rate of an optimizer step (from 0) of a run of ``total_steps``."""
    peak = flags.learning_rate * (global_batch if flags.scale_lr else 1)
    return peak * schedule_factor(flags, step, total_steps, peak) if peak else 0.0


def schedule_factor(flags: OptimizerFlags, step: int, total_steps: int, peak: float) -> float:
    """The shape of the learning rate, 0 to 1: the schedules of diffusers.optimization as functions of the step."""
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


@dataclass(frozen=True)
class StepResult:
    """What one optimizer step did, still on the device: loss, gradient norm, skipped, stop, each a scalar."""

    values: Tensor  # (4,) fp32

    NAMES = ("loss", "grad_norm", "skipped", "stop")

    @property
    def skipped(self) -> Tensor:
        """1 where the step changed no weight, else 0."""
        return self.values[self.NAMES.index("skipped")]


class Chunk:
    """Consecutive parameters with their gradients, their fp32 masters, and an optimizer of their own.

    On the device unless ``rest_on_host`` was called: then what is not needed between steps is there only while it is
    held there. Where the optimizer is fused, all that it keeps exists from the start.

    Args:
        gradients: fp32, on the device.
        masters: what is updated, of each parameter.
        away: for parameters that live on the host, with their gradients: the block, and which of its parameters.
    """

    def __init__(
        self,
        parameters: dict[str, Parameter],
        gradients: Sequence[Tensor],
        masters: list[Parameter],
        make: MakeOptimizer,
        away: tuple[Away, int, slice] | None = None,
    ) -> None:
        self.parameters, self.gradients, self.masters, self.away = parameters, gradients, masters, away
        self.rounded: Sequence[Tensor] = list(parameters.values())
        self.optimizer = make(self.masters)
        self.fused = is_fused(self.optimizer)
        if self.fused:  # a step that is skipped makes the moments, of zeros
            one = torch.ones((), device=self.masters[0].device)
            self.update(0.0, divisor=one, skipped=one)

    def update(self, lr: float, divisor: Tensor, skipped: Tensor) -> None:
        """One step of the masters, rounded into the model; only a fused one divides the gradients and skips itself."""
        if self.fused:
            self.optimizer.grad_scale = divisor
            self.optimizer.found_inf = skipped
        set_rate(self.optimizer, lr)
        for master, gradient in zip(self.masters, self.gradients, strict=True):
            master.grad = gradient
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.round()

    @torch.no_grad()
    def round(self) -> None:
        """Rounds the masters into the model."""
        for rounded, master in zip(self.rounded, self.masters, strict=True):
            if rounded is not master:
                rounded.copy_(master)

    def rest_on_host(self) -> None:
        """Moves masters and moments to pinned memory. The step counters stay: they are small, and the kernel's."""
        if not self.fused:
            raise ValueError(f"{type(self.optimizer).__name__} cannot pass through the device")
        tensors = self._held()
        self.layout = Layout(tensors)
        self.host = pinned(self.layout.num_bytes)
        self.at_rest = self.layout.views(self.host)
        for host, tensor in zip(self.at_rest, tensors, strict=True):
            host.copy_(tensor)
        self.release()

    def _held(self) -> list[Tensor]:
        """Each master and its moments."""
        states = [(master, self.optimizer.state[master]) for master in self.masters]
        return [t for master, state in states for t in (master.detach(), *map(state.get, moments(state)))]

    def load(self) -> list[Part]:
        """What passes through the device in a step."""
        state = Part(self.host, self.layout)
        if self.away is None:
            return [state]
        away, block, which = self.away
        gradients = Part(*away.gradients.part(block, which), leaves=False)
        return [gradients, state, Part(*away.layout.part(away.hosts[block], which), comes=False)]

    def hold(self, load: Sequence[Sequence[Tensor]]) -> None:
        """Works on the tensors of a load, on the device."""
        if self.away is None:
            (state,) = load
        else:
            gradients, state, self.rounded = load
            self.gradients = [gradient.float() for gradient in gradients]
        self._hold(state)

    def release(self) -> None:
        """Masters and moments, parameters that live on the host too, are there again."""
        self._hold(self.at_rest)
        if self.away is not None:
            self.gradients, self.rounded = (), list(self.parameters.values())

    def _hold(self, state: Sequence[Tensor]) -> None:
        """Masters and moments are these, in the order of the layout."""
        rest = iter(state)
        for master in self.masters:
            master.data = next(rest)
            values = self.optimizer.state[master]
            values.update({key: next(rest) for key in moments(values)})

    def state(self) -> dict[str, Tensor]:
        """Masters and what the optimizer keeps for each, as key/parameter."""
        tensors = {}
        for name, master in zip(self.parameters, self.masters, strict=True):
            tensors[f"master/{name}"] = master.detach()
            for key, tensor in plain_tensors(self.optimizer.state[master]):
                tensors[f"{key}/{name}"] = tensor
        return tensors

    @torch.no_grad()
    def load_state(self, of: dict[str, dict[str, Tensor]], numbers: dict[str, bool | int | float]) -> None:
        """Takes up what ``state`` returned, by parameter, and ``group_numbers``."""
        self.optimizer.param_groups[0].update(numbers)
        for name, master in zip(self.parameters, self.masters, strict=True):
            master.copy_(of[name].pop("master"))
            overwrite(self.optimizer.state[master], of[name], master.device)
        self.round()


def split(sizes: Sequence[int], most: int) -> list[slice]:
    """Consecutive runs of entries, each of at most that size together, or of one entry."""
    starts, total = [0], 0
    for number, size in enumerate(sizes):
        if number and total + size > most:
            starts.append(number)
            total = 0
        total += size
    return [slice(start, end) for start, end in pairwise([*starts, len(sizes)])]


class MasterWeights:
    """fp32 masters around any optimizer whose step needs no more than gradients.

    Args:
        parameters: the trainable parameters, in any float type; they hold the masters rounded to it.
        make: makes the optimizer for the masters.
        max_grad_norm: gradients are scaled down to it; 0 leaves them.
        dynamic_scale: scale the loss so that fp16 gradients do not vanish, and lower the scale when they overflow.
        state_on_host: masters and moments live in pinned host memory, and pass through the device in chunks at each
            step, with the same numbers bit for bit; for fused optimizers only. Else they are one chunk, on the device.
        away: which parameters live there too, with their gradients. All others are on the device.
    """

    def __init__(
        self,
        parameters: dict[str, Parameter],
        make: MakeOptimizer,
        max_grad_norm: float,
        dynamic_scale: bool,
        state_on_host: bool = False,
        away: Away | None = None,
    ) -> None:
        self.parameters, self.away = parameters, away
        self.names = {p: name for name, p in parameters.items()}
        absent = {p for block in away.parameters.values() for p in block} if away else set()
        here = {name: p for name, p in parameters.items() if p not in absent}
        params = list(here.values())
        self.device = params[0].device
        self.max_grad_norm = max_grad_norm
        self.scale = torch.tensor(INITIAL_SCALE if dynamic_scale else 1.0, device=self.device)
        self.good_steps = torch.zeros((), device=self.device)
        self.dynamic_scale = dynamic_scale
        sizes = [p.numel() for p in params]
        count = sum(sizes)
        # the tail carries the loss and the stop flag through the same all-reduce as the gradients
        self.buffer = torch.zeros(count + 2, device=self.device)
        self.flat, self.tail = self.buffer[:count], self.buffer[count:]
        self.gradients = {n: g.view_as(p) for (n, p), g in zip(here.items(), self.flat.split(sizes), strict=True)}
        self._hooks = [
            p.register_post_accumulate_grad_hook(self._collector(self.gradients[n])) for n, p in here.items()
        ]
        # one after another: on their way to the host, the device holds one at a time
        self.chunks = list(self._chunks(here, make, state_on_host))
        named = {name: m for chunk in self.chunks for name, m in zip(chunk.parameters, chunk.masters, strict=True)}
        self.masters = [named[name] for name in parameters]
        self.conveyor = Conveyor(self.device) if state_on_host else None
        self.fused = self.chunks[0].fused
        self.fresh_numbers = group_numbers(self.chunks[0].optimizer)

    def _chunks(self, here: dict[str, Parameter], make: MakeOptimizer, on_host: bool) -> Iterator[Chunk]:
        """One of all parameters; on the host many, none of them of parameters on the device and others."""
        if not on_host:
            masters = [p if p.dtype == torch.float32 else self._master(p) for p in here.values()]
            yield Chunk(here, list(self.gradients.values()), masters, make)
            return
        for which in split([p.numel() for p in here.values()], CHUNK_BYTES // STATE_BYTES):
            yield self._chunk(dict(list(here.items())[which]), make)
        if self.away:
            for block, parameters in self.away.parameters.items():
                for which in split([p.numel() for p in parameters], CHUNK_BYTES // STATE_BYTES):
                    yield self._chunk({self.names[p]: p for p in parameters[which]}, make, (self.away, block, which))

    def _chunk(
        self, parameters: dict[str, Parameter], make: MakeOptimizer, away: tuple[Away, int, slice] | None = None
    ) -> Chunk:
        masters = [self._master(p) for p in parameters.values()]
        gradients = [torch.zeros_like(m) for m in masters] if away else [self.gradients[name] for name in parameters]
        chunk = Chunk(parameters, gradients, masters, make, away)
        chunk.rest_on_host()
        return chunk

    def _master(self, parameter: Parameter) -> Parameter:
        return Parameter(parameter.detach().to(self.device, torch.float32, copy=True))

    @staticmethod
    def _collector(gradient: Tensor) -> Callable[[Tensor], None]:
        def collect(parameter: Tensor) -> None:
            gradient.add_(parameter.grad)
            parameter.grad = None

        return collect

    def backward(self, loss: Tensor) -> None:
        """Adds the gradients of this micro-batch's share of the step's mean loss."""
        self.tail[0] += loss.detach()
        (loss * self.scale).backward()

    def step(self, lr: float, stop: bool = False) -> StepResult:
        """One optimizer step over all ranks; a step with a non-finite gradient changes nothing and is counted."""
        if stop:
            self.tail[1] = 1.0
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(self.buffer)
            self.buffer.div_(dist.get_world_size())
        norm = self._norm() / self.scale
        skipped = (~torch.isfinite(norm)).float()
        clip = (norm / self.max_grad_norm).clamp(min=1.0) if self.max_grad_norm else torch.ones_like(norm)
        self._update(lr, divisor=clip * self.scale, skipped=skipped)
        result = StepResult(torch.stack([self.tail[0], norm, skipped, self.tail[1]]))
        self.buffer.zero_()
        if self.away:
            self.away.gradients.clear()
        if self.dynamic_scale:
            self._adapt_scale(skipped)
        return result

    def _norm(self) -> Tensor:
        """Of all gradients: by parameter, so that it is the same wherever they lie."""
        norms = dict(zip(self.gradients, norms_of(list(self.gradients.values())), strict=True))
        if self.away:
            for block, parameters in self.away.parameters.items():
                norms |= zip((self.names[p] for p in parameters), self.away.gradients.norms[block], strict=True)
        return torch.stack([norms[name] for name in self.parameters]).norm()

    def _update(self, lr: float, divisor: Tensor, skipped: Tensor) -> None:
        if not self.fused:
            if skipped.item():  # waits for the device; a step counted on the host cannot be undone there
                return
            self.flat.div_(divisor)
        for chunk in self._on_device():
            chunk.update(lr, divisor, skipped)

    def _on_device(self) -> Iterator[Chunk]:
        """Each chunk, on the device until the next is asked for."""
        if self.conveyor is None:
            yield from self.chunks
            return
        if self.away:
            self.away.gradients.settle()
        loads = [chunk.load() for chunk in self.chunks]
        for chunk, tensors in zip(self.chunks, self.conveyor.passes(loads), strict=True):
            chunk.hold(tensors)
            yield chunk
            chunk.release()

    def wait(self) -> None:
        """The host may read and write what rests there, parameters too."""
        if self.conveyor is not None:
            self.conveyor.wait()

    def _adapt_scale(self, skipped: Tensor) -> None:
        """Halve the loss scale after an overflow, double it after many good steps, without asking the device."""
        self.good_steps = torch.where(skipped > 0, 0.0, self.good_steps + 1)
        grown = self.good_steps >= GROWTH_INTERVAL
        factor = torch.where(skipped > 0, 0.5, torch.where(grown, 2.0, 1.0))
        self.scale = self.scale * factor
        self.good_steps = torch.where(grown, 0.0, self.good_steps)

    def named_masters(self) -> dict[str, Parameter]:
        """The masters by their parameters' names. On the host, who reads them waits for the compute stream first."""
        return dict(zip(self.parameters, self.masters, strict=True))

    def state(self, copy: bool = True) -> dict[str, Tensor]:
        """All that a resumed run needs, as plain tensors by name: masters, the optimizer's values, loss scale.

        Args:
            copy: see ``for_file``.
        """
        self.wait()
        tensors = {"loss_scale": self.scale, "good_steps": self.good_steps}
        for chunk in self.chunks:
            tensors |= chunk.state()
        for key, value in group_numbers(self.chunks[0].optimizer).items():  # the same in all
            if self.fresh_numbers.get(key) != value:
                tensors[f"{key}/{ALL}"] = as_tensor(value)
        return for_file(tensors, copy)

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        """Takes up what ``state`` returned, wherever that had its masters."""
        of = by_parameter(tensors)
        if not self.fused and any(len(of[name]) > 1 for name in self.parameters):  # more than a master
            # a first step, of gradients and a rate of zero, makes what is then written over
            self._update(0.0, torch.ones((), device=self.device), torch.zeros((), device=self.device))
            self.buffer.zero_()  # some optimizers add weight decay to the gradients themselves
        self.wait()
        self.scale.copy_(tensors["loss_scale"])
        self.good_steps.copy_(tensors["good_steps"])
        numbers = self.fresh_numbers | {key: tensor.item() for key, tensor in of[ALL].items()}
        for chunk in self.chunks:
            chunk.load_state(of, numbers)


# -- what optimizers keep ----------------------------------------------------------------------------------------------


def state_bytes(make: MakeOptimizer, device: torch.device) -> int:
    """Bytes of a trained number: its fp32 master, and what the optimizer keeps, as a step on many numbers shows."""
    parameter = Parameter(torch.ones(1024, 1024, device=device))
    parameter.grad = torch.ones_like(parameter)
    optimizer = make([parameter])
    optimizer.step()
    kept = sum(tensor.nbytes for _, tensor in plain_tensors(optimizer.state[parameter]))
    return parameter.element_size() + math.ceil(kept / parameter.numel() - 0.1)  # tables and counters are small change


def is_fused(optimizer: torch.optim.Optimizer) -> bool:
    """Whether its step skips itself. torch's SGD says so too, but leaves its momentum undefined when the first does."""
    adam = isinstance(optimizer, (torch.optim.Adam, torch.optim.AdamW))
    return adam and getattr(optimizer, "_step_supports_amp_scaling", False)  # as torch.amp.GradScaler asks


def moments(state: dict[str, Any]) -> list[str]:
    """What a fused Adam keeps for each element of a parameter: all but its step counter."""
    return [key for key in state if key != "step"]


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
    """What an optimizer keeps for a parameter, as tensors by name: numbers too, and quantised ones in their parts."""
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
