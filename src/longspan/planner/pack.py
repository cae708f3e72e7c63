"""One micro-batch: sequences into groups of any size that work side by side and end soonest.

For a time limit each sequence has a smallest group that keeps it. The long ones get such a group
each, placed inside a node where it fits; the others go one by one, longest first, to the group that
is least full of time and memory, those of the long ones among them. What comes out is then
improved by moving sequences, and ranks, away from the group that ends last.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from longspan.planner.prices import Floats, Ints, Pool, Prices
from longspan.planner.spread import fill, spread
from longspan.planner.teams import Shelf, Team, place, share

__all__ = ["Batch"]

_LIMITS = (1.0, 1.03, 1.07, 1.13, 1.25, 1.5, 2.2, 5.0)
_ALL_LIMITS = 64  # so few sequences times sizes have all limits, and rests of all sizes, tried

_BOTH = 1024  # so few sequences are planned with groups of powers of two, too
_SMALL = 1024  # sequences times sizes of a batch for which one size for all is tried, too


@dataclass(frozen=True, eq=False)
class Batch:
    """The sequences of a batch, longest first, and what they take in a group of their own.

    With ``only`` all groups have that size, with ``powers`` all are powers of two.
    """

    prices: Prices
    tokens: Ints
    pairs: Floats
    only: int | None = None
    powers: bool = False

    @cached_property
    def times(self) -> list[Floats]:
        """Seconds alone, by pool: arrays of shape (sequences, sizes); infinite if not allowed."""
        return [self._alone(pool, 1) for pool in self.prices.pools]

    @cached_property
    def planned(self) -> list[Floats]:
        """``times``, but in groups that end inside a node as if another one did there, too."""
        found = []
        for pool, times in zip(self.prices.pools, self.times, strict=True):
            nodes = [len(self.prices.nodes[node]) for node in pool.nodes]
            ranks = pool.columns.ranks
            whole = (ranks <= max(nodes)) | np.isin(ranks, np.cumsum(nodes))
            found.append(times if whole.all() else self._alone(pool, np.where(whole, 1, 2)))
        return found

    def _alone(self, pool: Pool, shares: Any) -> Floats:
        _, first, which = np.unique(self.tokens, return_index=True, return_inverse=True)
        times = pool.seconds(self.tokens[first], self.pairs[first], shares)
        if self.only is not None:
            times[:, pool.columns.ranks != self.only] = np.inf
        if self.powers:
            ranks = pool.columns.ranks
            times[:, (ranks & (ranks - 1)) != 0] = np.inf
        return times[which]

    @property
    def small(self) -> bool:
        """Whether there are few enough sequences, and sizes of groups, to try more ways."""
        return len(self.tokens) * sum(len(pool.prices) for pool in self.prices.pools) <= _SMALL

    @property
    def uneven_sizes(self) -> bool:
        """Whether groups may have other sizes than powers of two, and there is time to try both."""
        sizes = {price.ranks for pool in self.prices.pools for price in pool.prices}
        return len(self.tokens) <= _BOTH and any(size & (size - 1) for size in sizes)

    @cached_property
    def areas(self) -> Floats:
        """The fewest rank-seconds each sequence takes, beside what a group takes anyway."""
        least = np.full(len(self.tokens), np.inf)
        for pool, times in zip(self.prices.pools, self.times, strict=True):
            c = pool.columns
            least = np.minimum(least, ((times - c.fixed_s) * c.ranks * pool.weight).min(axis=1))
        return least

    @cached_property
    def short(self) -> tuple[Floats, Floats]:
        """Rank-seconds and memory of each sequence on one rank, beside what a group takes."""
        least = np.full(len(self.tokens), np.inf)
        for pool, times in zip(self.prices.pools, self.times, strict=True):
            price = pool.prices[0]
            alone = (times[:, 0] - price.fixed_s) * price.ranks * pool.weight
            least = np.minimum(least, alone)
        return least, self.tokens.astype(np.float64)

    @cached_property
    def _alone_s(self) -> Floats:
        """Seconds on one rank, of the slowest: ascending, the longest sequence's last."""
        slowest: Floats = np.max([times[::-1, 0] for times in self.planned], axis=0)
        return slowest

    def longer_than(self, limit_s: float) -> int:
        """How many sequences, the longest, take longer than this on one rank."""
        return len(self.tokens) - int(np.searchsorted(self._alone_s, limit_s, side="right"))

    @cached_property
    def quickest(self) -> Floats:
        """The least seconds that each sequence takes in any group."""
        best: Floats = np.min([times.min(axis=1) for times in self.times], axis=0)
        return best

    @cached_property
    def fixed_s(self) -> float:
        """The least that a group takes before its first token."""
        return min(float(pool.columns.fixed_s.min()) for pool in self.prices.pools)

    @cached_property
    def speed(self) -> float:
        """All ranks together, where the fastest is 1."""
        prices = self.prices
        return sum(
            prices.pools[prices.pool_of_node[index]].weight * len(node)
            for index, node in enumerate(prices.nodes)
        )

    def floor_s(self, items: Ints) -> float:
        """No micro-batch of these sequences ends sooner."""
        if not len(items):
            return 0.0
        area = float(self.areas[items].sum()) / self.speed
        return max(float(self.quickest[items].max()), self.fixed_s + area)

    @cached_property
    def least_count(self) -> int:
        """As many micro-batches as the tokens take memory, at least."""
        return -(-int(self.tokens.sum()) // self.prices.capacity)

    def least_s(self, items: Ints) -> float:
        """No micro-batches of these sequences take less together."""
        more = -(-int(self.tokens[items].sum()) // self.prices.capacity) - 1
        each = float(self.prices.whole_s(self.fixed_s))
        area = float(self.areas[items].sum()) / self.speed + (more + 1) * self.fixed_s
        area = area + (more + 1) * self.prices.gather_s
        longest = float(self.prices.whole_s(self.quickest[items[0]])) + more * each
        return longest if self.prices.overlap else max(longest, area)

    def smallest(self, items: Ints, limit_s: float) -> list[Ints]:
        """By pool, the place of the smallest size that ends in time; -1 where none does."""
        found = []
        for times in self.planned:
            # Longest first: those that end in time alone are at the end.
            own = times[items, 0] > limit_s
            first = np.zeros(len(items), dtype=np.int64)
            ends = times[items[own]] <= limit_s
            place = ends.argmax(axis=1)
            first[own] = np.where(ends[np.arange(len(ends)), place], place, -1)
            found.append(first)
        return found

    def best(self, items: Sequence[int], hint_s: float = 0.0) -> Shelf | None:
        """The best shelf found for these sequences; None if they don't fit the memory.

        ``hint_s``: a time limit to try as well.
        """
        where = np.array(sorted(items), dtype=np.int64)
        floor = self.floor_s(where)
        few = len(where) * sum(times.shape[1] for times in self.times) <= _ALL_LIMITS
        units = [self.only or 1]
        if few and self.only is None:
            units = sorted({price.ranks for pool in self.prices.pools for price in pool.prices})
        found = [self._best(where, self._limits(where, floor, hint_s, few), unit) for unit in units]
        return min(filter(None, found), key=lambda shelf: shelf.seconds, default=None)

    def _best(self, items: Ints, limits: list[float], unit: int) -> Shelf | None:
        best: Shelf | None = None
        before = None
        for limit in limits:
            sizes = self.smallest(items, limit)
            key = b"".join(size.tobytes() for size in sizes)
            if key == before:
                continue
            before = key
            shelf = self._even(items, sizes, limit, unit)
            if shelf is None:
                continue
            if best is None or shelf.seconds < best.seconds:
                best = shelf
            elif best.seconds <= limit:
                break
        return best

    def _limits(self, items: Ints, floor: float, hint: float, few: bool) -> list[float]:
        every = np.append(floor * np.array(_LIMITS), [hint] * (hint > 0))
        if few:
            every = np.concatenate([every, *(times[items].ravel() for times in self.times)])
        every = np.unique(every[np.isfinite(every)]) * (1 + 1e-9)
        found: list[float] = every[every >= floor].tolist()
        return found

    def fill(
        self, items: Ints, limit_s: float, *, unit: int = 1, snap: bool = False
    ) -> tuple[Shelf, Ints]:
        """A shelf of as many of these as end in time, longest first; and the others.

        With ``snap`` the time that the groups of long ones take becomes the limit. The longest
        sequence is in the shelf, whatever it takes.
        """
        limit_s = max(limit_s, float(self.quickest[items[0]]) * (1 + 1e-9))
        sizes = self.smallest(items, limit_s)
        teams, others, left = self._opened(items, sizes, self.only or unit)
        if snap:
            limit_s = max((team.seconds for team in teams), default=0.0) or limit_s
        left += fill(teams, others, self.tokens[others], self.pairs[others], limit_s)
        return Shelf(teams), np.sort(np.array(left, dtype=np.int64))

    def even(self, items: Ints, limit_s: float, unit: int = 1) -> Shelf | None:
        """A shelf of all of these, its groups as full as each other; None if they don't fit."""
        return self._even(items, self.smallest(items, limit_s), limit_s, self.only or unit)

    def _even(self, items: Ints, sizes: list[Ints], limit: float, unit: int) -> Shelf | None:
        teams, others, left = self._opened(items, sizes, unit)
        if left or spread(teams, others, self.tokens[others], self.pairs[others], limit):
            return None
        return Shelf(teams)

    def _opened(
        self, items: Ints, sizes: list[Ints], unit: int
    ) -> tuple[list[Team], Ints, list[int]]:
        """Groups for the long ones, and of ``unit`` ranks; the other sequences; what has no room."""
        free = [len(node) for node in self.prices.nodes]
        alone = np.zeros(len(items), dtype=bool)
        fits = np.zeros(len(items), dtype=bool)
        for pool, size in zip(self.prices.pools, sizes, strict=True):
            fits |= size >= 0
            alone |= (size >= 0) & (pool.columns.ranks[size] <= unit)
        teams: list[Team] = []
        left: list[int] = items[~fits].tolist()
        for row in np.flatnonzero(fits & ~alone).tolist():
            options = [(pool, int(size[row])) for pool, size in enumerate(sizes) if size[row] >= 0]
            item = int(items[row])
            team = self._open(options, free)
            if team is None:
                left.append(item)
                continue
            team.add(item, int(self.tokens[item]), float(self.pairs[item]))
            teams.append(team)
        teams += self._others(free, unit)
        share(teams)
        return teams, items[alone], left

    def _open(self, options: list[tuple[int, int]], free: list[int]) -> Team | None:
        """A group of the option that takes least, of those that there is room for."""
        pools, most = self.prices.pools, sum(free)
        for pool, size in sorted(
            options, key=lambda o: pools[o[0]].prices[o[1]].ranks * pools[o[0]].weight
        ):
            price = pools[pool].prices[size]
            if price.ranks > most:
                continue
            taken = place(price.ranks, pools[pool].nodes, free, self.prices)
            if taken is not None:
                for node, count in taken.items():
                    free[node] -= count
                return Team(price, taken)
        return None

    def _others(self, free: list[int], unit: int) -> list[Team]:
        """Groups of ``unit`` ranks of all that are left, and single ones of what is left then."""
        prices, found = self.prices, []
        if unit > 1:
            options = [
                (index, where)
                for index, pool in enumerate(prices.pools)
                for where, price in enumerate(pool.prices)
                if price.ranks == unit
            ]
            while team := self._open(options, free):
                found.append(team)
            if self.only:
                return found
        return found + [
            Team(prices.pools[prices.pool_of_node[node]].prices[0], {node: 1})
            for node, count in enumerate(free)
            for _ in range(count)
        ]
