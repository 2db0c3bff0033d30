"""Computes one CogVideoX transformer block with two pure functions of tensors, ``forward`` and ``backward``.

The block computes what CogVideoXBlock of diffusers computes, with PEFT's LoRA on its linear layers. ``forward`` returns
the block's output and those activations that it was asked to keep; ``backward`` takes the kept activations, recomputes
the others, and returns the gradients. No autograd graph exists between the two.

    x -> n1 = modulate(x)                   h -> n2 = modulate(h)
         q, k, v = linear(n1)                    f = linear(n2)
         rq, rk = rotate(q), rotate(k)           g = gelu(f)
         o, lse = attend(rq, rk, v)              z = linear(g)
         a = linear(o)                           y = h + gate2 * z   -> y
         h = x + gate1 * a   -> h

modulate(x) = LayerNorm(x) * (1 + scale) + shift is the adaptive layer norm of DiT (Peebles & Xie 2023). Its shift,
scale and gate are linear functions of the timestep embedding, one set for video tokens and one for text tokens.

Why any activation may be kept or recomputed: each one is a function of x, the timestep embedding and the weights, and
the functions are deterministic (dropout repeats its mask within a step). Keeping only x takes the least memory and one
more forward pass; keeping all activations takes the most memory, and nothing is recomputed. KEPT lists the four levels
from which a plan chooses. The gradients are the same at every level.

Why functions and not modules: all weights are arguments, so they may be stored in any buffer, such as one that is
filled from host memory just before the block runs, and one compiled graph serves all blocks. Text and video form one
sequence throughout, text first. Their modulations and rotary embeddings differ, so these are chosen by position.

Shapes: B samples, S tokens (L of text, then those of the video), D channels, H heads, E channels of a head (H * E = D),
R rank of a LoRA.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import reduce
from operator import add
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from cogvideox.model.attention import attend, attend_backward
from cogvideox.model.quant import Weight, dequantize
from cogvideox.model.sequence import Division, attend_divided, attend_divided_backward

KEPT: dict[str, tuple[str, ...]] = {
    "input": ("x",),
    "attention": ("x", "o", "lse"),
    "linear": ("x", "o", "lse", "q", "k", "v", "h", "f", "a", "z"),
    "all": ("x", "o", "lse", "q", "k", "v", "h", "f", "a", "z", "n1", "rq", "rk", "n2", "g"),
}
"""The activations that forward keeps at each level of --keep, by their names in the formulas above; least first."""
UNITS: dict[str, int] = {"x": 1, "o": 1, "lse": 0, "q": 1, "k": 1, "v": 1, "h": 1, "f": 4, "a": 1, "z": 1}
UNITS |= {"n1": 1, "rq": 1, "rk": 1, "n2": 1, "g": 4}
"""The size of each activation as a multiple of the size of x, (B, S, D). lse is small enough to count as 0."""


class Linear(NamedTuple):
    """Describes a linear layer with an optional LoRA: y = W x + bias + scale * B A drop(x).

    The fields tell which gradients ``linears_backward`` returns: those of ``a`` and ``b`` if there is a LoRA, those of
    ``weight`` and ``bias`` if ``trained`` is set, otherwise none.
    """

    weight: Weight  # W, (out, in); a quantized one is dequantized for each product
    bias: Tensor | None  # (out,)
    a: Tensor | None = None  # A, (R, in)
    b: Tensor | None = None  # B, (out, R)
    scale: Tensor | None = None  # a scalar; a number would be a constant of the graph, one for each --lora_alpha
    # The dropout in front of A. ``backward`` applies it to gradients and to recomputed inputs, so it must be linear in
    # its argument and use the same mask at every call within a step.
    drop: Callable[[Tensor], Tensor] | None = None
    trained: bool = False  # whether weight and bias get gradients


class Norm(NamedTuple):
    """Holds the weight and bias of a layer norm; ``trained`` tells whether they get gradients."""

    weight: Tensor | None  # (D,), or (E,) for queries and keys
    bias: Tensor | None
    eps: float
    trained: bool = False


class Block(NamedTuple):
    """Holds all weights of one block. The names are those of the formulas in the module's docstring."""

    modulation1: Linear  # timestep embedding -> shift, scale, gate of video, then of text: (6 D, time embedding)
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
"""The gradients of one layer: (a, b) of its LoRA, or (weight, bias) if these are trained, or nothing."""


