"""The rows of the table of layout changes: what each rank of one mesh axis gives each other.

Of a tensor of M bytes on P ranks:

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

(Bytes of even shards; ``Step.comms`` counts them for any.) Slices are what several ranks may have
copies of: the heads of keys and values that their own query heads need.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from math import prod

from torch.distributed.tensor import Partial, Replicate, Shard
from torch.distributed.tensor.placement_types import Placement

from longspan.layout import Order, Run, runs
from longspan.schedule.ops import Comm, CommKind

__all__ = ["Side", "Slices", "Step"]


@dataclass(frozen=True)
class Slices(Placement):
    """Rank r of the axis holds [start, end) = ``ranges[r]`` of dim ``dim``; ranges may overlap."""

    dim: int
    ranges: tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True)
class Side:
    """A placement on one axis, with the order of its shards."""

    placement: Placement = field(default_factory=Replicate)
    order: Order = Order.CONTIGUOUS

    @property
    def dim(self) -> int | None:
        """The dim that is cut, or None."""
        cut = isinstance(self.placement, Shard | Slices)
        return self.placement.dim if cut else None  # type: ignore[attr-defined]

    def runs(self, length: int, rank: int, world: int) -> tuple[Run, ...]:
        """What ``rank`` holds of the cut dim, which is ``length`` long."""
        if isinstance(self.placement, Slices):
            start, end = self.placement.ranges[rank]
            return (Run(0, start, end - start, 1),) if end > start else ()
        return runs(length, rank, world, self.order)

    def cut(self, shape: tuple[int, ...], rank: int, world: int) -> tuple[int, ...]:
        """The shape that ``rank`` holds of a tensor of ``shape``."""
        if (dim := self.dim) is None:
            return shape
        held = sum(run.count for run in self.runs(shape[dim], rank, world))
        return (*shape[:dim], held, *shape[dim + 1 :])


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
        return side.cut(self.whole, rank, self.world)

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
            kind: CommKind = "reduce_scatter" if before.dim is None else "all_gather"
            side = after if before.dim is None else before
            sizes = [prod(self.shape(side, rank)) for rank in everyone]
            return (Comm(kind, ranks, tuple(size * itemsize for size in sizes)),)
        sizes = []
        for giver in everyone:
            held = self.shape(before, giver)
            row = prod(held[: self._dim] + held[self._dim + 1 :])
            for taker in everyone:
                sizes.append(row * sum(run.count for run in self.gives(giver, taker)))
        return (Comm("all_to_all", ranks, tuple(size * itemsize for size in sizes)),)
