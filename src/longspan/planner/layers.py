"""The cheapest way to split every layer of a model over a cluster (PaSE, arXiv 2407.04001).

``capture`` reads the model, ``price`` says what every choice costs, ``solve`` finds the best of
them. A step takes the sum of all costs that nothing hides, and the gradient reductions as far as
backward doesn't hide them: now + max(0, later). That is the largest of now + μ·later for μ from 0
to 1, so whatever μ, the cheapest choices for it are a lower bound, and at 0 or 1 most often the
answer.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import nn

from longspan.cluster.spec import Cluster
from longspan.errors import ConfigError
from longspan.plan import LayerChoice, LayerPlan
from longspan.planner.capture import capture
from longspan.planner.choices import Choice, codes_of, given_codes, mesh_of
from longspan.planner.eliminate import Floats
from longspan.planner.graph import Graph
from longspan.planner.price import OPTIONS, Node, Prices, Pricing
from longspan.planner.prune import dearer_by, undominated
from longspan.planner.solve import solve
from longspan.planner.wires import PARTIAL, REPLICATE, Codes

__all__ = ["Planner", "plan_layers"]

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
        self._near: list[list[tuple[int, Floats]]] = [[] for _ in self.nodes]
        self._pairs_of: list[list[tuple[int, int]]] = [[] for _ in self.nodes]
        for (u, v), table in self.edges.items():
            self._near[u].append((v, table))
            self._near[v].append((u, table.T))
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
        hidden, open_ = ask(1.0), ask(0.0)
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
                for other, table in self._near[index]:
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
            now += float(table[self._choice(assignment, u), self._choice(assignment, v)])
        return now, later

    def memory(self, assignment: Assignment) -> float:
        """Bytes on a device."""
        return sum(
            float(node.costs.memory.flat[at])
            for node, at in zip(self.nodes, assignment, strict=True)
        )

    @staticmethod
    def _choice(assignment: Assignment, node: int) -> int:
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

    # The plan

    def plan(self, found: Found, model: str, alternatives: Mapping[str, float]) -> LayerPlan:
        """The rows of an assignment."""
        rows: list[LayerChoice | None] = [None] * len(self.graph.layers)
        for index, node in enumerate(self.nodes):
            second, more, why = self._runner_up(found.assignment, index)
            at = found.assignment[index]
            choice = node.choices[at // len(OPTIONS)]
            zero, again = OPTIONS[at % len(OPTIONS)]
            for place in node.layers:
                rows[place] = self._row(place, choice, zero, again, (second, more, why))
        return LayerPlan(
            model=model,
            cluster=self.cluster.name,
            axes=self.axes,
            layers=tuple(row for row in rows if row is not None),
            seconds=found.seconds,
            lower_bound_s=found.bound,
            memory_bytes=int(found.memory),
            alternatives=dict(alternatives),
            notes=self.graph.notes,
        )

    def _row(
        self, place: int, choice: Choice, zero: bool, again: bool, told: tuple[str, float, str]
    ) -> LayerChoice:
        layer = self.graph.layers[place]
        now, later, memory = self.prices.layer(layer, choice)
        option = OPTIONS.index((zero, again))
        splits: dict[str, tuple[str, ...]] = {}
        for axis, dim in zip(self.axes, choice.dims, strict=True):
            if dim is not None:
                splits[dim] = (*splits.get(dim, ()), axis)
        inputs = []
        for operand in layer.inputs:
            if operand.source is not None:
                giver = self.graph.layers[operand.source]
                taken, _ = given_codes(operand, giver.output.shape, choice, self.sizes)
                inputs.append((giver.name, self._words(taken)))
        weights = {w.path: self._words(codes_of(w.dims, choice)) for w in layer.weights}
        return LayerChoice(
            name=layer.name,
            module=layer.module,
            node=layer.node,
            kind=layer.kind,
            splits=splits,
            inputs=tuple(inputs),
            weights=weights,
            output=self._words(self.prices.output(layer, choice)),
            zero=zero,
            recompute=again,
            seconds=float(now[option] + max(0.0, later[option])),
            memory_bytes=int(memory[option]),
            runner_up=told[0],
            runner_up_s=told[1],
            why=told[2],
        )

    def _words(self, codes: Codes) -> dict[str, str]:
        words = {REPLICATE: "R", PARTIAL: "P"}
        return {
            axis: words.get(code, f"S({code})")
            for axis, code in zip(self.axes, codes, strict=True)
            if code != REPLICATE
        }

    def _others(self, assignment: Assignment, index: int) -> tuple[Floats, Floats]:
        """Seconds of each choice of one node while all others stay: all, and handing on alone."""
        node = self.nodes[index]
        total = node.costs.now + np.maximum(0.0, node.costs.later)
        moves = np.zeros(len(node.choices))
        for other, table in self._near[index]:
            moves = moves + table[:, self._choice(assignment, other)]
        whole = total.min(axis=1) + moves
        mine, option = divmod(assignment[index], len(OPTIONS))
        whole[mine] = total[mine, option] + moves[mine]
        return whole, moves

    def _runner_up(self, assignment: Assignment, index: int) -> tuple[str, float, str]:
        """The next best choice of a node, what it costs more, and why the best is better."""
        node = self.nodes[index]
        whole, moves = self._others(assignment, index)
        mine, option = divmod(assignment[index], len(OPTIONS))
        others = np.where(np.arange(len(whole)) == mine, np.inf, whole)
        if not np.isfinite(others.min(initial=np.inf)):
            return "", 0.0, "there is no other choice"
        second = int(np.argmin(others))
        more = float(others[second] - whole[mine])
        # The batch split is what everybody knows: a choice is explained beside it.
        pure = [at for at, c in enumerate(node.choices) if set(c.dims) == {"b"} and not c.to]
        against = pure[0] if pure and pure[0] != mine else second
        zero = OPTIONS[option][0]
        saves: dict[str, float] = {}
        for place in node.layers:
            layer = self.graph.layers[place]
            one = self.prices.parts(layer, node.choices[mine], zero)
            two = self.prices.parts(layer, node.choices[against], zero)
            for part in one:
                saves[part] = saves.get(part, 0.0) + two[part] - one[part]
        name = self.said(node.choices[against])
        part = max(saves, key=lambda one: saves[one])
        if saves[part] <= 0:
            part, saves["handing on"] = "handing on", float(moves[against] - moves[mine])
        gain = f"{saves[part] * 1e3:.2g} ms of {part}"
        why = f"saves {gain} against {name}" if saves[part] > 0 else f"as good as {name}"
        return self.said(node.choices[second]), more, why

    def said(self, choice: Choice) -> str:
        """A choice in a word: "b×8 out×4"."""
        return said(choice.parts(self.sizes), choice.to)


def said(parts: Mapping[str, int], to: str | None = None) -> str:
    """Dims and into how many parts each is split."""
    words = [f"{dim}×{n}" for dim, n in parts.items()]
    if to is not None:
        words.append(f"→ {to}")
    return " ".join(words) or "replicated"


def plan_layers(
    module: nn.Module,
    example_inputs: Sequence[Any] | Mapping[str, Any],
    *,
    cluster: Cluster,
    ranks: int | None = None,
    memory_limit: float | None = None,
    pricing: Pricing | None = None,
    fixed: Mapping[str, Mapping[str, int]] | None = None,
    alternatives: bool = True,
) -> LayerPlan:
    """The cheapest choice for every layer of ``module`` on the first ``ranks`` of ``cluster``.

    ``module`` and ``example_inputs`` (of the whole batch, all ranks together) should be on the
    meta device. ``memory_limit``: bytes on a device (by default its memory; inf: none).
    ``fixed``: layers by name (or the end of it) and the parts that each dim is split into, which
    are kept to. ``alternatives``: price data-parallel, FSDP and tensor-parallel as well.

    Raises ModelError if torch.export can't follow the module, MemoryLimitError if nothing fits,
    ConfigError for ranks or fixed layers that can't be.
    """
    graph = capture(module, example_inputs)
    planner = Planner(graph, cluster, pricing, ranks)
    if memory_limit is None:
        memory_limit = float(min(cluster.devices[kind].memory_bytes for kind in cluster.kinds))
    limit = None if np.isinf(memory_limit) else memory_limit
    best = planner.best(limit, _fix(planner, fixed) if fixed else None)
    others: dict[str, float] = {}
    if alternatives:
        others = {
            "data_parallel": planner.data_parallel().seconds,
            "fsdp": planner.data_parallel(zero=True).seconds,
            "tensor_parallel": planner.tensor_parallel().seconds,
        }
    return planner.plan(best, type(module).__name__, others)


def _fix(planner: Planner, fixed: Mapping[str, Mapping[str, int]]) -> list[Bools]:
    allowed = [np.ones(node.costs.now.shape, bool) for node in planner.nodes]
    for name, parts in fixed.items():
        names = [
            [planner.graph.layers[place].name for place in node.layers] for node in planner.nodes
        ]
        found = [
            at
            for at, several in enumerate(names)
            if any(one == name or one.endswith("." + name) for one in several)
        ]
        if not found:
            raise ConfigError(f"no layer {name!r}; layers are {', '.join(planner.names[:8])}, …")
        for at in found:
            node = planner.nodes[at]
            wanted = {dim: n for dim, n in parts.items() if n > 1}
            fits = [choice.parts(planner.sizes) == wanted for choice in node.choices]
            if not any(fits):
                possible = dict.fromkeys(planner.said(choice) for choice in node.choices)
                raise ConfigError(
                    f"layer {name!r} can't be split as {said(wanted)}: "
                    f"use one of {'; '.join(list(possible)[:12])}"
                )
            allowed[at][~np.array(fits)] = False
    return allowed


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
