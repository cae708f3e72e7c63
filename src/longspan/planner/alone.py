"""What each sequence of a batch takes in a group of its own, and what none can do without."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from longspan.planner.prices import Floats, Ints, Pool, Prices

__all__ = ["LONGEST", "Batch"]

LONGEST = 512  # so many sequences, as many as ranks, and all that fit none may have larger groups
_BOTH = 1024  # so few sequences are planned with groups of powers of two, too
_SMALL = 1024  # sequences times sizes of a batch for which one size for all is tried, too


@dataclass(frozen=True, eq=False)
class Batch:
    """The sequences of a batch, longest first.

    With ``only`` all groups have that size, with ``powers`` all are powers of two.
    """

    prices: Prices
    tokens: Ints
    pairs: Floats
    only: int | None = None
    powers: bool = False

    @cached_property
    def long(self) -> int:
        """How many of the longest may have groups of all sizes; others have the smallest."""
        if self.only is not None:
            return len(self.tokens)
        most = min(pool.prices[0].most_tokens for pool in self.prices.pools)
        some = min(max(LONGEST, self.prices.world), len(self.tokens))
        return max(some, int((self.tokens > most).sum()))

    @cached_property
    def times(self) -> list[Floats]:
        """Seconds alone of the long ones, by pool: (sequences, sizes); infinite if not allowed."""
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

    def _alone(self, pool: Pool, shares: int | Ints) -> Floats:
        ranks = pool.columns.ranks
        times = pool.seconds(self.tokens[: self.long], self.pairs[: self.long], shares)
        if self.only is not None:
            times[:, ranks != self.only] = np.inf
        if self.powers:
            times[:, (ranks & (ranks - 1)) != 0] = np.inf
        return times

    @cached_property
    def smallest_s(self) -> list[Floats]:
        """Seconds of all sequences alone in the smallest group, by pool."""
        found = []
        for pool, times in zip(self.prices.pools, self.planned, strict=True):
            first = Pool(pool.nodes, pool.weight, pool.prices[:1])
            rest = first.seconds(self.tokens[self.long :], self.pairs[self.long :])
            found.append(np.append(times[:, 0], rest))
        return found

    @cached_property
    def smallest_areas(self) -> Floats:
        """Rank-seconds of all sequences alone in the smallest group, beside what that takes."""
        least = np.full(len(self.tokens), np.inf)
        for pool, times in zip(self.prices.pools, self.smallest_s, strict=True):
            first = Pool(pool.nodes, pool.weight, pool.prices[:1])
            own = np.minimum(*first.added_s(self.tokens, self.pairs))[:, 0]
            own = np.where(np.isfinite(times), own, np.inf)
            least = np.minimum(least, own * pool.prices[0].ranks * pool.weight)
        return least

    @cached_property
    def areas(self) -> Floats:
        """The fewest rank-seconds each sequence takes, beside what a group takes anyway."""
        least = self.smallest_areas.copy()
        for pool, times in zip(self.prices.pools, self.times, strict=True):
            own = np.minimum(*pool.added_s(self.tokens[: self.long], self.pairs[: self.long]))
            own = np.where(np.isfinite(times), own, np.inf) * pool.columns.ranks * pool.weight
            least[: self.long] = np.minimum(least[: self.long], own.min(axis=1))
        return least

    @cached_property
    def quickest(self) -> Floats:
        """The least seconds that each sequence takes in any group."""
        best = np.min(self.smallest_s, axis=0)
        best[: self.long] = np.min([times.min(axis=1) for times in self.times], axis=0)
        found: Floats = best
        return found

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

    @property
    def small(self) -> bool:
        """Whether there are few enough sequences, and sizes of groups, to try more ways.

        Counted are powers of two, as with any size nothing may be left out that they have tried.
        """
        sizes = [price.ranks for pool in self.prices.pools for price in pool.prices]
        powers = sum(size & (size - 1) == 0 for size in sizes)
        return len(self.tokens) * (powers or len(sizes)) <= _SMALL

    @cached_property
    def sizes(self) -> list[int]:
        """The sizes that groups may have, of every pool."""
        sizes = [price.ranks for pool in self.prices.pools for price in pool.prices]
        if self.only is not None:
            return [size for size in sizes if size == self.only]
        return [size for size in sizes if not self.powers or size & (size - 1) == 0]

    @property
    def any_size(self) -> bool:
        """Whether not all sizes are powers of two, and sequences few enough to try those, too."""
        sizes = {price.ranks for pool in self.prices.pools for price in pool.prices}
        return len(self.tokens) <= _BOTH and any(size & (size - 1) for size in sizes)

    def most_s(self, limit_s: float) -> int:
        """How many of the longest take more than this in some pool's smallest group."""
        return max(
            len(times) - int(np.searchsorted(times[::-1], limit_s, side="right"))
            for times in self.smallest_s
        )

    def least_limit_s(self, item: int) -> float:
        """The smallest time limit that this sequence has a group for."""
        by_pool = self.planned if item < self.long else self.smallest_s
        return min(float(times[item].min()) for times in by_pool)

    def floor_s(self, items: Ints) -> float:
        """No micro-batch of these sequences, longest first, ends sooner."""
        area = float(self.areas[items].sum()) / self.speed
        return max(float(self.quickest[items[0]]), self.fixed_s + area)

    def least_count(self, items: Ints) -> int:
        """How many micro-batches' memory the tokens of these sequences take, at least."""
        return -(-int(self.tokens[items].sum()) // self.prices.capacity)

    def least_s(self, items: Ints) -> float:
        """No micro-batches of these sequences, longest first, take less together."""
        prices, count = self.prices, self.least_count(items)
        area = float(self.areas[items].sum()) / self.speed + count * self.fixed_s
        area += 0.0 if prices.overlap else count * prices.gather_s
        longest = prices.whole_s(self.quickest[items[0]])
        longest += (count - 1) * prices.whole_s(self.fixed_s)
        return max(float(longest), area)

    def smallest(self, items: Ints, limit_s: float) -> list[Ints]:
        """By pool, the place of the smallest size that ends in time; -1 where none does.

        That is the first for all that aren't among the long ones.
        """
        found = []
        for times, alone in zip(self.planned, self.smallest_s, strict=True):
            own = np.flatnonzero((alone[items] > limit_s) & (items < self.long))
            ends = times[items[own]] <= limit_s
            first = ends.argmax(axis=1)
            size = np.zeros(len(items), dtype=np.int64)
            size[own] = np.where(ends[np.arange(len(own)), first], first, -1)
            found.append(size)
        return found
