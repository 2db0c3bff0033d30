"""Adds to PEFT's LoRA what PEFT does not have.

There are four independent parts. ``lora_targets`` chooses the linear layers. ``SampleDropout`` is a dropout whose masks
can be repeated. ``start_from_principal`` initializes with PiSSA without changing the base model. ``fold_scale``
multiplies the scale into the matrices when a LoRA is saved.

A layer with a LoRA computes W x + scale * B A dropout(x). A is (rank, in), B is (out, rank), W is (out, in).
"""

import math
import re
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import Module, Parameter
from torch.nn.functional import linear

from cogvideox.config.lora_file import (
    FOLDED_EXACTLY,
    FOLDED_ROUNDED,
    NOT_FOLDED,
    TRANSFORMER_PREFIX,
    LoraFile,
    selected,
    unused,
)
from cogvideox.config.options import target_pattern
from cogvideox.errors import UsageError, plural
from cogvideox.rng import key_of


def linear_layers(transformer: Module) -> list[str]:
    """Returns the names of all linear layers."""
    return [name for name, module in transformer.named_modules() if isinstance(module, torch.nn.Linear)]


def lora_targets(transformer: Module, target_modules: Sequence[str]) -> list[str]:
    """Returns --target_modules in the form that PEFT takes.

    Names are returned unchanged; a regular expression is replaced by the names of all linear layers that it matches.

    Raises:
        UsageError: A name, or the expression, matches no linear layer.
    """
    names = linear_layers(transformer)
    missing = unused(target_modules, names)
    if missing:
        endings = sorted({".".join(name.split(".")[-2:]) for name in names if "blocks" in name})
        pattern = target_pattern(target_modules)
        rule = "no linear layer has this name" if pattern is None else "matches no linear layer's full name"
        there = f"there are {endings}" + (f", as in {names[-1]}" if pattern is not None else "")
        raise UsageError([f"--target_modules {target}: {rule}; {there}" for target in missing])
    return list(target_modules) if target_pattern(target_modules) is None else selected(target_modules, names)


# -- dropout -----------------------------------------------------------------------------------------------------------


class SampleDropout(Module):
    """Applies dropout whose mask is a function of (seed, step, position of the sample in the global batch, layer).

    The result therefore does not depend on the number of ranks or accumulation steps, a recomputed block gets the same
    mask again, and there is no random state to save.

    Args:
        p: The probability with which a value becomes 0.
        layer: The name of the layer.
        seed: The run's seed.
        position: The position of the current samples. All layers share it; it is set before each forward pass.
    """

    def __init__(self, p: float, layer: str, seed: int, position: "StepPosition") -> None:
        super().__init__()
        self.p, self.layer, self.seed, self.position = p, layer, seed, position
        exclude_dropout_from_graphs()

    def forward(self, x: Tensor) -> Tensor:
        """Sets each value of x, (B, ...), to 0 with probability p and divides the others by 1 - p; x in evaluation."""
        if not self.training:
            return x
        kept = torch.stack([self._kept(x[sample], self.position.first + sample) for sample in range(len(x))])
        return x * kept.to(x.dtype) / (1.0 - self.p)

    def _kept(self, x: Tensor, index: int) -> Tensor:
        """Returns the mask of one sample, True where values are kept, for its position in the global batch."""
        key = key_of(self.seed, "lora dropout", self.position.step, index, self.layer)
        generator = torch.Generator(x.device).manual_seed(key)
        return torch.rand(x.shape, generator=generator, device=x.device) >= self.p


@cache
def exclude_dropout_from_graphs() -> None:
    """Makes torch.compile call ``SampleDropout`` instead of tracing it.

    Its keys change with every step, so each step would compile a new graph. This is not a decorator, because that would
    import the compiler, which takes more than a second, in every script that imports this module.
    """
    SampleDropout.forward = torch.compiler.disable(SampleDropout.forward)  # type: ignore[method-assign]


class StepPosition:
    """Holds the optimizer step, and the position of the micro-batch's first sample in the global batch of that step."""

    step = first = 0


# -- PiSSA -------------------------------------------------------------------------------------------------------------


class PissaMatrix(Module):
    """Represents one LoRA matrix of PiSSA: the trained matrix concatenated with its constant initial value.

    PiSSA (arXiv:2404.02948) initializes B A with B0 A0, the part of W with the largest singular values, and
    subtracts that part from the base, (W - s B0 A0) + s B A, where s is the scale. The same sum can be written as

        W + s [B, -B0] [A; A0]

    which leaves the base unchanged in every precision. The matrices [A; A0] and [B, -B0] are a plain LoRA of twice the
    rank for the original base, and this is what is saved.

    Args:
        start: The initial value, A0 (rank, in) or B0 (out, rank).
        dim: The dimension of the rank, along which the two matrices are concatenated: 0 for A, 1 for B.
        sign: The factor of the initial value: 1 for A, -1 for B.
    """

    start: Tensor

    def __init__(self, start: Tensor, dim: int, sign: float) -> None:
        super().__init__()
        self.weight = Parameter(start.clone())
        self.dim, self.sign = dim, sign
        self.register_buffer("start", start, persistent=False)

    def concatenated(self) -> Tensor:
        """Returns the matrix of twice the rank: (2 rank, in) for A, (out, 2 rank) for B."""
        return torch.cat([self.weight, self.sign * self.start], self.dim)

    def forward(self, x: Tensor) -> Tensor:
        """Multiplies x by the matrix of twice the rank."""
        return linear(x, self.concatenated())

    @torch.no_grad()
    def load_initial(self, saved: Tensor) -> None:
        """Restores the initial value from a saved result of ``concatenated``."""
        self.start.copy_(self.sign * saved.chunk(2, self.dim)[1])


