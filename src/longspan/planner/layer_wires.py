"""What it costs to change a tensor's layout on a mesh: the table of ``schedule.step``, priced.

A change on neighbouring axes of the mesh that all change in the same way is one step of the table
among all their ranks, and its price grows in a straight line with the tensor's bytes. So prices
are two numbers, seconds and seconds a byte, by change and axes, whatever the tensor. A group of
ranks is never alone: all groups of a mesh make the same change at the same time, and what passes
a pipe is the sum of theirs.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from types import MappingProxyType
from typing import Literal, Protocol

import numpy as np
from torch.distributed.tensor import Partial, Replicate, Shard

from longspan.cluster.cost import demand
from longspan.cluster.spec import Cluster
from longspan.schedule.step import Side, Step

__all__ = ["PARTIAL", "REPLICATE", "ClusterWires", "Codes", "Moves", "PaseWires", "Price", "Wires"]

REPLICATE, PARTIAL = -1, -2
Codes = tuple[int, ...]  # a layout: for each mesh axis the dim that it shards, or one of these two
Price = tuple[float, float]  # seconds, and seconds for each byte of the whole tensor

Row = Literal["gather", "scatter", "reduce", "switch"]
_LARGE = 1 << 36  # rows of a tensor whose bytes are all that counts


class Wires(Protocol):
    """The price of a row of the table among the ranks of neighbouring axes [start, end)."""

    @property
    def sizes(self) -> tuple[int, ...]:
        """Of the mesh's axes."""
        ...

    def row(self, kind: Row, start: int, end: int) -> Price:
        """Seconds, and seconds a byte of what the ranks would hold without these axes."""
        ...


_SIDES = {
    "gather": (Side(Shard(0)), Side(Replicate())),
    "scatter": (Side(Partial()), Side(Shard(0))),
    "reduce": (Side(Partial()), Side(Replicate())),
    "switch": (Side(Shard(0)), Side(Shard(1))),
}


class ClusterWires:
    """Prices on a described cluster, whose first ranks make up the mesh, row by row.

    ``flat_sums``: what is summed over several axes goes around one ring of all their ranks.
    ``handling``: not what a change takes, but what it takes from the computing of a rank.
    """

    def __init__(
        self,
        cluster: Cluster,
        sizes: Sequence[int],
        flat_sums: bool = False,
        *,
        handling: bool = False,
    ) -> None:
        self.cluster, self.sizes, self.flat_sums = cluster, tuple(sizes), flat_sums
        self.handling, self._capacity = handling, cluster.capacity.copy()
        if handling:
            self._capacity[: len(cluster.fabric.capacity)] = np.inf
        self._known: dict[tuple[Row, int, int], Price] = {}

    def row(self, kind: Row, start: int, end: int) -> Price:
        """See ``Wires``."""
        key = (kind, start, end)
        if key not in self._known:
            self._known[key] = self._price(*key)
        return self._known[key]

    def _price(self, kind: Row, start: int, end: int) -> Price:
        world = prod(self.sizes[start:end])
        if world == 1:
            return 0.0, 0.0
        if kind == "reduce" and end - start > 1 and not self.flat_sums:
            return self._reduce(start, end)
        groups = list(self._groups(start, end))
        latency, small = self._change(kind, groups, 1)
        each = self._change(kind, groups, _LARGE)[1] / (_LARGE * world**2)
        once = 0.0 if self.handling else latency
        if self.cluster.handles:  # messages take something, however small
            once += max(0.0, small - each * world**2)
        return once, each

    def _change(
        self, kind: Row, groups: Sequence[tuple[int, ...]], rows: int
    ) -> tuple[float, float]:
        """Seconds of latency and of transfer of so many rows for each rank, a byte for each."""
        world = len(groups[0])
        before, after = _SIDES[kind]
        step = Step("", world, before, after, (rows * world, world))
        ops = step.comms(groups[0], 1)  # the others do the same
        asked = [[demand(replace(op, ranks=ranks), self.cluster) for op in ops] for ranks in groups]
        latency, took = 0.0, 0.0
        for together in zip(*asked, strict=True):
            load = np.zeros(len(self._capacity))
            for one in together:
                load[one.pipes] += one.bytes
            latency += max(one.latency_s for one in together)
            took += float((load / self._capacity).max())
        return latency, took

    def _reduce(self, start: int, end: int) -> Price:
        """A sum over several axes: scattered from the innermost outwards, gathered inwards."""
        latency, slope, share = 0.0, 0.0, 1.0
        for axis in range(end - 1, start - 1, -1):
            for kind in ("scatter", "gather"):
                once, each = self.row(kind, axis, axis + 1)
                latency, slope = latency + once, slope + each * share
            share /= self.sizes[axis]
        return latency, slope

    def _groups(self, start: int, end: int) -> Iterator[tuple[int, ...]]:
        ranks = np.arange(prod(self.sizes)).reshape(
            prod(self.sizes[:start]), prod(self.sizes[start:end]), prod(self.sizes[end:])
        )
        for outer in range(ranks.shape[0]):
            for inner in range(ranks.shape[2]):
                yield tuple(int(rank) for rank in ranks[outer, :, inner])


