"""Compares single blocks, executed as in training, with diffusers' own forward pass and autograd.

``check_blocks`` runs before the first step. It compares the first and the last block, with the run's dtype, attention
backend and compilation mode, on as many tokens as fit into the planned memory. An ExecutionPlan is checked through a
Stack of one copied block, so that weights, saved activations and gradients take the same paths as in training. Under a
ModulePlan that compiles blocks, diffusers' compiled blocks are compared with the same blocks uncompiled. The check runs
before the plan moves any weights, and stays within the plan's predicted memory, so it does not raise the peak of a run.
model/blocks.py defines the letters that name the dimensions of tensors.
"""

import copy
import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from cogvideox.memory.streaming import TrainedBlocks, compute_event, host_waits_for
from cogvideox.model.attention import GRADIENT_TOLERANCE, SAGE
from cogvideox.model.blocks import Block
from cogvideox.model.quant import dequantize, quantize
from cogvideox.model.rope import RotaryTables
from cogvideox.model.sequence import SequenceGroup, division_error
from cogvideox.planning.execution import Plan, buckets_of, compile_block
from cogvideox.planning.plan import AUTO, ExecutionPlan
from cogvideox.planning.stack import Stack, base_parameters, block_layers, lora_layers, quantization_kinds
from cogvideox.preparation.tensors import Tensors
from cogvideox.rng import key_of
from cogvideox.runtime.run import Run

TOLERANCES = {torch.float32: 1e-9, torch.float16: 1e-4, torch.bfloat16: 1e-4}
"""How far the cosine may be below 1 for outputs, gradients of inputs, and the gradients of all matrices together."""
QUANTIZED_TOLERANCE = 1e-3  # used instead if frozen matrices or attention are quantized
LAYER_FACTOR, NORM_FACTOR = 10, 1000
"""Factors of these tolerances: LAYER_FACTOR for the gradients of one layer, NORM_FACTOR for those of one norm.

Gradients of queries and keys are differences of nearly equal numbers. The gradient of a norm is a sum over all tokens
in which random numbers nearly cancel. Between two correct computations in 16 bits, the cosine of the former is 1e-4
below 1, and that of the latter 2e-2.
"""
LEAST_LIMIT = 2**30  # bytes of GPU memory; the workspaces of CUDA's libraries exceed what a tiny model needs itself
LEAST_PATCHES = 64  # least number of video tokens per sample with which a comparison is meaningful
CHUNK = 2**24  # elements that are compared at a time
GRADIENT = "gradient of "


class BlockError(RuntimeError):
    """Reports that training would compute a block differently from diffusers."""


def check_blocks(run: Run, samples: int, tensors: Tensors, transformer: Any, plan: Plan) -> None:
    """Checks the first and the last block against diffusers, and prints the lowest cosine.

    Args:
        run: The run, for its device and its output.
        samples: The samples in a micro-batch.
        tensors: The data set, for its buckets and geometry.
        transformer: The transformer on the CPU, with its adapters.
        plan: The plan that training will use.

    Raises:
        BlockError: An output or a gradient of a block differs by more than its tolerance; the message says which one.
    """
    if not isinstance(plan, ExecutionPlan) and not plan.compiled:
        return  # diffusers' own blocks run uncompiled, so there is nothing to compare
    if run.ranks.sequence is not None and isinstance(plan, ExecutionPlan):
        check_division(run, run.ranks.sequence, plan)
    blocks = transformer.transformer_blocks
    found = [check_block(run.device, samples, tensors, blocks, i, plan) for i in sorted({0, len(blocks) - 1})]
    tokens, cosine = map(min, zip(*found, strict=True))
    run.say(f"checked on {tokens} tokens: blocks compute the same as those of diffusers, cosine at least {cosine:.6f}")


def check_division(run: Run, group: SequenceGroup, plan: ExecutionPlan) -> None:
    """Checks that attention of divided tokens has the results of attention of all tokens, on all processes.

    Raises:
        BlockError: The results differ on a process. Every process raises it.
    """
    errors = run.ranks.gather([division_error(group, plan.attention, run.device, run.dtype)])
    worst = max(range(len(errors)), key=errors.__getitem__)
    if not errors[worst] <= GRADIENT_TOLERANCE:  # NaN fails
        raise BlockError(
            f"process {worst}: attention of divided tokens has a relative error of {errors[worst]:.2g}; nothing was "
            "trained; run without --sequence_parallel, and check the connections between the GPUs, such as with "
            "NCCL_P2P_DISABLE=1"
        )


