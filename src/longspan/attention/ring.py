"""Runs a ring schedule: attention over a sequence that is sharded on the ranks of a group.

Names: a rank's *payload* is what it hands around: its keys and values, or in backward its queries,
their output's gradient and two statistics of each row. ``held`` is the payload that a round
computes with, ``own`` the gradient of this rank's payload, ``sums`` that of another's, on its way.
Payloads are one flat buffer, so that they go as one message. Results are accumulated in float32
(float64 for float64), and gradients travel so.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from longspan.attention.kept import Kept, Late
from longspan.attention.kernels import Flipped, kernel_for
from longspan.attention.merge import merge_
from longspan.comm.p2p import Mailbox
from longspan.layout import Order
from longspan.schedule.ring import Block, Ring, tokens
from longspan.schedule.rounds import Round, Travels, cheapest, rounds, travelling

__all__ = ["RingAttention", "accumulation_dtype", "ring_of", "turn"]


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """float32, or float64 for float64."""
    return torch.promote_types(dtype, torch.float32)


@dataclass(frozen=True)
class _Flat:
    """What travels of any rank's tensors (batch, heads, tokens, …), in one flat buffer of bytes.

    ``own`` are this rank's, whole; those of another rank differ in the number of tokens.
    """

    ring: Ring
    travels: Travels
    own: tuple[Tensor, ...]

    def _shape(self, x: Tensor, source: int) -> torch.Size:
        spans = travelling(self.ring, source, self.travels)
        return torch.Size((*x.shape[:2], sum(b - a for a, b in spans), *x.shape[3:]))

    def empty(self, source: int) -> Tensor:
        """A buffer for the tensors of a rank."""
        size = sum(self._shape(x, source).numel() * x.element_size() for x in self.own)
        return self.own[0].new_empty(size, dtype=torch.uint8)

    def filled(self, rank: int) -> Tensor:
        """A buffer with what travels of this rank's tensors."""
        flat = self.empty(rank)
        for part, x in zip(self.views(flat, rank), self.own, strict=True):
            for here, there in self._spans(rank):
                part[:, :, there] = x[:, :, here]
        return flat

    def join(self, sums: Tensor, part: Tensor, source: int) -> None:
        """Add a buffer to another."""
        pairs = zip(self.views(sums, source), self.views(part, source), strict=True)
        for total, share in pairs:
            total += share

    def add(self, flat: Tensor, rank: int) -> None:
        """Add what a buffer holds to this rank's tensors."""
        for part, x in zip(self.views(flat, rank), self.own, strict=True):
            for here, there in self._spans(rank):
                x[:, :, here] += part[:, :, there]

    def _spans(self, rank: int) -> Iterator[tuple[slice, slice]]:
        """Where what travels lies in a rank's tensors, and in a buffer's."""
        before = 0
        for start, stop in travelling(self.ring, rank, self.travels):
            yield slice(start, stop), slice(before, before := before + stop - start)

    def views(self, flat: Tensor, source: int) -> list[Tensor]:
        """The tensors in a rank's buffer."""
        shapes = [self._shape(x, source) for x in self.own]
        sizes = [s.numel() * x.element_size() for x, s in zip(self.own, shapes, strict=True)]
        parts = zip(flat.split(sizes), shapes, self.own, strict=True)
        return [part.view(x.dtype).view(shape) for part, shape, x in parts]


