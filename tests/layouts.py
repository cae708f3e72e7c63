"""Plain references for layouts: a whole tensor dealt to ranks, and put together again."""

from collections.abc import Mapping, Sequence

import torch
from hypothesis import strategies as st
from torch import Tensor
from torch.distributed.tensor import Partial, Replicate, Shard

from longspan.layout import Layout, Order, positions

# A layout knows no documents.
LAYOUT_ORDERS = [order for order in Order if order is not Order.BALANCED]


def whole_numbers(shape: Sequence[int], seed: int) -> Tensor:
    """Random fp64 whole numbers, whose sums are exact in any order."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-99, 100, tuple(shape), generator=generator).double()


def deal(whole: Tensor, layout: Layout, axes: Mapping[str, int], seed: int = 0) -> list[Tensor]:
    """What each rank of the mesh holds, row by row."""
    if not axes:
        return [whole]
    (axis, world), *inner = axes.items()
    placement = layout.placements.get(axis, Replicate())
    if isinstance(placement, Shard):
        length = whole.shape[placement.dim]
        shards = [positions(length, rank, world, layout.order) for rank in range(world)]
        pieces = [whole.index_select(placement.dim, shard) for shard in shards]
    elif isinstance(placement, Partial):
        pieces = [whole_numbers(whole.shape, seed + rank + 1) for rank in range(1, world)]
        pieces.append(whole - sum(pieces))
    else:
        pieces = [whole] * world
    return [
        part
        for rank, piece in enumerate(pieces)
        for part in deal(piece, layout, dict(inner), world * (seed + rank))
    ]


def join(
    parts: Sequence[Tensor], shape: Sequence[int], layout: Layout, axes: Mapping[str, int]
) -> Tensor:
    """The whole tensor that ranks hold; asserts that copies agree."""
    if not axes:
        assert parts[0].shape == tuple(shape)
        return parts[0]
    (axis, world), *inner = axes.items()
    placement = layout.placements.get(axis, Replicate())
    each = len(parts) // world
    pieces = []
    for rank in range(world):
        held = list(shape)
        if isinstance(placement, Shard):
            length = shape[placement.dim]
            held[placement.dim] = len(positions(length, rank, world, layout.order))
        mine = parts[rank * each : (rank + 1) * each]
        pieces.append(join(mine, held, layout, dict(inner)))
    if isinstance(placement, Shard):
        whole = pieces[0].new_full(tuple(shape), torch.nan)
        for rank, piece in enumerate(pieces):
            shard = positions(shape[placement.dim], rank, world, layout.order)
            whole.index_copy_(placement.dim, shard, piece)
        return whole
    if isinstance(placement, Partial):
        return torch.stack(pieces).sum(0)
    assert all(torch.equal(piece, pieces[0]) for piece in pieces)
    return pieces[0]


@st.composite
def layouts(draw: st.DrawFn, ndim: int, axes: Sequence[str]) -> Layout:
    shards = [Shard(dim) for dim in range(-ndim, ndim)]
    some = st.sampled_from([Replicate(), Partial(), *shards, *shards])
    return Layout({axis: draw(some) for axis in axes}, draw(st.sampled_from(LAYOUT_ORDERS)))
