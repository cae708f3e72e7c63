"""A batch into micro-batches, each of them into groups: constructed, then improved.

Sorted by length, a batch is cut into micro-batches of sequences alike in length, as a long one
makes short ones wait (``cuts``). Each is then packed for real (``pack``), with what fits in its
time limit; what doesn't goes to the next one. That is tried in several ways, for scaled limits. In
small batches sequences are then moved between micro-batches as long as that helps.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from longspan.planner.alone import Batch
from longspan.planner.cuts import Cut, shortest
from longspan.planner.pack import Known, best_shelf, even_shelf, full_shelf
from longspan.planner.prices import Ints
from longspan.planner.teams import Shelf

__all__ = ["search", "total_s"]

_FEW = 16  # so few sequences are all moved one by one
_HOPE = 0.95  # packings take at least about so much of what fluids do
_SOME = 1024  # of so few sequences every micro-batch is packed at other limits, too
# About so many sequences and groups are placed, in all packings of some or of more sequences
# together; a micro-batch counts as so many more.
_WORK, _MORE_WORK, _EACH = 10_000, 32_000, 16
# By how much a cut's time limits are scaled: at first, those that snap and those that don't; then
# from the best, more and more finely.
_SNAPPED, _PLAIN, _STEPS = (1.01, 1.15, 1.35), (1.0, 1.1), (0.05, 0.025, 0.0125)
_FULL = 1e3  # so that only memory limits a micro-batch: where all groups are alike, none waits
_UNITS = (4, 8)  # ranks of short sequences' groups, where one each may be less full of memory


@dataclass(frozen=True, slots=True)
class _Way:
    """How a batch is packed: the limits' scale, whether they snap, short sequences' ranks."""

    scale: float
    snap: bool
    unit: int = 1


def search(batch: Batch, under_s: float = np.inf) -> list[Shelf]:
    """The best micro-batches found; every sequence must fit in some group.

    None are returned if there is no hope that they take less than ``under_s``.
    """
    if batch.least_s(np.arange(len(batch.tokens))) >= under_s:
        return []
    cut = shortest(batch)
    if cut.seconds * _HOPE >= under_s:
        return []
    few = len(batch.tokens) <= _FEW
    tries = _Tries(batch, cut, np.inf if few else under_s)
    ways = [_Way(scale, True) for scale in _SNAPPED] + [_Way(scale, False) for scale in _PLAIN]
    if batch.small:
        tries.together()
    for way in ways:
        tries.pack(way)
    if batch.only is not None:
        tries.pack(_Way(_FULL, False))
    else:
        loose = len(tries.best) > batch.least_count(np.arange(len(batch.tokens)))
        for way in ways if loose else [tries.way, replace(tries.way, snap=not tries.way.snap)]:
            for unit in [unit for unit in _UNITS if unit in batch.sizes]:
                tries.pack(replace(way, unit=unit))
    for step in _STEPS:
        way = tries.way
        for scale in (way.scale * (1 + step), way.scale / (1 + step)):
            tries.pack(replace(way, scale=scale))
    best = tries.best
    if len(batch.tokens) <= _SOME:
        best = [_repacked(batch, shelf) for shelf in best]
    return _improved(batch, best) if few else best


class _Tries:
    """The best packing so far, and how it was found."""

    def __init__(self, batch: Batch, cut: Cut, under_s: float) -> None:
        self.batch, self.cut = batch, cut
        self.best: list[Shelf] = []
        self.least = under_s
        self.way = _Way(1.0, True)
        self.known: Known = {}
        self.evened: dict[bytes, Shelf | None] = {}
        self.work = _WORK if len(batch.tokens) <= _SOME else _MORE_WORK
        if batch.any_size and not batch.powers:  # sought beside powers of two: half the work
            self.work //= 2

    def pack(self, way: _Way) -> None:
        """Each micro-batch filled up, what doesn't fit goes to the next; the last one evenly."""
        if self.work < 0:
            return
        batch, prices = self.batch, self.batch.prices
        shelves: list[Shelf] = []
        took, limits = 0.0, self.cut.limits_s
        rest = np.arange(len(batch.tokens))
        floor = prices.gather_s if prices.overlap else 0.0
        while len(rest):
            if took + batch.least_s(rest) >= self.least:
                return
            limit = max(limits[min(len(shelves), len(limits) - 1)] * way.scale, floor)
            shelf, left = full_shelf(batch, rest, limit, self.known, unit=way.unit, snap=way.snap)
            if not shelf.items:  # groups of so many ranks are too few, or too slow
                assert way.unit > 1  # else the longest has room, as all ranks are free
                return
            if not len(left):
                even = self._even(rest, floor)
                shelf = even if even and even.seconds < shelf.seconds else shelf
            self.work -= len(rest) - len(left) + len(shelf.teams) + _EACH
            shelves.append(shelf)
            took += float(prices.whole_s(shelf.seconds))
            rest = left
        if took < self.least:
            self.best, self.least, self.way = shelves, took, way

    def together(self) -> None:
        """All in one micro-batch, if it has the memory: no cut may look as good and be better."""
        every = np.arange(len(self.batch.tokens))
        if self.batch.least_count(every) > 1 or not (shelf := best_shelf(self.batch, every)):
            return
        if (took := float(self.batch.prices.whole_s(shelf.seconds))) < self.least:
            self.best, self.least = [shelf], took

    def _even(self, rest: Ints, floor: float) -> Shelf | None:
        key = rest.tobytes()
        if key not in self.evened:
            limit = max(self.batch.floor_s(rest), floor)
            self.evened[key] = even_shelf(self.batch, rest, limit)
        return self.evened[key]