def principal_matrices(weight: Tensor, rank: int, scale: float, init: str, seed: int) -> tuple[Tensor, Tensor]:
    """Computes the initial matrices of PiSSA.

    With the ``rank`` largest singular values S of W = U S V^T and their vectors,

        A0 = sqrt(S / scale) V^T        B0 = U sqrt(S / scale)        scale * B0 A0 = the principal part of W

    Args:
        weight: The matrix W, (out, in).
        rank: The number of singular values.
        scale: The LoRA's scale.
        init: The value of --init_lora_weights: "pissa" for an exact SVD, "pissa_niter_N" for a randomized one of N
            iterations.
        seed: The seed of the randomized SVD.

    Returns:
        A0, (rank, in), and B0, (out, rank), in the type and on the device of the weight.
    """
    if weight.is_meta:  # in a dry run
        return weight.new_empty(rank, weight.shape[1]), weight.new_empty(weight.shape[0], rank)
    # The weights may be stored on the host. The wheel of torch for CUDA knows of an accelerator even without a GPU.
    fast = torch.accelerator.current_accelerator(check_available=True) or weight.device
    matrix = weight.detach().to(fast).float()
    rounds = re.fullmatch(r"pissa_niter_(\d+)", init)
    if rounds:
        devices = [matrix.device] if matrix.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(seed)  # the randomized SVD begins with random vectors
            left, values, right = torch.svd_lowrank(matrix, rank, niter=int(rounds[1]))
        rows = right.T
    else:
        left, values, rows = torch.linalg.svd(matrix, full_matrices=False)
    roots = (values[:rank] / scale).sqrt()
    start = (roots[:, None] * rows[:rank], left[:, :rank] * roots)  # A0 (rank, in), B0 (out, rank)
    a, b = (matrix.to(weight.device, weight.dtype).contiguous() for matrix in start)
    return a, b


def start_from_principal(layers: dict[str, Any], adapter: str, rank: int, init: str, seed: int) -> None:
    """Initializes the layers of PEFT with PiSSA.

    All ranks use the matrices of the first rank, because the SVD may differ between machines.

    Raises:
        UsageError: A layer is smaller than the rank.
    """
    sizes = {name: min(layer.get_base_layer().weight.shape) for name, layer in layers.items()}
    small = min(sizes, key=lambda name: sizes[name])
    if sizes[small] < rank:
        rule = f"{small} has {plural(sizes[small], 'singular value')} for the initialization of PiSSA"
        raise UsageError(f"--rank {rank}: {rule}; give at most --rank {sizes[small]}")
    for layer in layers.values():
        a, b = principal_matrices(layer.get_base_layer().weight, rank, layer.scaling[adapter], init, seed)
        if dist.is_available() and dist.is_initialized():
            a, b = broadcast_from_first(a), broadcast_from_first(b)
        layer.lora_A[adapter] = PissaMatrix(a, dim=0, sign=1.0)
        layer.lora_B[adapter] = PissaMatrix(b, dim=1, sign=-1.0)


def broadcast_from_first(tensor: Tensor) -> Tensor:
    """Returns the first rank's tensor on all ranks, on the device of this rank's own tensor."""
    fast = torch.accelerator.current_accelerator()
    # NCCL cannot send host memory, where the weights are stored at this time.
    here = tensor.to(fast) if fast is not None and dist.get_backend() == "nccl" else tensor
    dist.broadcast(here, src=0)
    return here.to(tensor.device)


# -- scale -------------------------------------------------------------------------------------------------------------


def fold_scale(state: dict[str, Tensor], scale: float, rounded: bool = False) -> tuple[dict[str, Tensor], str]:
    """Multiplies the scale of a LoRA into its matrices B, so that the LoRA applies with a scale of 1.

    A scale that is a power of two is exact: it changes only the exponents, unless a number leaves the range of its
    type.

    Args:
        state: Matrices by PEFT's names.
        scale: The factor of B A.
        rounded: Whether to fold a scale even if that rounds the numbers.

    Returns:
        The folded matrices, and FOLDED_EXACTLY or FOLDED_ROUNDED; or ``state`` and NOT_FOLDED if the scale was not
        folded.

    Raises:
        UsageError: A folded number is too large for its type.
    """
    # (scale * B) A is scale * B A.
    folded = {name: tensor * scale if is_lora_b(name) else tensor for name, tensor in state.items()}
    if is_power_of_two(scale) and all(
        (folded[name] / scale).equal(tensor) for name, tensor in state.items() if is_lora_b(name)
    ):
        return folded, FOLDED_EXACTLY
    if not rounded:
        return state, NOT_FOLDED
    for name, tensor in folded.items():
        if not tensor.isfinite().all():
            kind = str(tensor.dtype).removeprefix("torch.")
            raise UsageError(f"--fold_lora_scale: {name} times {scale:g} is too large for {kind}; leave the flag out")
    return folded, FOLDED_ROUNDED


def is_lora_b(name: str) -> bool:
    """Returns whether this is the name of a matrix B, the matrix of a LoRA that is applied last."""
    return name.endswith("lora_B.weight")


def is_power_of_two(number: float) -> bool:
    """Returns whether a positive number is a power of two."""
    return math.frexp(number)[0] == 0.5


def trained_matrices(file: LoraFile) -> dict[str, Tensor]:
    """Returns the matrices of a LoRA file by PEFT's names, with an exactly folded scale divided out again.

    A scale that was folded with rounding stays folded.
    """
    from safetensors.torch import load_file

    found = {name.removeprefix(TRANSFORMER_PREFIX): tensor for name, tensor in load_file(file.path).items()}
    if file.training is None or file.folded != FOLDED_EXACTLY:
        return found
    return {name: tensor / file.training.scale if is_lora_b(name) else tensor for name, tensor in found.items()}
