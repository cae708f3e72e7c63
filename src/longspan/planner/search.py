"""A batch into micro-batches, each of them into groups: constructed, then improved.

Sorted by length, a batch is cut into micro-batches of sequences alike in length, as a long one
makes short ones wait. Where to cut, and how long each may take, is a shortest path: for every time
limit the ranks' time and memory that a sequence takes are added up, and a micro-batch ends where
either is used up. Each micro-batch is then packed for real (``pack``). In small batches sequences
are then moved between micro-batches as long as that helps.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from longspan.planner.pack import Batch
from longspan.planner.prices import Floats, Ints
from longspan.planner.teams import Shelf

__all__ = ["search", "total_s"]

_LIMITS = 32
# Shares of the ranks' time and of their memory that a real packing may be able to use.
_FILLS = ((1.0, 1.0), (0.93, 0.98), (0.85, 0.95), (0.97, 0.9))
_FEW = 16  # so few sequences are all moved one by one
_LONGEST = 6  # so many sequences' own times are limits as well


@dataclass(frozen=True, eq=False)
class _Cuts:
    """The shortest paths over cuts of a sorted batch."""

    batch: Batch
    limits: Floats
    areas: Floats  # (limits, sequences + 1), added up
    tokens: Floats  # (limits, sequences + 1), added up: memory that is taken up
    possible: np.ndarray

    @classmethod
    def of(cls, batch: Batch) -> "_Cuts":
        every = np.arange(len(batch.tokens))
        low = batch.fixed_s + 0.25 * float(batch.areas.sum()) / batch.speed / len(every)
        low = max(low, float(batch.quickest[-1]))
        high = max(float(batch.quickest[0]), batch.floor_s(every)) * 1.5
        limits = np.geomspace(low, high, _LIMITS)
        exact = np.concatenate([times[:_LONGEST].ravel() for times in batch.times])
        exact = exact[(exact >= low) & (exact <= high)] * (1 + 1e-9)
        limits = _thinned(np.concatenate([limits, exact]))
        areas, held, possible = [], [], []
        for limit in limits:
            area = np.full(len(every), np.inf)
            memory = batch.tokens.astype(np.float64)
            for pool, times, size in zip(
                batch.prices.pools, batch.times, batch.smallest(every, limit), strict=True
            ):
                c = pool.columns
                own = (times[every, size] - c.fixed_s[size]) * c.ranks[size] * pool.weight
                better = (size >= 0) & (own < area)
                area = np.where(better, own, area)
                # A long sequence's group has no use for its memory in the time it takes.
                busy = (times[every, size] - c.fixed_s[size]) / (limit - c.fixed_s[size])
                blocked = np.where(c.ranks[size] > 1, busy * c.most_tokens[size], 0.0)
                memory = np.where(better, np.maximum(batch.tokens, blocked), memory)
            possible.append(np.isfinite(area))
            areas.append(_added(np.where(np.isfinite(area), area, 0)))
            held.append(_added(memory))
        return cls(batch, limits, np.array(areas), np.array(held), np.array(possible))

    def cuts(self) -> list[list[tuple[int, int, float]]]:
        """First, end and time limit of each micro-batch, for several shares of what there is."""
        batch, count = self.batch, len(self.batch.tokens)
        ends = np.empty((count, len(_FILLS), len(self.limits)), dtype=np.int64)
        after = np.arange(1, count + 1)
        for row, limit in enumerate(self.limits):
            added, held, possible = self.areas[row], self.tokens[row], self.possible[row]
            for column, (time_fill, memory_fill) in enumerate(_FILLS):
                room = (limit - batch.fixed_s) * batch.speed * time_fill * (1 + 1e-9)
                memory = batch.prices.capacity * memory_fill * (1 + 1e-9)
                by_time = np.searchsorted(added, added[:-1] + room, side="right")
                by_memory = np.searchsorted(held, held[:-1] + memory, side="right")
                end = np.maximum(np.minimum(by_time, by_memory) - 1, after)
                ends[:, column, row] = np.where(possible, end, -1)
        each = batch.prices.whole_s(self.limits)
        left = np.zeros((count + 1, len(_FILLS)))
        fills = np.arange(len(_FILLS))
        chosen = np.zeros((count, len(_FILLS)), dtype=np.int64)  # the row of the limit
        total = each + np.where(ends > 0, 0.0, np.inf)
        for first in range(count - 1, -1, -1):
            through = total[first] + left[ends[first], fills[:, None]]
            chosen[first] = through.argmin(axis=1)
            left[first] = through[fills, chosen[first]]
        return [self._way(ends[:, fill], chosen[:, fill]) for fill in fills]

    def _way(self, ends: Ints, chosen: Ints) -> list[tuple[int, int, float]]:
        found, first = [], 0
        while first < len(chosen):
            row = int(chosen[first])
            found.append((first, int(ends[first, row]), float(self.limits[row])))
            first = found[-1][1]
        return found


def search(batch: Batch) -> list[Shelf]:
    """The best micro-batches found; every sequence must fit in some group."""
    best: list[Shelf] = []
    seen = set()
    for cut in _Cuts.of(batch).cuts():
        if tuple(cut) in seen:
            continue
        seen.add(tuple(cut))
        shelves = _packed(batch, cut)
        if not best or total_s(batch, shelves) < total_s(batch, best):
            best = shelves
    if len(batch.tokens) <= _FEW:
        return _improved(batch, best)
    return best


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


def _thinned(limits: Floats) -> Floats:
    """Ascending, none within a hundredth of the next larger one."""
    every = np.unique(limits)
    keep = np.append(np.diff(np.floor(np.log(every) / np.log(1.01))) > 0, [True])
    kept: Floats = every[keep]
    return kept


def _added(values: Floats) -> Floats:
    added: Floats = np.concatenate([[0.0], np.cumsum(values)])
    return added


def _packed(batch: Batch, cut: Sequence[tuple[int, int, float]]) -> list[Shelf]:
    """Each part packed; what doesn't fit goes to the next one, or to new ones at the end."""
    shelves: list[Shelf] = []
    over: list[int] = []
    for first, end, limit in cut:
        shelf, over = _fitted(batch, sorted([*over, *range(first, end)]), limit)
        shelves.append(shelf)
    while over:
        shelf, over = _fitted(batch, over, 0.0)
        shelves.append(shelf)
    return shelves


def _fitted(batch: Batch, items: list[int], limit: float) -> tuple[Shelf, list[int]]:
    """A shelf of as many of these, longest first, as fit; and the others."""
    kept = len(items)
    while (shelf := batch.best(items[:kept], limit)) is None:
        kept -= max(1, kept // 40)
    return shelf, items[kept:]
