"""Parts of a LoRA that PEFT does not have: its layers, PiSSA's start on an untouched base, dropout that repeats, and a
scale that is part of the matrices.

A layer computes W x + scale * B (A dropout(x)). A is (rank, in), B is (out, rank).
"""

import math
import re
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import Module, Parameter
from torch.nn.functional import linear

from cogvideox.config.lora_file import EXACT, NO, PREFIX, ROUNDED, LoraFile, selected, unused
from cogvideox.config.options import target_pattern
from cogvideox.errors import UsageError
from cogvideox.rng import key_of


def linear_layers(transformer: Module) -> list[str]:
    """The names of the linear layers."""
    return [name for name, module in transformer.named_modules() if isinstance(module, torch.nn.Linear)]


def targets(transformer: Module, target_modules: Sequence[str]) -> list[str]:
    """--target_modules for PEFT: the names as they are, or all linear layers that a regular expression means.

    Raises:
        UsageError: a name or the expression means no linear layer.
    """
    names = linear_layers(transformer)
    missing = unused(target_modules, names)
    if missing:
        endings = sorted({".".join(name.split(".")[-2:]) for name in names if "blocks" in name})
        pattern = target_pattern(target_modules)
        rule = "no linear layer has this name" if pattern is None else "matches no linear layer's whole name"
        there = f"there are {endings}" + (f", as in {names[-1]}" if pattern is not None else "")
        raise UsageError([f"--target_modules {target}: {rule}; {there}" for target in missing])
    return list(target_modules) if target_pattern(target_modules) is None else selected(target_modules, names)


# -- dropout -----------------------------------------------------------------------------------------------------------


class SampleDropout(Module):
    """Dropout whose mask is a function of (seed, step, position of the sample in the global batch, layer).

    So another number of ranks or accumulation steps changes nothing, a recomputed block has the same mask again, and
    there is no state to save. ``place`` is shared by all layers of a model, and set before each forward pass.
    """

    def __init__(self, p: float, layer: str, seed: int, place: "StepPosition") -> None:
        super().__init__()
        self.p, self.layer, self.seed, self.place = p, layer, seed, place

    @torch.compiler.disable  # the keys change with every step: each would be a graph of its own
    def forward(self, x: Tensor) -> Tensor:
        """Of (B, ...): each value zero with probability p, else divided by 1 - p. In evaluation x itself."""
        if not self.training:
            return x
        kept = torch.stack([self._kept(x[sample], self.place.first + sample) for sample in range(len(x))])
        return x * kept.to(x.dtype) / (1.0 - self.p)

    def _kept(self, x: Tensor, position: int) -> Tensor:
        key = key_of(self.seed, "lora dropout", self.place.step, position, self.layer)
        generator = torch.Generator(x.device).manual_seed(key)
        return torch.rand(x.shape, generator=generator, device=x.device) >= self.p


class StepPosition:
    """Where a run is: the optimizer step, and the position in its global batch of the first sample of a micro-batch."""

    step = first = 0


# -- PiSSA -------------------------------------------------------------------------------------------------------------


class PissaMatrix(Module):
    """A LoRA matrix beside its own start, as one matrix: [A; A0], or [B, -B0].

    PiSSA (arXiv:2404.02948) starts from the largest singular values of W: B0 A0, and takes them out of the base:
    (W - s B0 A0) + s B A. This is W + s [B, -B0] [A; A0]: the base stays what it is in every precision, and the plain
    LoRA of twice the rank that is saved computes what was trained.
    """

    start: Tensor

    def __init__(self, start: Tensor, dim: int, sign: float) -> None:
        super().__init__()
        self.weight = Parameter(start.clone())
        self.dim, self.sign = dim, sign
        self.register_buffer("start", start, persistent=False)

    def concatenated(self) -> Tensor:
        """The matrix of twice the rank."""
        return torch.cat([self.weight, self.sign * self.start], self.dim)

    def forward(self, x: Tensor) -> Tensor:
        """The product with it."""
        return linear(x, self.concatenated())

    @torch.no_grad()
    def load_initial(self, saved: Tensor) -> None:
        """Restores the start out of what ``concatenated`` returned, which was saved."""
        self.start.copy_(self.sign * saved.chunk(2, self.dim)[1])