class Shared(NamedTuple):
    """Holds the inputs that all blocks of one forward pass have in common.

    If the tokens of a sample are divided between processes, ``rotary`` and ``text_length`` are those of this process's
    tokens, and S in the shapes of tokens is their number.
    """

    temb: Tensor  # timestep embedding, (B, time embedding)
    rotary: tuple[Tensor, Tensor] | None  # cos and sin, (S, E) each; 1 and 0 for text tokens, which are not rotated
    text_length: int  # L
    heads: int  # H
    backend: str  # as attention.choose_backend returns it
    division: Division | None = None  # how the tokens are divided; None if this process has all of them


Kept = dict[str, Tensor]


def kept_at(level: str, p: Block) -> tuple[str, ...]:
    """Returns the activations that ``forward`` keeps at a level of KEPT, without those that ``backward`` never uses."""
    unused = {"n1", "n2", "g", "a", "z"} - needed_for_weights(p)
    return tuple(name for name in KEPT[level] if name not in unused)


def needed_for_weights(p: Block) -> set[str]:
    """Returns the activations that are needed for gradients of weights only.

    If the outputs of the linear layers are known, the gradient of x needs none of these. Gradients of the weights or of
    the LoRA of a layer need the layer's input (n1, n2 or g). Gradients of gates, which exist where modulations are
    trained, need the values that the gates are multiplied by (a and z).
    """
    inputs = {"n1": (p.q, p.k, p.v), "n2": (p.ff1,), "g": (p.ff2,)}
    used = {name for name, layers in inputs.items() if any(p.trained or p.a is not None for p in layers)}
    return used | {name for name, gate in (("a", p.modulation1), ("z", p.modulation2)) if gate.trained}


# -- layers ------------------------------------------------------------------------------------------------------------


def linears(x: Tensor, layers: Sequence[Linear]) -> list[Tensor]:
    """Applies several linear layers to one input.

    Args:
        x: The input, (..., in).
        layers: The layers, each (in) -> (out).

    Returns:
        The output of each layer, (..., out).
    """
    ys = [F.linear(x, dequantize(p.weight, x.dtype), p.bias) for p in layers]
    for group in lora_groups(layers):
        members = [layers[i] for i in group]
        for i, u in zip(group, lora_down(apply_dropout(x, members), members), strict=True):
            ys[i] = ys[i] + F.linear(u, not_none(layers[i].b)) * not_none(layers[i].scale)
    return ys


def linears_backward(
    dys: Sequence[Tensor], x: Tensor | None, layers: Sequence[Linear]
) -> tuple[Tensor, list[Gradients]]:
    """Computes the gradients of ``linears``.

    With tokens as rows, and dy as the gradient of y = x W^T + bias + scale * drop(x) A^T B^T:

        dx = dy W + scale * drop(dy B A)            dW = dy^T x            dbias = sum of dy over tokens
        dA = scale * (dy B)^T drop(x)               dB = scale * dy^T (drop(x) A^T)

    Args:
        dys: The gradient of each layer's output, (..., out).
        x: The input, (..., in); None if no layer trains anything, because only gradients of weights need it.
        layers: The layers, in the order of ``dys``.

    Returns:
        The gradient of x, summed over the layers, and for each layer the gradients of what it trains.
    """
    dx = reduce(add, [dy @ dequantize(p.weight, dy.dtype) for dy, p in zip(dys, layers, strict=True)])  # dy W
    found: list[Gradients] = [()] * len(layers)
    for i, (dy, p) in enumerate(zip(dys, layers, strict=True)):
        if p.trained:
            dy = dy.flatten(0, -2)
            found[i] = dy.mT @ not_none(x).flatten(0, -2), *([] if p.bias is None else [dy.sum(0)])
    for group in lora_groups(layers):
        members = [layers[i] for i in group]
        x_in = apply_dropout(not_none(x), members)
        us = lora_down(x_in, members)  # A drop(x): (..., R) for each layer
        # The gradient of all of them together: scale * dy B, (..., sum of R).
        du = concatenated([dys[i] @ not_none(layers[i].b) * not_none(layers[i].scale) for i in group], dim=-1)
        das = (du.flatten(0, -2).mT @ x_in.flatten(0, -2)).split([u.shape[-1] for u in us])
        for i, u, da in zip(group, us, das, strict=True):
            found[i] = da, dys[i].flatten(0, -2).mT @ u.flatten(0, -2) * not_none(layers[i].scale)
        dx = dx + apply_dropout(du @ concatenated([not_none(p.a) for p in members], dim=0), members)
    return dx, found


def lora_groups(layers: Sequence[Linear]) -> list[list[int]]:
    """Groups layers of one x whose LoRAs have the same input, so that their matrices A are multiplied as one matrix.

    A layer with dropout is a group by itself, because its mask makes its input different from that of the others.

    Returns:
        Groups of indices into ``layers``. Layers without a LoRA are in no group.
    """
    trained = [i for i, p in enumerate(layers) if p.a is not None]
    together = [i for i in trained if layers[i].drop is None]
    return [group for group in (together, *([i] for i in trained if i not in together)) if group]


