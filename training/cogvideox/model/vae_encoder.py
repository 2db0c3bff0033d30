"""Makes the encoder of CogVideoX's VAE faster on a GPU, with the same weights, names and results.

``optimize_encoder(vae)`` replaces the forward passes of the encoder's resnets and downsamplers. In diffusers they are
bound by memory: the input of each convolution is read and written nine times, and transposed twice for the tensor
cores. Here, everything is stored channels last, and group norm, activation and causal padding in front of a convolution
are two kernels. The statistics of the norm are computed from the same numbers in fp32; only the activation is rounded
once, not three times.

Shapes: C channels, F frames, H height, W width; R = F * H rows of pixels, S = F * H * W pixels, G groups of K channels.
The batch is always one clip.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from cogvideox.memory.graphs import allowing_graphs

FORMAT = torch.channels_last_3d
Cache = dict[str, Tensor]
Kernels = tuple[Callable[..., tuple[Tensor, Tensor]], Callable[..., None]]  # scale_and_shift and activate_into


def optimize_encoder(vae: Any, compiled: bool = True) -> None:
    """Makes ``vae.encode`` faster, in place; from then on it takes one clip at a time.

    Args:
        vae: The VAE, on its device.
        compiled: Whether to compile the two kernels.

    Raises:
        ValueError: The encoder is not built like that of CogVideoX.
        Exception: The compiler does not work on this machine; any of its errors is passed on.
    """
    blocks = [*vae.encoder.down_blocks, vae.encoder.mid_block]
    resnets = [resnet for block in blocks for resnet in block.resnets]
    if not all(is_plain(resnet) for resnet in resnets):
        raise ValueError("the encoder's resnets are not those of CogVideoX")
    functions: Kernels = (scale_and_shift, activate_into)
    if compiled:
        # If the compiler does not work here, this fails now and not in the middle of the first clip.
        torch.compile(torch.sin)(torch.zeros(8, device=vae.device))
        compiling = partial(torch.compile, fullgraph=True, dynamic=False)  # only sizes that are marked vary
        functions = (allowing_graphs(compiling(scale_and_shift)), allowing_graphs(compiling(activate_into)))
    # Convolutions run without transposing their input only if their weights are channels last, too.
    for layer in vae.encoder.modules():
        if isinstance(layer, torch.nn.Conv3d | torch.nn.Conv2d):
            format_ = FORMAT if isinstance(layer, torch.nn.Conv3d) else torch.channels_last
            layer.weight.data = layer.weight.data.contiguous(memory_format=format_)
    for resnet in resnets:
        resnet.forward = partial(run_resnet, resnet, functions)
    for block in vae.encoder.down_blocks:
        for layer in block.downsamplers or ():
            layer.forward = partial(downsample, layer)


def is_plain(resnet: Any) -> bool:
    """Returns whether ``run_resnet`` computes the same as this resnet of diffusers."""
    norms = isinstance(resnet.norm1, torch.nn.GroupNorm) and isinstance(resnet.norm2, torch.nn.GroupNorm)
    pads = resnet.conv1.pad_mode == resnet.conv2.pad_mode == "first" and resnet.conv1.time_pad == 2
    return norms and pads and isinstance(resnet.nonlinearity, torch.nn.SiLU) and not resnet.use_conv_shortcut


def run_resnet(
    resnet: Any, functions: Kernels, inputs: Tensor, temb: None = None, zq: None = None, conv_cache: Cache | None = None
) -> tuple[Tensor, Cache]:
    """Replaces CogVideoXResnetBlock3D.forward: (1, C, F, H, W) -> (1, C', F, H, W).

    Args:
        resnet: The resnet of diffusers.
        functions: ``scale_and_shift`` and ``activate_into``, compiled or not.
        inputs: The frames, (1, C, F, H, W).
        temb: Must be None; the encoder has no time embedding.
        zq: Must be None; the encoder has no spatial condition.
        conv_cache: For each convolution, the last two frames of its input in the previous part of the clip.

    Returns:
        The output, and the cache for the next part of the clip.

    Raises:
        ValueError: There is more than one clip, or ``temb`` or ``zq`` is given.
    """
    if temb is not None or zq is not None or len(inputs) != 1:
        raise ValueError("an optimized encoder takes one clip, without conditions")
    inputs = inputs.contiguous(memory_format=FORMAT)
    kept: Cache = {}
    hidden = inputs
    for name, norm, conv in (("conv1", resnet.norm1, resnet.conv1), ("conv2", resnet.norm2, resnet.conv2)):
        hidden = padded(hidden, norm, (conv_cache or {}).get(name), functions)
        # The next part of the clip is padded with the last two frames. A clone frees the memory of all other frames.
        kept[name] = hidden[:, :, -2:].clone(memory_format=FORMAT)
        hidden = conv.conv(hidden).contiguous(memory_format=FORMAT)
    if resnet.in_channels != resnet.out_channels:
        inputs = resnet.conv_shortcut(inputs)
    return hidden + inputs, kept


def padded(x: Tensor, norm: torch.nn.GroupNorm, cache: Tensor | None, functions: Kernels) -> Tensor:
    """Computes the input of a causal convolution: two frames of padding, then silu(norm(x)).

    Args:
        x: The frames, (1, C, F, H, W).
        norm: The group norm in front of the convolution.
        cache: The last two frames of this input in the previous part of the clip, (1, C, 2, H, W); None for the first
            part, which is padded with its own first frame.
        functions: ``scale_and_shift`` and ``activate_into``, compiled or not.

    Returns:
        The padded input, (1, C, 2 + F, H, W), channels last.
    """
    scale_and_shift, activate_into = functions
    _, channels, frames, height, width = x.shape
    x_FHWC = x[0].permute(1, 2, 3, 0)
    y_FHWC = x.new_empty(2 + frames, height, width, channels)
    scale_C, shift_C = scale_and_shift(
        mark_dynamic(x_FHWC.flatten(0, 1), 0, 1), norm.weight, norm.bias, norm.num_groups, norm.eps
    )
    activate_into(mark_dynamic(y_FHWC[2:].flatten(0, 2), 0), mark_dynamic(x_FHWC.flatten(0, 2), 0), scale_C, shift_C)
    y_FHWC[:2] = y_FHWC[2] if cache is None else cache[0].permute(1, 2, 3, 0)
    return y_FHWC.permute(3, 0, 1, 2).unsqueeze(0)


def mark_dynamic(x: Tensor, *dims: int) -> Tensor:
    """Returns x with dimensions marked as dynamic, so that one compiled graph serves all their sizes."""
    x = x.data  # not a view: the compiler would also specialize on the sizes of a view's base
    for dim in dims:
        torch._dynamo.maybe_mark_dynamic(x, dim)
    return x


def scale_and_shift(x_RWC: Tensor, weight_C: Tensor, bias_C: Tensor, groups: int, eps: float) -> tuple[Tensor, Tensor]:
    """Computes group norm as a scale and a shift per channel: norm(x) = x * scale + shift.

    The variance of a group is combined from those of its rows, Var = mean(Var_row + (mean_row - mean)^2), so that many
    rows are reduced in parallel and x is read once.

    Args:
        x_RWC: Rows of pixels, (R, W, C).
        weight_C: The norm's weight, (C,).
        bias_C: The norm's bias, (C,).
        groups: The number of groups G, of K = C / G channels each.
        eps: A small number that is added to the variance.

    Returns:
        Scale and shift, (C,) each, fp32.
    """
    variance_RC, mean_RC = torch.var_mean(x_RWC.float(), dim=1, correction=0)
    mean_GK = mean_RC.mean(0).view(groups, -1)
    mean_G1 = mean_GK.mean(1, keepdim=True)
    apart_RGK = mean_RC.unflatten(1, (groups, -1)) - mean_G1
    variance_G1 = (variance_RC.unflatten(1, (groups, -1)) + apart_RGK**2).mean((0, 2)).unsqueeze(1)
    scale_GK = weight_C.float().view(groups, -1) * torch.rsqrt(variance_G1 + eps)
    shift_GK = bias_C.float().view(groups, -1) - mean_G1 * scale_GK
    return scale_GK.flatten(), shift_GK.flatten()


def activate_into(y_SC: Tensor, x_SC: Tensor, scale_C: Tensor, shift_C: Tensor) -> None:
    """Writes silu(x * scale + shift) to y, (S, C); computed in fp32 and rounded once, to the type of y."""
    y_SC.copy_(F.silu(x_SC.float() * scale_C + shift_C))


def downsample(layer: Any, x: Tensor) -> Tensor:
    """Replaces CogVideoXDownsample3D.forward: (1, C, F, H, W) -> (1, C, F', H / 2, W / 2).

    Where the layer compresses time, F' = F / 2: pairs of frames are averaged, and with an odd number of frames the
    first one is kept. Otherwise F' = F.
    """
    if layer.compress_time:
        odd = x.shape[2] % 2
        pairs = x[:, :, odd:].unflatten(2, (-1, 2)).mean(3) if x.shape[2] > 1 else x[:, :, odd:]
        x = torch.cat([x[:, :, :odd], pairs], dim=2)
    frames_FCHW = x[0].transpose(0, 1)
    y_FCHW = layer.conv(F.pad(frames_FCHW, (0, 1, 0, 1)).contiguous(memory_format=torch.channels_last))
    return y_FCHW.transpose(0, 1).unsqueeze(0)