def _repacked(batch: Batch, shelf: Shelf) -> Shelf:
    other = best_shelf(batch, shelf.items, shelf.seconds)
    return other if other and other.seconds < shelf.seconds else shelf


def _improved(batch: Batch, shelves: list[Shelf]) -> list[Shelf]:
    """The best that moving and swapping sequences between micro-batches leads to."""
    known: dict[frozenset[int], Shelf | None] = {}

    def packed(part: frozenset[int]) -> Shelf | None:
        if part not in known:
            known[part] = best_shelf(batch, sorted(part)) if part else Shelf([])
        return known[part]

    def took(part: frozenset[int]) -> float:
        shelf = packed(part)
        if shelf is None:
            return np.inf
        return float(batch.prices.whole_s(shelf.seconds)) if part else 0.0

    parts = [frozenset(shelf.items) for shelf in shelves]
    while True:
        parts = [*filter(None, parts), frozenset()]
        gains = [
            (took(parts[a]) + took(parts[b]) - took(one) - took(other), (a, b, one, other))
            for a in range(len(parts))
            for b in range(a + 1, len(parts))
            for one, other in _exchanges(parts[a], parts[b])
        ]
        gain, (a, b, one, other) = max(gains, key=lambda found: found[0])
        if gain <= 1e-12:
            return [shelf for part in parts if part and (shelf := packed(part))]
        parts[a], parts[b] = one, other


def _exchanges(
    one: frozenset[int], other: frozenset[int]
) -> Iterator[tuple[frozenset[int], frozenset[int]]]:
    """What two micro-batches are after one sequence moved, two were swapped, or all joined."""
    yield one | other, frozenset()
    for item in sorted(one):
        yield one - {item}, other | {item}
    for item in sorted(other):
        yield one | {item}, other - {item}
    for a in sorted(one):
        for b in sorted(other):
            yield one - {a} | {b}, other - {b} | {a}


def total_s(batch: Batch, shelves: Sequence[Shelf]) -> float:
    """Seconds of all micro-batches."""
    return float(sum(batch.prices.whole_s(shelf.seconds) for shelf in shelves))
