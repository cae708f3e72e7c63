"""Runs a ring schedule: attention over a sequence that is sharded on the ranks of a group.

Names: ``held`` is the flat buffer of keys and values that a round computes with, ``own`` the
gradients of this rank's keys and values, ``travelling`` those of the held ones. Buffers are flat
so that keys and values go as one message whatever their head dims. Results are accumulated in
float32 (float64 for float64), and gradients travel so.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from longspan.attention.kernels import kernel_for
from longspan.attention.merge import merge_
from longspan.comm.p2p import UnderWay, start
from longspan.schedule.ring import Block, Ring, rounds, tokens

__all__ = ["Late", "RingAttention", "accumulation_dtype"]


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """float32, or float64 for float64."""
    return torch.promote_types(dtype, torch.float32)


@dataclass(frozen=True)
class _Buffers:
    """Flat buffers for the keys and values of any rank, or their gradients; views into them."""

    ring: Ring
    k: Tensor
    v: Tensor
    dtype: torch.dtype

    def _shapes(self, source: int) -> tuple[torch.Size, torch.Size]:
        count = tokens(self.ring, source)
        k, v = (torch.Size((*x.shape[:2], count, x.shape[3])) for x in (self.k, self.v))
        return k, v

    def empty(self, source: int) -> Tensor:
        numel = sum(shape.numel() for shape in self._shapes(source))
        return self.k.new_empty(numel, dtype=self.dtype)

    def filled(self) -> Tensor:
        return torch.cat([self.k.reshape(-1), self.v.reshape(-1)])

    def views(self, flat: Tensor, source: int, block: Block) -> tuple[Tensor, Tensor]:
        shapes = self._shapes(source)
        parts = flat.split([shape.numel() for shape in shapes])
        k, v = (part.view(shape) for part, shape in zip(parts, shapes, strict=True))
        return k[:, :, block.kv_start : block.kv_stop], v[:, :, block.kv_start : block.kv_stop]


@dataclass(frozen=True)
class Late:
    """Out and lse of this rank's tokens from position ``stop`` on, known from an earlier run."""

    stop: int
    out: Tensor
    lse: Tensor


class RingAttention(torch.autograd.Function):
    """``apply(q, k, v, ring, group, scale, late) -> (out, lse)``; lse carries no gradient.

    If ``late`` isn't None forward computes, and sends, only what the tokens before it need.
    """

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        ring: Ring,
        group: dist.ProcessGroup,
        scale: float,
        late: Late | None,
    ) -> tuple[Tensor, Tensor]:
        rank, early = group.rank(), ring if late is None else replace(ring, stop=late.stop)
        count = tokens(early, rank)
        kernel, wide = kernel_for(q, v), accumulation_dtype(q.dtype)
        out = q.new_zeros((*q.shape[:3], v.shape[3]), dtype=wide)
        lse = q.new_full(q.shape[:3], -torch.inf, dtype=wide)
        buffers = _Buffers(early, k[:, :, :count], v[:, :, :count], k.dtype)
        held = buffers.filled()
        for turn in rounds(early, rank):
            moving = start(turn.kv, group, held, buffers.empty)
            for block in turn.blocks:
                rows = slice(block.q_start, block.q_stop)
                kv = buffers.views(held, turn.source, block)
                part = kernel.forward(q[:, :, rows], *kv, causal=block.causal, scale=scale)
                merge_(out[:, :, rows], lse[:, :, rows], *part)
            held = next(iter(moving.wait().values()), held)
        if late is not None:
            out[:, :, count:], lse[:, :, count:] = late.out, late.lse
        out = out.to(q.dtype)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.ring, ctx.group, ctx.scale = ring, group, scale
        ctx.mark_non_differentiable(lse)
        return out, lse

    @staticmethod
    def backward(ctx: Any, dout: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse = ctx.saved_tensors
        ring, group, scale = ctx.ring, ctx.group, ctx.scale
        rank, kernel, wide = group.rank(), kernel_for(q, v), accumulation_dtype(q.dtype)
        buffers, gradients = _Buffers(ring, k, v, k.dtype), _Buffers(ring, k, v, wide)
        dq = torch.zeros_like(q, dtype=wide)
        held, own = buffers.filled(), gradients.empty(rank).zero_()
        grads_moving = UnderWay()
        for turn in rounds(ring, rank, backward=True):
            kv_moving = start(turn.kv, group, held, buffers.empty)
            travelling = own if turn.source == rank else gradients.empty(turn.source).zero_()
            for block in turn.blocks:
                rows = slice(block.q_start, block.q_stop)
                part = kernel.backward(
                    dout[:, :, rows],
                    q[:, :, rows],
                    *buffers.views(held, turn.source, block),
                    out[:, :, rows],
                    lse[:, :, rows],
                    causal=block.causal,
                    scale=scale,
                )
                dk, dv = gradients.views(travelling, turn.source, block)
                for total, share in zip((dq[:, :, rows], dk, dv), part, strict=True):
                    total += share
            for source, before in grads_moving.wait().items():
                (own if source == rank else travelling).add_(before)
            grads_moving = start(turn.grads, group, travelling, gradients.empty)
            held = next(iter(kv_moving.wait().values()), held)
        for arrived in grads_moving.wait().values():
            own += arrived
        dk, dv = gradients.views(own, rank, Block(0, 0, 0, k.shape[2], False))
        return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), None, None, None, None
