"""The one table of layout changes: what moves when a tensor goes from one layout to another.

On one mesh axis of P ranks, for a tensor of M bytes:

======================  ======================================  =====================
from → to               what is sent                            bytes a rank sends
======================  ======================================  =====================
Replicate → Shard(i)    nothing: a split                        0
Replicate → Partial     nothing: the first rank keeps its own   0
                        tensor, the others hold zeros
Shard(i) → Partial      nothing: zeros elsewhere                0
Shard(i) → Shard(j)     one all-to-all: a switch (DSP, arXiv    M(P−1)/P²
                        2403.10266, section 4; Ulysses'
                        head exchange)
Shard(i) → Shard(i)     one all-to-all, if the order changes    what changes its rank
Shard(i) → Replicate    an all-gather                           M(P−1)/P
Partial → Shard(i)      a reduce-scatter                        M(P−1)/P
Partial → Replicate     an all-reduce: a reduce-scatter and an  2M(P−1)/P
                        all-gather of equal shares
Shard(i) → Slices(j)    one all-to-all; what slices share is    each slice's share
                        sent to every rank that has it
Slices(j) → Shard(i)    one all-to-all; what slices share is    each slice's share
                        summed: the former's transpose
======================  ======================================  =====================

(Bytes of even shards; ``transition`` counts them for any.) On several axes one axis changes at a
time. A dim that several axes shard is dealt by the mesh's first such axis, each next one deals
what the one before left a rank, and so only the last of them can change: the chain of changes is
searched, least bytes first.
"""

import heapq
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import count, product
from math import prod

import torch
from torch.distributed.tensor import Partial, Replicate, Shard
from torch.distributed.tensor.placement_types import Placement

from longspan.errors import LayoutError
from longspan.layout import Layout, Order, Run, runs
from longspan.schedule.ops import Comm

__all__ = [
    "Side",
    "Slices",
    "Step",
    "backward",
    "local_shape",
    "steps",
    "transition",
]


@dataclass(frozen=True)
class Slices(Placement):
    """Rank r of the axis holds [start, end) = ``ranges[r]`` of dim ``dim``; ranges may overlap."""

    dim: int
    ranges: tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True)
class Side:
    """A placement on one axis, with the order of its shards."""

    placement: Placement = Replicate()
    order: Order = Order.CONTIGUOUS

    @property
    def dim(self) -> int | None:
        """The dim that is cut, or None."""
        cut = isinstance(self.placement, Shard | Slices)
        return self.placement.dim if cut else None  # type: ignore[attr-defined, no-any-return]

    def runs(self, length: int, rank: int, world: int) -> tuple[Run, ...]:
        """What ``rank`` holds of the cut dim, which is ``length`` long."""
        if isinstance(self.placement, Slices):
            start, end = self.placement.ranges[rank]
            return (Run(0, start, end - start, 1),) if end > start else ()
        return runs(length, rank, world, self.order)


_State = tuple[Side, ...]  # a side for each axis of the mesh
_Hop = tuple[int, _State, _State]  # the axis that changes, before and after