def apply_dropout(x: Tensor, group: Sequence[Linear]) -> Tensor:
    """Applies the dropout of a group of LoRAs to their input x, or to the gradient of x; the mask is the same."""
    drop = group[0].drop
    return drop(x) if drop else x


def lora_down(x: Tensor, group: Sequence[Linear]) -> list[Tensor]:
    """Returns A x for each layer of a group, (..., R)."""
    matrices = [not_none(p.a) for p in group]
    u = F.linear(x, concatenated(matrices, dim=0))
    return list(u.split([a.shape[0] for a in matrices], dim=-1))


def concatenated(tensors: list[Tensor], dim: int) -> Tensor:
    """Concatenates tensors; returns a single tensor without copying it."""
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors, dim)


def not_none(tensor: Tensor | None) -> Tensor:
    """Returns a tensor that is known not to be None, for the type checker."""
    assert tensor is not None
    return tensor


def modulations(p: Linear, shared: Shared, length: int) -> tuple[Tensor, Tensor, Tensor]:
    """Computes the shift, scale and gate of each token from the timestep embedding (CogVideoXLayerNormZero).

    Args:
        p: The modulation layer.
        shared: The timestep embedding and the number of text tokens.
        length: The number of tokens, S.

    Returns:
        Shift, scale and gate, (B, S, D) each.
    """
    # (B, 6 D) -> six of (B, 1, D): first those of video tokens, then those of text tokens
    shift, scale, gate, *text = linears(F.silu(shared.temb), [p])[0].unsqueeze(1).chunk(6, dim=-1)
    is_text = (torch.arange(length, device=shift.device) < shared.text_length).view(1, -1, 1)
    shift, scale, gate = (torch.where(is_text, t, v) for t, v in zip(text, (shift, scale, gate), strict=True))
    return shift, scale, gate


def modulations_backward(dtokens: Sequence[Tensor], p: Linear, shared: Shared) -> tuple[Tensor, Gradients]:
    """Computes the gradients of ``modulations``.

    Args:
        dtokens: Gradients of shift, scale and gate, (B, S, D) each.
        p: The modulation layer.
        shared: The timestep embedding and the number of text tokens.

    Returns:
        The gradient of the timestep embedding, (B, time embedding), and the gradients of the layer.
    """
    of_text, of_video = slice(None, shared.text_length), slice(shared.text_length, None)
    # All tokens of a kind share one modulation, so their gradients are summed: (B, S, D) -> (B, D), six times.
    sums = [dtoken[:, part].sum(1) for part in (of_video, of_text) for dtoken in dtokens]
    dx, (found,) = linears_backward([torch.cat(sums, dim=-1)], F.silu(shared.temb), [p])
    return vjp(F.silu, shared.temb, dx), found


def modulate(x: Tensor, norm: Norm, shift: Tensor, scale: Tensor) -> Tensor:
    """Applies adaptive layer norm: LayerNorm(x) * (1 + scale) + shift, all (B, S, D)."""
    return F.layer_norm(x, x.shape[-1:], norm.weight, norm.bias, norm.eps) * (1 + scale) + shift


def modulate_backward(
    dn: Tensor, x: Tensor, norm: Norm, shift: Tensor, scale: Tensor, dy: Tensor, gated: Tensor | None
) -> tuple[Tensor, Gradients, list[Tensor]]:
    """Computes the gradients of ``modulate``, and with it that of the gate that belongs to the same modulation.

    Args:
        dn: Gradient of the modulated x, (B, S, D).
        x: Input of ``modulate``, (B, S, D).
        norm: The layer norm.
        shift: The shift of each token, (B, S, D).
        scale: The scale of each token, (B, S, D).
        dy: Gradient of the residual sum that the gated branch is added to, (B, S, D).
        gated: The value that the gate is multiplied by (a or z), (B, S, D); None if the modulation is not trained.

    Returns:
        The gradient of x, those of the norm, and those of shift, scale and gate. The last list is empty if ``gated`` is
        None.
    """
    if gated is None:
        dx, dnorm, _ = norm_vjp(lambda x, norm: modulate(x, norm, shift, scale), x, norm, dn)
        return dx, dnorm, []
    dx, dnorm, dtokens = norm_vjp(modulate, x, norm, dn, shift, scale)
    return dx, dnorm, [*dtokens, dy * gated]


