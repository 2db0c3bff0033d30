"""One CogVideoX block as two pure functions of tensors: forward and, with what forward kept, backward.

The block is that of diffusers (CogVideoXBlock) with PEFT's LoRA on its linear layers. Text and video are one sequence
from end to end: what differs by token, modulation and rotary embedding, is looked up by position. The functions take
all weights as arguments, so they may lie in any buffer, and one compiled graph serves all blocks. Each layer says what
of it gets gradients: its LoRA, its own weights, or nothing. What forward keeps is a choice (KEPT); backward computes
the rest again.

    x -> n1 = modulate(x)              n2 = modulate(h)
         q, k, v = linear(n1)          f = linear(n2)
         o = attend(rotate(q, k), v)   z = linear(gelu(f))
         a = linear(o)                 y = h + gate * z
         h = x + gate * a

Shapes: B samples, S tokens (L of text, then the video's), D channels, H heads, E head dim, R rank.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import reduce
from operator import add
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from cogvideox.model.attention import attend, attend_backward
from cogvideox.model.quant import Weight, dequantize

KEPT: dict[str, tuple[str, ...]] = {
    "input": ("x",),
    "attention": ("x", "o", "lse"),
    "linear": ("x", "o", "lse", "q", "k", "v", "h", "f", "a", "z"),
    "all": ("x", "o", "lse", "q", "k", "v", "h", "f", "a", "z", "n1", "rq", "rk", "n2", "g"),
}
"""What forward may keep at each level, from least to most; the names of the formulas above, g the output of gelu."""
UNITS: dict[str, int] = {"x": 1, "o": 1, "lse": 0, "q": 1, "k": 1, "v": 1, "h": 1, "f": 4, "a": 1, "z": 1}
UNITS |= {"n1": 1, "rq": 1, "rk": 1, "n2": 1, "g": 4}
"""Their sizes, in the size of x."""


class Linear(NamedTuple):
    """A linear layer, with a LoRA or without: W x + bias + scale * B (A x)."""

    weight: Weight  # (out, in); if quantized, made whole for each product
    bias: Tensor | None
    a: Tensor | None = None  # (R, in)
    b: Tensor | None = None  # (out, R)
    scale: float = 1.0
    drop: Callable[[Tensor], Tensor] | None = (
        None  # of x in front of A; linear, and the same mask at every call of a step
    )
    trained: bool = False  # weight and bias


class Norm(NamedTuple):
    """A layer norm's weight and bias."""

    weight: Tensor | None
    bias: Tensor | None
    eps: float
    trained: bool = False


class Block(NamedTuple):
    """The weights of a block."""

    modulation1: Linear  # adaLN: of the time embedding
    norm1: Norm
    q: Linear
    k: Linear
    v: Linear
    norm_q: Norm
    norm_k: Norm
    out: Linear
    modulation2: Linear
    norm2: Norm
    ff1: Linear
    ff2: Linear


LORA_LAYERS = ("q", "k", "v", "out", "ff1", "ff2")
Gradients = tuple[Tensor, ...]
"""Of one layer: of a and b, or of weight and bias, or nothing."""


class Shared(NamedTuple):
    """What is the same in all blocks of one forward pass."""

    temb: Tensor  # (B, time embedding)
    rotary: tuple[Tensor, Tensor] | None  # (S, E) each: cos and sin, 1 and 0 over the text
    text_length: int
    heads: int
    backend: str


Kept = dict[str, Tensor]


def kept_at(level: str, p: Block) -> tuple[str, ...]:
    """What forward keeps of a block: of KEPT, what its backward pass uses."""
    unused = {"n1", "n2", "g", "a", "z"} - for_weights(p)
    return tuple(name for name in KEPT[level] if name not in unused)


def for_weights(p: Block) -> set[str]:
    """What only gradients of weights need once all linear outputs are there: inputs of layers, and what is gated."""
    inputs = {"n1": (p.q, p.k, p.v), "n2": (p.ff1,), "g": (p.ff2,)}
    used = {name for name, layers in inputs.items() if any(p.trained or p.a is not None for p in layers)}
    return used | {name for name, gate in (("a", p.modulation1), ("z", p.modulation2)) if gate.trained}


