"""Finds tensors that contain NaN or infinity.

Each tensor is read once on its own device, without a temporary of its size.
"""

from collections import defaultdict
from collections.abc import Mapping

import torch
from torch import Tensor


@torch.no_grad()
def not_finite(tensors: Mapping[str, Tensor], dtype: torch.dtype | None = None) -> list[str]:
    """Returns the names of the floating-point tensors with a value that is not finite. Waits once for each device.

    Tensors with one byte per number are skipped: quantized optimizer states have separate float tensors of scales.

    Args:
        tensors: The tensors by name.
        dtype: If given, values that are infinite in this type count too.
    """
    flags: dict[torch.device, dict[str, Tensor]] = defaultdict(dict)
    for name, tensor in tensors.items():  # which may compute each one only now
        if tensor.is_floating_point() and tensor.itemsize > 1 and tensor.numel():
            # NaN propagates through both extremes, and this is much faster than isfinite().all().
            flags[tensor.device][name] = torch.stack(torch.aminmax(tensor)).to(dtype or tensor.dtype).isfinite().all()
    return [
        name
        for of_device in flags.values()
        for name, good in zip(of_device, torch.stack([*of_device.values()]).tolist(), strict=True)
        if not good
    ]