@dataclass(frozen=True, slots=True)
class Step:
    """A row of the table on mesh axis ``axis`` of ``world`` ranks, as one of them sees it.

    ``whole`` is the shape that they would hold if the axis were replicated.
    """

    axis: str
    world: int
    before: Side
    after: Side
    whole: tuple[int, ...]

    @property
    def sums(self) -> bool:
        """Whether what several ranks send of the same element is added."""
        return isinstance(self.before.placement, Partial | Slices)

    def shape(self, side: Side, rank: int) -> tuple[int, ...]:
        """The shape that ``rank`` holds on that side."""
        return _cut(self.whole, side, rank, self.world)

    def gives(self, rank: int, peer: int) -> tuple[Run, ...]:
        """What ``rank`` gives ``peer``, along the dim that is cut on the far side (the near one
        in a gather): where it lies here (``start``, ``stride``), and in what is sent (``local``).
        """
        if self.after.dim is None:
            held = self.shape(self.before, rank)[self._dim]
            return (Run(0, 0, held, 1),)
        if self.before.dim == self.after.dim:
            return tuple(near for near, _ in self._common(rank, peer))
        return self.after.runs(self.whole[self._dim], peer, self.world)

    def takes(self, rank: int, peer: int) -> tuple[Run, ...]:
        """Where what ``peer`` gives lies in what ``rank`` ends up with, along the near dim."""
        if self.before.dim is None:
            held = self.shape(self.after, rank)[self._dim]
            return (Run(0, 0, held, 1),)
        if self.before.dim == self.after.dim:
            return tuple(far for _, far in self._common(peer, rank))
        return self.before.runs(self.whole[self.before.dim], peer, self.world)

    @property
    def _dim(self) -> int:
        dim = self.before.dim if self.after.dim is None else self.after.dim
        assert dim is not None
        return dim

    def _common(self, giver: int, taker: int) -> Iterator[tuple[Run, Run]]:
        """The tokens that one rank has and another is to have, as runs in either's shard."""
        length = self.whole[self._dim]
        local = 0
        for a in self.before.runs(length, giver, self.world):
            for b in self.after.runs(length, taker, self.world):
                # One order of two at most is striped, so one of the strides is 1.
                stride = max(a.stride, b.stride)
                phase = (a if a.stride == stride else b).start
                low = max(a.start, b.start)
                first = low + (phase - low) % stride
                end = min(r.start + (r.count - 1) * r.stride for r in (a, b)) + 1
                common = len(range(first, end, stride))
                if common:
                    near, far = (
                        Run(
                            local,
                            r.local + (first - r.start) // r.stride,
                            common,
                            stride // r.stride,
                        )
                        for r in (a, b)
                    )
                    yield near, far
                    local += common

    @property
    def halves(self) -> tuple["Step", "Step"]:
        """The reduce-scatter and the all-gather, of the flat tensor, that are an all-reduce."""
        flat, cut = (prod(self.whole),), Side(Shard(0))
        scatter = replace(self, after=cut, whole=flat)
        return scatter, replace(scatter, before=cut, after=self.after)

    def comms(self, ranks: tuple[int, ...], itemsize: int) -> tuple[Comm, ...]:
        """What the ranks of the axis send each other, whatever rank of them this is."""
        before, after = self.before, self.after
        everyone = range(self.world)
        if before.dim is None and after.dim is None and isinstance(before.placement, Partial):
            return tuple(comm for half in self.halves for comm in half.comms(ranks, itemsize))
        if isinstance(before.placement, Replicate) or isinstance(after.placement, Partial):
            return ()
        if before.dim is None or after.dim is None:
            kind, side = ("reduce_scatter", after) if before.dim is None else ("all_gather", before)
            sizes = [prod(self.shape(side, rank)) for rank in everyone]
            return (Comm(kind, ranks, tuple(size * itemsize for size in sizes)),)
        sizes = []
        for giver in everyone:
            held = self.shape(before, giver)
            row = prod(held[: self._dim] + held[self._dim + 1 :])
            for taker in everyone:
                sizes.append(row * sum(run.count for run in self.gives(giver, taker)))
        return (Comm("all_to_all", ranks, tuple(size * itemsize for size in sizes)),)


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
    found = []
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


def backward(src: Layout, dst: Layout, grad: Mapping[str, Placement]) -> tuple[Layout, Layout]:
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
    whole. Raises LayoutError if ``grad`` holds another placement.
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

    leaves = {a: p for a, p in grad.items() if not replicated(dst, a)}
    return of(dst, grad), of(src, leaves)


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
        shape = _cut(shape, side, rank, size)
    return shape


def _cut(shape: tuple[int, ...], side: Side, rank: int, world: int) -> tuple[int, ...]:
    if (dim := side.dim) is None:
        return shape
    held = sum(run.count for run in side.runs(shape[dim], rank, world))
    return (*shape[:dim], held, *shape[dim + 1 :])


def _groups(axis: int, sizes: tuple[int, ...]) -> Iterator[list[tuple[int, ...]]]:
    """The coordinates of each group of ranks that differ along ``axis`` only."""
    for rest in product(*(range(n) for other, n in enumerate(sizes) if other != axis)):
        yield [(*rest[:axis], at, *rest[axis:]) for at in range(sizes[axis])]


def _place(coordinate: Sequence[int], sizes: Sequence[int]) -> int:
    place = 0
    for at, size in zip(coordinate, sizes, strict=True):
        place = place * size + at
    return place