def _play(
    turns: tuple[Round, ...],
    group: dist.ProcessGroup | None,
    payload: _Flat,
    gradient: _Flat | None,
    compute: Callable[[Block, Sequence[Tensor], Sequence[Tensor]], None],
) -> None:
    """Go through the rounds: ``compute(block, held, sums)`` adds to ``sums`` in backward.

    The gradient of this rank's own payload, over all ranks, is added to ``gradient.own``.
    """
    rank = _rank(group)
    # What goes to the next node may take as long as the inner ring's whole turn.
    ring = payload.ring
    mail = Mailbox(group, payload.empty, rounds=2 if ring.node == ring.world else ring.node + 1)
    grad_mail = Mailbox(group, gradient.empty, tag=1) if gradient else None
    held = {rank: payload.filled(rank)}
    mail.announce(turns[0].payload)
    for number, turn in enumerate(turns):
        source = turn.source
        if number + 1 < len(turns):
            mail.announce(turns[number + 1].payload)
        for arrived in mail.take(source) if source != rank else ():
            held[source] = arrived
        mail.start(turn.payload, held.__getitem__)
        sums: dict[int, Tensor] = {}
        if gradient and grad_mail:
            grad_mail.announce(turn.grads)
            if source != rank:
                sums[source] = gradient.empty(source).zero_()
        views: Sequence[Tensor] = payload.own
        parts: Sequence[Tensor] = gradient.own if gradient else ()
        if turn.blocks and source != rank:
            views = payload.views(held[source], source)
            parts = gradient.views(sums[source], source) if gradient else ()
        if views[0].numel():  # a rank may have no heads
            for block in turn.blocks:
                compute(block, views, parts)
        if gradient and grad_mail:
            if source != rank:
                for part in grad_mail.take(source):
                    gradient.join(sums[source], part, source)
            grad_mail.start(turn.grads, sums.__getitem__)
        if source != rank:
            held.pop(source, None)
    mail.finish()
    if gradient and grad_mail:
        for part in grad_mail.take(rank):
            gradient.add(part, rank)
        grad_mail.finish()


class RingAttention(torch.autograd.Function):
    """``apply(q, k, v, ring, group, scale, travels, late) -> (out, lse)``; lse has no gradient.

    ``travels``: what backward hands around. With ``late``, which is known already, forward only
    computes and sends what the tokens before need.
    """

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        ring: Ring,
        group: dist.ProcessGroup | None,
        scale: float,
        travels: Travels,
        late: Late | None,
    ) -> tuple[Tensor, Tensor]:
        rank, early = _rank(group), ring if late is None else replace(ring, stop=late.stop)
        count = tokens(early, rank)
        kernel, wide = kernel_for(q, v), accumulation_dtype(q.dtype)
        # Heads inside tokens, as models go on with it: else a transposed copy would be kept, too.
        size = (q.shape[0], q.shape[2], q.shape[1], v.shape[3])
        out = q.new_zeros(size, dtype=wide).transpose(1, 2)
        lse = q.new_full(q.shape[:3], -torch.inf, dtype=wide)

        def compute(block: Block, held: Sequence[Tensor], _: Sequence[Tensor]) -> None:
            rows, columns = _cuts(block)
            kv = [x[:, :, columns] for x in held]
            run = Flipped(kernel) if block.flipped else kernel
            part = run.forward(q[:, :, rows], *kv, causal=block.causal, scale=scale)
            merge_(out[:, :, rows], lse[:, :, rows], *part)

        payload = _Flat(early, "kv", (k, v))
        _play(rounds(early, rank), group, payload, None, compute)
        if late is not None:
            out[:, :, count:], lse[:, :, count:] = late.out, late.lse
        out = out.to(q.dtype)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.ring, ctx.group, ctx.scale, ctx.travels = ring, group, scale, travels
        ctx.mark_non_differentiable(lse)
        return out, lse

    @staticmethod
    def backward(ctx: Any, dout: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse = ctx.saved_tensors
        ring, group, wide = ctx.ring, ctx.group, accumulation_dtype(q.dtype)
        turns = rounds(ring, _rank(group), True, ctx.travels)
        kernel, scale = kernel_for(q, v), ctx.scale
        dq, dk, dv = (torch.zeros_like(x, dtype=wide) for x in (q, k, v))

        def add(
            block: Block, query: list[Tensor], keys: Sequence[Tensor], sums: Sequence[Tensor]
        ) -> None:
            """``query``: the block's rows of dout, q, out, lse; ``sums``: of dq, and dk, dv."""
            _, columns = _cuts(block)
            dout, q, out, lse = query
            k, v = (x[:, :, columns] for x in keys)
            run = Flipped(kernel) if block.flipped else kernel
            part = run.backward(dout, q, k, v, out, lse, causal=block.causal, scale=scale)
            dq, dk, dv = sums
            for total, share in zip((dq, dk[:, :, columns], dv[:, :, columns]), part, strict=True):
                total += share

        if ctx.travels == "kv":

            def compute_kv(block: Block, held: Sequence[Tensor], sums: Sequence[Tensor]) -> None:
                rows, _ = _cuts(block)
                add(
                    block,
                    [x[:, :, rows] for x in (dout, q, out, lse)],
                    held,
                    [dq[:, :, rows], *sums],
                )

            payload, gradient = _Flat(ring, "kv", (k, v)), _Flat(ring, "kv", (dk, dv))
            _play(turns, group, payload, gradient, compute_kv)
        else:
            delta = (dout.to(wide) * out).sum(-1)

            def compute_q(block: Block, held: Sequence[Tensor], sums: Sequence[Tensor]) -> None:
                lse, delta, q, dout = held
                rows, _ = _cuts(block)
                out = _stand_in(dout[:, :, rows], delta[:, :, rows], dout.dtype)
                query = [dout[:, :, rows], q[:, :, rows], out, lse[:, :, rows]]
                add(block, query, [k, v], [sums[0][:, :, rows], dk, dv])

            payload, gradient = _Flat(ring, "q", (lse, delta, q, dout)), _Flat(ring, "q", (dq,))
            _play(turns, group, payload, gradient, compute_q)
        return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), *[None] * 5


