"""Head exchange inside, ring outside: attention on a mesh of one or two axes.

Inside a node, where links are fast, ranks exchange tokens for heads; between nodes, or where there
are more ranks than heads, keys and values travel (BurstEngine, arXiv 2509.19836; USP, arXiv
2405.07719).
"""

from typing import Literal

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from longspan.attention.heads import to_heads, to_tokens
from longspan.attention.kept import Kept
from longspan.attention.ring import ring_of, turn
from longspan.layout import Order, positions
from longspan.schedule.heads import HeadShares
from longspan.schedule.rounds import Travels

__all__ = ["exchange_heads"]


def exchange_heads(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mesh: DeviceMesh,
    causal: bool,
    window: int | None,
    order: Order,
    scale: float,
    documents: tuple[int, ...],
    travels: Travels | Literal["auto"],
    kept: Kept | None,
) -> Tensor:
    """Attention with a head exchange on the mesh's last axis, and a ring over the other, if any.

    The ranks of the last axis gather each other's tokens, for a share of the heads. Arguments are
    those of ``attend``, checked.
    """
    inner = mesh.get_group(mesh.ndim - 1)
    width, places = inner.size(), mesh.size() // inner.size()
    place = mesh.get_local_rank(0) if mesh.ndim == 2 else 0
    ranks = range(place * width, (place + 1) * width)
    dealt = [positions(documents[-1], rank, mesh.size(), order, documents) for rank in ranks]
    counts = [len(part) for part in dealt]
    shares = HeadShares(q.shape[1], k.shape[1], width)
    q_shares = [shares.q(rank) for rank in range(width)]
    kv_shares = [shares.kv(rank) for rank in range(width)]
    q_here = to_heads(q, counts, q_shares, inner)
    k_here, v_here = (to_heads(x, counts, kv_shares, inner) for x in (k, v))
    if not shares.even(inner.rank()):
        one_each = torch.tensor(shares.kv_of_q(inner.rank()), device=k.device)
        k_here, v_here = (x.index_select(1, one_each) for x in (k_here, v_here))
    # Tokens come rank by rank; a ring's are in ascending position.
    ascending = None
    if order is not Order.STRIPED and width > 1:
        ascending = torch.cat(dealt).argsort().to(q.device)
        q_here, k_here, v_here = (x.index_select(2, ascending) for x in (q_here, k_here, v_here))
    here = (q_here, k_here, v_here)
    ring = ring_of(*here, places, order, causal, documents, window=window, width=width)
    outer = mesh.get_group(0) if places > 1 else None
    out = turn(*here, ring, outer, scale, travels, kept)
    if ascending is not None:
        out = out.index_select(2, ascending.argsort())
    return to_tokens(out, counts, q_shares, q.shape[1], inner)
