"""Divides the tokens of a sample between processes, which compute attention together (DeepSpeed-Ulysses, 2309.14509).

Everything in a block except attention computes each token by itself. So each of P processes holds 1/P of the tokens of
one joined sequence, text first, and only attention communicates: each process gets all tokens of 1/P of the heads,
computes these heads, and gives every process the output of that process's tokens.

    q, k, v  --to_heads-->  attend  --to_tokens-->  o             (B, n, H, E)  <-->  (B, S, h, E)

Tokens and heads need not be divisible by P: the first S % P processes have one token more than the others, and the
first H % P processes one head more. So nothing is padded, and attention sees exactly the tokens of the sample.

The processes of a group train on the same sample, and each computes the complete loss. Its gradients of weights are
partial sums over its own tokens. ``joined`` multiplies the gradient by P in its backward pass. With that, the mean over
all processes, which every engine computes anyway, is the gradient of the mean loss: of weights inside the blocks, of
which each process has a part, and of those outside, of which each process has all.

Shapes: B samples, S tokens of a sample and n of this process, H heads and h of this process, E channels of a head, D
channels.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from cogvideox.model.attention import attend, attend_backward

GROUPS: dict[str, dist.ProcessGroup] = {}
"""The processes that divide a sample, by the name of ``Division.group``: operators of torch take no other objects."""
CHECKED_TOKENS = 353


class Division(NamedTuple):
    """Describes how the tokens of a sample are divided, as arguments of the operators.

    Attributes:
        group: The name of the processes, in GROUPS.
        rank: The number of this process within them.
        size: The number of these processes, P.
        tokens: The number of tokens of the sample, S.
    """

    group: str
    rank: int
    size: int
    tokens: int

    @property
    def own(self) -> slice:
        """Returns the positions of this process's tokens."""
        sizes = shares(self.tokens, self.size)
        start = sum(sizes[: self.rank])
        return slice(start, start + sizes[self.rank])


@dataclass(frozen=True)
class SequenceGroup:
    """The processes that divide the tokens of a sample.

    Attributes:
        name: Their name in GROUPS.
        rank: The number of this process within them.
        size: Their number, P.
    """

    name: str
    rank: int
    size: int

    def division_of(self, tokens: int) -> Division:
        """Returns how a sample of some tokens is divided."""
        return Division(self.name, self.rank, self.size, tokens)


def make_sequence_group(size: int, timeout: timedelta) -> SequenceGroup | None:
    """Connects each ``size`` consecutive processes of the run, which all call this.

    Args:
        size: The number of processes that divide a sample.
        timeout: How long a process waits for the others.

    Returns:
        The group of this process; None if each process has samples of its own.
    """
    if size == 1:
        return None
    everyone = dist.get_world_size() == size
    group = dist.group.WORLD if everyone else dist.new_subgroups(group_size=size, timeout=timeout)[0]
    assert group is not None
    name = f"{size} consecutive processes"  # the same in every run, because it is part of the keys of compiled graphs
    GROUPS[name] = group
    return SequenceGroup(name, dist.get_rank(group), size)