@dataclass(frozen=True)
class PaseWires:
    """PaSE's own prices (arXiv 2407.04001, section 3): one bandwidth, no latency, no topology.

    ``word_factor``: it counts words of eight bytes, whatever the numbers' own size.
    """

    sizes: tuple[int, ...]
    bytes_per_s: float
    word_factor: float

    def row(self, kind: Row, start: int, end: int) -> Price:
        """See ``Wires``."""
        world = prod(self.sizes[start:end])
        passes = {"gather": 1.0, "scatter": 1.0, "reduce": 2.0, "switch": 1.0 / world}[kind]
        return 0.0, passes * (world - 1) / world * self.word_factor / self.bytes_per_s


class Moves:
    """Prices of whole changes of layout, several axes at once."""

    def __init__(self, wires: Wires) -> None:
        self.wires, self.sizes = wires, wires.sizes
        self._known: dict[tuple[Codes, Codes], Price] = {}

    def price(self, src: Codes, dst: Codes) -> Price:
        """From one layout to another, by bytes of the whole tensor."""
        if src == dst:
            return 0.0, 0.0
        known = self._known.get((src, dst))
        if known is None:
            # Whatever dims are called, the same change costs the same.
            places: dict[int, int] = {}
            both = tuple(c if c < 0 else places.setdefault(c, len(places)) for c in (*src, *dst))
            one, two = both[: len(src)], both[len(src) :]
            known = self._best(src, dst) if (one, two) == (src, dst) else self.price(one, two)
            self._known[src, dst] = known
        return known

    def _best(self, src: Codes, dst: Codes) -> Price:
        direct = self._price(src, dst)
        whole = (REPLICATE,) * len(src)
        if dst == whole:
            return direct
        # Gathering all of it and cutting it again may be cheaper over uneven links.
        return min(direct, self.price(src, whole), key=lambda price: price[1])

    def local(self, codes: Codes) -> float:
        """The share of a tensor that a rank holds."""
        return 1.0 / prod(n for n, code in zip(self.sizes, codes, strict=True) if code >= 0)

    def _price(self, src: Codes, dst: Codes) -> Price:
        """One step of the table after another: what makes the tensor smaller comes first.

        Only the last of the axes that share a dim can change (``schedule.switch``); where one
        before it must, those behind it are gathered first and cut again afterwards.
        """
        # Neighbouring axes that change alike are one.
        bounds = [0]
        for axis in range(1, len(src)):
            if (src[axis], dst[axis]) != (src[axis - 1], dst[axis - 1]):
                bounds.append(axis)
        spans = list(zip(bounds, [*bounds[1:], len(src)], strict=True))
        state, goal = [src[start] for start in bounds], [dst[start] for start in bounds]
        worlds = [prod(self.sizes[start:end]) for start, end in spans]
        latency = slope = 0.0
        while state != goal:
            ready = [at for at in range(len(goal)) if _may_change(state, goal, at)]
            if ready:
                at = min(ready, key=lambda at: (_rank(state[at], goal[at]), at))
                after = goal[at]
            else:
                at, after = _in_the_way(state, goal), REPLICATE
            kind = _ROWS.get((min(state[at], 0), min(after, 0)))
            if kind is not None:
                held = prod(n for n, code in zip(worlds, state, strict=True) if code >= 0)
                if state[at] >= 0:
                    held //= worlds[at]
                once, each = self.wires.row(kind, *spans[at])
                latency, slope = latency + once, slope + each / held
            state[at] = after
        return latency, slope


# The row for a change from and to a shard (0), all of it or partial sums; the others are free.
_ROWS: Mapping[tuple[int, int], Row] = MappingProxyType(
    {
        (0, REPLICATE): "gather",
        (PARTIAL, 0): "scatter",
        (PARTIAL, REPLICATE): "reduce",
        (0, 0): "switch",
    }
)


def _may_change(state: Sequence[int], goal: Sequence[int], at: int) -> bool:
    before, after = state[at], goal[at]
    if before == after:
        return False
    inner = state[at + 1 :]
    if (before >= 0 and before in inner) or (after >= 0 and after in inner):
        return False
    # Axes before these that are still to shard the same dim, or to leave it, come first.
    return after < 0 or not any(
        a != b and after in (a, b) for a, b in zip(state[:at], goal, strict=False)
    )


def _in_the_way(state: Sequence[int], goal: Sequence[int]) -> int:
    """The innermost axes that keep one before them from changing."""
    wanted = {code for a, b in zip(state, goal, strict=True) if a != b for code in (a, b)}
    return max(at for at, code in enumerate(state) if code >= 0 and code in wanted)


def _rank(before: int, after: int) -> int:
    if before == REPLICATE:
        return 0
    if before == PARTIAL:
        return 3 if after == REPLICATE else 1
    return 4 if after == REPLICATE else 2
