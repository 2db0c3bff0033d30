"""Before the first step: single blocks as training runs them, against diffusers' own forward pass and autograd.

The first and the last block, in the run's type, attention and compilation, on as many tokens as fit. An ExecutionPlan
is compared through a Stack of one copied block, so that weights, kept tensors and gradients take the way that they take
in training; compiled blocks of diffusers are compared with the same blocks as they are. This happens before the plan
places anything, within the memory that it is to take, so the peak of a run stays what it is.
Shapes as in blocks.py.
"""

import copy
import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from cogvideox.memory.streaming import HostTrainedBlocks, computed, host_waits_for
from cogvideox.model.attention import SAGE
from cogvideox.model.blocks import Block
from cogvideox.model.quant import dequantize, quantize
from cogvideox.model.rope import RotaryTables
from cogvideox.planning.execution import Plan, buckets_of, compile_block
from cogvideox.planning.plan import AUTO, ExecutionPlan
from cogvideox.planning.stack import Stack, base_parameters, block_layers, lora_layers, quantization_kinds
from cogvideox.preparation.tensors import Tensors
from cogvideox.rng import key_of
from cogvideox.runtime.run import Run

APART = {torch.float32: 1e-9, torch.float16: 1e-4, torch.bfloat16: 1e-4}
"""How far below 1 the cosine may be: of outputs, of gradients of inputs, of all gradients of matrices together."""
APART_QUANTIZED = 1e-3  # where frozen matrices are quantized, or attention is
LAYER, NORM = 10, 1000
"""How many times farther: of the gradients of one layer, as those of queries and keys are differences of numbers that
are nearly equal; and of one norm, a sum over all tokens, in which random numbers nearly cancel. Rounding to 16 bits
alone puts two right ways to compute them 1e-4 and 2e-2 apart.
"""
LEAST_PATCHES = 64  # of a sample's video; with fewer there is not much to compare
CHUNK = 2**24  # numbers that are compared at a time
GRADIENT = "gradient of "


class BlockError(RuntimeError):
    """Training would compute something else with a block than diffusers does."""


def check_blocks(run: Run, samples: int, tensors: Tensors, transformer: Any, plan: Plan) -> None:
    """Compares the first and the last block of a transformer that lies on the CPU with its adapters.

    Args:
        samples: in a micro-batch.

    Raises:
        BlockError: which block and which quantity differ, and by how much.
    """
    if not isinstance(plan, ExecutionPlan) and not plan.compiled:
        return  # the blocks run as diffusers has them
    blocks = transformer.transformer_blocks
    found = [check_block(run.device, samples, tensors, blocks, i, plan) for i in sorted({0, len(blocks) - 1})]
    tokens, cosine = map(min, zip(*found, strict=True))
    run.say(f"checked on {tokens} tokens: blocks give what diffusers' blocks give, cosine {cosine:.6f} or more")


def check_block(
    device: torch.device, samples: int, tensors: Tensors, blocks: Any, i: int, plan: Plan
) -> tuple[int, float]:
    """(tokens of a sample, lowest cosine of what needs the highest) of one block.

    Raises:
        BlockError: as ``check_blocks`` does.
    """
    tokens, cosines = as_many_tokens_as_fit(device, samples, tensors, blocks[i], i, plan)
    limits = {what: 1 - apart(plan, blocks[i]) * factor_of(what) for what in cosines}
    for what, cosine in cosines.items():
        if not cosine >= limits[what]:  # NaN fails
            raise BlockError(
                f"block {i + 1} of {len(blocks)}, {what}: training and diffusers differ, cosine {cosine:.9g}, where at "
                f"least {limits[what]:.9g} is right; nothing was trained; please report this"
            )
    return tokens, min(cosine for what, cosine in cosines.items() if factor_of(what) == 1)