def principal(weight: Tensor, rank: int, scale: float, init: str, seed: int) -> tuple[Tensor, Tensor]:
    """(A0, B0) in the weight's type, scale * B0 A0 being the part of the weight with its ``rank`` largest singular
    values, half of each value in either matrix.
    """
    fast = torch.accelerator.current_accelerator() or weight.device  # weights may still lie on the host
    matrix = weight.detach().to(fast).float()
    rounds = re.fullmatch(r"pissa_niter_(\d+)", init)
    if rounds:
        devices = [matrix.device] if matrix.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(seed)  # the faster SVD begins with random vectors
            left, values, right = torch.svd_lowrank(matrix, rank, niter=int(rounds[1]))
        rows = right.T
    else:
        left, values, rows = torch.linalg.svd(matrix, full_matrices=False)
    roots = (values[:rank] / scale).sqrt()
    start = (roots[:, None] * rows[:rank], left[:, :rank] * roots)
    a, b = (matrix.to(weight.device, weight.dtype).contiguous() for matrix in start)
    return a, b


def start_from_principal(layers: dict[str, Any], adapter: str, rank: int, init: str, seed: int) -> None:
    """Gives PEFT's layers the start of PiSSA. All ranks take that of the first one: an SVD may differ by machine.

    Raises:
        UsageError: a layer is smaller than the rank.
    """
    sizes = {name: min(layer.get_base_layer().weight.shape) for name, layer in layers.items()}
    small = min(sizes, key=lambda name: sizes[name])
    if sizes[small] < rank:
        rule = f"{small} has {sizes[small]} singular values for PiSSA to start from"
        raise UsageError(f"--rank {rank}: {rule}; give at most --rank {sizes[small]}")
    for layer in layers.values():
        a, b = principal(layer.get_base_layer().weight, rank, layer.scaling[adapter], init, seed)
        if dist.is_available() and dist.is_initialized():
            a, b = of_first_rank(a), of_first_rank(b)
        layer.lora_A[adapter] = PissaMatrix(a, dim=0, sign=1.0)
        layer.lora_B[adapter] = PissaMatrix(b, dim=1, sign=-1.0)


def of_first_rank(tensor: Tensor) -> Tensor:
    """The first rank's tensor, on all; it lies where this one's does."""
    fast = torch.accelerator.current_accelerator()
    # NCCL knows no memory of the host, where the weights still are
    here = tensor.to(fast) if fast is not None and dist.get_backend() == "nccl" else tensor
    dist.broadcast(here, src=0)
    return here.to(tensor.device)


# -- scale -------------------------------------------------------------------------------------------------------------


def fold_scale(state: dict[str, Tensor], scale: float, rounded: bool = False) -> tuple[dict[str, Tensor], str]:
    """A LoRA that needs no scale any more, and EXACT or ROUNDED; or the same LoRA, and NO.

    A power of two changes no bit of a product but its exponent, unless a number of B leaves the range of its type.

    Args:
        state: matrices by PEFT's names.
        scale: what B A is multiplied by.
        rounded: multiply by any scale.

    Raises:
        UsageError: a number becomes too large for its type.
    """
    folded = {name: tensor * scale if is_b(name) else tensor for name, tensor in state.items()}
    if is_power_of_two(scale) and all(
        (folded[name] / scale).equal(tensor) for name, tensor in state.items() if is_b(name)
    ):
        return folded, EXACT
    if not rounded:
        return state, NO
    for name, tensor in folded.items():
        if not tensor.isfinite().all():
            kind = str(tensor.dtype).removeprefix("torch.")
            raise UsageError(f"--fold_lora_scale: {name} times {scale:g} is too large for {kind}; leave the flag out")
    return folded, ROUNDED


def is_b(name: str) -> bool:
    """Whether a tensor is the matrix that is multiplied last."""
    return name.endswith("lora_B.weight")


def is_power_of_two(number: float) -> bool:
    """Whether a positive number has no bits but those of its exponent."""
    return math.frexp(number)[0] == 0.5


def trained_matrices(file: LoraFile) -> dict[str, Tensor]:
    """A file's matrices by PEFT's names, as training had them; where folding rounded, as they are."""
    from safetensors.torch import load_file

    found = {name.removeprefix(PREFIX): tensor for name, tensor in load_file(file.path).items()}
    if file.training is None or file.folded != EXACT:
        return found
    return {name: tensor / file.training.scale if is_b(name) else tensor for name, tensor in found.items()}
