"""Runs a transformer of diffusers on the device, one layer at a time, while its weights stay on the CPU.

``run_layer_by_layer`` installs hooks that move each layer's tensors to the device for the duration of its forward pass;
the modules' own code is unchanged. A transformer that no plan has modified can thus run in the memory that a plan
leaves free, and on every card on which the training ran.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from cogvideox.model.quant import dequantize, quantize
from cogvideox.planning.plan import AUTO
from cogvideox.planning.stack import lora_layers, quantization_kinds


def run_layer_by_layer(transformer: Any, device: torch.device, dtype: torch.dtype, precision: str) -> None:
    """Installs the hooks of every layer.

    Args:
        transformer: The transformer, on the CPU.
        device: The device on which layers compute.
        dtype: The compute type of the tensors on the device.
        precision: The base precision of the plan. Matrices that the plan quantizes are rounded in the same way.
    """
    kinds: dict[int, str] = {}
    if precision != AUTO:
        for block in transformer.transformer_blocks:
            kinds |= {id(matrix): kind for matrix, kind in quantization_kinds(block, precision).items()}
    for module, tensors in modules_with_tensors(transformer):
        install_hooks(module, tensors, device, dtype, kinds)


def modules_with_tensors(transformer: nn.Module) -> Iterator[tuple[nn.Module, list[Tensor]]]:
    """Yields modules with the tensors that only they use; a layer with an adapter includes those of its base layer."""
    adapted = lora_layers(transformer)
    inside = {id(part) for layer in adapted for part in layer.modules()} - {id(layer) for layer in adapted}
    for module in transformer.modules():
        has_lora = hasattr(module, "lora_A")
        tensors = [*module.parameters(recurse=has_lora), *module.buffers(recurse=has_lora)]
        if tensors and id(module) not in inside:
            yield module, tensors


def install_hooks(
    module: nn.Module, tensors: list[Tensor], device: torch.device, dtype: torch.dtype, kinds: dict[int, str]
) -> None:
    """Installs hooks that move a module's tensors to the device before its forward pass and restore them afterwards."""
    homes = [tensor.data for tensor in tensors]

    def load(*_: object) -> None:
        for tensor, home in zip(tensors, homes, strict=True):
            here, kind = home.to(device, dtype), kinds.get(id(tensor))
            tensor.data = here if kind is None else dequantize(quantize(here, kind), dtype)

    def restore(*_: object) -> None:
        for tensor, home in zip(tensors, homes, strict=True):
            tensor.data = home

    module.register_forward_pre_hook(load)
    module.register_forward_hook(restore)