# -- pieces ------------------------------------------------------------------------------------------------------------


def linears(x: Tensor, layers: Sequence[Linear]) -> list[Tensor]:
    """Layers of one x, (..., in) -> (..., out) each."""
    ys = [F.linear(x, dequantize(p.weight, x.dtype), p.bias) for p in layers]
    for group in lora_groups(layers):
        members = [layers[i] for i in group]
        for i, u in zip(group, lora_down(dropped(x, members), members), strict=True):
            ys[i] = ys[i] + F.linear(u, not_none(layers[i].b)) * layers[i].scale
    return ys


def linears_backward(
    dys: Sequence[Tensor], x: Tensor | None, layers: Sequence[Linear]
) -> tuple[Tensor, list[Gradients]]:
    """(gradient of x, for each layer those of what it trains, for which alone x is needed)."""
    dx = reduce(add, [dy @ dequantize(p.weight, dy.dtype) for dy, p in zip(dys, layers, strict=True)])
    found: list[Gradients] = [()] * len(layers)
    for i, (dy, p) in enumerate(zip(dys, layers, strict=True)):
        if p.trained:
            dy = dy.flatten(0, -2)
            found[i] = dy.mT @ not_none(x).flatten(0, -2), *([] if p.bias is None else [dy.sum(0)])
    for group in lora_groups(layers):
        members = [layers[i] for i in group]
        x_in = dropped(not_none(x), members)
        us = lora_down(x_in, members)
        du = joined([dys[i] @ not_none(layers[i].b) * layers[i].scale for i in group], dim=-1)
        das = (du.flatten(0, -2).mT @ x_in.flatten(0, -2)).split([u.shape[-1] for u in us])
        for i, u, da in zip(group, us, das, strict=True):
            found[i] = da, dys[i].flatten(0, -2).mT @ u.flatten(0, -2) * layers[i].scale
        dx = dx + dropped(du @ joined([not_none(p.a) for p in members], dim=0), members)
    return dx, found


def lora_groups(layers: Sequence[Linear]) -> list[list[int]]:
    """Layers of one x whose LoRAs have the same input, so that their A are one product: all but those that drop."""
    trained = [i for i, p in enumerate(layers) if p.a is not None]
    together = [i for i in trained if layers[i].drop is None]
    return [group for group in (together, *([i] for i in trained if i not in together)) if group]


def dropped(x: Tensor, group: Sequence[Linear]) -> Tensor:
    """What the LoRAs of a group get of x, or its gradient."""
    drop = group[0].drop
    return drop(x) if drop else x


def lora_down(x: Tensor, group: Sequence[Linear]) -> list[Tensor]:
    """A x of each layer of a group, (..., R)."""
    matrices = [not_none(p.a) for p in group]
    u = F.linear(x, joined(matrices, dim=0))
    return list(u.split([a.shape[0] for a in matrices], dim=-1))


def joined(tensors: list[Tensor], dim: int) -> Tensor:
    """One tensor; without a copy if it is one already."""
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors, dim)


def not_none(tensor: Tensor | None) -> Tensor:
    """A tensor that is there."""
    assert tensor is not None
    return tensor


def modulations(p: Linear, shared: Shared, length: int) -> tuple[Tensor, Tensor, Tensor]:
    """(shift, scale, gate) of each token, (B, S, D)."""
    shift, scale, gate, *text = linears(F.silu(shared.temb), [p])[0].unsqueeze(1).chunk(6, dim=-1)
    is_text = (torch.arange(length, device=shift.device) < shared.text_length).view(1, -1, 1)
    shift, scale, gate = (torch.where(is_text, t, v) for t, v in zip(text, (shift, scale, gate), strict=True))
    return shift, scale, gate


