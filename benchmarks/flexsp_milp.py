"""FlexSP's planner as published, and its baselines: what ours is compared with.

A batch, sorted by length, is cut into M chunks of as even a number of tokens as can be, for M from
the least that fits the memory to four more (section 4.3 of arXiv 2412.01523: sequence blaster). A
chunk's lengths become 16 buckets by dynamic programming (section 4.2), and a mixed integer program
says how many of each bucket go to each group of 2, 4, … ranks (section 4.1), here solved by HiGHS.
As in the released code groups of one rank are left out, and programs that find nothing in their
time are given up. The baselines pack by best fit, decreasing, into groups of one size filled to
90 % of their memory.
"""

from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context

import highspy
import numpy as np

from longspan.planner.prices import Floats, Ints, Price, Prices

BUCKETS, MORE_CHUNKS, FILL = 16, 5, 0.9


@dataclass(frozen=True)
class Milp:
    """The planner, with seconds and relative gap at which a program is left."""

    prices: Prices
    limit_s: float = 10.0
    gap: float = 0.0

    @property
    def options(self) -> list[Price]:
        """Prices of the sizes it may use."""
        return [price for price in self.prices.pools[0].prices if price.ranks > 1]

    @property
    def room(self) -> int:
        """Tokens that fit a rank."""
        return self.prices.pools[0].prices[0].most_tokens

    def plan(self, lengths: list[int]) -> float:
        """Predicted seconds of a batch; infinite if no number of chunks worked out."""
        longest_first = np.sort(np.array(lengths))[::-1]
        everything = self.room * self.prices.world
        least = -(-int(longest_first.sum()) // everything)
        while max(int(part.sum()) for part in chunks(longest_first, least)) >= everything:
            least += 1
        # As published, every number of chunks has a process of its own: of two, those that take
        # longest first.
        counts = range(least, least + MORE_CHUNKS)[::-1]
        with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as workers:
            return min(workers.map(partial(self.of_chunks, longest_first), counts))

    def of_chunks(self, longest_first: Ints, count: int) -> float:
        """Predicted seconds with so many chunks; infinite if a program finds nothing."""
        total = 0.0
        for part in chunks(longest_first, count):
            total += self.solve(part)
            if not np.isfinite(total):
                break
        return total

    def least_size(self, tokens: int) -> int:
        """The smallest power of two of ranks that holds so many tokens."""
        return 1 << (-(-tokens // self.room) - 1).bit_length()

    def solve(self, part: Ints) -> float:
        """Predicted seconds of one micro-batch by the program's grouping."""
        least = [self.least_size(int(tokens)) for tokens in part]
        largest = max(least)
        world, held = self.prices.world, Counter(least)[largest]
        slots: list[Price] = []
        for price in self.options:
            left = world - (largest * held if price.ranks < largest else 0)
            slots += [price] * (left // price.ranks)
        buckets = self.bucketed(np.sort(part))
        tops = [int(bucket[-1]) for bucket in buckets]
        taken = self._program(slots, buckets, tops)
        if taken is None:
            return np.inf
        left = [bucket.tolist() for bucket in buckets]
        slowest = 0.0
        for place, price in enumerate(slots):
            group: list[int] = []
            for index, own in enumerate(left):
                group += [own.pop() for _ in range(taken[index, place])]
            if group:
                pairs = float(np.square(np.array(group, dtype=np.float64)).sum())
                slowest = max(slowest, price.seconds(sum(group), pairs))
        return slowest

    def bucketed(self, ascending: Ints) -> list[Ints]:
        """At least 16 buckets; more, if rounding up to their tops would take too much memory."""
        count = min(BUCKETS, len(ascending))
        most = (int(ascending.sum()) + self.room * self.prices.world) / 2
        while True:
            found = buckets_of(ascending, count)
            if sum(len(bucket) * int(bucket[-1]) for bucket in found) <= most:
                return found
            count += 1

    def _program(self, slots: list[Price], buckets: list[Ints], tops: list[int]) -> Ints | None:
        many, places = len(buckets), len(slots)
        solver = highspy.Highs()
        solver.silent()
        solver.setOptionValue("time_limit", self.limit_s)
        solver.setOptionValue("mip_rel_gap", self.gap)
        solver.setOptionValue("threads", 1)
        end = solver.addVariable(lb=0.0)
        goes = [
            [
                solver.addIntegral(
                    lb=0, ub=len(bucket) if price.ranks >= self.least_size(top) else 0
                )
                for price in slots
            ]
            for bucket, top in zip(buckets, tops, strict=True)
        ]
        used = [solver.addBinary() for _ in slots]
        for index, bucket in enumerate(buckets):
            solver.addConstr(solver.qsum(goes[index]) == len(bucket))
        total = sum(map(len, buckets))
        for place, price in enumerate(slots):
            column = [goes[index][place] for index in range(many)]
            tokens = solver.qsum([top * x for top, x in zip(tops, column, strict=True)])
            solver.addConstr(tokens <= price.most_tokens)
            alone = [price.seconds(top, float(top) ** 2) - price.fixed_s for top in tops]
            took = solver.qsum([t * x for t, x in zip(alone, column, strict=True)])
            solver.addConstr(took + price.fixed_s <= end)
            solver.addConstr(solver.qsum(column) <= total * used[place])
            solver.addConstr(solver.qsum(column) >= used[place])
        ranks = solver.qsum([p.ranks * u for p, u in zip(slots, used, strict=True)])
        solver.addConstr(ranks == self.prices.world)
        solver.minimize(end)
        if solver.getInfo().primal_solution_status != 2:
            return None
        values = solver.getSolution().col_value
        counts = np.rint(np.array(values[1 : 1 + many * places])).astype(np.int64)
        return counts.reshape(many, places)


def chunks(longest_first: Ints, count: int) -> list[Ints]:
    """Consecutive parts whose largest number of tokens is least."""
    added = np.concatenate([[0], np.cumsum(longest_first)])
    n = len(longest_first)
    cost = added[1:, None] - added[None, :-1].astype(np.float64)  # [end - 1, start]
    cost[np.arange(n)[:, None] < np.arange(n)[None, :]] = np.inf
    return [longest_first[a:b] for a, b in _cuts(cost, count, np.maximum)]


def buckets_of(ascending: Ints, count: int) -> list[Ints]:
    """Consecutive parts of which rounding up to the largest adds the fewest tokens."""
    added = np.concatenate([[0], np.cumsum(ascending)])
    n = len(ascending)
    lengths = np.arange(1, n + 1)[:, None] - np.arange(n)[None, :]
    cost = ascending[:, None] * lengths - (added[1:, None] - added[None, :-1]).astype(np.float64)
    cost[lengths < 1] = np.inf
    return [ascending[a:b] for a, b in _cuts(cost, count, np.add)]


def _cuts(cost: Floats, count: int, join: np.ufunc) -> list[tuple[int, int]]:
    n = len(cost)
    least = np.full(n + 1, np.inf)
    least[0] = 0.0
    came = []
    for _ in range(count):
        through = join(least[None, :-1], cost)
        start = through.argmin(axis=1)
        least = np.concatenate([[np.inf], through[np.arange(n), start]])
        came.append(start)
    found, end = [], n
    for start in came[::-1]:
        found.append((int(start[end - 1]), end))
        end = found[-1][0]
    return found[::-1]


def best_fit(lengths: list[int], prices: Prices, size: int) -> float:
    """Predicted seconds with groups of one size, packed as FlexSP's baselines are."""
    price = next(one for one in prices.pools[0].prices if one.ranks == size)
    room = max(FILL * price.most_tokens, max(lengths))
    if max(lengths) > price.most_tokens:
        return np.inf
    groups: list[list[int]] = []
    held: list[int] = []
    for tokens in sorted(lengths, reverse=True):
        fits = [place for place, own in enumerate(held) if own + tokens <= room]
        if fits:
            fullest = max(fits, key=held.__getitem__)
            groups[fullest].append(tokens)
            held[fullest] += tokens
        else:
            groups.append([tokens])
            held.append(tokens)
    at_once = prices.world // size
    while len(groups) % at_once:  # an empty group takes one sequence of the last that has several
        donor = next(group for group in groups[::-1] if len(group) > 1)
        groups.append([donor.pop(0)])
    if size >= 16:
        _evened(groups[-at_once:], room)
    took = [price.seconds(sum(group), sum(float(t) ** 2 for t in group)) for group in groups]
    return sum(max(took[start : start + at_once]) for start in range(0, len(took), at_once))


def _evened(groups: list[list[int]], room: float) -> None:
    """The last micro-batch's tokens dealt evenly, from earlier groups to later ones."""
    mean = sum(map(sum, groups)) // len(groups)
    for index, group in enumerate(groups):
        for donor in groups[:index]:
            for tokens in list(donor):
                if sum(group) >= mean or sum(donor) <= mean or len(donor) < 2:
                    break
                if sum(group) + tokens <= room:
                    donor.remove(tokens)
                    group.append(tokens)