def as_many_tokens_as_fit(
    device: torch.device, samples: int, tensors: Tensors, module: Any, i: int, plan: Plan
) -> tuple[int, dict[str, float]]:
    """(tokens of a sample, ``compare``): those of the largest bucket, if they fit, so that the compiled functions are
    those of training; else half of them, and so on, without compiling for a length that is used once.
    """
    geometry = tensors.geometry
    bucket = max(buckets_of(tensors), key=geometry.tokens)
    frames, _, height, width = geometry.latent_shape(bucket)
    rotary = RotaryTables(geometry, device)(frames, height, width)
    length = geometry.max_text_seq_length
    patches = geometry.tokens(bucket) - length
    while True:
        try:
            with at_most(plan, device):
                inputs = random_inputs(module, samples, patches, length, rotary, device)
                return length + patches, compare(module, plan, i, inputs, device)
        except torch.OutOfMemoryError:
            patches //= 2
            if patches < LEAST_PATCHES:
                raise
            if isinstance(plan, ExecutionPlan):
                plan = replace(plan, compiled=plan.any_length)


@contextmanager
def at_most(plan: Plan, device: torch.device) -> Iterator[None]:
    """On a GPU, more memory than an ExecutionPlan is to take is out of memory. Frees what is left at the end."""
    if device.type != "cuda":
        yield
        return
    before = torch.cuda.get_per_process_memory_fraction()
    if isinstance(plan, ExecutionPlan):
        share = plan.peak / torch.cuda.mem_get_info(device)[1]
        torch.cuda.set_per_process_memory_fraction(min(before, share))
    gc.freeze()  # to look through what libraries made takes half a second, and nothing of it is garbage
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(before)
        torch.cuda.synchronize(device)  # host memory is given back, which copies may still use
        gc.collect()
        gc.unfreeze()
        torch.cuda.empty_cache()


def apart(plan: Plan, module: Any) -> float:
    """How far below 1 cosines may be."""
    if isinstance(plan, ExecutionPlan) and (plan.base_precision != AUTO or plan.attention == SAGE):
        return APART_QUANTIZED
    return APART[module.norm1.linear.weight.dtype]


def factor_of(what: str) -> int:
    """How many times farther the cosine of a quantity may be."""
    name = what.removeprefix(GRADIENT)
    if name.startswith("norm"):
        return NORM
    return LAYER if name in (*Block._fields, "time embedding") else 1


# -- inputs ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Inputs:
    """What a block is called with, and the gradients of what it returns."""

    video: Tensor  # (B, S - L, D)
    text: Tensor  # (B, L, D)
    temb: Tensor  # (B, time embedding)
    rotary: tuple[Tensor, Tensor] | None  # (S - L, E) each
    dvideo: Tensor
    dtext: Tensor

    def call(self, block: Callable[..., Any]) -> Any:
        """The block's (video, text)."""
        return block(self.video, self.text, self.temb, self.rotary)

    def leaves(self, with_temb: bool) -> "Inputs":
        """The same, of which autograd takes gradients."""
        video, text = (x.detach().requires_grad_() for x in (self.video, self.text))
        return replace(self, video=video, text=text, temb=self.temb.detach().requires_grad_(with_temb))


def random_inputs(
    module: Any, samples: int, patches: int, length: int, rotary: tuple[Tensor, Tensor] | None, device: torch.device
) -> Inputs:
    """The same random numbers in every run; the first rows of the rotary tables."""
    weight, width = module.norm1.linear.weight, module.attn1.inner_dim
    generator = torch.Generator(device).manual_seed(key_of("block check"))

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device, dtype=weight.dtype)

    video, text, dvideo, dtext = (normal(samples, tokens, width) for tokens in (patches, length, patches, length))
    cut = (rotary[0][:patches], rotary[1][:patches]) if rotary else None
    return Inputs(video, text, normal(samples, weight.shape[1]), cut, dvideo, dtext)


@torch.no_grad()
def balance(inputs: Inputs, stock: Any) -> None:
    """Makes the inputs as large as what the block adds to them, so that neither hides the other in the output."""
    for x, y in zip((inputs.video, inputs.text), inputs.call(stock), strict=True):
        x *= ((y - x).float().norm() / x.float().norm()).clamp(0.01, 1.0)


def copy_of(module: Any) -> Any:
    """A copy of a block. A LoRA that starts at zero, so that half of it has no gradients, is random in it."""
    block = copy.deepcopy(module)
    for number, layer in enumerate(lora_layers(block)):
        for adapter, b in layer.lora_B.items():
            if not b.weight.any():
                generator = torch.Generator().manual_seed(key_of("block check", number))
                size = 1 / (layer.scaling[adapter] * layer.r[adapter] ** 0.5)
                b.weight.data.copy_(torch.randn(b.weight.shape, generator=generator) * size)
    return block


