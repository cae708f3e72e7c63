"""Runs the head exchange: from a share of the tokens of all heads to all tokens of some, and back.

The two directions are each other's backward. Where several ranks hold the same KV head, going
back adds their gradients up. Tensors that are exchanged together go as one message to each rank.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import prod
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from longspan.attention.ring import accumulation_dtype
from longspan.comm.exchange import exchange

__all__ = ["Dealt", "to_heads", "to_tokens"]

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Dealt:
    """Each rank's number of tokens, and which of the ``heads`` heads it gets."""

    heads: int
    counts: tuple[int, ...]
    shares: tuple[range, ...]

    @property
    def apart(self) -> bool:
        """Whether no two ranks get the same head."""
        held = [share for share in self.shares if share]
        return all(one.stop <= other.start for one, other in pairwise(held))


def to_heads(
    tensors: Sequence[Tensor], dealt: Sequence[Dealt], group: dist.ProcessGroup
) -> tuple[Tensor, ...]:
    """Each ``(B, H, tokens here, D)`` to ``(B, heads here, all tokens, D)``, rank by rank."""
    out: tuple[Tensor, ...] = _ToHeads.apply(tuple(dealt), group, *tensors)
    return out


def to_tokens(x: Tensor, dealt: Dealt, group: dist.ProcessGroup) -> Tensor:
    """``(B, heads here, all tokens, D)`` to ``(B, heads, tokens here, D)``."""
    out: Tensor = _ToTokens.apply(x, dealt, group)
    return out


def _swap(
    parts: Sequence[Sequence[Tensor]], shapes: Sequence[Sequence[Shape]], group: dist.ProcessGroup
) -> list[list[Tensor]]:
    """Send ``parts[i]`` to rank i; what came from rank i, of ``shapes[i]``."""
    sent_sizes = [[part.numel() for part in to] for to in parts]
    sizes = [[prod(shape) for shape in source] for source in shapes]
    sent = parts[0][0].new_empty(sum(map(sum, sent_sizes)))
    pieces = sent.split([size for to in sent_sizes for size in to])
    for piece, part in zip(pieces, (part for to in parts for part in to), strict=True):
        piece.view(part.shape).copy_(part)
    received = sent.new_empty(sum(map(sum, sizes)))
    exchange(
        received, sent, [sum(row) for row in sizes], [sum(row) for row in sent_sizes], group
    ).wait()
    came = iter(received.split([size for source in sizes for size in source]))
    return [[next(came).view(shape) for shape in source] for source in shapes]


def _scatter(
    tensors: Sequence[Tensor], dealt: Sequence[Dealt], group: dist.ProcessGroup
) -> tuple[Tensor, ...]:
    here, world = group.rank(), group.size()
    both = list(zip(tensors, dealt, strict=True))
    parts = [[x[:, d.shares[r].start : d.shares[r].stop] for x, d in both] for r in range(world)]
    shapes = [
        [(x.shape[0], len(d.shares[here]), d.counts[r], x.shape[3]) for x, d in both]
        for r in range(world)
    ]
    came = _swap(parts, shapes, group)
    return tuple(torch.cat(of_one, dim=2) for of_one in zip(*came, strict=True))


def _gather(
    tensors: Sequence[Tensor], dealt: Sequence[Dealt], group: dist.ProcessGroup
) -> tuple[Tensor, ...]:
    here, world = group.rank(), group.size()
    both = list(zip(tensors, dealt, strict=True))
    parts = zip(*(x.split(d.counts, 2) for x, d in both), strict=True)
    shapes = [
        [(x.shape[0], len(d.shares[r]), d.counts[here], x.shape[3]) for x, d in both]
        for r in range(world)
    ]
    came = zip(*_swap(list(parts), shapes, group), strict=True)
    return tuple(_joined(of_one, d) for of_one, d in zip(came, dealt, strict=True))


def _joined(parts: Sequence[Tensor], dealt: Dealt) -> Tensor:
    """All heads from each rank's; one that several ranks had is their sum."""
    if dealt.apart:
        return torch.cat(list(parts), dim=1)
    batch, _, here, dim = parts[0].shape
    dtype = accumulation_dtype(parts[0].dtype)
    out = parts[0].new_zeros(batch, dealt.heads, here, dim, dtype=dtype)
    for share, part in zip(dealt.shares, parts, strict=True):
        out[:, share.start : share.stop] += part
    return out.to(parts[0].dtype)


class _ToHeads(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, dealt: tuple[Dealt, ...], group: dist.ProcessGroup, *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.dealt, ctx.group = dealt, group
        return _scatter(tensors, dealt, group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, *_gather(grads, ctx.dealt, ctx.group)


class _ToTokens(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dealt: Dealt, group: dist.ProcessGroup) -> Tensor:
        ctx.dealt, ctx.group = dealt, group
        return _gather((x,), (dealt,), group)[0]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return _scatter((grad,), (ctx.dealt,), ctx.group)[0], None, None
