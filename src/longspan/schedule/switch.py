"""What moves when a tensor goes from one layout to another, and how its gradient comes back.

The rows of the table, one mesh axis each, are in ``step``. On several axes one changes at a time.
A dim that several axes shard is dealt by the mesh's first such axis, each next one deals what the
one before left a rank, and so only the last of them can change: the chain of changes is searched,
least bytes first.
"""

import heapq
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from itertools import count, pairwise, product
from math import prod

import torch
from torch.distributed.tensor import Partial, Replicate, Shard
from torch.distributed.tensor.placement_types import Placement

from longspan.errors import LayoutError
from longspan.layout import Layout, Order
from longspan.schedule.heads import HeadShares
from longspan.schedule.ops import Comm
from longspan.schedule.step import Side, Slices, Step

__all__ = ["backward", "head_placements", "local_shape", "steps", "transition"]

_State = tuple[Side, ...]  # a side for each axis of the mesh
_Hop = tuple[int, _State, _State]  # the axis that changes, before and after


def transition(
    src: Layout,
    dst: Layout,
    shape: Sequence[int],
    dtype: torch.dtype,
    axes: Mapping[str, int],
    ranks: Sequence[int] | None = None,
) -> tuple[Comm, ...]:
    """All that the ranks of a mesh send each other to bring a tensor from ``src`` to ``dst``.

    ``shape`` is the whole tensor's, ``axes`` the mesh's axes and their sizes, the first one
    outermost; ``ranks`` the mesh's ranks, row by row (0, 1, … by default). Each group of ranks
    that talks has its own op; a rank's are those that name it, in their order. Sizes in bytes.
    Raises LayoutError if a layout doesn't fit the tensor or the mesh.
    """
    names, sizes = tuple(axes), tuple(axes.values())
    ranks = range(prod(sizes)) if ranks is None else ranks
    if len(ranks) != prod(sizes):
        raise LayoutError(f"{len(ranks)} ranks given for a mesh of {prod(sizes)}")
    found: list[Comm] = []
    for hop in _path(src, dst, tuple(shape), axes):
        for coordinates in _groups(hop[0], sizes):
            step = _step(names, sizes, hop, tuple(shape), coordinates[0])
            group = tuple(ranks[_place(at, sizes)] for at in coordinates)
            found += step.comms(group, dtype.itemsize)
    return tuple(found)


def steps(
    src: Layout,
    dst: Layout,
    shape: Sequence[int],
    axes: Mapping[str, int],
    coordinate: Sequence[int],
) -> tuple[Step, ...]:
    """The same as the rank at ``coordinate`` of the mesh goes through it, one step an axis' change.

    Raises LayoutError if a layout doesn't fit the tensor or the mesh.
    """
    names, sizes = tuple(axes), tuple(axes.values())
    return tuple(
        _step(names, sizes, hop, tuple(shape), coordinate)
        for hop in _path(src, dst, tuple(shape), axes)
    )


def local_shape(
    layout: Layout, shape: Sequence[int], axes: Mapping[str, int], coordinate: Sequence[int]
) -> tuple[int, ...]:
    """The shape that the rank at ``coordinate`` of the mesh holds of a tensor of ``shape``."""
    return _local(
        _state(layout, tuple(shape), axes), tuple(shape), tuple(axes.values()), coordinate
    )


def backward(
    src: Layout, dst: Layout, grad: Mapping[str, Placement], sums: bool = True
) -> tuple[Layout, Layout]:
    """The transition that the gradient takes after a forward one: from ``dst``'s side to ``src``'s.

    =================  ==============================================================
    forward            gradient
    =================  ==============================================================
    Shard, Slices      the same
    Partial            Replicate: every summand has the sum's gradient
    Replicate          by axis as ``grad`` says: Replicate (default) where all ranks do
                       the same with the tensor, Partial where each goes its own way
    =================  ==============================================================

    On an axis that is replicated on both sides the gradient comes as ``grad`` says and leaves
    whole, or, where nothing ``sums`` it, as it came. Raises LayoutError if ``grad`` holds another
    placement.
    """
    for placement in grad.values():
        if not isinstance(placement, Replicate | Partial):
            raise LayoutError(f"grad must be Replicate() or Partial(), not {placement}")

    def of(layout: Layout, named: Mapping[str, Placement]) -> Layout:
        cut = {a: p for a, p in layout.placements.items() if isinstance(p, Shard | Slices)}
        whole = {a: p for a, p in named.items() if a not in layout.placements}
        whole |= {
            a: named.get(a, Replicate())
            for a, p in layout.placements.items()
            if isinstance(p, Replicate)
        }
        return Layout(whole | cut, layout.order)

    def replicated(layout: Layout, axis: str) -> bool:
        return isinstance(layout.placements.get(axis, Replicate()), Replicate)

    leaves = {a: p for a, p in grad.items() if not (sums and replicated(dst, a))}
    return of(dst, grad), of(src, leaves)


