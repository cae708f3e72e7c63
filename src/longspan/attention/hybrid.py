"""Head exchange inside, ring outside: attention on a mesh of one or two axes.

Inside a node, where links are fast, ranks exchange tokens for heads; between nodes, or where there
are more ranks than heads, keys and values travel (BurstEngine, arXiv 2509.19836; USP, arXiv
2405.07719).
"""

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from longspan.attention.heads import Dealt, HeadExchange
from longspan.layout import Order
from longspan.schedule.heads import GPU_ROWS, HeadShares, gathered
from longspan.schedule.ring import mean_document

__all__ = ["exchange_heads", "shares_of"]


def exchange_heads(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sinks: Tensor | None,
    mesh: DeviceMesh,
    order: Order,
    documents: tuple[int, ...],
    kv_documents: tuple[int, ...],
    parts: int | None,
    attend_here: Callable[..., Tensor],
) -> Tensor:
    """Attention with a head exchange on the mesh's last axis, and a ring over the other, if any.

    The ranks of the last axis gather each other's tokens, for a share of the heads, and
    ``attend_here(q, k, v, sinks, group, world, width=…)`` attends with each part of what is
    gathered, on a ring of ``world`` places of ``width`` ranks. Other arguments are those of
    ``attend``, checked.
    """
    inner = mesh.get_group(mesh.ndim - 1)
    here, width, places = inner.rank(), inner.size(), mesh.size() // inner.size()
    place = mesh.get_local_rank(0) if mesh.ndim == 2 else 0
    shares = shares_of(q, k, v, width, places, kv_documents, parts)
    ranks = range(place * width, (place + 1) * width)
    q_dealt, kv_dealt = (
        Dealt(
            heads,
            tuple(tuple(of(r, part) for r in range(width)) for part in range(shares.parts)),
            gathered(ends[-1], ranks, mesh.size(), order, ends),
        )
        for heads, of, ends in (
            (q.shape[1], shares.q, documents),
            (k.shape[1], shares.brought, kv_documents),
        )
    )
    outer = mesh.get_group(0) if places > 1 else None
    exchange = HeadExchange(q_dealt, kv_dealt, inner)
    exchange.set_off(q, k, v)
    keys: list[Tensor] = []
    for part in range(shares.parts):
        q_here, *new = exchange.take(part)
        keys = _with_brought(keys, new, len(shares.kv(here, part)))
        kv = keys
        if not shares.even(here, part):
            kv = [_repeated(x, shares.kv_of_q(here, part)) for x in keys]
        own = shares.q(here, part)
        own_sinks = None if sinks is None else sinks[own.start : own.stop]
        out = attend_here(q_here, *kv, own_sinks, outer, places, width=width)
        exchange.give(part, out)
    return exchange.join()


def shares_of(
    q: Tensor, k: Tensor, v: Tensor, width: int, places: int, ends: Sequence[int], parts: int | None
) -> HeadShares:
    """Who gets which heads when; ``ends``: the keys' documents."""
    shares = HeadShares(q.shape[1], k.shape[1], width)
    if places > 1:  # a ring outside has parts of its own, which overlap one another
        parts = 1
    if parts is None:
        batch, size = q.shape[0], q.shape[0] * q.element_size()
        weights = size * q.shape[3], size * (k.shape[3] + v.shape[3])
        rows = -(-GPU_ROWS // max(1, batch)) if q.is_cuda else 1
        parts = shares.cuts(mean_document(ends) // width, *weights, rows)[-1]
    return replace(shares, parts=parts)


def _with_brought(before: Sequence[Tensor], new: Sequence[Tensor], heads: int) -> list[Tensor]:
    """Keys and values of a part: what has come with it, and of what was there what it lacks."""
    lacking = heads - new[0].shape[1]
    if not lacking:
        return list(new)
    last = [x[:, -lacking:] for x in before]
    return [torch.cat(both, 1) for both in zip(last, new, strict=True)] if heads > lacking else last


def _repeated(x: Tensor, kv_of_q: Sequence[int]) -> Tensor:
    """A KV head for each query head."""
    return torch.cat([x[:, head : head + 1] for head in kv_of_q], 1)
