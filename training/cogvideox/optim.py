"""Optimizers, the learning rate, and the fp32 masters that every optimizer works on.

Trainable parameters stay in the compute type inside the model. Each backward pass adds their gradients to one flat fp32
buffer; a step averages it over the ranks, clips, skips what is not finite and updates fp32 masters, all on the device.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import Parameter

from cogvideox.args import POLYNOMIAL_END, OptimizerFlags

MakeOptimizer = Callable[[Sequence[Parameter]], torch.optim.Optimizer]
INITIAL_SCALE, GROWTH_INTERVAL = 2.0**16, 2000  # of torch.amp.GradScaler


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


def make_optimizer(flags: OptimizerFlags, parameters: Sequence[Parameter]) -> torch.optim.Optimizer:
    """The optimizer that the flags name; its learning rate is set before every step."""
    rule = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[flags.optimizer]
    betas = (flags.beta1, flags.beta2)
    # fused: the kernel takes the clipping factor and the non-finite flag as tensors, so nothing waits for the device
    return rule(parameters, lr=0.0, betas=betas, eps=flags.epsilon, weight_decay=flags.weight_decay, fused=True)


@dataclass(frozen=True)
class StepResult:
    """What one optimizer step did, still on the device: loss, gradient norm, skipped, stop, each a scalar."""

    values: Tensor  # (4,) fp32

    NAMES = ("loss", "grad_norm", "skipped", "stop")


class MasterWeights:
    """fp32 masters around any torch optimizer.

    Args:
        parameters: the trainable parameters, in any float type; they hold the masters rounded to it.
        make: makes the optimizer for the masters.
        max_grad_norm: gradients are scaled down to it; 0 leaves them.
        dynamic_scale: scale the loss so that fp16 gradients do not vanish, and lower the scale when they overflow.
    """

    def __init__(
        self, parameters: dict[str, Parameter], make: MakeOptimizer, max_grad_norm: float, dynamic_scale: bool
    ) -> None:
        self.parameters = parameters
        params = list(parameters.values())
        self.device = params[0].device
        self.masters = [p if p.dtype == torch.float32 else Parameter(p.detach().float()) for p in params]
        self.optimizer = make(self.masters)
        self.max_grad_norm = max_grad_norm
        self.scale = torch.tensor(INITIAL_SCALE if dynamic_scale else 1.0, device=self.device)
        self.good_steps = torch.zeros((), device=self.device)
        self.dynamic_scale = dynamic_scale
        count = sum(p.numel() for p in params)
        # the tail carries the loss and the stop flag through the same all-reduce as the gradients
        self.buffer = torch.zeros(count + 2, device=self.device)
        self.flat, self.tail = self.buffer[:count], self.buffer[count:]
        self.gradients = [
            view.view_as(p) for view, p in zip(self.flat.split([p.numel() for p in params]), params, strict=True)
        ]
        self._hooks = [
            p.register_post_accumulate_grad_hook(self._collector(g))
            for p, g in zip(params, self.gradients, strict=True)
        ]

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
        norm = self.flat.norm() / self.scale
        skipped = (~torch.isfinite(norm)).float()
        clip = (norm / self.max_grad_norm).clamp(min=1.0) if self.max_grad_norm else torch.ones_like(norm)
        self._update(lr, divisor=clip * self.scale, skipped=skipped)
        result = StepResult(torch.stack([self.tail[0], norm, skipped, self.tail[1]]))
        self.buffer.zero_()
        if self.dynamic_scale:
            self._adapt_scale(skipped)
        return result

    def _update(self, lr: float, divisor: Tensor, skipped: Tensor) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        for master, gradient in zip(self.masters, self.gradients, strict=True):
            master.grad = gradient
        self.optimizer.grad_scale = divisor
        self.optimizer.found_inf = skipped
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self._round_into_model()

    @torch.no_grad()
    def _round_into_model(self) -> None:
        """Rounds the masters into the model."""
        for parameter, master in zip(self.parameters.values(), self.masters, strict=True):
            if parameter is not master:
                parameter.copy_(master)

    def _adapt_scale(self, skipped: Tensor) -> None:
        """Halve the loss scale after an overflow, double it after many good steps, without asking the device."""
        self.good_steps = torch.where(skipped > 0, 0.0, self.good_steps + 1)
        grown = self.good_steps >= GROWTH_INTERVAL
        factor = torch.where(skipped > 0, 0.5, torch.where(grown, 2.0, 1.0))
        self.scale = self.scale * factor
        self.good_steps = torch.where(grown, 0.0, self.good_steps)

    def state(self) -> dict[str, Tensor]:
        """All that a resumed run needs, as tensors by name: masters, moments, loss scale."""
        tensors = {"loss_scale": self.scale, "good_steps": self.good_steps}
        for name, master in zip(self.parameters, self.masters, strict=True):
            tensors[f"master/{name}"] = master.detach()
            for key, value in self.optimizer.state[master].items():
                tensors[f"{key}/{name}"] = torch.as_tensor(value)
        return {name: tensor.clone().cpu().contiguous() for name, tensor in tensors.items()}

    @torch.no_grad()
    def load_state(self, tensors: dict[str, Tensor]) -> None:
        """Takes up what ``state`` returned."""
        self.scale.copy_(tensors["loss_scale"])
        self.good_steps.copy_(tensors["good_steps"])
        for name, master in zip(self.parameters, self.masters, strict=True):
            master.copy_(tensors[f"master/{name}"])
            values: dict[str, Any] = {}
            for full, tensor in tensors.items():
                key, _, of = full.partition("/")
                if of == name and key != "master":
                    values[key] = tensor.to(self.device, copy=True)
            if values:
                self.optimizer.state[master] = values
        self._round_into_model()
