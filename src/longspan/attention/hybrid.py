"""Head exchange inside, ring outside: attention on a mesh of one or two axes.

Inside a node, where links are fast, ranks exchange tokens for heads; between nodes, or where there
are more ranks than heads, keys and values travel (BurstEngine, arXiv 2509.19836; USP, arXiv
2405.07719).
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from longspan.attention.heads import Dealt, to_heads, to_tokens
from longspan.layout import Order, positions
from longspan.schedule.heads import HeadShares

__all__ = ["exchange_heads"]


def exchange_heads(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sinks: Tensor | None,
    mesh: DeviceMesh,
    order: Order,
    documents: tuple[int, ...],
    kv_documents: tuple[int, ...],
    attend_here: Callable[..., Tensor],
) -> Tensor:
    """Attention with a head exchange on the mesh's last axis, and a ring over the other, if any.

    The ranks of the last axis gather each other's tokens, for a share of the heads, and
    ``attend_here(q, k, v, sinks, group, world, width=…)`` attends with what is gathered, on a ring
    of ``world`` places of ``width`` ranks. Other arguments are
    those of ``attend``, checked.
    """
    inner = mesh.get_group(mesh.ndim - 1)
    width, places = inner.size(), mesh.size() // inner.size()
    place = mesh.get_local_rank(0) if mesh.ndim == 2 else 0
    ranks = range(place * width, (place + 1) * width)
    q_places, kv_places = (
        [positions(ends[-1], rank, mesh.size(), order, ends) for rank in ranks]
        for ends in (documents, kv_documents)
    )
    shares = HeadShares(q.shape[1], k.shape[1], width)
    q_dealt = Dealt(q.shape[1], _counts(q_places), tuple(shares.q(r) for r in range(width)))
    kv_dealt = Dealt(k.shape[1], _counts(kv_places), tuple(shares.kv(r) for r in range(width)))
    q_here, k_here, v_here = to_heads((q, k, v), (q_dealt, kv_dealt, kv_dealt), inner)
    if not shares.even(inner.rank()):
        one_each = torch.tensor(shares.kv_of_q(inner.rank()), device=k.device)
        k_here, v_here = (x.index_select(1, one_each) for x in (k_here, v_here))
    # Tokens come rank by rank; a ring's are in ascending position.
    sort = order is not Order.STRIPED and width > 1
    if sort:
        ascending, keys_ascending = (
            torch.cat(found).argsort().to(q.device) for found in (q_places, kv_places)
        )
        q_here = q_here.index_select(2, ascending)
        k_here, v_here = (x.index_select(2, keys_ascending) for x in (k_here, v_here))
    if sinks is not None:
        own = shares.q(inner.rank())
        sinks = sinks[own.start : own.stop]
    outer = mesh.get_group(0) if places > 1 else None
    out = attend_here(q_here, k_here, v_here, sinks, outer, places, width=width)
    if sort:
        out = out.index_select(2, ascending.argsort())
    return to_tokens(out, q_dealt, inner)


def _counts(places: Sequence[Tensor]) -> tuple[int, ...]:
    return tuple(len(part) for part in places)
