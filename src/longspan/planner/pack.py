"""One micro-batch: sequences into groups of any size that work side by side and end soonest.

For a time limit each sequence has a smallest group that keeps it. The long ones get such a group
each, placed inside a node where it fits; the others go one by one, longest first, to the group that
is least full of time and memory, those of the long ones among them. What comes out is then
improved by moving sequences, and ranks, away from the group that ends last.
"""

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from longspan.planner.prices import Floats, Ints, Pool, Prices
from longspan.planner.teams import Shelf, Team, place, share

__all__ = ["Batch"]

_LIMITS = (1.0, 1.03, 1.07, 1.13, 1.25, 1.5, 2.2, 5.0)
# In a shelf of many groups a sequence is left for later if so many are too full for it, and all
# that follow if so many in a row were left.
_FEW_GROUPS, _TRIES, _MISSES = 64, 8, 50
_SCANNED = 12  # so few groups are all looked at for each sequence
_ALL_LIMITS = 64  # so few sequences times sizes have all limits, and rests of all sizes, tried

_SMALL = 1024  # sequences times sizes of a batch for which one size for all is tried, too


@dataclass(frozen=True, eq=False)
class Batch:
    """The sequences of a batch, longest first, and what they take in a group of their own.

    With ``only`` all groups have that size.
    """

    prices: Prices
    tokens: Ints
    pairs: Floats
    only: int | None = None

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
        return times[which]

    @property
    def small(self) -> bool:
        """Whether there are few enough sequences, and sizes of groups, to try more ways."""
        return len(self.tokens) * sum(len(pool.prices) for pool in self.prices.pools) <= _SMALL

    @cached_property
    def areas(self) -> Floats:
        """The fewest rank-seconds each sequence takes, beside what a group takes anyway."""
        least = np.full(len(self.tokens), np.inf)
        for pool, times in zip(self.prices.pools, self.times, strict=True):
            c = pool.columns
            least = np.minimum(least, ((times - c.fixed_s) * c.ranks * pool.weight).min(axis=1))
        return least

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
            shelf, left = self._pack(items, sizes, limit, np.inf, unit)
            if left:
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
        self, items: Sequence[int], limit_s: float, *, slack: float = 1.0, strict: bool = True
    ) -> tuple[Shelf, list[int]]:
        """A shelf of as many of these as fit, longest first; and the others.

        Long ones get groups in which they take ``slack`` of the time limit; with ``strict`` no
        group takes longer than it, but for a sequence that always does.
        """
        where = np.array(items, dtype=np.int64)
        sizes = self.smallest(where, limit_s * slack)
        for pool, size in enumerate(sizes):
            late = np.flatnonzero(size < 0)
            if len(late):
                size[late] = self.smallest(where[late], limit_s)[pool]
        late = np.flatnonzero(np.max(sizes, axis=0) < 0)
        for pool, size in enumerate(sizes):
            times = self.planned[pool][where[late]]
            place = times.argmin(axis=1)
            size[late] = np.where(np.isfinite(times[np.arange(len(late)), place]), place, -1)
        end = limit_s * (1 + 1e-9) if strict else np.inf
        return self._pack(where, sizes, limit_s, end, self.only or 1)

    def _pack(
        self, items: Ints, sizes: list[Ints], limit: float, end: float, unit: int
    ) -> tuple[Shelf, list[int]]:
        free = [len(node) for node in self.prices.nodes]
        alone = np.zeros(len(items), dtype=bool)
        for pool, size in zip(self.prices.pools, sizes, strict=True):
            alone |= (size >= 0) & (pool.columns.ranks[size] <= unit)
        teams: list[Team] = []
        left: list[int] = []
        for row in np.flatnonzero(~alone).tolist():
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
        left += self._spread(teams, items[alone], limit, end)
        return Shelf(teams), sorted(left)

    def _open(self, options: list[tuple[int, int]], free: list[int]) -> Team | None:
        """A group of the option that takes least, of those that there is room for."""
        pools = self.prices.pools
        for pool, size in sorted(
            options, key=lambda o: pools[o[0]].prices[o[1]].ranks * pools[o[0]].weight
        ):
            price = pools[pool].prices[size]
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

    def _spread(self, teams: list[Team], items: Ints, limit: float, end: float) -> list[int]:
        """Each to the group that is least full of time, and of memory; those that fit none.

        No group takes longer than ``end``.
        """
        lines = [_line(team) for team in teams]
        held = [team.tokens for team in teams]
        seen = [team.pairs for team in teams]
        most = [team.price.most_tokens for team in teams]
        if len(teams) <= _SCANNED:
            return self._scan(teams, lines, items, limit, end)
        heap = [
            (max(_seconds(line, tokens, pairs) / limit, tokens / room), place)
            for place, (line, tokens, pairs, room) in enumerate(
                zip(lines, held, seen, most, strict=True)
            )
        ]
        heapq.heapify(heap)
        most_tries = len(heap) if len(heap) <= _FEW_GROUPS else _TRIES
        tries = len(heap)  # of the first, which some group holds
        left: list[int] = []
        misses = 0
        given = zip(
            items.tolist(), self.tokens[items].tolist(), self.pairs[items].tolist(), strict=True
        )
        for item, size, square in given:
            aside: list[tuple[float, int]] = []
            while misses < _MISSES and heap and len(aside) < tries:
                place = heap[0][1]
                tokens = held[place] + size
                if tokens <= most[place]:
                    pairs = seen[place] + square
                    seconds = _seconds(lines[place], tokens, pairs)
                    if seconds <= end:
                        held[place], seen[place] = tokens, pairs
                        teams[place].items.append(item)
                        full, full_memory = seconds / limit, tokens / most[place]
                        full = full if full > full_memory else full_memory
                        heapq.heapreplace(heap, (full, place))
                        misses, tries = 0, most_tries
                        break
                aside.append(heapq.heappop(heap))
            else:
                left.append(item)
                misses += 1
            for one in aside:
                heapq.heappush(heap, one)
        for team, tokens, pairs in zip(teams, held, seen, strict=True):
            team.tokens, team.pairs = tokens, pairs
        return left

    def _scan(
        self, teams: list[Team], lines: list["_Line"], items: Ints, limit: float, end: float
    ) -> list[int]:
        """As ``_spread``, but to the group that is least full with the sequence: for few groups."""
        left = []
        for item in items.tolist():
            size, square = int(self.tokens[item]), float(self.pairs[item])
            best, least = None, np.inf
            for team, line in zip(teams, lines, strict=True):
                tokens, room = team.tokens + size, team.price.most_tokens
                seconds = _seconds(line, tokens, team.pairs + square)
                if tokens <= room and seconds <= end:
                    full = max(seconds / limit, tokens / room)
                    if full < least:
                        best, least = team, full
            if best is None:
                left.append(item)
            else:
                best.add(item, size, square)
        return left


_Line = tuple[float, float, float, tuple[float, float, float, float] | None]


def _line(team: Team) -> _Line:
    """A group's seconds: fixed, a token, a pair, by head exchange; and by a ring, if it can."""
    p = team.price
    heads = (
        p.fixed_s + p.heads_fixed_s,
        p.token_s + p.heads_token_s * team.share,
        p.heads_pair_s,
    )
    if np.isinf(p.ring_fixed_s):
        return *heads, None
    # What its transfers take from computing it takes in any case.
    fixed, token_s = p.fixed_s + p.ring_fixed_s, p.token_s + p.ring_busy_s
    return *heads, (fixed, token_s, p.ring_pair_s, p.ring_token_s * team.share - p.ring_busy_s)


def _seconds(line: _Line, tokens: int, pairs: float) -> float:
    """``Price.seconds``, for the search's innermost loop."""
    fixed, token_s, pair_s, ring = line
    heads = fixed + token_s * tokens + pair_s * pairs
    if ring is None:
        return heads
    fixed, token_s, pair_s, sent_s = ring
    behind = max(pair_s * pairs, sent_s * tokens)
    return min(heads, fixed + token_s * tokens + behind)