def head_placements(dim: int, heads: int, kv_heads: int, world: int) -> tuple[Placement, Placement]:
    """Where a head exchange brings the query heads, and the heads of keys and values (dim ``dim``).

    Query heads are shared as evenly as they can be, in contiguous order. A rank is given each
    KV head that one of its own needs, which is a Shard where no two ranks need the same, else
    Slices: query head h reads KV head h·kv_heads//heads. Raises LayoutError if ``kv_heads``
    doesn't divide ``heads``.
    """
    if kv_heads < 1 or heads % kv_heads:
        raise LayoutError(f"{heads} query heads can't share {kv_heads} KV heads evenly")
    needed = [HeadShares(heads, kv_heads, world).kv(rank) for rank in range(world)]
    ranges = [(share.start, share.stop) for share in needed]
    even = [Side(Shard(0)).cut((kv_heads,), rank, world)[0] for rank in range(world)]
    joined = all(left[1] == right[0] for left, right in pairwise(ranges))
    if joined and [end - start for start, end in ranges] == even:
        return Shard(dim), Shard(dim)
    return Shard(dim), Slices(dim, tuple(ranges))


def _state(layout: Layout, shape: tuple[int, ...], axes: Mapping[str, int]) -> _State:
    sides = []
    for axis, size in axes.items():
        placement = layout.placements.get(axis, Replicate())
        if isinstance(placement, Partial) and placement.reduce_op != "sum":
            raise LayoutError(f"axis {axis!r}: {placement} can't be moved, only Partial('sum')")
        order = Order.CONTIGUOUS
        if isinstance(placement, Shard | Slices):
            dim = placement.dim
            if not -len(shape) <= dim < len(shape):
                raise LayoutError(f"axis {axis!r}: {placement} of a tensor with {len(shape)} dims")
            dim %= len(shape)
            if isinstance(placement, Slices):
                _check_slices(placement, axis, size, shape[dim])
                placement = Slices(dim, placement.ranges)
            else:
                placement, order = Shard(dim), layout.order
        elif not isinstance(placement, Replicate | Partial):
            raise LayoutError(f"axis {axis!r}: {placement} is no Shard, Replicate or Partial")
        # A single rank has all in any layout.
        sides.append(Side(placement, order) if size > 1 else Side())
    return tuple(sides)


def _check_slices(slices: Slices, axis: str, size: int, length: int) -> None:
    if len(slices.ranges) != size:
        raise LayoutError(f"axis {axis!r} has {size} ranks, Slices {len(slices.ranges)} ranges")
    for start, end in slices.ranges:
        if not 0 <= start <= end <= length:
            raise LayoutError(f"slice [{start}, {end}) of dim {slices.dim}, which has {length}")


def _path(
    src: Layout, dst: Layout, shape: tuple[int, ...], axes: Mapping[str, int]
) -> tuple[_Hop, ...]:
    for axis in (src.placements.keys() | dst.placements.keys()) - axes.keys():
        if src.placements.get(axis, Replicate()) != dst.placements.get(axis, Replicate()):
            raise LayoutError(f"axis {axis!r} changes, but the mesh has {', '.join(axes)}")
    return _cheapest(
        _state(src, shape, axes), _state(dst, shape, axes), shape, tuple(axes.values())
    )


