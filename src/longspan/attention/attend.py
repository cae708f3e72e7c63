"""The one entry point to attention over a sharded sequence."""

from collections.abc import Sequence
from typing import Any, Literal, get_args

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from longspan.attention.hybrid import exchange_heads
from longspan.attention.kept import Kept
from longspan.attention.ring import GradsIn, ring_of, turn
from longspan.comm.mesh import flat_group
from longspan.errors import LayoutError
from longspan.layout import Order, local_length
from longspan.schedule.rounds import Travels

__all__ = ["Inside", "attend", "global_length"]

Inside = Literal["ring", "heads"]


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
    cu_seqlens_k: Tensor | Sequence[int] | None = None,
    sinks: Tensor | None = None,
    inside: Inside = "ring",
    travels: Travels | Literal["auto"] = "auto",
    grads_in: GradsIn = "float32",
    parts: int | None = None,
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

    Cross attention: keys may be of another global length, sharded in the same ``order``; then
    ``causal`` must be False. ``cu_seqlens_k``: where the keys' documents start, as many as the
    queries', where they aren't the same; document i of the queries sees document i of the keys,
    and if that is empty its output is 0. ``sinks (Hq,)``: a logit more in each head's softmax,
    that no value belongs to (gpt_oss); each rank's gradient is its own tokens' share of the sum.

    A mesh has one axis, or two: between nodes and inside them. ``inside`` says what the ranks of
    the last axis do: turn a ring (with two axes the double ring), or exchange tokens for heads
    (Ulysses; with two axes the ring is of nodes only). ``travels``: what a ring's backward hands
    around, "kv" or "q" (BurstAttention); "auto": what is fewer bytes, unless ranks' work is much
    less even. ``grads_in``: the dtype that gradients travel in. They are added up in "float32"
    (float64 for float64) and travel so, too; in "compute", q's own, they are fewer bytes but are
    rounded at each of up to P-1 hops. A head exchange's are always in q's. ``parts``: in how many
    parts of the heads a ring's payload or, where there is no ring, an exchange crosses, one while
    another is attended; by default as many as leave large messages. ``kept`` remembers a part of
    the result for when the same call is made again to recompute activations.

    Raises LayoutError for tensors, mesh, order, window and documents that don't fit together, and
    for an unknown way.
    """
    group = flat_group(mesh)
    _check_ways(inside=(inside, Inside), grads_in=(grads_in, GradsIn))
    if travels != "auto":
        _check_ways(travels=(travels, Travels))
    if parts is not None and parts < 1:
        raise LayoutError(f"heads can't be sent in {parts} parts: use 1 or more, or None")
    order = Order.of(order)
    _check_shapes(q, k, v, sinks)
    if cu_seqlens is None:
        if cu_seqlens_k is not None:
            raise LayoutError("cu_seqlens_k pairs the keys' documents with cu_seqlens: pass both")
        lengths = _global_lengths((q.shape[2], k.shape[2]), group, order)
        documents, kv_documents = (_ends((0, length)) for length in lengths)
    else:
        documents = _ends(cu_seqlens)
        kv_documents = documents if cu_seqlens_k is None else _ends(cu_seqlens_k)
    for name, x, ends in (("q", q, documents), ("k", k, kv_documents)):
        _check_share(name, x.shape[2], ends, group, order)
    if scale is None:
        scale = q.shape[-1] ** -0.5

    def attend_here(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        sinks: Tensor | None,
        group: dist.ProcessGroup | None,
        world: int,
        *,
        width: int = 1,
        node_ranks: int = 0,
    ) -> Tensor:
        ring = ring_of(
            *(q, k, v, world, order, causal, documents),
            kv_documents=None if kv_documents == documents else kv_documents,
            window=window,
            grads_in=grads_in,
            node_ranks=node_ranks,
            width=width,
            parts=parts,
        )
        return turn(q, k, v, sinks, ring, group, scale, travels, grads_in, kept)

    if inside == "heads":
        return exchange_heads(
            *(q, k, v, sinks, mesh, order, documents, kv_documents, parts), attend_here
        )
    node_ranks = mesh.size(1) if mesh.ndim == 2 else 0
    return attend_here(q, k, v, sinks, group, group.size(), node_ranks=node_ranks)


def _ends(cu_seqlens: Tensor | Sequence[int]) -> tuple[int, ...]:
    ends = tuple(int(end) for end in cu_seqlens)
    if not ends:
        raise LayoutError("cu_seqlens is empty: it must start at 0 and end at the sequence's end")
    return ends


def _check_share(
    name: str, tokens: int, documents: tuple[int, ...], group: dist.ProcessGroup, order: Order
) -> None:
    expected = local_length(documents[-1], group.rank(), group.size(), order, documents)
    if tokens != expected:
        raise LayoutError(
            f"rank {group.rank()} of {group.size()} holds {expected} of {documents[-1]} tokens in "
            f"{order} order, but {name} has {tokens}: cut it with longspan.positions"
        )


def _check_ways(**ways: tuple[str, Any]) -> None:
    for name, (given, known) in ways.items():
        if given not in get_args(known):
            raise LayoutError(f"unknown {name} {given!r}: use one of {', '.join(get_args(known))}")


def _check_shapes(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None) -> None:
    if not q.ndim == k.ndim == v.ndim == 4:
        raise LayoutError("q, k and v must be (batch, heads, tokens, head dim)")
    if k.shape[:3] != v.shape[:3] or q.shape[0] != k.shape[0]:
        raise LayoutError(f"q {_dims(q)}, k {_dims(k)} and v {_dims(v)} don't fit together")
    if q.shape[3] != k.shape[3]:
        raise LayoutError(f"q has head dim {q.shape[3]}, k has {k.shape[3]}")
    if k.shape[1] == 0 or q.shape[1] % k.shape[1]:
        raise LayoutError(f"{q.shape[1]} query heads are no multiple of {k.shape[1]} KV heads")
    if not q.dtype == k.dtype == v.dtype or not q.is_floating_point():
        raise LayoutError(
            f"q, k and v must share a floating dtype: {q.dtype}, {k.dtype}, {v.dtype}"
        )
    if sinks is not None and sinks.shape != q.shape[1:2]:
        raise LayoutError(f"{q.shape[1]} query heads need a sink each, not {_dims(sinks)}")


def _dims(x: Tensor) -> tuple[int, ...]:
    return tuple(x.shape)


def global_length(tokens: int, group: dist.ProcessGroup, order: Order) -> int:
    """The whole sequence's length, from each rank's number of tokens.

    Raises LayoutError, on every rank, if they aren't the shares that ``order`` deals.
    """
    return _global_lengths((tokens,), group, order)[0]


def _global_lengths(
    tokens: tuple[int, ...], group: dist.ProcessGroup, order: Order
) -> tuple[int, ...]:
    """The same of several sequences, asked for at once."""
    if group.size() == 1:
        return tokens
    device = "cuda" if dist.get_backend(group) == "nccl" else "cpu"
    counts = torch.zeros(len(tokens), group.size(), dtype=torch.long, device=device)
    counts[:, group.rank()] = torch.tensor(tokens, device=device)
    dist.all_reduce(counts, group=group)
    for found in counts.tolist():
        shares = [local_length(sum(found), rank, len(found), order) for rank in range(len(found))]
        if found != shares:
            raise LayoutError(
                f"the ranks hold {found} tokens; in {order} order it must be {shares}"
            )
    return tuple(counts.sum(1).tolist())