def check_block(
    device: torch.device, samples: int, tensors: Tensors, blocks: Any, i: int, plan: Plan
) -> tuple[int, float]:
    """Checks block ``i``.

    Returns:
        The number of tokens per sample, and the lowest cosine of the outputs and gradients that must meet the strictest
        tolerance.

    Raises:
        BlockError: An output or a gradient of the block differs by more than its tolerance.
    """
    tokens, cosines = as_many_tokens_as_fit(device, samples, tensors, blocks[i], i, plan)
    return tokens, require_agreement(cosines, plan, blocks[i], f"block {i + 1} of {len(blocks)}")


def require_agreement(cosines: dict[str, float], plan: Plan, module: Any, name: str) -> float:
    """Returns the lowest cosine of those that must meet the strictest tolerance.

    Args:
        cosines: The result of ``compare_block``.
        plan: The plan under which the block ran.
        module: The block.
        name: What the message calls the block.

    Raises:
        BlockError: An output or a gradient of the block differs by more than its tolerance.
    """
    for what, cosine in cosines.items():
        limit = 1 - tolerance_of(plan, module) * tolerance_factor(what)
        if not cosine >= limit:  # NaN fails
            raise BlockError(
                f"{name}, {what}: training and diffusers differ, cosine {cosine:.9g}, but at least {limit:.9g} is "
                "required; nothing was trained; please report this"
            )
    return min(cosine for what, cosine in cosines.items() if tolerance_factor(what) == 1)


def as_many_tokens_as_fit(
    device: torch.device, samples: int, tensors: Tensors, module: Any, i: int, plan: Plan
) -> tuple[int, dict[str, float]]:
    """Compares block ``i`` on the tokens of the largest bucket, and halves the video tokens until memory suffices.

    The graphs that are compiled for the largest bucket are those of training. A shorter sequence occurs only in this
    check and would need graphs of its own, so the block runs uncompiled then, unless one graph serves all lengths.

    Returns:
        The number of tokens per sample, and the result of ``compare_block``.
    """
    geometry = tensors.geometry
    bucket = max(buckets_of(tensors), key=geometry.tokens)
    frames, _, height, width = geometry.latent_shape(bucket)
    rotary = RotaryTables(geometry, device)(frames, height, width)
    length = geometry.max_text_seq_length
    patches = geometry.tokens(bucket) - length
    if isinstance(plan, ExecutionPlan) and plan.sequence_parallel > 1:
        plan = replace(plan, compiled=False)  # graphs of training are for divided tokens, and each process checks alone
    while True:
        try:
            with limited_to_plan(plan, device):
                inputs = random_inputs(module, samples, patches, length, rotary, device)
                return length + patches, compare_block(module, plan, i, inputs, device)
        except torch.OutOfMemoryError:
            patches //= 2
            if patches < LEAST_PATCHES:
                raise
            if isinstance(plan, ExecutionPlan):
                plan = replace(plan, compiled=plan.any_length)


@contextmanager
def limited_to_plan(plan: Plan, device: torch.device) -> Iterator[None]:
    """Limits a GPU's memory to an ExecutionPlan's predicted peak, and frees unused memory when the context ends.

    The limit is at least LEAST_LIMIT.
    """
    if device.type != "cuda":
        yield
        return
    before = torch.cuda.get_per_process_memory_fraction()
    if isinstance(plan, ExecutionPlan):
        share = max(plan.peak, LEAST_LIMIT) / torch.cuda.mem_get_info(device)[1]
        torch.cuda.set_per_process_memory_fraction(min(before, share))
    gc.freeze()  # scanning the objects of libraries takes half a second, and none of them is garbage
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(before)
        # collect() frees pinned memory at once, so copies on the side streams that use this memory must end before it.
        torch.cuda.synchronize(device)
        gc.collect()
        gc.unfreeze()
        torch.cuda.empty_cache()