def modulations_backward(dtokens: Sequence[Tensor], p: Linear, shared: Shared) -> tuple[Tensor, Gradients]:
    """(gradient of temb, those of the layer), for gradients of shift, scale and gate of each token."""
    of_text, of_video = slice(None, shared.text_length), slice(shared.text_length, None)
    sums = [dtoken[:, part].sum(1) for part in (of_video, of_text) for dtoken in dtokens]
    dx, (found,) = linears_backward([torch.cat(sums, dim=-1)], F.silu(shared.temb), [p])
    return vjp(F.silu, shared.temb, dx), found


def modulate(x: Tensor, norm: Norm, shift: Tensor, scale: Tensor) -> Tensor:
    """adaLN of x, (B, S, D)."""
    return F.layer_norm(x, x.shape[-1:], norm.weight, norm.bias, norm.eps) * (1 + scale) + shift


def modulate_backward(
    dn: Tensor, x: Tensor, norm: Norm, shift: Tensor, scale: Tensor, dy: Tensor, gated: Tensor | None
) -> tuple[Tensor, Gradients, list[Tensor]]:
    """(gradient of x, those of the norm, those of shift, scale and gate of each token if ``gated`` is given).

    Args:
        gated: what the gate is multiplied with before it is added, for a gradient dy of the sum.
    """
    if gated is None:
        dx, dnorm, _ = norm_vjp(lambda x, norm: modulate(x, norm, shift, scale), x, norm, dn)
        return dx, dnorm, []
    dx, dnorm, dtokens = norm_vjp(modulate, x, norm, dn, shift, scale)
    return dx, dnorm, [*dtokens, dy * gated]


def rotate(x: Tensor, norm: Norm, rotary: tuple[Tensor, Tensor] | None) -> Tensor:
    """Queries or keys, (B, S, H, E), normalised and with rotary embedding."""
    x = F.layer_norm(x, x.shape[-1:], norm.weight, norm.bias, norm.eps)
    if rotary is None:
        return x
    cos, sin = (table[None, :, None, :] for table in rotary)
    swapped = x.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)  # an index, so that it fuses with the norm
    sign = torch.arange(x.shape[-1], device=x.device) % 2 * 2 - 1
    return (x.float() * cos + swapped.float() * (sin * sign)).to(x.dtype)


def gelu(f: Tensor) -> Tensor:
    """The approximation by tanh."""
    return F.gelu(f, approximate="tanh")


def vjp(function: Callable[[Tensor], Tensor], x: Tensor, dy: Tensor) -> Tensor:
    """The gradient of x."""
    dx: Tensor = torch.func.vjp(function, x)[1](dy)[0]
    return dx


def norm_vjp(
    function: Callable[..., Tensor], x: Tensor, norm: Norm, dy: Tensor, *more: Tensor
) -> tuple[Tensor, Gradients, list[Tensor]]:
    """(gradient of x, those of the norm if it is trained, those of more), of a function of x, norm and more."""
    weights = {name: w for name in ("weight", "bias") if (w := getattr(norm, name)) is not None} if norm.trained else {}

    def call(x: Tensor, weights: dict[str, Tensor], *more: Tensor) -> Tensor:
        return function(x, norm._replace(**weights), *more)

    dx, dweights, *dmore = torch.func.vjp(call, x, weights, *more)[1](dy)
    return dx, tuple(dweights.values()), dmore


# -- the block ---------------------------------------------------------------------------------------------------------


def forward(x: Tensor, p: Block, shared: Shared, keep: tuple[str, ...]) -> tuple[Tensor, Kept]:
    """(y, what was asked to keep), for x of shape (B, S, D)."""
    split = (*x.shape[:2], shared.heads, -1)
    shift, scale, gate = modulations(p.modulation1, shared, x.shape[1])
    n1 = modulate(x, p.norm1, shift, scale)
    q, k, v = (z.view(split) for z in linears(n1, (p.q, p.k, p.v)))
    rq, rk = rotate(q, p.norm_q, shared.rotary), rotate(k, p.norm_k, shared.rotary)
    o, lse = attend(rq, rk, v, shared.backend)
    (a,) = linears(o.view(x.shape), [p.out])
    h = x + gate * a
    shift, scale, gate = modulations(p.modulation2, shared, x.shape[1])
    n2 = modulate(h, p.norm2, shift, scale)
    (f,) = linears(n2, [p.ff1])
    g = gelu(f)
    (z,) = linears(g, [p.ff2])
    made = {"o": o, "lse": lse, "q": q, "k": k, "v": v, "h": h, "f": f, "a": a, "z": z}
    made |= {"n1": n1, "rq": rq, "rk": rk, "n2": n2, "g": g}
    return h + gate * z, {name: made[name] for name in keep if name != "x"}


