"""Runs the head exchange: from a share of the tokens of all heads to all tokens of some, and back.

The two directions are each other's backward. Where several ranks hold the same KV head, going
back adds their gradients up.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from longspan.attention.ring import accumulation_dtype
from longspan.comm.exchange import exchange

__all__ = ["to_heads", "to_tokens"]


def to_heads(
    x: Tensor, counts: Sequence[int], shares: Sequence[range], group: dist.ProcessGroup
) -> Tensor:
    """``(B, H, tokens here, D)`` to ``(B, heads here, all tokens, D)``, rank by rank.

    ``counts`` and ``shares``: each rank's number of tokens and heads.
    """
    out: Tensor = _ToHeads.apply(x, tuple(counts), tuple(shares), group)
    return out


def to_tokens(
    x: Tensor, counts: Sequence[int], shares: Sequence[range], heads: int, group: dist.ProcessGroup
) -> Tensor:
    """``(B, heads here, all tokens, D)`` to ``(B, heads, tokens here, D)``."""
    out: Tensor = _ToTokens.apply(x, tuple(counts), tuple(shares), heads, group)
    return out


def _swap(parts: list[Tensor], shapes: list[torch.Size], group: dist.ProcessGroup) -> list[Tensor]:
    """Send parts[i] to rank i; what came from each, in the shapes given."""
    sent = torch.cat([part.reshape(-1) for part in parts])
    sizes = [shape.numel() for shape in shapes]
    received = sent.new_empty(sum(sizes))
    exchange(received, sent, sizes, [part.numel() for part in parts], group).wait()
    return [p.view(shape) for p, shape in zip(received.split(sizes), shapes, strict=True)]


def _scatter(
    x: Tensor, counts: tuple[int, ...], shares: tuple[range, ...], group: dist.ProcessGroup
) -> Tensor:
    batch, *_, dim = x.shape
    here = len(shares[group.rank()])
    parts = [x[:, share.start : share.stop] for share in shares]
    shapes = [torch.Size((batch, here, count, dim)) for count in counts]
    return torch.cat(_swap(parts, shapes, group), dim=2)


def _gather(
    x: Tensor,
    counts: tuple[int, ...],
    shares: tuple[range, ...],
    heads: int,
    group: dist.ProcessGroup,
) -> Tensor:
    batch, *_, dim = x.shape
    here = counts[group.rank()]
    shapes = [torch.Size((batch, len(share), here, dim)) for share in shares]
    shared = sum(map(len, shares)) > heads
    dtype = accumulation_dtype(x.dtype) if shared else x.dtype
    out = x.new_zeros(batch, heads, here, dim, dtype=dtype)
    for share, part in zip(shares, _swap(list(x.split(counts, 2)), shapes, group), strict=True):
        out[:, share.start : share.stop] += part
    return out.to(x.dtype)


class _ToHeads(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        counts: tuple[int, ...],
        shares: tuple[range, ...],
        group: dist.ProcessGroup,
    ) -> Tensor:
        ctx.back = (counts, shares, x.shape[1], group)
        return _scatter(x, counts, shares, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return _gather(grad, *ctx.back), None, None, None


class _ToTokens(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        counts: tuple[int, ...],
        shares: tuple[range, ...],
        heads: int,
        group: dist.ProcessGroup,
    ) -> Tensor:
        ctx.back = (counts, shares, group)
        return _gather(x, counts, shares, heads, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return _scatter(grad, *ctx.back), None, None, None, None