def rotate(x: Tensor, norm: Norm, rotary: tuple[Tensor, Tensor] | None) -> Tensor:
    """Normalizes queries or keys over each head's channels, and applies the rotary embedding.

    Equals norm_q or norm_k and apply_rotary_emb of diffusers: each pair of channels (x0, x1) of a token becomes
    (x0 cos - x1 sin, x1 cos + x0 sin).

    Args:
        x: Queries or keys, (B, S, H, E).
        norm: Layer norm over E.
        rotary: The cosine and sine tables, (S, E) each, or None for a model without rotary embedding.

    Returns:
        The rotated x, (B, S, H, E), in its type.
    """
    x = F.layer_norm(x, x.shape[-1:], norm.weight, norm.bias, norm.eps)
    if rotary is None:
        return x
    cos, sin = (table[None, :, None, :] for table in rotary)
    # (x0, x1) -> (x1, x0). A flip only changes which element is read, so the compiler fuses it with the norm.
    swapped = x.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)
    sign = torch.arange(x.shape[-1], device=x.device) % 2 * 2 - 1  # -1, 1, -1, 1, ...
    return (x.float() * cos + swapped.float() * (sin * sign)).to(x.dtype)


def gelu(f: Tensor) -> Tensor:
    """Applies GELU in the tanh approximation, as the feed-forward layer of CogVideoX does."""
    return F.gelu(f, approximate="tanh")


def vjp(function: Callable[[Tensor], Tensor], x: Tensor, dy: Tensor) -> Tensor:
    """Returns the gradient of x, for a gradient ``dy`` of function(x)."""
    dx: Tensor = torch.func.vjp(function, x)[1](dy)[0]
    return dx


def norm_vjp(
    function: Callable[..., Tensor], x: Tensor, norm: Norm, dy: Tensor, *more: Tensor
) -> tuple[Tensor, Gradients, list[Tensor]]:
    """Computes the gradients of function(x, norm, *more), for a gradient ``dy`` of its result.

    Returns:
        The gradient of x, those of the norm's weight and bias if it is trained, and those of ``more``.
    """
    weights = {name: w for name in ("weight", "bias") if (w := getattr(norm, name)) is not None} if norm.trained else {}

    def call(x: Tensor, weights: dict[str, Tensor], *more: Tensor) -> Tensor:
        weight, bias = weights.get("weight", norm.weight), weights.get("bias", norm.bias)
        return function(x, norm._replace(weight=weight, bias=bias), *more)

    dx, dweights, *dmore = torch.func.vjp(call, x, weights, *more)[1](dy)
    return dx, tuple(dweights.values()), dmore


def attention(q: Tensor, k: Tensor, v: Tensor, shared: Shared) -> tuple[Tensor, Tensor]:
    """Returns the attention output of this process's tokens, and the log-sum-exp of the heads that it computes."""
    if shared.division is None:
        return attend(q, k, v, shared.backend)
    return attend_divided(q, k, v, shared.backend, shared.division.group, shared.division[1:])