@torch.no_grad()
def stock_block(module: Any, plan: Plan, device: torch.device) -> Any:
    """A copy on the device that diffusers runs, of the same values as those that the plan computes with."""
    block = copy_of(module).to(device)
    if isinstance(plan, ExecutionPlan) and plan.base_precision != AUTO:
        for matrix, kind in quantization_kinds(block, plan.base_precision).items():
            matrix.copy_(dequantize(quantize(matrix, kind), matrix.dtype))
    return block


# -- comparing ---------------------------------------------------------------------------------------------------------


def compare(module: Any, plan: Plan, i: int, inputs: Inputs, device: torch.device) -> dict[str, float]:
    """The cosine of each quantity of block ``i``, between what training computes and what diffusers does."""
    stock = stock_block(module, plan, device)
    balance(inputs, stock)
    expected = {what: tensor.cpu() for what, tensor in outcome(stock, stock, inputs).items()}
    del stock
    own = copy_of(module)
    if isinstance(plan, ExecutionPlan):
        alone = nn.ModuleDict({"transformer_blocks": nn.ModuleList([own])})
        stack = Stack(alone, replace(plan, blocks=(plan.blocks[i],)), device)
        found = outcome(stack.run, own, inputs, stack.host_trained)
        del stack
    else:
        compile_block(own.to(device))
        found = outcome(own, own, inputs)
    parts = {what: overlap(found[what], tensor, device) for what, tensor in expected.items()}
    names = [GRADIENT + name for name in Block._fields if not name.startswith("norm")]
    matrices = [parts[name] for name in names if name in parts]
    if matrices:
        product, squares = map(sum, zip(*matrices, strict=True))
        parts[f"{GRADIENT}all matrices"] = product, squares
    return {what: cosine_of(*part) for what, part in parts.items()}


def outcome(
    run: Callable[..., Any], module: Any, inputs: Inputs, host_trained: HostTrainedBlocks | None = None
) -> dict[str, Tensor]:
    """Outputs and gradients by name; ``run`` computes with the parameters of the module."""
    trains_all = base_parameters(module)[0].requires_grad
    leaves = inputs.leaves(with_temb=trains_all)
    video, text = leaves.call(run)
    torch.autograd.backward((video, text), (inputs.dvideo, inputs.dtext))
    if host_trained is not None:
        take_gradients(host_trained)
    inner = {"video": leaves.video.grad, "text": leaves.text.grad, "time embedding": leaves.temb.grad}
    layers = {
        name: torch.cat([p.grad.flatten() for p in piece.parameters() if p.grad is not None])
        for name, piece in block_layers(module).items()
        if any(p.requires_grad for p in piece.parameters())
    }
    found = {"video": video.detach(), "text": text.detach()}
    found |= {GRADIENT + name: gradient for name, gradient in (inner | layers).items() if gradient is not None}
    return found


def take_gradients(host_trained: HostTrainedBlocks) -> None:
    """Gives the parameters of the only block, if they are trained on the host, the gradients that are summed there."""
    host_trained.gradients.settle()
    store = host_trained.gradients.store
    host_waits_for(computed(store.device))
    gradients = store.layouts[0][1].views(store.buffers[0])
    for parameter, gradient in zip(host_trained.parameters[0], gradients, strict=True):
        parameter.grad = gradient.clone()


def likeness(first: Tensor, second: Tensor, device: torch.device) -> float:
    """The cosine of two tensors, less where their norms differ too."""
    return cosine_of(*overlap(first, second, device))


def overlap(first: Tensor, second: Tensor, device: torch.device) -> tuple[float, float]:
    """a.b and a.a + b.b of two tensors, in fp64; both add up over several pairs of tensors."""
    product = squares = 0.0
    for pair in zip(first.flatten().split(CHUNK), second.flatten().split(CHUNK), strict=True):
        a, b = (part.to(device).double() for part in pair)
        product += (a @ b).item()
        squares += (a @ a + b @ b).item()
    return product, squares


def cosine_of(product: float, squares: float) -> float:
    """2 a.b / (a.a + b.b), which is the cosine where the norms are equal; NaN of zeros."""
    return 2 * product / squares if squares else float("nan")