@lru_cache(maxsize=4096)
def _cheapest(
    src: _State, dst: _State, shape: tuple[int, ...], sizes: tuple[int, ...]
) -> tuple[_Hop, ...]:
    """The chain whose steps' most loaded ranks send the least, then the shortest one (Dijkstra)."""
    wide = [axis for axis, size in enumerate(sizes) if size > 1]
    if src == dst:
        return ()
    if len(wide) == 1:
        _check_row(src[wide[0]], dst[wide[0]])
        return ((wide[0], src, dst),)
    orders = dict.fromkeys(side.order for side in src + dst)
    anywhere = [Side()] + [Side(Shard(d), o) for d in range(len(shape)) for o in orders]
    choices = {axis: dict.fromkeys([src[axis], dst[axis], *anywhere]) for axis in wide}
    best = {src: (0, 0)}
    way: dict[_State, tuple[_Hop, ...]] = {src: ()}
    ticket = count()
    queue = [(0, 0, next(ticket), src)]
    while queue and queue[0][-1] != dst:
        cost, hops, _, state = heapq.heappop(queue)
        if best[state] < (cost, hops):
            continue
        for axis in wide:
            for side in choices[axis]:
                if not _may_change(state, axis, side):
                    continue
                after = (*state[:axis], side, *state[axis + 1 :])
                hop = (axis, state, after)
                key = (cost + _most_sent(hop, shape, sizes), hops + 1)
                if after not in best or key < best[after]:
                    best[after], way[after] = key, (*way[state], hop)
                    heapq.heappush(queue, (*key, next(ticket), after))
    if not queue:
        raise LayoutError(f"no way from {_said(src)} to {_said(dst)}, one axis at a time")
    return way[dst]


def _check_row(before: Side, after: Side) -> None:
    if not _is_row(before, after):
        raise LayoutError(f"no way from {_said((before,))} to {_said((after,))}")


def _is_row(before: Side, after: Side) -> bool:
    """Slices come from shards of another dim, and go there."""
    if isinstance(before.placement, Slices) or isinstance(after.placement, Slices):
        shards = sum(isinstance(side.placement, Shard) for side in (before, after))
        return shards == 1 and before.dim != after.dim
    return True


def _may_change(state: _State, axis: int, side: Side) -> bool:
    dims = {state[axis].dim, side.dim} - {None}
    inner = any(other.dim in dims for other in state[axis + 1 :])
    return side != state[axis] and not inner and _is_row(state[axis], side)


def _said(state: _State) -> str:
    return ", ".join(f"{side.placement} ({side.order})" for side in state)


@lru_cache(maxsize=1 << 14)
def _most_sent(hop: _Hop, shape: tuple[int, ...], sizes: tuple[int, ...]) -> int:
    """Elements that the most loaded rank sends in a step."""
    most = 0
    for coordinates in _groups(hop[0], sizes):
        step = _step(tuple(map(str, sizes)), sizes, hop, shape, coordinates[0])
        comms = step.comms(tuple(range(step.world)), 1)
        most = max(most, sum(max(map(comm.sent_bytes, comm.ranks)) for comm in comms))
    return most


def _step(
    names: Sequence[str],
    sizes: tuple[int, ...],
    hop: _Hop,
    shape: tuple[int, ...],
    coordinate: Sequence[int],
) -> Step:
    axis, before, after = hop
    others = (*before[:axis], Side(), *before[axis + 1 :])
    whole = _local(others, shape, sizes, coordinate)
    return Step(names[axis], sizes[axis], before[axis], after[axis], whole)


def _local(
    state: _State, shape: tuple[int, ...], sizes: Sequence[int], coordinate: Sequence[int]
) -> tuple[int, ...]:
    for side, size, rank in zip(state, sizes, coordinate, strict=True):
        shape = side.cut(shape, rank, size)
    return shape


def _groups(axis: int, sizes: tuple[int, ...]) -> Iterator[list[tuple[int, ...]]]:
    """The coordinates of each group of ranks that differ along ``axis`` only."""
    for rest in product(*(range(n) for other, n in enumerate(sizes) if other != axis)):
        yield [(*rest[:axis], at, *rest[axis:]) for at in range(sizes[axis])]


def _place(coordinate: Sequence[int], sizes: Sequence[int]) -> int:
    place = 0
    for at, size in zip(coordinate, sizes, strict=True):
        place = place * size + at
    return place
