"""The state of any optimizer as plain tensors by name, as checkpoints store it: ``key/parameter``."""

from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass


def as_tensor(value: Tensor | bool | int | float) -> Tensor:
    """Returns a number as a tensor without loss of precision; floats become fp64."""
    return torch.tensor(value, dtype=torch.float64) if isinstance(value, float) else torch.as_tensor(value)


def plain_tensors(values: dict[str, Any]) -> Iterator[tuple[str, Tensor]]:
    """Yields an optimizer's state of one parameter as plain tensors by name.

    A number becomes a scalar tensor. A quantized tensor is yielded in its parts, named ``key.part``.
    """
    for key, value in values.items():
        if is_traceable_wrapper_subclass(value):
            yield from ((f"{key}.{part}", getattr(value, part)) for part in value.__tensor_flatten__()[0])
        elif value is not None:
            yield key, as_tensor(value)


def for_file(tensors: dict[str, Tensor], copy: bool) -> dict[str, Tensor]:
    """Returns the tensors on the CPU, contiguous and without shared memory, as safetensors needs them.

    Args:
        tensors: Tensors by name, on any device.
        copy: Whether tensors that are on the CPU already are copied. Without copies the result must be written before
            the next step, but takes no additional memory, which may be most of the host's.
    """
    found: dict[str, Tensor] = {}
    addresses: set[int] = set()
    for name, tensor in tensors.items():
        on_cpu = tensor.cpu().contiguous()
        found[name] = on_cpu.clone() if copy or on_cpu.data_ptr() in addresses else on_cpu
        addresses.add(on_cpu.data_ptr())
    return found


def by_parameter(tensors: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Groups tensors named ``key/parameter`` by parameter, and returns for each its tensors by key."""
    grouped: dict[str, dict[str, Tensor]] = defaultdict(dict)
    for full_name, tensor in tensors.items():
        key, _, name = full_name.partition("/")
        grouped[name][key] = tensor
    return grouped


def overwrite(values: dict[str, Any], tensors: dict[str, Tensor], device: torch.device) -> None:
    """Writes tensors that ``plain_tensors`` yielded back into an optimizer's state of one parameter.

    Args:
        values: The state to overwrite. Quantized tensors must exist in it already, so the optimizer must have stepped.
        tensors: The tensors by name.
        device: Where tensors that the state does not have yet are created.
    """
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
