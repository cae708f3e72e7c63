"""One micro-batch: sequences into groups of any size that work side by side.

For a time limit each sequence has a smallest group that keeps it. The long ones get such a group
each, placed inside a node where it fits. The others, longest first, fill up one group after the
other, those of the long ones among them; or all groups evenly.
"""

from collections.abc import Sequence

import numpy as np

from longspan.planner.alone import Batch
from longspan.planner.prices import Ints, Prices
from longspan.planner.spread import fill, spread
from longspan.planner.teams import Shelf, Team, place, share

__all__ = ["Known", "best_shelf", "even_shelf", "full_shelf"]

_LIMITS = (1.0, 1.03, 1.07, 1.13, 1.25, 1.5, 2.2, 5.0)
_ALL_LIMITS = 64  # so few sequences times sizes have all limits, and rests of all sizes, tried


Known = dict[tuple[object, ...], tuple[Shelf, Ints]]


def full_shelf(
    batch: Batch,
    items: Ints,
    limit_s: float,
    known: Known,
    *,
    unit: int = 1,
    snap: bool = False,
) -> tuple[Shelf, Ints]:
    """A shelf of as many of these as end in time, longest first; and the others.

    Short ones get groups of ``unit`` ranks. With ``snap`` what the long ones' groups take becomes
    the limit, so that many limits are one: what came of them is kept in ``known``. The longest
    sequence is in the shelf, whatever it takes.
    """
    limit_s = max(limit_s, batch.least_limit_s(int(items[0])) * (1 + 1e-9))
    unit, sizes = batch.only or unit, batch.smallest(items, limit_s)
    key = (unit, items.tobytes(), *(size.tobytes() for size in sizes))
    if snap and key in known:
        return known[key]
    teams, others, left = _opened(batch, items, sizes, unit)
    snapped = max((team.seconds for team in teams), default=0.0) if snap else 0.0
    left += fill(teams, others, batch.tokens[others], batch.pairs[others], snapped or limit_s)
    found = Shelf(teams), np.sort(np.array(left, dtype=np.int64))
    if snapped:
        known[key] = found
    return found


def even_shelf(batch: Batch, items: Ints, limit_s: float) -> Shelf | None:
    """A shelf of all of these, its groups as full as each other; None if they don't fit."""
    return _even(batch, items, batch.smallest(items, limit_s), limit_s, batch.only or 1)


def best_shelf(batch: Batch, items: Sequence[int] | Ints, hint_s: float = 0.0) -> Shelf | None:
    """The best even shelf found for these sequences; None if they don't fit the memory.

    ``hint_s``: a time limit to try as well.
    """
    where = np.array(sorted(items), dtype=np.int64)
    floor = batch.floor_s(where)
    few = len(where) * len(batch.sizes) <= _ALL_LIMITS
    units = [batch.only or 1]
    if few and batch.only is None:
        units = sorted(set(batch.sizes))
    limits = _limits(batch, where, floor, hint_s, few)
    found = [_best(batch, where, limits, unit) for unit in units]
    return min(filter(None, found), key=lambda shelf: shelf.seconds, default=None)


def _best(batch: Batch, items: Ints, limits: list[float], unit: int) -> Shelf | None:
    best: Shelf | None = None
    before = None
    for limit in limits:
        sizes = batch.smallest(items, limit)
        key = b"".join(size.tobytes() for size in sizes)
        if key == before:
            continue
        before = key
        shelf = _even(batch, items, sizes, limit, unit)
        if shelf is None:
            continue
        if best is None or shelf.seconds < best.seconds:
            best = shelf
        elif best.seconds <= limit:
            break
    return best


def _limits(batch: Batch, items: Ints, floor: float, hint: float, few: bool) -> list[float]:
    every = np.append(floor * np.array(_LIMITS), [hint] * (hint > 0))
    if few:
        every = np.concatenate([every, *(times[items].ravel() for times in batch.times)])
    every = np.unique(every[np.isfinite(every)]) * (1 + 1e-9)
    found: list[float] = every[every >= floor].tolist()
    return found


def _even(batch: Batch, items: Ints, sizes: list[Ints], limit: float, unit: int) -> Shelf | None:
    teams, others, left = _opened(batch, items, sizes, unit)
    if left or spread(teams, others, batch.tokens[others], batch.pairs[others], limit):
        return None
    return Shelf(teams)


def _opened(
    batch: Batch, items: Ints, sizes: list[Ints], unit: int
) -> tuple[list[Team], Ints, list[int]]:
    """Groups for the long ones, and of ``unit`` ranks; the other sequences; what has no room."""
    prices = batch.prices
    free = [len(node) for node in prices.nodes]
    alone = np.zeros(len(items), dtype=bool)
    fits = np.zeros(len(items), dtype=bool)
    for pool, size in zip(prices.pools, sizes, strict=True):
        fits |= size >= 0
        alone |= (size >= 0) & (pool.columns.ranks[size] <= unit)
    teams: list[Team] = []
    left: list[int] = items[~fits].tolist()
    full: set[tuple[int, ...]] = set()  # sizes by pool that there is no room for any more
    rows = np.flatnonzero(fits & ~alone)
    asked = zip(*(size[rows].tolist() for size in sizes), strict=True)
    for item, wanted in zip(items[rows].tolist(), asked, strict=True):
        team = None if wanted in full else _open(prices, wanted, free)
        if team is None:
            full.add(wanted)
            left.append(item)
            continue
        team.add(item, int(batch.tokens[item]), float(batch.pairs[item]))
        teams.append(team)
    teams += _others(prices, free, unit, whole=batch.only is not None)
    share(teams)
    return teams, items[alone], left


def _open(prices: Prices, wanted: Sequence[int], free: list[int]) -> Team | None:
    """A group of one of these sizes by pool: that which takes least, of those with room."""
    pools = prices.pools
    options = [
        (pool, pool.prices[size]) for pool, size in zip(pools, wanted, strict=True) if size >= 0
    ]
    for pool, price in sorted(options, key=lambda option: option[1].ranks * option[0].weight):
        taken = place(price.ranks, pool.nodes, free, prices)
        if taken is not None:
            for node, count in taken.items():
                free[node] -= count
            return Team(price, taken)
    return None


def _others(prices: Prices, free: list[int], unit: int, *, whole: bool) -> list[Team]:
    """Groups of ``unit`` ranks of all that are left, and but for ``whole`` single ones then."""
    found: list[Team] = []
    if unit > 1:
        ranks = [[price.ranks for price in pool.prices] for pool in prices.pools]
        wanted = [own.index(unit) if unit in own else -1 for own in ranks]
        while team := _open(prices, wanted, free):
            found.append(team)
        if whole:
            return found
    return found + [
        Team(prices.pools[prices.pool_of_node[node]].prices[0], {node: 1})
        for node, count in enumerate(free)
        for _ in range(count)
    ]