def shares(total: int, size: int) -> list[int]:
    """Returns how many of ``total`` tokens or heads each process has; the first ones have one more if needed."""
    return [total // size + (i < total % size) for i in range(size)]


def exchange(parts: Sequence[Tensor], shapes: Sequence[tuple[int, ...]], group: str) -> list[Tensor]:
    """Sends a part to each process of a group.

    Args:
        parts: What each process gets.
        shapes: The shape of what each process sends to this one.
        group: The name of the group.

    Returns:
        What each process has sent to this one.
    """
    in_sizes, out_sizes = [part.numel() for part in parts], [torch.Size(shape).numel() for shape in shapes]
    sent, received = (parts[0].new_empty(sum(sizes)) for sizes in (in_sizes, out_sizes))
    for place, part in zip(sent.split(in_sizes), parts, strict=True):
        place.view(part.shape).copy_(part)
    dist.all_to_all_single(received, sent, out_sizes, in_sizes, group=GROUPS[group])
    return [part.view(shape) for part, shape in zip(received.split(out_sizes), shapes, strict=True)]


def to_heads(x: Tensor, division: Division) -> Tensor:
    """Gives each process all tokens of its heads: (B, n, H, E) -> (B, S, h, E)."""
    samples, _, heads, channels = x.shape
    of_heads = shares(heads, division.size)
    shapes = [(samples, n, of_heads[division.rank], channels) for n in shares(division.tokens, division.size)]
    return torch.cat(exchange(x.split(of_heads, dim=2), shapes, division.group), dim=1)


def to_tokens(x: Tensor, division: Division, heads: int) -> Tensor:
    """Gives each process all heads of its tokens: (B, S, h, E) -> (B, n, H, E), with H = ``heads``."""
    samples, _, _, channels = x.shape
    of_tokens = shares(division.tokens, division.size)
    shapes = [(samples, of_tokens[division.rank], h, channels) for h in shares(heads, division.size)]
    return torch.cat(exchange(x.split(of_tokens, dim=1), shapes, division.group), dim=2)


@torch.library.custom_op("cogvideox::attend_divided", mutates_args=())
def attend_divided(
    q: Tensor, k: Tensor, v: Tensor, backend: str, group: str, place: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """Computes attention of all tokens together with the other processes.

    Args:
        q: Queries of this process's tokens, (B, n, H, E).
        k: Keys, (B, n, H, E).
        v: Values, (B, n, H, E).
        backend: The kernels, as ``choose_backend`` returns them.
        group: The name of the processes, in GROUPS.
        place: The other fields of their ``Division``: rank, size and tokens.

    Returns:
        The output of this process's tokens, (B, n, H, E), and lse of its heads, (B, h, S) in fp32.
    """
    division = Division(group, *place)
    o, lse = attend(*(to_heads(x, division) for x in (q, k, v)), backend)
    return to_tokens(o, division, q.shape[2]), lse


@attend_divided.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, backend: str, group: str, place: Sequence[int]) -> tuple[Tensor, Tensor]:
    rank, size, tokens = place
    own = shares(q.shape[2], size)[rank]
    return q.new_empty(q.shape), q.new_empty((q.shape[0], own, tokens), dtype=torch.float32)


@torch.library.custom_op("cogvideox::attend_divided_backward", mutates_args=())
def attend_divided_backward(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, backend: str, group: str, place: Sequence[int]
) -> tuple[Tensor, Tensor, Tensor]:
    """Computes the gradients of ``attend_divided``.

    Args:
        do: Gradient of the output of this process's tokens, (B, n, H, E).
        q: Queries, as given to ``attend_divided``.
        k: Keys, as given to ``attend_divided``.
        v: Values, as given to ``attend_divided``.
        o: The output that ``attend_divided`` returned.
        lse: The log-sum-exp that ``attend_divided`` returned, (B, h, S).
        backend: The kernels that ``attend_divided`` used.
        group: The name of the processes, in GROUPS.
        place: The other fields of their ``Division``: rank, size and tokens.

    Returns:
        The gradients of q, k and v, (B, n, H, E) each.
    """
    division = Division(group, *place)
    of_heads = attend_backward(*(to_heads(x, division) for x in (do, q, k, v, o)), lse, backend)
    dq, dk, dv = (to_tokens(x, division, q.shape[2]) for x in of_heads)
    return dq, dk, dv


@attend_divided_backward.register_fake
def _(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, backend: str, group: str, place: Sequence[int]
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


class Join(torch.autograd.Function):
    """Gives each process the tokens of all: (B, n, D) -> (B, S, D); the module docstring has its backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, division: Division) -> Tensor:
        ctx.division = division
        samples, _, width = x.shape
        shapes = [(samples, n, width) for n in shares(division.tokens, division.size)]
        return torch.cat(exchange([x] * division.size, shapes, division.group), dim=1)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        return dy[:, ctx.division.own] * ctx.division.size, None


def joined(x: Tensor, division: Division | None) -> Tensor:
    """Returns the tokens of all processes, (B, S, D), from those of this one; x if the sample is not divided."""
    y: Tensor = Join.apply(x, division) if division is not None else x
    return y


def division_error(group: SequenceGroup, backend: str, device: torch.device, dtype: torch.dtype) -> float:
    """Returns the largest relative error of divided attention and its gradients, against attention without division.

    All processes of the group call this. The inputs are random and small, and the processes cannot share them evenly.
    """
    division, generator = group.division_of(CHECKED_TOKENS), torch.Generator().manual_seed(0)
    shape = (1, CHECKED_TOKENS, group.size + 1, 64)
    q, k, v, do = (torch.randn(shape, generator=generator).to(device, dtype) for _ in range(4))
    o, lse = attend(q, k, v, backend)
    right = [x[:, division.own] for x in (o, *attend_backward(do, q, k, v, o, lse, backend))]
    q, k, v, do = (x[:, division.own].contiguous() for x in (q, k, v, do))
    o, lse = attend_divided(q, k, v, backend, division.group, division[1:])
    found = (o, *attend_divided_backward(do, q, k, v, o, lse, backend, division.group, division[1:]))
    return max(float((a - b).float().norm() / b.float().norm()) for a, b in zip(found, right, strict=True))
