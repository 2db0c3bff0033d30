"""Steps the optimizer in host memory with torchao's CPUOffloadOptimizer (--use_cpu_offload_optimizer).

torchao copies each gradient to pinned host memory during the backward pass, updates the weights there tensor by tensor
on the CPU, and copies them back. Because it would update bf16 weights directly, ``HostMasters`` gives it fp32 master
weights. ``OffloadedWeights`` adds what MasterWeights has: skipped steps, a gradient norm, and exact resume. torchao
supports neither clipping nor a loss scale, so config/conflicts.py refuses both.
"""

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from cogvideox.optimizer.master_weights import (
    MASTER,
    MakeOptimizer,
    by_parameter,
    for_file,
    overwrite,
    plain_tensors,
    set_rate,
)
from cogvideox.optimizer.step import StepResult
from cogvideox.tensor_files import Piece, pieces_of


class HostMasters:
    """Keeps fp32 masters of some parameters and updates them with a real optimizer.

    torchao creates one for each tensor on the host, and one for all small tensors, which it leaves on the GPU. Toward
    torchao this class looks like a torch optimizer.
    """

    def __init__(self, groups: list[dict[str, Any]], make: MakeOptimizer) -> None:
        """Copies the parameters to fp32 masters.

        Args:
            groups: Parameter groups, as a torch optimizer takes them; "params" is a parameter or a list of them.
            make: Makes the optimizer for the masters.
        """
        listed = [group["params"] for group in groups]
        self.parameters = [p for entry in listed for p in ([entry] if isinstance(entry, Tensor) else entry)]
        if torch.cuda.is_available():
            # torchao copies the weights to the host asynchronously, and the masters are read from that copy.
            torch.cuda.synchronize()
        self.masters = [Parameter(p.detach().to(torch.float32, copy=True)) for p in self.parameters]
        self.optimizer = make(self.masters)
        self.param_groups = self.optimizer.param_groups

    def step(self) -> None:
        """Updates the masters with the gradients of the parameters, and rounds them into the parameters."""
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
        """Drops the gradients of the parameters. The flag exists because torch optimizers have it."""
        for parameter in self.parameters:
            parameter.grad = None


class OffloadedWeights:
    """Trains parameters as MasterWeights does, for one GPU, with masters and moments in host memory.

    Gradients of micro-batches are summed in the type of the parameters, and each step waits for the device.
    """

    def __init__(self, parameters: dict[str, Parameter], make: MakeOptimizer, offload_gradients: bool) -> None:
        """Creates torchao's optimizer.

        Args:
            parameters: The trained parameters by name, on a GPU.
            make: Makes the optimizer for masters.
            offload_gradients: Whether gradients are freed on the GPU as soon as they are on the host.
        """
        from torchao.optim import CPUOffloadOptimizer

        self.parameters = parameters
        params = list(parameters.values())
        self.loss_sum = torch.zeros(1, device=params[0].device)  # sum over the micro-batches of the step so far
        self.norms: dict[Parameter, Tensor] = {}  # of the gradients of the step so far
        for parameter in params:
            # Hooks run in the order of registration, and torchao's hook frees the gradient.
            parameter.register_post_accumulate_grad_hook(self._measure)
        host_masters: Any = partial(HostMasters, make=make)  # torchao expects a class here
        self.optimizer = CPUOffloadOptimizer(params, host_masters, offload_gradients=offload_gradients)

    def _measure(self, parameter: Parameter) -> None:
        self.norms[parameter] = torch.linalg.vector_norm(parameter.grad, dtype=torch.float32)

    def _optimizers(self) -> list[HostMasters]:
        """Returns the optimizers that torchao has made: one per tensor on the host, and that of the small tensors."""
        small = self.optimizer.d_opt
        return [*self.optimizer.optim_dict.values(), *([small] if small else [])]

    def _masters(self) -> Iterator[tuple[str, Parameter, HostMasters, Parameter]]:
        """Yields for each parameter its name, the parameter, the optimizer that has its master, and the master."""
        small = self.optimizer.d_opt
        owners = {p: (small, m) for p, m in zip(small.parameters, small.masters, strict=True)} if small else {}
        owners |= {p: (own, own.masters[0]) for p, own in self.optimizer.optim_dict.items()}
        return ((name, p, *owners[p]) for name, p in self.parameters.items())

    def backward(self, loss: Tensor) -> None:
        """Adds the gradients of this micro-batch's share of the step's mean loss."""
        self.loss_sum[0] += loss.detach()
        loss.backward()

    def step(self, lr: float) -> StepResult:
        """Makes one optimizer step. It changes nothing if a gradient is not finite."""
        norm = torch.stack(list(self.norms.values())).norm()
        skipped = (~torch.isfinite(norm)).float()
        if not skipped.item():
            for own in self._optimizers():
                set_rate(own.optimizer, lr)
            self.optimizer.step()
        result = StepResult(torch.stack([self.loss_sum[0], norm, skipped, torch.ones_like(norm)]))
        self.drop()
        return result

    def drop(self) -> None:
        """Drops gradients and losses that no step has used."""
        self.optimizer.queue.clear()
        self.optimizer.zero_grad()
        self.norms.clear()
        self.loss_sum.zero_()

    def room_for_state(self) -> Tensor:
        """Returns an empty tensor, because the optimizer's state takes no device memory."""
        return torch.empty(0)

    def wait(self) -> None:
        """Does nothing, because a step has waited for the device already."""

    def named_masters(self) -> dict[str, Tensor]:
        """Returns the masters by the names of their parameters, on the CPU where torchao has them."""
        return {name: master for name, _, _, master in self._masters()}

    def state(self, copy: bool = True) -> dict[str, Tensor]:
        """Returns what a resumed run needs, with the names that ``MasterWeights.state`` uses.

        Args:
            copy: See ``for_file``.
        """
        return for_file(self.tensors(), copy)

    def pieces(self) -> dict[str, Piece]:
        """Returns the tensors of ``state`` as pieces of a file, to be read one after another before the next step."""
        return pieces_of(self.tensors())

    def tensors(self) -> dict[str, Tensor]:
        """Returns the tensors of ``state`` on their own devices, without a copy."""
        tensors = {}
        for name, _, own, master in self._masters():
            tensors[f"{MASTER}/{name}"] = master.detach()
            for key, tensor in plain_tensors(own.optimizer.state[master]):
                tensors[f"{key}/{name}"] = tensor
        return tensors

    @torch.no_grad()
    def load_state(self, tensors: dict[str, Tensor]) -> None:
        """Restores what ``state`` returned."""
        saved = by_parameter(tensors)
        for name, parameter, own, master in self._masters():
            master.copy_(saved[name].pop(MASTER))
            overwrite(own.optimizer.state[master], saved[name], master.device)
            own.round()
            parameter.copy_(master)
