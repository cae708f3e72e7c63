"""A batch into micro-batches, each of them into groups: constructed, then improved.

Sorted by length, a batch is cut into micro-batches of sequences alike in length, as a long one
makes short ones wait (``cuts``). Each is then packed for real (``pack``), with what fits in its
time limit; what doesn't goes to the next one, and limits are raised or lowered together until
little is left over. In small batches sequences are then moved between micro-batches as long as
that helps.
"""

from collections.abc import Iterator, Sequence

import numpy as np

from longspan.planner.cuts import Cut, cuts
from longspan.planner.pack import Batch
from longspan.planner.teams import Shelf

__all__ = ["search", "total_s"]

_FEW = 16  # so few sequences are all moved one by one
_TRIED, _TRIED_ALL = 2, 256  # cuts that are packed for real: two, and all of few sequences
_FILLED = 180  # about so many micro-batches are packed for each
_REPACKED = 1024  # of so few sequences every micro-batch is packed at other limits, too
# Changes of a cut's time limits, each up if a packing overran, down if not.
_UNITS = (1, 2, 4, 8)
_STEPS = (0.08, 0.04, 0.02, 0.01, 0.005, 0.0025)


def search(batch: Batch, under_s: float = np.inf) -> list[Shelf]:
    """The best micro-batches found; every sequence must fit in some group.

    None are returned if there is no hope that they take less than ``under_s``.
    """
    best: list[Shelf] = []
    least = np.inf
    tried = None if len(batch.tokens) <= _TRIED_ALL else _TRIED
    for cut in cuts(batch)[:tried]:
        if cut.seconds >= min(least, under_s):
            break
        for unit in _UNITS:
            for shelves in _packings(batch, cut, unit):
                took = total_s(batch, shelves)
                if took < least:
                    best, least = shelves, took
    if len(batch.tokens) <= _REPACKED:
        best = [_repacked(batch, shelf) for shelf in best]
    if best and len(batch.tokens) <= _FEW:
        return _improved(batch, best)
    return best


def _packings(batch: Batch, cut: Cut, unit: int) -> Iterator[list[Shelf]]:
    """What fits in time, for better and better limits."""
    scale = 1.0
    for step in _STEPS[: max(2, _FILLED // len(cut.ends))]:
        shelves = _packed(batch, cut, scale, unit)
        yield shelves
        aim = batch.prices.whole_s(np.array(cut.limits_s) * scale).sum()
        over = total_s(batch, shelves) > aim * (1 + 1e-9)
        scale *= 1 + step if over else 1 / (1 + step)


def _repacked(batch: Batch, shelf: Shelf) -> Shelf:
    other = batch.best(shelf.items, shelf.seconds)
    return other if other and other.seconds < shelf.seconds else shelf


def _packed(batch: Batch, cut: Cut, scale: float, unit: int) -> list[Shelf]:
    """Each micro-batch filled up, what doesn't fit goes to the next; the last one evenly."""
    shelves: list[Shelf] = []
    rest = list(range(len(batch.tokens)))
    floor = batch.prices.gather_s if batch.prices.overlap else 0.0
    while rest:
        limit = cut.limits_s[min(len(shelves), len(cut.limits_s) - 1)]
        limit = max(limit * scale, floor)
        shelf, left = batch.fill(rest, limit, slack=cut.slack, unit=unit)
        assert shelf.items  # all ranks are free: the longest has room
        if not left:
            even = batch.even(rest, max(batch.floor_s(np.array(rest)), floor))
            shelf = even if even and even.seconds < shelf.seconds else shelf
        shelves.append(shelf)
        rest = left
    return shelves


def _improved(batch: Batch, shelves: list[Shelf]) -> list[Shelf]:
    """The best that moving and swapping sequences between micro-batches leads to."""
    known: dict[frozenset[int], Shelf | None] = {}

    def packed(part: frozenset[int]) -> Shelf | None:
        if part not in known:
            known[part] = batch.best(sorted(part)) if part else Shelf([])
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
