"""fp32 masters, moments and the optimizer step in host memory: torchao's CPUOffloadOptimizer, made safe to resume.

A backward pass sends each gradient to page-locked memory; a step updates fp32 masters there, tensor by tensor, and
sends the rounded weights back. torchao has neither clipping nor a loss scale; conflicts.py refuses both by name.
"""

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from cogvideox.optimizer.master_weights import MakeOptimizer, by_parameter, for_file, overwrite, plain_tensors, set_rate
from cogvideox.optimizer.step import StepResult


class HostMasters:
    """The optimizer that torchao makes for each tensor: fp32 masters of parameters, and the real optimizer on them."""

    def __init__(self, groups: list[dict[str, Any]], make: MakeOptimizer) -> None:
        listed = [group["params"] for group in groups]
        self.parameters = [p for entry in listed for p in ([entry] if isinstance(entry, Tensor) else entry)]
        if torch.cuda.is_available():
            torch.cuda.synchronize()  # torchao copies the weights without waiting for them
        self.masters = [Parameter(p.detach().to(torch.float32, copy=True)) for p in self.parameters]
        self.optimizer = make(self.masters)
        self.param_groups = self.optimizer.param_groups

    def step(self) -> None:
        """One update of the masters, rounded into the parameters."""
        for parameter, master in zip(self.parameters, self.masters, strict=True):
            master.grad = None if parameter.grad is None else parameter.grad.float()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.round()

    @torch.no_grad()
    def round(self) -> None:
        """Rounds the masters into the parameters."""
        for parameter, master in zip(self.parameters, self.masters, strict=True):
            parameter.copy_(master)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drops the gradients of the parameters."""
        for parameter in self.parameters:
            parameter.grad = None


class OffloadedWeights:
    """What MasterWeights is, for one GPU, with all but the weights themselves in host memory.

    Between the micro-batches of a step gradients add up in the parameters' own type, and a step waits for the device.
    """

    def __init__(self, parameters: dict[str, Parameter], make: MakeOptimizer, offload_gradients: bool) -> None:
        from torchao.optim import CPUOffloadOptimizer

        self.parameters = parameters
        params = list(parameters.values())
        self.tail = torch.zeros(1, device=params[0].device)  # the loss
        self.norms: dict[Parameter, Tensor] = {}  # of the gradients so far
        for parameter in params:
            parameter.register_post_accumulate_grad_hook(self._measure)  # before torchao's hook, which frees it
        inner: Any = partial(HostMasters, make=make)
        self.optimizer = CPUOffloadOptimizer(params, inner, offload_gradients=offload_gradients)

    def _measure(self, parameter: Parameter) -> None:
        self.norms[parameter] = torch.linalg.vector_norm(parameter.grad, dtype=torch.float32)

    def _inner(self) -> list[HostMasters]:
        small = self.optimizer.d_opt  # of the tensors that torchao leaves on the GPU
        return [*self.optimizer.optim_dict.values(), *([small] if small else [])]

    def _masters(self) -> Iterator[tuple[str, Parameter, HostMasters, Parameter]]:
        """(name, parameter, optimizer that has its master, master)."""
        small = self.optimizer.d_opt
        places = {p: (small, m) for p, m in zip(small.parameters, small.masters, strict=True)} if small else {}
        places |= {p: (inner, inner.masters[0]) for p, inner in self.optimizer.optim_dict.items()}
        return ((name, p, *places[p]) for name, p in self.parameters.items())

    def backward(self, loss: Tensor) -> None:
        """Adds the gradients of this micro-batch's share of the step's mean loss."""
        self.tail[0] += loss.detach()
        loss.backward()

    def step(self, lr: float) -> StepResult:
        """One optimizer step; one with a non-finite gradient changes nothing and is counted."""
        norm = torch.stack(list(self.norms.values())).norm()
        skipped = (~torch.isfinite(norm)).float()
        if not skipped.item():
            for inner in self._inner():
                set_rate(inner.optimizer, lr)
            self.optimizer.step()
        result = StepResult(torch.stack([self.tail[0], norm, skipped, torch.ones_like(norm)]))
        self.drop()
        return result

    def drop(self) -> None:
        """Forgets gradients and losses that no step has used."""
        self.optimizer.queue.clear()
        self.optimizer.zero_grad()
        self.norms.clear()
        self.tail.zero_()

    def room_for_state(self) -> Tensor:
        """None: what the optimizer keeps is in host memory."""
        return torch.empty(0)

    def wait(self) -> None:
        """A step has waited for the device already."""

    def named_masters(self) -> dict[str, Tensor]:
        """The masters by their parameters' names, on the CPU where torchao has them."""
        return {name: master for name, _, _, master in self._masters()}

    def state(self, copy: bool = True) -> dict[str, Tensor]:
        """All that a resumed run needs, as plain tensors by name, as MasterWeights names them; copied as there."""
        return for_file(self.tensors(), copy)

    def tensors(self) -> dict[str, Tensor]:
        """The same where they lie: nothing is copied."""
        tensors = {}
        for name, _, inner, master in self._masters():
            tensors[f"master/{name}"] = master.detach()
            for key, tensor in plain_tensors(inner.optimizer.state[master]):
                tensors[f"{key}/{name}"] = tensor
        return tensors

    @torch.no_grad()
    def load_state(self, tensors: dict[str, Tensor]) -> None:
        """Takes up what ``state`` returned."""
        of = by_parameter(tensors)
        for name, parameter, inner, master in self._masters():
            master.copy_(of[name].pop("master"))
            overwrite(inner.optimizer.state[master], of[name], master.device)
            inner.round()
            parameter.copy_(master)