def attention_backward(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, shared: Shared
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the gradients of q, k and v of ``attention``, for a gradient ``do`` of its output."""
    if shared.division is None:
        return attend_backward(do, q, k, v, o, lse, shared.backend)
    return attend_divided_backward(do, q, k, v, o, lse, shared.backend, shared.division.group, shared.division[1:])


# -- the block ---------------------------------------------------------------------------------------------------------


def forward(x: Tensor, p: Block, shared: Shared, keep: tuple[str, ...]) -> tuple[Tensor, Kept]:
    """Runs the block.

    Args:
        x: Text and video tokens, (B, S, D).
        p: The weights.
        shared: The inputs that all blocks have in common.
        keep: Names of the activations to return, as ``kept_at`` gives them.

    Returns:
        The output y, (B, S, D), and the kept activations by name. They do not include x, which the caller has.
    """
    split = (*x.shape[:2], shared.heads, -1)
    shift, scale, gate = modulations(p.modulation1, shared, x.shape[1])
    n1 = modulate(x, p.norm1, shift, scale)
    q, k, v = (z.view(split) for z in linears(n1, (p.q, p.k, p.v)))  # (B, S, D) -> (B, S, H, E)
    rq, rk = rotate(q, p.norm_q, shared.rotary), rotate(k, p.norm_k, shared.rotary)
    o, lse = attention(rq, rk, v, shared)  # (B, S, H, E), (B, H, S)
    (a,) = linears(o.view(x.shape), [p.out])  # (B, S, D)
    h = x + gate * a
    shift, scale, gate = modulations(p.modulation2, shared, x.shape[1])
    n2 = modulate(h, p.norm2, shift, scale)
    (f,) = linears(n2, [p.ff1])  # (B, S, 4 D)
    g = gelu(f)
    (z,) = linears(g, [p.ff2])  # (B, S, D)
    activations = {"o": o, "lse": lse, "q": q, "k": k, "v": v, "h": h, "f": f, "a": a, "z": z}
    activations |= {"n1": n1, "rq": rq, "rk": rk, "n2": n2, "g": g}
    return h + gate * z, {name: activations[name] for name in keep if name != "x"}


def backward(
    dy: Tensor, p: Block, shared: Shared, kept: Mapping[str, Tensor]
) -> tuple[Tensor, Tensor | None, dict[str, Gradients]]:
    """Computes the gradients of the block, recomputing the activations that were not kept.

    Args:
        dy: Gradient of the block's output, (B, S, D).
        p: The weights.
        shared: The inputs that all blocks have in common.
        kept: The activations by name: x, and those that ``forward`` returned.

    Returns:
        The gradient of x, the gradient of temb or None if no modulation is trained, and each layer's gradients by name.
    """
    x, rotary = kept["x"], shared.rotary
    split = (*x.shape[:2], shared.heads, -1)
    shift1, scale1, gate1 = modulations(p.modulation1, shared, x.shape[1])
    shift2, scale2, gate2 = modulations(p.modulation2, shared, x.shape[1])

    # First half: take every activation that the gradients need from ``kept``, or recompute it; the others stay None. n1
    # and n2 are also needed to recompute the outputs of their linear layers if these were not kept.
    def obtain(name: str, compute: Callable[[], Tensor]) -> Tensor:
        return kept[name] if name in kept else compute()

    used = needed_for_weights(p)
    n1 = obtain("n1", lambda: modulate(x, p.norm1, shift1, scale1)) if "n1" in used or "q" not in kept else None
    if "q" in kept:
        q, k, v = (kept[name] for name in "qkv")
    else:
        q, k, v = (z.view(split) for z in linears(not_none(n1), (p.q, p.k, p.v)))
    rq = obtain("rq", lambda: rotate(q, p.norm_q, rotary))
    rk = obtain("rk", lambda: rotate(k, p.norm_k, rotary))
    o, lse = (kept["o"], kept["lse"]) if "o" in kept else attention(rq, rk, v, shared)
    a = obtain("a", lambda: linears(o.view(x.shape), [p.out])[0]) if "a" in used else None
    h = obtain("h", lambda: x + gate1 * (linears(o.view(x.shape), [p.out])[0] if a is None else a))
    n2 = obtain("n2", lambda: modulate(h, p.norm2, shift2, scale2)) if "n2" in used or "f" not in kept else None
    f = obtain("f", lambda: linears(not_none(n2), [p.ff1])[0])
    g = obtain("g", lambda: gelu(f)) if used & {"g", "z"} else None
    z = obtain("z", lambda: linears(not_none(g), [p.ff2])[0]) if "z" in used else None

    # Second half: the chain rule, from the last formula to the first.
    found: dict[str, Gradients] = {}
    dg, (found["ff2"],) = linears_backward([gate2 * dy], g, [p.ff2])
    dn2, (found["ff1"],) = linears_backward([vjp(gelu, f, dg)], n2, [p.ff1])
    dh, found["norm2"], dtokens2 = modulate_backward(dn2, h, p.norm2, shift2, scale2, dy, z)
    # h feeds both the second branch and the sum, so its gradient has two terms; the same holds for x at the end.
    dh = dy + dh
    do, (found["out"],) = linears_backward([gate1 * dh], o.view(x.shape), [p.out])
    drq, drk, dv = attention_backward(do.view(split), rq, rk, v, o, lse, shared)
    dq, found["norm_q"], _ = norm_vjp(lambda q, norm: rotate(q, norm, rotary), q, p.norm_q, drq)
    dk, found["norm_k"], _ = norm_vjp(lambda k, norm: rotate(k, norm, rotary), k, p.norm_k, drk)
    dqkv = [dz.reshape(x.shape) for dz in (dq, dk, dv)]
    dn1, (found["q"], found["k"], found["v"]) = linears_backward(dqkv, n1, (p.q, p.k, p.v))
    dx, found["norm1"], dtokens1 = modulate_backward(dn1, x, p.norm1, shift1, scale1, dh, a)
    dtembs = []
    for name, dtokens in (("modulation1", dtokens1), ("modulation2", dtokens2)):
        if dtokens:  # empty for a modulation that is not trained
            dtemb, found[name] = modulations_backward(dtokens, getattr(p, name), shared)
            dtembs.append(dtemb)
    return dh + dx, reduce(add, dtembs) if dtembs else None, found
