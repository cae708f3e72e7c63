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

import numpy as np

from longspan.planner.prices import Floats, Ints, Prices
from longspan.planner.teams import Shelf, Team, place, share

__all__ = ["Batch"]

_LIMITS = (1.0, 1.03, 1.07, 1.13, 1.25, 1.5, 2.2, 5.0)
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
        found = []
        for pool in self.prices.pools:
            times = pool.seconds(self.tokens, self.pairs)
            if self.only is not None:
                times[:, pool.columns.ranks != self.only] = np.inf
            found.append(times)
        return found

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
        for times in self.times:
            ends = times[items] <= limit_s
            first = ends.argmax(axis=1)
            found.append(np.where(ends[np.arange(len(items)), first], first, -1))
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
        found = [self._best(where, self._limits(where, floor, hint_s, few), u) for u in units]
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
            shelf = self._pack(items, sizes, limit, unit)
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

    def _pack(self, items: Ints, sizes: list[Ints], limit: float, unit: int) -> Shelf | None:
        free = [len(node) for node in self.prices.nodes]
        alone = np.zeros(len(items), dtype=bool)
        for pool, size in zip(self.prices.pools, sizes, strict=True):
            alone |= (size >= 0) & (pool.columns.ranks[size] <= unit)
        teams: list[Team] = []
        for row in np.flatnonzero(~alone).tolist():
            options = [(pool, int(size[row])) for pool, size in enumerate(sizes) if size[row] >= 0]
            team = self._open(options, free)
            if team is None:
                return None
            item = int(items[row])
            team.add(item, int(self.tokens[item]), float(self.pairs[item]))
            teams.append(team)
        teams += self._others(free, unit)
        share(teams)
        return self._spread(teams, items[alone], limit)

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

    def _spread(self, teams: list[Team], items: Ints, limit: float) -> Shelf | None:
        """Each to the group that is least full of time, and of memory."""
        kinds = {(id(team.price), team.share): team for team in teams}
        more = {key: self._seconds_more(team, items) for key, team in kinds.items()}
        adds = [more[id(team.price), team.share] for team in teams]
        took = [team.price.seconds(team.tokens, team.pairs, team.share) for team in teams]
        held = [team.tokens for team in teams]
        most = [team.price.most_tokens for team in teams]
        heap = [
            (max(seconds / limit, tokens / room), place)
            for place, (seconds, tokens, room) in enumerate(zip(took, held, most, strict=True))
        ]
        heapq.heapify(heap)
        goes = [0] * len(items)
        sizes = self.tokens[items].tolist()
        for row, size in enumerate(sizes):
            aside = []
            while heap and held[heap[0][1]] + size > most[heap[0][1]]:
                aside.append(heapq.heappop(heap))
            if not heap:
                return None
            place = heap[0][1]
            goes[row] = place
            tokens = held[place] = held[place] + size
            seconds = took[place] = took[place] + adds[place][row]
            full, full_memory = seconds / limit, tokens / most[place]
            heapq.heapreplace(heap, (full if full > full_memory else full_memory, place))
            for one in aside:
                heapq.heappush(heap, one)
        pairs = self.pairs[items].tolist()
        for row, item in enumerate(items.tolist()):
            teams[goes[row]].add(item, sizes[row], pairs[row])
        return Shelf(teams)

    def _seconds_more(self, team: Team, items: Ints) -> list[float]:
        """What each of these sequences adds to a group like this one."""
        p, tokens, pairs = team.price, self.tokens[items], self.pairs[items]
        way = p.heads_pair_s * pairs + p.heads_token_s * tokens * team.share
        if np.isfinite(p.ring_fixed_s):
            sent = p.ring_token_s * tokens * team.share
            way = np.minimum(way, np.maximum(p.ring_pair_s * pairs, sent))
        found: list[float] = (p.token_s * tokens + way).tolist()
        return found
