"""Makes the encoder of CogVideoX's VAE faster on a GPU, with the same weights, names and results.

``optimize_encoder(vae)`` replaces the forward passes of the encoder's resnets and downsamplers. In diffusers they are
bound by memory: the input of each convolution is read and written nine times, and transposed twice for the tensor
cores. Here, everything is stored channels last, and group norm, activation and causal padding in front of a convolution
are two kernels. The statistics of the norm are computed from the same numbers in fp32; only the activation is rounded
once, not three times.

Shapes: C channels, F frames, H height, W width; R = F * H rows of pixels, S = F * H * W pixels, G groups of K channels.
The batch is always one clip.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from cogvideox.memory.graphs import allowing_graphs

FORMAT = torch.channels_last_3d
Cache = dict[str, Any]


def optimize_encoder(vae: Any, compiled: bool = True) -> None:
    """Makes ``vae.encode`` fast, in place, for one clip at a time.

    Raises:
        ValueError: the encoder is not made as CogVideoX's is.
        Exception: whatever the compiler says if it does not work here.
    """
    blocks = [*vae.encoder.down_blocks, vae.encoder.mid_block]
    resnets = [resnet for block in blocks for resnet in block.resnets]
    if not all(is_plain(resnet) for resnet in resnets):
        raise ValueError("the encoder's resnets are not those of CogVideoX")
    functions: Any = (scale_and_shift, activate_into)
    if compiled:
        torch.compile(torch.sin)(torch.zeros(8, device=vae.device))  # no clip is needed to see that nothing compiles
        compiling = partial(torch.compile, fullgraph=True, dynamic=False)  # but for what is marked
        functions = tuple(allowing_graphs(compiling(function)) for function in functions)
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
    """Whether ``run_resnet`` does what a resnet of diffusers does."""
    norms = isinstance(resnet.norm1, torch.nn.GroupNorm) and isinstance(resnet.norm2, torch.nn.GroupNorm)
    pads = resnet.conv1.pad_mode == resnet.conv2.pad_mode == "first" and resnet.conv1.time_pad == 2
    return norms and pads and isinstance(resnet.nonlinearity, torch.nn.SiLU) and not resnet.use_conv_shortcut


def run_resnet(
    resnet: Any, functions: Any, inputs: Tensor, temb: None = None, zq: None = None, conv_cache: Cache | None = None
) -> tuple[Tensor, Cache]:
    """CogVideoXResnetBlock3D.forward, of (1, C, F, H, W).

    Raises:
        ValueError: it is given more.
    """
    if temb is not None or zq is not None or len(inputs) != 1:
        raise ValueError("an optimized encoder takes one clip, without conditions")
    inputs = inputs.contiguous(memory_format=FORMAT)
    kept: Cache = {}
    hidden = inputs
    for name, norm, conv in (("conv1", resnet.norm1, resnet.conv1), ("conv2", resnet.norm2, resnet.conv2)):
        hidden = padded(hidden, norm, (conv_cache or {}).get(name), functions)
        kept[name] = hidden[:, :, -2:].clone(memory_format=FORMAT)
        hidden = conv.conv(hidden).contiguous(memory_format=FORMAT)
    if resnet.in_channels != resnet.out_channels:
        inputs = resnet.conv_shortcut(inputs)
    return hidden + inputs, kept


def padded(x: Tensor, norm: torch.nn.GroupNorm, cache: Tensor | None, functions: Any) -> Tensor:
    """The input of a causal convolution, (1, C, 2 + F, H, W): silu(norm(x)) behind the last two frames of what came
    before, or behind its own first frame twice.
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
    """The same, marked: one graph is to serve all sizes of these dimensions."""
    x = x.data  # no view, or the sizes of what it is a view of would count
    for dim in dims:
        torch._dynamo.maybe_mark_dynamic(x, dim)
    return x


def scale_and_shift(x_RWC: Tensor, weight_C: Tensor, bias_C: Tensor, groups: int, eps: float) -> tuple[Tensor, Tensor]:
    """Group norm as a factor and a summand for each channel, fp32: of rows first, so that many can be read at once."""
    variance_RC, mean_RC = torch.var_mean(x_RWC.float(), dim=1, correction=0)
    mean_GK = mean_RC.mean(0).view(groups, -1)
    mean_G1 = mean_GK.mean(1, keepdim=True)
    apart_RGK = mean_RC.unflatten(1, (groups, -1)) - mean_G1
    variance_G1 = (variance_RC.unflatten(1, (groups, -1)) + apart_RGK**2).mean((0, 2)).unsqueeze(1)
    scale_GK = weight_C.float().view(groups, -1) * torch.rsqrt(variance_G1 + eps)
    shift_GK = bias_C.float().view(groups, -1) - mean_G1 * scale_GK
    return scale_GK.flatten(), shift_GK.flatten()


def activate_into(y_SC: Tensor, x_SC: Tensor, scale_C: Tensor, shift_C: Tensor) -> None:
    """silu(x * scale + shift), in fp32, rounded to what it is written over."""
    y_SC.copy_(F.silu(x_SC.float() * scale_C + shift_C))


def downsample(layer: Any, x: Tensor) -> Tensor:
    """CogVideoXDownsample3D.forward, of (1, C, F, H, W): half the frames, the first stays if their number is odd."""
    if layer.compress_time:
        odd = x.shape[2] % 2
        pairs = x[:, :, odd:].unflatten(2, (-1, 2)).mean(3) if x.shape[2] > 1 else x[:, :, odd:]
        x = torch.cat([x[:, :, :odd], pairs], dim=2)
    frames_FCHW = x[0].transpose(0, 1)
    y_FCHW = layer.conv(F.pad(frames_FCHW, (0, 1, 0, 1)).contiguous(memory_format=torch.channels_last))
    return y_FCHW.transpose(0, 1).unsqueeze(0)