def _rank(group: dist.ProcessGroup | None) -> int:
    return group.rank() if group else 0


def _cuts(block: Block) -> tuple[slice, slice]:
    return slice(block.q_start, block.q_stop), slice(block.kv_start, block.kv_stop)


def _stand_in(dout: Tensor, delta: Tensor, dtype: torch.dtype) -> Tensor:
    """An ``out`` with the row sums of dout·out that are given, as all that kernels use it for.

    Stock kernels take out, not the sums; out itself needn't travel. A row without gradient has
    the sum 0. Rows are scaled first, as the square of a small gradient would vanish.
    """
    wide = dout.to(delta.dtype)
    largest = wide.abs().amax(-1, keepdim=True)
    largest = torch.where(largest > 0, largest, 1.0)
    unit = wide / largest
    square = unit.square().sum(-1, keepdim=True)
    square = torch.where(square > 0, square, 1.0)
    return (unit * (delta.unsqueeze(-1) / largest / square)).to(dtype)


def turn(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    ring: Ring,
    group: dist.ProcessGroup | None,
    scale: float,
    travels: Travels | Literal["auto"],
    kept: Kept | None,
) -> Tensor:
    """Attention by this ring's schedule; a ring of one rank needs no group."""
    way = cheapest(ring) if travels == "auto" else travels
    late = None if kept is None else kept.recalled()
    out: Tensor
    out, lse = RingAttention.apply(q, k, v, ring, group, scale, way, late)
    if kept is not None and late is None:
        kept.keep(out, lse, ring, _rank(group))
    return out


def ring_of(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    world: int,
    order: Order | str,
    causal: bool,
    documents: Sequence[int],
    *,
    window: int | None = None,
    node_ranks: int = 0,
    width: int = 1,
) -> Ring:
    """The ring schedule's sizes for these queries, keys and values."""
    wide = accumulation_dtype(k.dtype).itemsize
    kv_numbers = k.shape[0] * k.shape[1] * (k.shape[3] + v.shape[3])
    rows = q.shape[0] * q.shape[1]
    return Ring(
        length=documents[-1] if documents else 0,
        world=world,
        order=Order.of(order),
        causal=causal,
        documents=tuple(documents),
        kv_bytes=kv_numbers * k.element_size(),
        grad_bytes=kv_numbers * wide,
        q_bytes=rows * ((q.shape[3] + v.shape[3]) * q.element_size() + 2 * wide),
        dq_bytes=rows * q.shape[3] * wide,
        window=window,
        node_ranks=node_ranks,
        width=width,
    )
