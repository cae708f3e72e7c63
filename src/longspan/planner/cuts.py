"""Where to cut a batch into micro-batches: a shortest path over cuts and time limits.

For every time limit the ranks' time and the memory that a sequence takes are added up, as if they
were fluids; a micro-batch ends where either is used up.
"""

from dataclasses import dataclass

import numpy as np

from longspan.planner.alone import Batch
from longspan.planner.prices import Floats, Ints

__all__ = ["Cut", "shortest"]

_LIMITS = 24
_PLACES = 256  # about so many places to cut; in batches of no more sequences,
_LONGEST = 6  # the own times of so many of them are limits as well


@dataclass(frozen=True, slots=True)
class Cut:
    """Time limits of micro-batches, one after the other, and what they take in all."""

    limits_s: tuple[float, ...]
    seconds: float


def shortest(batch: Batch) -> Cut:
    """The cut that takes least."""
    every = np.arange(len(batch.tokens))
    prices = batch.prices
    low = batch.fixed_s + 0.25 * float(batch.areas.sum()) / batch.speed / len(every)
    low = max(low, float(batch.quickest[-1]), prices.gather_s if prices.overlap else 0.0)
    first = [batch.least_limit_s(item) for item in (0, batch.long) if item < len(every)]
    high = max(*first, batch.floor_s(every), low) * 1.5
    limits = np.geomspace(low, high, _LIMITS)
    if len(every) <= _PLACES:
        exact = np.concatenate([times[:_LONGEST].ravel() for times in batch.planned])
        exact = exact[(exact >= low) & (exact <= high)] * (1 + 1e-9)
        limits = _thinned(np.concatenate([limits, exact]))
    return _path(batch, limits, _places(batch))


def _path(batch: Batch, limits: Floats, places: Ints) -> Cut:
    ends = _ends(batch, limits, places).T
    each = batch.prices.whole_s(limits)
    total = each + np.where(ends > 0, 0.0, np.inf)
    left = np.zeros(len(places))  # the last place is the end
    chosen = np.zeros(len(places), dtype=np.int64)
    for first in range(len(places) - 2, -1, -1):
        through = total[first] + left[ends[first]]
        chosen[first] = through.argmin()
        left[first] = through[chosen[first]]
    row, taken = 0, []
    while row < len(places) - 1:
        taken.append(float(limits[chosen[row]]))
        row = int(ends[row, chosen[row]])
    return Cut(tuple(taken), float(left[0]))


def _ends(batch: Batch, limits: Floats, places: Ints) -> Ints:
    """By limit and place where a micro-batch begins, the place where it ends; 0 if at none."""
    shape = len(limits), len(batch.tokens)
    area = np.broadcast_to(batch.smallest_areas, shape).copy()
    memory = np.broadcast_to(batch.tokens.astype(np.float64), shape).copy()
    long = np.array([batch.most_s(limit) for limit in limits])
    if most := int(long.max()):
        above = np.arange(most) < long[:, None]
        own_area, own_memory = _long(batch, limits, most)
        area[:, :most] = np.where(above, own_area, area[:, :most])
        memory[:, :most] = np.where(above, own_memory, memory[:, :most])
    possible = np.isfinite(area)
    areas, held = _added(np.where(possible, area, 0.0)), _added(np.where(possible, memory, 0.0))
    room = (limits - batch.fixed_s) * batch.speed * (1 + 1e-9)
    fits = batch.prices.capacity * (1 + 1e-9)
    starts = places[:-1]
    by_time = _found(areas, areas[:, starts] + room[:, None])
    by_memory = _found(held, held[:, starts] + fits)
    item = np.maximum(np.minimum(by_time, by_memory) - 1, starts + 1)
    end = np.searchsorted(places, item, side="right") - 1
    end = np.maximum(end, np.arange(1, len(places)))
    found: Ints = np.where(possible[:, starts], end, 0)
    return found


def _long(batch: Batch, limits: Floats, count: int) -> tuple[Floats, Floats]:
    """Rank-seconds and memory that so many of the longest take in groups of several ranks."""
    all_sizes, limit = min(count, batch.long), limits[:, None]
    shape = len(limits), count
    area, memory = np.full(shape, np.inf), np.full(shape, np.inf)
    density = float(batch.tokens.sum()) / float(batch.areas.sum())
    for pool, times, alone in zip(batch.prices.pools, batch.planned, batch.smallest_s, strict=True):
        c, took = pool.columns, np.broadcast_to(alone[:count], shape).copy()
        in_time = times[:all_sizes] <= limits[:, None, None]
        first = in_time.argmax(axis=2)
        first[~np.take_along_axis(in_time, first[:, :, None], 2)[:, :, 0]] = -1
        size = np.zeros(shape, dtype=np.int64)
        size[:, :all_sizes] = np.where(took[:, :all_sizes] > limit, first, 0)
        took[:, :all_sizes] = times[np.arange(all_sizes), size[:, :all_sizes]]
        ranks = c.ranks[size]
        took_area = (took - c.fixed_s[size]) * ranks * pool.weight
        # What other sequences could take of the group's memory in the time it has left.
        other = (limit - took) * ranks * pool.weight * density
        blocked = np.where(ranks > 1, c.most_tokens[size] - other, 0)
        taken = np.maximum(batch.tokens[:count], blocked)
        better = (size >= 0) & (took <= limit) & (took_area < area)
        area, memory = np.where(better, took_area, area), np.where(better, taken, memory)
    return area, memory


def _places(batch: Batch) -> Ints:
    """Where cuts may be: after each of the longest, and after even shares of tokens and time."""
    count = len(batch.tokens)
    if count <= _PLACES:
        return np.arange(count + 1)
    found: list[Ints] = [np.arange(_PLACES // 4), np.array([count])]
    for values in (batch.tokens.astype(np.float64), batch.areas):
        added = np.cumsum(values)
        shares = np.linspace(0, added[-1], _PLACES * 3 // 8)
        found.append(np.searchsorted(added, shares))
    return np.unique(np.concatenate(found))


def _thinned(limits: Floats) -> Floats:
    """Ascending, none within a hundredth of the next larger one."""
    every = np.unique(limits)
    keep = np.append(np.diff(np.floor(np.log(every) / np.log(1.01))) > 0, [True])
    kept: Floats = every[keep]
    return kept


def _added(values: Floats) -> Floats:
    added: Floats = np.cumsum(np.pad(values, ((0, 0), (1, 0))), axis=1)
    return added


def _found(rows: Floats, values: Floats) -> Ints:
    pairs = zip(rows, values, strict=True)
    return np.array([np.searchsorted(row, own, side="right") for row, own in pairs])
