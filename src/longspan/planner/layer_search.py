"""Searches the cheapest assignment of choices to a model's layers.

A step takes the sum of all costs that nothing hides, and the gradient reductions as far as
backward doesn't hide them: now + max(0, later). That is the largest of now + μ·later for μ from 0
to 1, so whatever μ, the cheapest choices for it are a lower bound, and at 0 or 1 most often the
answer.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod

import numpy as np
from numpy.typing import NDArray

from longspan.cluster.spec import Cluster
from longspan.errors import ConfigError
from longspan.planner.choices import Choice, mesh_of
from longspan.planner.eliminate import Floats
from longspan.planner.graph import Graph
from longspan.planner.price import OPTIONS, Node, Prices, Pricing
from longspan.planner.prune import dearer_by, undominated
from longspan.planner.solve import solve

__all__ = ["Assignment", "Bools", "Found", "Planner"]

Bools = NDArray[np.bool_]
Assignment = tuple[int, ...]  # for each node: choice · options + option


@dataclass(frozen=True, slots=True)
class Found:
    """An assignment, what it takes and holds, and what no other takes less than."""

    assignment: Assignment
    seconds: float
    bound: float
    memory: float


class Planner:
    """Everything that is known of one model on one cluster, to be asked in several ways."""

    def __init__(
        self,
        graph: Graph,
        cluster: Cluster,
        pricing: Pricing | None = None,
        ranks: int | None = None,
    ) -> None:
        world = cluster.ranks if ranks is None else ranks
        if not 1 <= world <= cluster.ranks:
            raise ConfigError(
                f"{world} ranks on a cluster of {cluster.ranks}: give 1 to all of them"
            )
        self.graph, self.cluster = graph, cluster
        self.pricing = pricing or Pricing()
        self.sizes = mesh_of(world, _levels(cluster, world))
        self.axes = {f"m{axis}": size for axis, size in enumerate(self.sizes)}
        self._inside = len(_axes_within(cluster, self.sizes))
        self.prices = Prices(graph, cluster, self.sizes, self.pricing, self._inside)
        self.nodes = self.prices.nodes()
        self.edges = self.prices.edges(self.nodes)
        self.names = [graph.layers[node.layers[0]].name for node in self.nodes]
        self._dearer: dict[tuple[int, bool], Floats] = {}
        self.near: list[list[tuple[int, Floats]]] = [[] for _ in self.nodes]
        self._pairs_of: list[list[tuple[int, int]]] = [[] for _ in self.nodes]
        for (u, v), table in self.edges.items():
            self.near[u].append((v, table))
            self.near[v].append((u, table.T))
            self._pairs_of[u].append((u, v))
            self._pairs_of[v].append((u, v))

    def best(
        self,
        limit: float | None = None,
        allowed: Sequence[Bools] | None = None,
    ) -> Found:
        """The cheapest assignment, of what is ``allowed``, within ``limit``.

        ``limit``: bytes on a device. Raises MemoryLimitError if nothing fits.
        """
        walls = allowed or [np.ones(node.costs.now.shape, bool) for node in self.nodes]
        now = [np.where(w, n.costs.now, np.inf) for n, w in zip(self.nodes, walls, strict=True)]
        later = [n.costs.later for n in self.nodes]
        found: Found | None = None
        bound = -np.inf

        def ask(share: float) -> tuple[float, float]:
            nonlocal found, bound
            costs = [a + share * b for a, b in zip(now, later, strict=True)]
            assignment, least = self._solve(costs, limit)
            bound = max(bound, least)
            for one in (assignment, self._improved(assignment, walls, limit)):
                seconds = self.measure(one)
                held = self.memory(one)
                if (found is None or seconds < found.seconds) and (limit is None or held <= limit):
                    found = Found(one, seconds, 0.0, held)
            return self._sums(assignment)

        # Each answer is a line over the share; the next is asked where the best two cross.
        hidden = ask(1.0)
        open_ = ask(0.0) if hidden[1] < 0 else hidden
        if hidden[1] < 0 < open_[1]:
            for _ in range(8):
                share = (hidden[0] - open_[0]) / (open_[1] - hidden[1])
                line = ask(share)
                if line in (hidden, open_):
                    break
                hidden, open_ = (line, open_) if line[1] <= 0 else (hidden, line)
        assert found is not None
        return Found(found.assignment, found.seconds, min(bound, found.seconds), found.memory)

    def _improved(
        self, assignment: Assignment, walls: Sequence[Bools], limit: float | None
    ) -> Assignment:
        """Each node in turn takes what makes the step quickest, as long as one gets quicker."""
        at = list(assignment)
        now, later = self._sums(assignment)
        held = self.memory(assignment)
        options = len(OPTIONS)
        for _ in range(20):
            before = now + max(0.0, later)
            for index, node in enumerate(self.nodes):
                joined = np.zeros(len(node.choices))
                for other, table in self.near[index]:
                    joined = joined + table[:, at[other] // options]
                own = np.where(walls[index], node.costs.now, np.inf) + joined[:, None]
                mine, more = at[index], node.costs.memory
                new_now = now - own.flat[mine] + own
                new_later = later - node.costs.later.flat[mine] + node.costs.later
                new_held = held - more.flat[mine] + more
                whole = new_now + np.maximum(0.0, new_later)
                if limit is not None:
                    whole = np.where(new_held <= limit, whole, np.inf)
                best = int(np.argmin(whole))
                if whole.flat[best] < whole.flat[mine] * (1 - 1e-9):
                    at[index] = best
                    now, later = float(new_now.flat[best]), float(new_later.flat[best])
                    held = float(new_held.flat[best])
            if now + max(0.0, later) >= before * (1 - 1e-6):
                break
        return tuple(at)

    def _solve(self, costs: Sequence[Floats], limit: float | None) -> tuple[Assignment, float]:
        """The cheapest assignment, searched without what is ruled out or dominated, and a bound."""
        kept = []
        for index, (node, cost) in enumerate(zip(self.nodes, costs, strict=True)):
            possible = np.flatnonzero(np.isfinite(cost).any(axis=1))
            held = None if limit is None else node.costs.memory[possible]
            dearer = [
                self._dearer_by(pair, index == pair[1])[np.ix_(possible, possible)]
                for pair in self._pairs_of[index]
            ]
            kept.append(possible[undominated(cost[possible], dearer, held)])
        answer = solve(
            [cost[rows] for cost, rows in zip(costs, kept, strict=True)],
            [(u, v, t[np.ix_(kept[u], kept[v])]) for (u, v), t in self.edges.items()],
            memory=None
            if limit is None
            else [n.costs.memory[rows] for n, rows in zip(self.nodes, kept, strict=True)],
            limit=limit,
            names=self.names,
        )
        options = len(OPTIONS)
        assignment = tuple(
            int(rows[at // options]) * options + at % options
            for rows, at in zip(kept, answer.assignment, strict=True)
        )
        return assignment, answer.bound

    def _dearer_by(self, pair: tuple[int, int], second: bool) -> Floats:
        table = self.edges[pair]
        key = (id(table), second)  # tables of repeated blocks are one and the same
        if key not in self._dearer:
            self._dearer[key] = dearer_by(table.T if second else table)
        return self._dearer[key]

    def measure(self, assignment: Assignment) -> float:
        """Seconds of a step."""
        now, later = self._sums(assignment)
        return now + max(0.0, later)

    def _sums(self, assignment: Assignment) -> tuple[float, float]:
        now = later = 0.0
        for node, at in zip(self.nodes, assignment, strict=True):
            now += float(node.costs.now.flat[at])
            later += float(node.costs.later.flat[at])
        for (u, v), table in self.edges.items():
            now += float(table[self.choice_of(assignment, u), self.choice_of(assignment, v)])
        return now, later

    def memory(self, assignment: Assignment) -> float:
        """Bytes on a device."""
        return sum(
            float(node.costs.memory.flat[at])
            for node, at in zip(self.nodes, assignment, strict=True)
        )

    @staticmethod
    def choice_of(assignment: Assignment, node: int) -> int:
        """The place of a node's choice."""
        return assignment[node] // len(OPTIONS)

    # Alternatives

    def data_parallel(self, zero: bool = False) -> Found:
        """Every layer splits the batch as far as can be; with ``zero`` parameters are sharded."""
        everywhere = len(self.sizes)

        def fits(node: Node) -> Callable[[Choice], bool]:
            most = max(choice.dims.count("b") for choice in node.choices)
            return lambda choice: (
                choice.dims == ("b",) * most + (None,) * (everywhere - most) and choice.to is None
            )

        return self._only(fits, lambda option: option == (zero, False))

    def tensor_parallel(self) -> Found:
        """Megatron-style: the batch over the nodes, and everything else within a node."""
        outside = len(self.sizes) - self._inside

        def fits(node: Node) -> Callable[[Choice], bool]:
            most = max(choice.dims[:outside].count("b") for choice in node.choices)
            return lambda choice: (
                choice.dims[:outside] == ("b",) * most + (None,) * (outside - most)
                and "b" not in choice.dims[outside:]
            )

        return self._only(fits, lambda option: option == (False, False))

    def _only(
        self,
        fits: Callable[[Node], Callable[[Choice], bool]],
        option: Callable[[tuple[bool, bool]], bool],
    ) -> Found:
        allowed = []
        for node in self.nodes:
            test = fits(node)
            wall = np.zeros(node.costs.now.shape, bool)
            chosen = [at for at, choice in enumerate(node.choices) if test(choice)]
            columns = [at for at, one in enumerate(OPTIONS) if option(one)]
            for at in chosen or range(len(node.choices)):
                usable = [c for c in columns if np.isfinite(node.costs.now[at, c])]
                wall[at, usable or [0]] = True
            allowed.append(wall)
        return self.best(allowed=allowed)


def _levels(cluster: Cluster, world: int) -> list[int]:
    """Sites, nodes of a site and devices of a node, as the first ``world`` ranks have them."""
    fabric = cluster.fabric
    nodes, sites = fabric.node[:world], fabric.site[:world]
    devices = np.bincount(nodes)
    in_sites = np.array([len(np.unique(nodes[sites == site])) for site in np.unique(sites)])
    if len(set(devices)) > 1 or len(set(in_sites)) > 1:
        return [world]
    return [len(in_sites), int(in_sites[0]), int(devices[0])]


def _axes_within(cluster: Cluster, sizes: Sequence[int]) -> tuple[int, ...]:
    """The mesh axes inside a node, or all where every node has one device."""
    world = prod(sizes)
    levels = _levels(cluster, world)
    inside = levels[-1] if len(levels) == 3 and levels[-1] > 1 else world
    axes: list[int] = []
    for axis in reversed(range(len(sizes))):
        if prod(sizes[at] for at in axes) < inside:
            axes.insert(0, axis)
    return tuple(axes)
