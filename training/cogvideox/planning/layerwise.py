"""Runs a transformer of diffusers on the device while it lies on the CPU: a layer's tensors are there while it runs.

Hooks move them, and the modules compute as they always do. So what no plan has touched can be run beside a plan's
memory, or on any card on which training ran.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from cogvideox.model.quant import dequantize, quantize
from cogvideox.planning.plan import AUTO
from cogvideox.planning.stack import lora_layers, quantization_kinds


def run_layer_by_layer(transformer: Any, device: torch.device, dtype: torch.dtype, precision: str = AUTO) -> None:
    """Gives each layer its hooks, which bring its tensors in the compute type. The matrices that a plan quantizes have
    the values that it computes with.
    """
    kinds: dict[int, str] = {}
    if precision != AUTO:
        for block in transformer.transformer_blocks:
            kinds |= {id(matrix): kind for matrix, kind in quantization_kinds(block, precision).items()}
    for module, tensors in modules_with_tensors(transformer):
        visit(module, tensors, device, dtype, kinds)


def modules_with_tensors(transformer: Any) -> Iterator[tuple[Any, list[Tensor]]]:
    """Modules with the tensors that only they use: their own; with an adapter, those of the layer and of its base."""
    adapted = lora_layers(transformer)
    inside = {id(part) for layer in adapted for part in layer.modules()} - {id(layer) for layer in adapted}
    for module in transformer.modules():
        whole = hasattr(module, "lora_A")
        tensors = [*module.parameters(recurse=whole), *module.buffers(recurse=whole)]
        if tensors and id(module) not in inside:
            yield module, tensors


def visit(module: Any, tensors: list[Tensor], device: torch.device, dtype: torch.dtype, kinds: dict[int, str]) -> None:
    """Hooks around a module's forward pass: its tensors come to the device, and are the old ones afterwards."""
    homes = [tensor.data for tensor in tensors]

    def come(*_: Any) -> None:
        for tensor, home in zip(tensors, homes, strict=True):
            here, kind = home.to(device, dtype), kinds.get(id(tensor))
            tensor.data = here if kind is None else dequantize(quantize(here, kind), dtype)

    def leave(*_: Any) -> None:
        for tensor, home in zip(tensors, homes, strict=True):
            tensor.data = home

    module.register_forward_pre_hook(come)
    module.register_forward_hook(leave)