def backward(
    dy: Tensor, p: Block, shared: Shared, kept: Mapping[str, Tensor]
) -> tuple[Tensor, Tensor | None, dict[str, Gradients]]:
    """(gradients of x, of temb if the modulations are trained, of what is trained by layer), computing again what was
    not kept.
    """
    x, rotary = kept["x"], shared.rotary
    split = (*x.shape[:2], shared.heads, -1)
    shift1, scale1, gate1 = modulations(p.modulation1, shared, x.shape[1])
    shift2, scale2, gate2 = modulations(p.modulation2, shared, x.shape[1])

    def again(name: str, compute: Callable[[], Any]) -> Any:
        return kept[name] if name in kept else compute()

    used = for_weights(p)
    n1 = again("n1", lambda: modulate(x, p.norm1, shift1, scale1)) if "n1" in used or "q" not in kept else None
    if "q" in kept:
        q, k, v = (kept[name] for name in "qkv")
    else:
        q, k, v = (z.view(split) for z in linears(n1, (p.q, p.k, p.v)))
    rq = again("rq", lambda: rotate(q, p.norm_q, rotary))
    rk = again("rk", lambda: rotate(k, p.norm_k, rotary))
    o, lse = (kept["o"], kept["lse"]) if "o" in kept else attend(rq, rk, v, shared.backend)
    a = again("a", lambda: linears(o.view(x.shape), [p.out])[0]) if "a" in used else None
    h = again("h", lambda: x + gate1 * (linears(o.view(x.shape), [p.out])[0] if a is None else a))
    n2 = again("n2", lambda: modulate(h, p.norm2, shift2, scale2)) if "n2" in used or "f" not in kept else None
    f = again("f", lambda: linears(n2, [p.ff1])[0])
    g = again("g", lambda: gelu(f)) if used & {"g", "z"} else None
    z = again("z", lambda: linears(not_none(g), [p.ff2])[0]) if "z" in used else None

    found: dict[str, Gradients] = {}
    dg, (found["ff2"],) = linears_backward([gate2 * dy], g, [p.ff2])
    dn2, (found["ff1"],) = linears_backward([vjp(gelu, f, dg)], n2, [p.ff1])
    dh, found["norm2"], dtokens2 = modulate_backward(dn2, h, p.norm2, shift2, scale2, dy, z)
    dh = dy + dh
    do, (found["out"],) = linears_backward([gate1 * dh], o.view(x.shape), [p.out])
    drq, drk, dv = attend_backward(do.view(split), rq, rk, v, o, lse, shared.backend)
    dq, found["norm_q"], _ = norm_vjp(lambda q, norm: rotate(q, norm, rotary), q, p.norm_q, drq)
    dk, found["norm_k"], _ = norm_vjp(lambda k, norm: rotate(k, norm, rotary), k, p.norm_k, drk)
    dqkv = [dz.reshape(x.shape) for dz in (dq, dk, dv)]
    dn1, (found["q"], found["k"], found["v"]) = linears_backward(dqkv, n1, (p.q, p.k, p.v))
    dx, found["norm1"], dtokens1 = modulate_backward(dn1, x, p.norm1, shift1, scale1, dh, a)
    dtembs = []
    for name, dtokens in (("modulation1", dtokens1), ("modulation2", dtokens2)):
        if dtokens:
            dtemb, found[name] = modulations_backward(dtokens, getattr(p, name), shared)
            dtembs.append(dtemb)
    return dh + dx, reduce(add, dtembs) if dtembs else None, found