def tolerance_of(plan: Plan, module: Any) -> float:
    """Returns the strictest tolerance for a plan: how far below 1 a cosine may be, before ``tolerance_factor``."""
    if isinstance(plan, ExecutionPlan) and (plan.base_precision != AUTO or plan.attention == SAGE):
        return QUANTIZED_TOLERANCE
    return TOLERANCES[module.norm1.linear.weight.dtype]


def tolerance_factor(what: str) -> int:
    """Returns the factor by which the tolerance is multiplied for an output or a gradient."""
    name = what.removeprefix(GRADIENT)
    if name.startswith("norm"):
        return NORM_FACTOR
    return LAYER_FACTOR if name in (*Block._fields, "time embedding") else 1


# -- inputs ------------------------------------------------------------------------------------------------------------


BlockFunction = Callable[..., tuple[Tensor, Tensor]]  # called as a diffusers block; returns (video, text)


@dataclass(frozen=True)
class Inputs:
    """Holds the inputs of a block, and the gradients with respect to its outputs."""

    video: Tensor  # (B, S - L, D)
    text: Tensor  # (B, L, D)
    temb: Tensor  # (B, time embedding)
    rotary: tuple[Tensor, Tensor] | None  # (S - L, E) each
    dvideo: Tensor  # (B, S - L, D)
    dtext: Tensor  # (B, L, D)

    def call(self, block: BlockFunction) -> tuple[Tensor, Tensor]:
        """Returns the block's outputs (video, text)."""
        return block(self.video, self.text, self.temb, self.rotary)

    def leaves(self, with_temb: bool) -> "Inputs":
        """Returns the same inputs as leaves that autograd computes gradients for."""
        video, text = (x.detach().requires_grad_() for x in (self.video, self.text))
        return replace(self, video=video, text=text, temb=self.temb.detach().requires_grad_(with_temb))


def random_inputs(
    module: Any, samples: int, patches: int, length: int, rotary: tuple[Tensor, Tensor] | None, device: torch.device
) -> Inputs:
    """Returns the same random inputs in every run, with the first rows of the rotary tables."""
    weight, width = module.norm1.linear.weight, module.attn1.inner_dim
    generator = torch.Generator(device).manual_seed(key_of("block check"))

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device, dtype=weight.dtype)

    video, text, dvideo, dtext = (normal(samples, tokens, width) for tokens in (patches, length, patches, length))
    cut = (rotary[0][:patches], rotary[1][:patches]) if rotary else None
    return Inputs(video, text, normal(samples, weight.shape[1]), cut, dvideo, dtext)


@torch.no_grad()
def balance(inputs: Inputs, stock: BlockFunction) -> None:
    """Scales inputs down in place to the norm of what the block adds, so that the sum shows errors of both."""
    for x, y in zip((inputs.video, inputs.text), inputs.call(stock), strict=True):
        x *= ((y - x).float().norm() / x.float().norm()).clamp(0.01, 1.0)


def copy_of(module: nn.Module) -> nn.Module:
    """Copies a block, and randomizes each LoRA matrix B that is zero, because the gradients of A would be zero too."""
    block = copy.deepcopy(module)
    for number, layer in enumerate(lora_layers(block)):
        for adapter, b in layer.lora_B.items():
            if not b.weight.any():
                generator = torch.Generator().manual_seed(key_of("block check", number))
                size = 1 / (layer.scaling[adapter] * layer.r[adapter] ** 0.5)
                b.weight.data.copy_(torch.randn(b.weight.shape, generator=generator) * size)
    return block


@torch.no_grad()
def stock_block(module: nn.Module, plan: Plan, device: torch.device) -> nn.Module:
    """Returns a copy of a block on the device for diffusers to run; its matrices have the rounding of the plan."""
    block = copy_of(module).to(device)
    if isinstance(plan, ExecutionPlan) and plan.base_precision != AUTO:
        for matrix, kind in quantization_kinds(block, plan.base_precision).items():
            matrix.copy_(dequantize(quantize(matrix, kind), matrix.dtype))
    return block


# -- comparing ---------------------------------------------------------------------------------------------------------


