"""The one entry point to attention over a sharded sequence."""

from collections.abc import Sequence
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from longspan.attention.hybrid import exchange_heads
from longspan.attention.kept import Kept
from longspan.attention.ring import ring_of, turn
from longspan.comm.mesh import flat_group
from longspan.errors import LayoutError
from longspan.layout import Order, local_length
from longspan.schedule.rounds import Travels

__all__ = ["attend", "global_length"]


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mesh: DeviceMesh,
    causal: bool = True,
    order: Order | str = Order.ZIGZAG,
    scale: float | None = None,
    window: int | None = None,
    cu_seqlens: Tensor | Sequence[int] | None = None,
    inside: Literal["ring", "heads"] = "ring",
    travels: Travels | Literal["auto"] = "auto",
    kept: Kept | None = None,
) -> Tensor:
    """Exact attention over a sequence whose tokens are sharded over ``mesh``.

    q ``(B, Hq, S_local, D)``, k and v ``(B, Hkv, S_local, D)``, Hq a multiple of Hkv; S_local is
    this rank's share of any global length in ``order`` (``longspan.positions``, which in balanced
    order wants the documents, too). Returns
    ``(B, Hq, S_local, D)`` in q's dtype. ``scale`` defaults to 1/√D. With a ``window``
    each token sees itself and the window-1 tokens before it, as transformers' ``sliding_window``.
    ``cu_seqlens``: where packed documents start in the *global* sequence and where the last ends,
    the same on every rank and in every row of the batch; on the CPU, so that nothing waits for a
    device. Without it the sequence is one document, and the ranks tell each other their lengths.

    A mesh has one axis, or two: between nodes and inside them. ``inside`` says what the ranks of
    the last axis do: turn a ring (with two axes the double ring), or exchange tokens for heads
    (Ulysses; with two axes the ring is of nodes only). ``travels``: what a ring's backward hands
    around, "kv" or "q" (BurstAttention); "auto": what is fewer bytes. ``kept`` remembers a part of
    the result for when the same call is made again to recompute activations.

    Raises LayoutError for tensors, mesh, order, window and documents that don't fit together.
    """
    group = flat_group(mesh)
    order = Order.of(order)
    _check_shapes(q, k, v)
    documents: tuple[int, ...]
    if cu_seqlens is None:
        documents = (0, global_length(q.shape[2], group, order))
    else:
        documents = tuple(int(end) for end in cu_seqlens)
    expected = local_length(documents[-1], group.rank(), group.size(), order, documents)
    if q.shape[2] != expected:
        raise LayoutError(
            f"rank {group.rank()} of {group.size()} holds {expected} of {documents[-1]} tokens in "
            f"{order} order, but q has {q.shape[2]}: cut it with longspan.positions"
        )
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    ranks_inside = mesh.size(mesh.ndim - 1)
    if inside == "heads":
        return exchange_heads(q, k, v, mesh, causal, window, order, scale, documents, travels, kept)
    ring = ring_of(
        *(q, k, v, group.size(), order, causal, documents),
        window=window,
        node_ranks=ranks_inside,
    )
    return turn(q, k, v, ring, group, scale, travels, kept)


def _check_shapes(q: Tensor, k: Tensor, v: Tensor) -> None:
    if not q.ndim == k.ndim == v.ndim == 4:
        raise LayoutError("q, k and v must be (batch, heads, tokens, head dim)")
    if k.shape[:3] != v.shape[:3] or q.shape[0] != k.shape[0] or q.shape[2] != k.shape[2]:
        raise LayoutError(f"q {_dims(q)}, k {_dims(k)} and v {_dims(v)} don't fit together")
    if q.shape[3] != k.shape[3]:
        raise LayoutError(f"q has head dim {q.shape[3]}, k has {k.shape[3]}")
    if k.shape[1] == 0 or q.shape[1] % k.shape[1]:
        raise LayoutError(f"{q.shape[1]} query heads are no multiple of {k.shape[1]} KV heads")
    if not q.dtype == k.dtype == v.dtype or not q.is_floating_point():
        raise LayoutError(
            f"q, k and v must share a floating dtype: {q.dtype}, {k.dtype}, {v.dtype}"
        )


def _dims(x: Tensor) -> tuple[int, ...]:
    return tuple(x.shape)


def global_length(tokens: int, group: dist.ProcessGroup, order: Order) -> int:
    """The whole sequence's length, from each rank's number of tokens.

    Raises LayoutError, on every rank, if they aren't the shares that ``order`` deals.
    """
    if group.size() == 1:
        return tokens
    device = "cuda" if dist.get_backend(group) == "nccl" else "cpu"
    lengths = torch.zeros(group.size(), dtype=torch.long, device=device)
    lengths[group.rank()] = tokens
    dist.all_reduce(lengths, group=group)
    found = lengths.tolist()
    shares = [local_length(sum(found), rank, len(found), order) for rank in range(len(found))]
    if found != shares:
        raise LayoutError(f"the ranks hold {found} tokens; in {order} order it must be {shares}")
    return sum(found)
