"""Which tensors hold NaN or infinity. Each is read once where it lies, and nothing of its size is made for it."""

from collections import defaultdict
from collections.abc import Mapping

import torch
from torch import Tensor


@torch.no_grad()
def not_finite(tensors: Mapping[str, Tensor]) -> list[str]:
    """The names of the tensors of floating-point numbers that are not all finite. Waits once for each device.

    Numbers of one byte are passed over: what quantizes an optimizer's state keeps its scales beside them, as floats.
    """
    flags: dict[torch.device, dict[str, Tensor]] = defaultdict(dict)
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and tensor.itemsize > 1 and tensor.numel():
            # as NaN passes through both, and much faster than isfinite().all()
            flags[tensor.device][name] = torch.stack(torch.aminmax(tensor)).isfinite().all()
    return [
        name
        for of_device in flags.values()
        for name, good in zip(of_device, torch.stack([*of_device.values()]).tolist(), strict=True)
        if not good
    ]