def compare_block(module: nn.Module, plan: Plan, i: int, inputs: Inputs, device: torch.device) -> dict[str, float]:
    """Returns, for each output and gradient of block ``i``, the cosine between training's and diffusers'."""
    stock = stock_block(module, plan, device)
    balance(inputs, stock)
    expected = {what: tensor.cpu() for what, tensor in outputs_and_gradients(stock, stock, inputs).items()}
    del stock
    own = copy_of(module)
    if isinstance(plan, ExecutionPlan):
        alone = nn.ModuleDict({"transformer_blocks": nn.ModuleList([own])})
        stack = Stack(alone, replace(plan, blocks=(plan.blocks[i],)), device)
        found = outputs_and_gradients(stack.run, own, inputs, stack.trained_blocks)
        del stack
    else:
        compile_block(own.to(device))
        found = outputs_and_gradients(own, own, inputs)
    parts = {what: overlap(found[what], tensor, device) for what, tensor in expected.items()}
    names = [GRADIENT + name for name in Block._fields if not name.startswith("norm")]
    matrices = [parts[name] for name in names if name in parts]
    if matrices:
        product, squares = map(sum, zip(*matrices, strict=True))
        parts[f"{GRADIENT}all matrices"] = product, squares
    return {what: cosine_of_sums(*part) for what, part in parts.items()}


def outputs_and_gradients(
    run: BlockFunction, module: Any, inputs: Inputs, trained_blocks: TrainedBlocks | None = None
) -> dict[str, Tensor]:
    """Returns outputs and gradients by name.

    Args:
        run: A function with the signature of a diffusers block. It computes with the parameters of the module.
        module: The block of diffusers that has the parameters.
        inputs: The inputs, and the gradients with respect to the outputs.
        trained_blocks: The trained blocks that hold the gradients of those on the host, if all weights are trained.
    """
    trains_all = base_parameters(module)[0].requires_grad
    leaves = inputs.leaves(with_temb=trains_all)
    video, text = leaves.call(run)
    torch.autograd.backward((video, text), (inputs.dvideo, inputs.dtext))
    if trained_blocks is not None and trained_blocks.ring:
        take_gradients(trained_blocks)
    inner = {"video": leaves.video.grad, "text": leaves.text.grad, "time embedding": leaves.temb.grad}
    layers = {
        name: torch.cat([p.grad.flatten() for p in piece.parameters() if p.grad is not None])
        for name, piece in block_layers(module).items()
        if any(p.requires_grad for p in piece.parameters())
    }
    found = {"video": video.detach(), "text": text.detach()}
    found |= {GRADIENT + name: gradient for name, gradient in (inner | layers).items() if gradient is not None}
    return found


def take_gradients(trained_blocks: TrainedBlocks) -> None:
    """Copies the gradients of the only block from the host, where they are summed, to its parameters."""
    trained_blocks.gradients.finish_copies()
    store = trained_blocks.gradients.store
    # The host reads the buffers below, so it must wait too: ``finish_copies`` only makes the compute stream wait.
    host_waits_for(compute_event(store.device))
    gradients = store.layouts[0][1].views(store.buffers[0])
    for parameter, gradient in zip(trained_blocks.parameters[0], gradients, strict=True):
        parameter.grad = gradient.clone()


def cosine_between(first: Tensor, second: Tensor, device: torch.device) -> float:
    """Returns 2 a.b / (a.a + b.b) of two tensors: their cosine if their norms are equal, and less otherwise."""
    return cosine_of_sums(*overlap(first, second, device))


def overlap(first: Tensor, second: Tensor, device: torch.device) -> tuple[float, float]:
    """Returns a.b and a.a + b.b of two tensors in fp64. Both can be summed over several pairs of tensors."""
    product = squares = 0.0
    for pair in zip(first.flatten().split(CHUNK), second.flatten().split(CHUNK), strict=True):
        a, b = (part.to(device).double() for part in pair)
        product += (a @ b).item()
        squares += (a @ a + b @ b).item()
    return product, squares


def cosine_of_sums(product: float, squares: float) -> float:
    """Returns 2 a.b / (a.a + b.b), which is the cosine if the norms are equal; NaN if both tensors are zero."""
    return 2 * product / squares if squares else float("nan")
