"""Runs a ring schedule: attention over a sequence that is sharded on the ranks of a group.

Names: a rank's *payload* is what it hands around: its keys and values, or in backward its queries,
their output's gradient and two statistics of each row. ``held`` is the payload that a round
computes with, ``own`` the gradient of this rank's payload, ``sums`` that of another's, on its way.
Payloads are one flat buffer for each part of the heads, so that it goes as one message. Results are
accumulated in float32 (float64 for float64); gradients travel so, or in the dtype that is computed
in.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from longspan.attention.buffers import Flat, Sums
from longspan.attention.kept import Kept, Late
from longspan.attention.kernels import Flipped, kernel_for
from longspan.attention.merge import merge_
from longspan.comm.p2p import Mailbox
from longspan.layout import Order
from longspan.schedule.ring import Block, Ring, tokens
from longspan.schedule.rounds import Round, Travels, cheapest, rounds

__all__ = ["GradsIn", "RingAttention", "accumulation_dtype", "ring_of", "turn"]

GradsIn = Literal["float32", "compute"]


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """float32, or float64 for float64."""
    return torch.promote_types(dtype, torch.float32)


def _play(
    turns: tuple[Round, ...],
    group: dist.ProcessGroup | None,
    payloads: Sequence[Flat],
    gradients: Sequence[Sums],
    compute: Callable[[int, Block, Sequence[Tensor], Sequence[Tensor]], None],
    opened: Callable[[Sequence[Tensor]], Sequence[Tensor]] = lambda held: held,
) -> None:
    """Go through the rounds; ``compute(part, block, held, sums)`` adds to ``sums`` in backward.

    ``opened`` makes ``held`` of what travels, once a round.
    ``payloads`` and ``gradients``, none in forward: of each part of the heads. The gradients of
    this rank's own payload, over all ranks, are added to ``gradients``' own.
    """
    rank, ring = _rank(group), payloads[0].ring
    # What goes to the next node may take as long as a turn of each part.
    mail = Mailbox(group, payloads[0].empty, rounds=ring.node * ring.parts + 1)
    grad_mail = Mailbox(group, gradients[0].arriving, tag=1) if gradients else None
    held: dict[tuple[int, int], Tensor] = {}
    sums: dict[tuple[int, int], Tensor] = {}

    def handed_on(source: int, part: int) -> Tensor:
        if source == rank and (rank, part) not in held:
            held[rank, part] = payloads[part].filled(rank)
        return held[source, part]

    def summed(source: int, part: int) -> Tensor:
        return gradients[part].leaving(sums[source, part], source)

    mail.announce(turns[0].payload)
    for number, turn in enumerate(turns):
        source, part = key = turn.source, turn.part
        payload, away = payloads[part], source != rank
        if number + 1 < len(turns):
            mail.announce(turns[number + 1].payload)
        for arrived in mail.take(*key) if away else ():
            held[key] = arrived
        mail.start(turn.payload, handed_on)
        if grad_mail:
            grad_mail.announce(turn.grads)
            if away:
                sums[key] = gradients[part].zeros(source)
        views: Sequence[Tensor] = payload.own
        totals: Sequence[Tensor] = gradients[part].own.own if gradients else ()
        if turn.blocks and away:
            views = payload.views(held[key], source)
            totals = gradients[part].own.views(sums[key], source) if gradients else ()
        if turn.blocks and views[0].numel():  # a rank may have no heads
            views = opened(views)
            for block in turn.blocks:
                compute(part, block, views, totals)
        if grad_mail:
            if away:
                gradients[part].join(sums[key], grad_mail.take(*key), source)
            grad_mail.start(turn.grads, summed)
        if away:
            held.pop(key, None)
            sums.pop(key, None)
    mail.finish()
    if grad_mail:
        for part, gradient in enumerate(gradients):
            gradient.home(grad_mail.take(rank, part), rank)
        grad_mail.finish()


class RingAttention(torch.autograd.Function):
    """``apply(q, k, v, sinks, ring, group, scale, travels, grads_in, late) -> (out, lse)``.

    lse, with the sinks in it, has no gradient. ``travels``: what backward hands around. With
    ``late``, which is known already, forward only computes and sends what the tokens before need.
    """

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        sinks: Tensor | None,
        ring: Ring,
        group: dist.ProcessGroup | None,
        scale: float,
        travels: Travels,
        grads_in: GradsIn,
        late: Late | None,
    ) -> tuple[Tensor, Tensor]:
        rank, early = _rank(group), ring if late is None else replace(ring, stop=late.stop)
        count = tokens(early, rank)
        kernel, wide = kernel_for(q, v), accumulation_dtype(q.dtype)
        # Heads inside tokens, as models go on with it: else a transposed copy would be kept, too.
        size = (q.shape[0], q.shape[2], q.shape[1], v.shape[3])
        out = q.new_zeros(size, dtype=wide).transpose(1, 2)
        lse = q.new_full(q.shape[:3], -torch.inf, dtype=wide)
        queries = _by_part(ring, q, out, lse)
        reached = [0] * len(queries)  # no row from here on has a result yet, by part

        def compute(part: int, block: Block, held: Sequence[Tensor], _: Sequence[Tensor]) -> None:
            rows, columns = _cuts(block)
            query, total, total_lse = (x[:, :, rows] for x in queries[part])
            kv = [x[:, :, columns] for x in held]
            run = Flipped(kernel) if block.flipped else kernel
            found = run.forward(query, *kv, causal=block.causal, scale=scale)
            if block.q_start < reached[part]:
                merge_(total, total_lse, *found)
            else:
                total.copy_(found[0])
                total_lse.copy_(found[1])
            reached[part] = max(reached[part], block.q_stop)

        payloads = [Flat(early, "kv", kv) for kv in _by_part(ring, k, v)]
        _play(rounds(early, rank), group, payloads, (), compute)
        if sinks is not None:  # a sink is one more key, whose value is 0
            rows = lse[:, :, :count]
            merge_(out[:, :, :count], rows, out.new_zeros(()), _by_row(sinks, rows))
        if late is not None:
            out[:, :, count:], lse[:, :, count:] = late.out, late.lse
        out = out.to(q.dtype)
        ctx.save_for_backward(q, k, v, sinks, out, lse)
        ctx.ring, ctx.group, ctx.scale, ctx.travels = ring, group, scale, travels
        ctx.wire = _wire_dtype(q.dtype, grads_in)
        ctx.mark_non_differentiable(lse)
        return out, lse

    @staticmethod
    def backward(ctx: Any, dout: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, sinks, out, lse = ctx.saved_tensors
        ring, group, wide = ctx.ring, ctx.group, accumulation_dtype(q.dtype)
        turns = rounds(ring, _rank(group), True, ctx.travels)
        kernel, scale = kernel_for(q, v), ctx.scale
        dq, dk, dv = (torch.zeros_like(x, dtype=wide) for x in (q, k, v))
        dsinks = None
        if sinks is not None:
            weights = (_by_row(sinks, lse) - lse).exp().masked_fill(lse == -torch.inf, 0.0)
            dsinks = -(weights * _row_sums(dout, out)).sum((0, 2)).to(sinks.dtype)

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
            queries = _by_part(ring, dout, q, out, lse, dq)

            def compute_kv(
                part: int, block: Block, held: Sequence[Tensor], sums: Sequence[Tensor]
            ) -> None:
                rows, _ = _cuts(block)
                *query, dq = (x[:, :, rows] for x in queries[part])
                add(block, query, held, [dq, *sums])

            sums = [Sums(Flat(ring, "kv", kv), ctx.wire) for kv in _by_part(ring, dk, dv)]
            payloads = [Flat(ring, "kv", kv) for kv in _by_part(ring, k, v)]
            _play(turns, group, payloads, sums, compute_kv)
        else:
            delta = _row_sums(dout, out)
            keys = _by_part(ring, k, v, dk, dv)

            def compute_q(
                part: int, block: Block, held: Sequence[Tensor], sums: Sequence[Tensor]
            ) -> None:
                rows, _ = _cuts(block)
                *query, dq = (x[:, :, rows] for x in (*held, *sums))
                k, v, *dkv = keys[part]
                add(block, query, [k, v], [dq, *dkv])

            def opened(held: Sequence[Tensor]) -> Sequence[Tensor]:
                lse, delta, q, dout = held
                return dout, q, _stand_in(dout, delta, dout.dtype), lse

            sums = [Sums(Flat(ring, "q", own), ctx.wire) for own in _by_part(ring, dq)]
            payloads = [Flat(ring, "q", own) for own in _by_part(ring, lse, delta, q, dout)]
            _play(turns, group, payloads, sums, compute_q, opened)
        return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), dsinks, *[None] * 6


def _rank(group: dist.ProcessGroup | None) -> int:
    return group.rank() if group else 0


def _by_part(ring: Ring, *tensors: Tensor) -> list[tuple[Tensor, ...]]:
    """The tensors ``(B, H, …)`` of each part of the heads."""
    return list(zip(*(x.chunk(ring.parts, 1) for x in tensors), strict=True))


def _by_row(sinks: Tensor, rows: Tensor) -> Tensor:
    """The sinks of the heads, for rows ``(B, H, S)``."""
    return sinks.to(rows.dtype).view(1, -1, 1).expand_as(rows)


def _row_sums(dout: Tensor, out: Tensor) -> Tensor:
    return (dout.to(accumulation_dtype(dout.dtype)) * out).sum(-1)


def _wire_dtype(dtype: torch.dtype, grads_in: GradsIn) -> torch.dtype:
    return dtype if grads_in == "compute" else accumulation_dtype(dtype)


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
    sinks: Tensor | None,
    ring: Ring,
    group: dist.ProcessGroup | None,
    scale: float,
    travels: Travels | Literal["auto"],
    grads_in: GradsIn,
    kept: Kept | None,
) -> Tensor:
    """Attention by this ring's schedule; a ring of one rank needs no group."""
    way = cheapest(ring) if travels == "auto" else travels
    late = None if kept is None else kept.recalled()
    out: Tensor
    out, lse = RingAttention.apply(q, k, v, sinks, ring, group, scale, way, grads_in, late)
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
    kv_documents: Sequence[int] | None = None,
    window: int | None = None,
    node_ranks: int = 0,
    width: int = 1,
    grads_in: GradsIn = "float32",
    parts: int | None = None,
) -> Ring:
    """The ring schedule's sizes for these queries, keys and values."""
    wide, wire = accumulation_dtype(k.dtype).itemsize, _wire_dtype(k.dtype, grads_in).itemsize
    kv_numbers = k.shape[0] * k.shape[1] * (k.shape[3] + v.shape[3])
    rows = q.shape[0] * q.shape[1]
    return Ring(
        length=documents[-1] if documents else 0,
        world=world,
        order=Order.of(order),
        causal=causal,
        documents=tuple(documents),
        kv_bytes=kv_numbers * k.element_size(),
        grad_bytes=kv_numbers * wire,
        q_bytes=rows * ((q.shape[3] + v.shape[3]) * q.element_size() + 2 * wide),
        dq_bytes=rows * q.shape[3] * wire,
        window=window,
        node_ranks=node_ranks,
        width=width,
        kv_documents=None if kv_documents is None else tuple(kv_documents),
    ).in_parts(k.shape[1], parts)
