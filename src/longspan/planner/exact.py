"""The best plan of a small batch, proven: a mixed integer program, solved by HiGHS.

Each micro-batch has places where groups can be: so many ranks of one node, or whole nodes and a
part of another. A place is used or not, a sequence is in one place, a micro-batch lasts as long as
its slowest place, and no node gives more ranks than it has. Time is linear in tokens and pairs, but
for a ring that hides what it sends: that is two lower limits. The program has as many variables as
sequences times places times micro-batches, so it is for small ones.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import highspy
import numpy as np

from longspan.planner.alone import Batch
from longspan.planner.prices import Price, Prices
from longspan.planner.search import total_s
from longspan.planner.teams import Shelf, Team

__all__ = ["solve_exactly"]


@dataclass(frozen=True, slots=True)
class _Place:
    """A group that may be: its price, the ranks it takes of each node, and whether it is a ring."""

    price: Price
    ranks: tuple[tuple[int, int], ...]
    ring: bool


def solve_exactly(
    batch: Batch, shelves: list[Shelf], *, limit_s: float = 60.0
) -> tuple[list[Shelf], float]:
    """The best micro-batches, and the seconds that none can beat, what a batch takes anyway apart.

    ``shelves`` is a plan to start from, and what is returned if nothing better is found in
    ``limit_s`` seconds. As many micro-batches as it has, and one more, are considered: the bound
    holds for plans with no more.
    """
    model = _Model(batch, len(shelves) + 1)
    found, bound = model.solve(limit_s)
    if found and total_s(batch, found) < total_s(batch, shelves):
        shelves = found
    return shelves, min(bound, total_s(batch, shelves))


class _Model:
    def __init__(self, batch: Batch, micro_batches: int) -> None:
        self.batch = batch
        self.places = list(_places(batch.prices))
        self.solver = highspy.Highs()
        self.solver.silent()
        self.ends = [self.solver.addVariable(lb=0.0) for _ in range(micro_batches)]
        self.goes: list[list[dict[int, Any]]] = []
        for end in self.ends:
            self.goes.append(self._micro_batch(end))
        for item in range(len(batch.tokens)):
            every = [goes[item] for micro in self.goes for goes in micro if item in goes]
            self.solver.addConstr(self.solver.qsum(every) == 1)
        for one, other in zip(self.ends, self.ends[1:], strict=False):
            self.solver.addConstr(one >= other)

    def _micro_batch(self, end: Any) -> list[dict[int, Any]]:
        """Variables and constraints of one; by place, which sequences go there."""
        batch, solver = self.batch, self.solver
        prices, found, used = batch.prices, [], []
        begun = solver.addBinary()
        if prices.overlap:
            solver.addConstr(end >= prices.gather_s * begun)
        gathered = 0.0 if prices.overlap else prices.gather_s
        for place in self.places:
            price, here = place.price, solver.addBinary()
            fits = [i for i, t in enumerate(batch.tokens.tolist()) if t <= price.most_tokens]
            goes = {item: solver.addBinary() for item in fits}
            for one in goes.values():
                solver.addConstr(one <= here)
            solver.addConstr(here <= begun)
            tokens = [(float(batch.tokens[i]), x) for i, x in goes.items()]
            pairs = [(float(batch.pairs[i]), x) for i, x in goes.items()]
            solver.addConstr(solver.qsum([t * x for t, x in tokens]) <= price.most_tokens)
            for fixed, token_s, pair_s in _lines(place):
                took = solver.qsum([t * token_s * x for t, x in tokens])
                took += solver.qsum([p * pair_s * x for p, x in pairs])
                solver.addConstr(took + (fixed + gathered) * here <= end)
            used.append(here)
            found.append(goes)
        for node, ranks in enumerate(prices.nodes):
            taken = [
                count * here
                for place, here in zip(self.places, used, strict=True)
                for where, count in place.ranks
                if where == node
            ]
            solver.addConstr(solver.qsum(taken) <= len(ranks))
        return found

    def solve(self, limit_s: float) -> tuple[list[Shelf], float]:
        """The best found, and the proven bound."""
        solver, batch = self.solver, self.batch
        solver.setOptionValue("time_limit", limit_s)
        solver.setOptionValue("mip_rel_gap", 1e-6)
        solver.minimize(solver.qsum(self.ends))
        bound = float(solver.getInfo().mip_dual_bound)
        if solver.getInfo().primal_solution_status != 2:
            return [], bound
        values = solver.getSolution().col_value
        shelves = []
        for micro in self.goes:
            teams = []
            for place, goes in zip(self.places, micro, strict=True):
                team = Team(place.price, dict(place.ranks))
                for item, variable in goes.items():
                    if values[variable.index] > 0.5:
                        team.add(item, int(batch.tokens[item]), float(batch.pairs[item]))
                if team.items:
                    teams.append(team)
            if teams:
                shelves.append(Shelf(teams))
        return shelves, bound


def _lines(place: _Place) -> list[tuple[float, float, float]]:
    """(seconds, a token, a pair) of which a group takes the largest."""
    p = place.price
    if not place.ring:
        return [(p.fixed_s + p.heads_fixed_s, p.token_s + p.heads_token_s, p.heads_pair_s)]
    fixed = p.fixed_s + p.ring_fixed_s
    return [
        (fixed, p.token_s + p.ring_busy_s, p.ring_pair_s),
        (fixed, p.token_s + p.ring_token_s, 0.0),
    ]


def _places(prices: Prices) -> Iterator[_Place]:
    for pool in prices.pools:
        for price in pool.prices:
            ways = [False, True] if np.isfinite(price.ring_fixed_s) else [False]
            for taken in _rooms(price.ranks, pool.nodes, prices):
                # A place of few ranks is there as often as it can be used at once.
                times = 1
                if len(taken) == 1:
                    times = len(prices.nodes[taken[0][0]]) // price.ranks
                for ring in ways:
                    for _ in range(times):
                        yield _Place(price, taken, ring)


def _rooms(
    size: int, nodes: tuple[int, ...], prices: Prices
) -> Iterator[tuple[tuple[int, int], ...]]:
    """The ranks of one node each, or where none is so large, of whole nodes and a rest."""
    large = [node for node in nodes if len(prices.nodes[node]) >= size]
    for node in large:
        yield ((node, size),)
    if large:
        return
    for start in range(len(nodes)):
        taken, left = [], size
        for node in nodes[start:] + nodes[:start]:
            part = min(left, len(prices.nodes[node]))
            taken.append((node, part))
            left -= part
            if not left:
                break
        if not left:
            yield tuple(sorted(taken))
