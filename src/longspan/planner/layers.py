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
from torch import nn

from longspan.cluster.spec import Cluster
from longspan.errors import ConfigError
from longspan.plan import LayerChoice, LayerPlan
from longspan.planner.capture import capture
from longspan.planner.choices import Choice, codes_of, given_codes, mesh_of
from longspan.planner.eliminate import Floats
from longspan.planner.graph import Graph
from longspan.planner.price import OPTIONS, Node, Prices, Pricing
from longspan.planner.solve import solve
from longspan.planner.wires import PARTIAL, REPLICATE, Codes

__all__ = ["Planner", "plan_layers"]

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
        self, graph: Graph, cluster: Cluster, pricing: Pricing | None = None, ranks: int | None = None
    ) -> None:
        world = cluster.ranks if ranks is None else ranks
        if not 1 <= world <= cluster.ranks:
            raise ConfigError(f"{world} ranks on a cluster of {cluster.ranks}: give 1 to all of them")
        self.graph, self.cluster = graph, cluster
        self.pricing = pricing or Pricing()
        self.sizes = mesh_of(world, _levels(cluster, world))
        self.axes = {f"m{axis}": size for axis, size in enumerate(self.sizes)}
        self.prices = Prices(graph, cluster, self.sizes, self.pricing)
        self.nodes = self.prices.nodes()
        self.edges = self.prices.edges(self.nodes)
        self.names = [graph.layers[node.layers[0]].name for node in self.nodes]
        self._near: list[list[tuple[int, Floats]]] = [[] for _ in self.nodes]
        for (u, v), table in self.edges.items():
            self._near[u].append((v, table))
            self._near[v].append((u, table.T))

    def best(
        self,
        limit: float | None = None,
        allowed: Sequence[Floats] | None = None,
    ) -> Found:
        """The cheapest assignment, of what is ``allowed`` (1) and not (inf), within ``limit``.

        ``limit``: bytes on a device. Raises MemoryLimitError if nothing fits.
        """
        walls = allowed or [np.ones_like(node.costs.now) for node in self.nodes]
        now = [n.costs.now * w for n, w in zip(self.nodes, walls, strict=True)]
        later = [n.costs.later for n in self.nodes]
        edges = [(u, v, table) for (u, v), table in self.edges.items()]
        memory = [n.costs.memory for n in self.nodes] if limit is not None else None
        found: Found | None = None
        bound = -np.inf

        def ask(share: float) -> float:
            nonlocal found, bound
            costs = [a + share * b for a, b in zip(now, later, strict=True)]
            answer = solve(costs, edges, memory=memory, limit=limit, names=self.names)
            bound = max(bound, answer.bound)
            seconds, slack = self.measure(answer.assignment)
            if found is None or seconds < found.seconds:
                held = self.memory(answer.assignment)
                found = Found(answer.assignment, seconds, 0.0, held)
            return slack

        # Most often reductions are hidden for good, or not at all.
        low, high = 0.0, 1.0
        if ask(1.0) < 0 and ask(0.0) > 0:
            for _ in range(6):
                middle = (low + high) / 2
                low, high = (middle, high) if ask(middle) > 0 else (low, middle)
                assert found is not None
                if found.seconds - bound <= 1e-3 * found.seconds:
                    break
        assert found is not None
        return Found(found.assignment, found.seconds, min(bound, found.seconds), found.memory)

    def measure(self, assignment: Assignment) -> tuple[float, float]:
        """Seconds of a step, and what of the reductions backward can't hide (below 0: it can)."""
        now = later = 0.0
        for node, at in zip(self.nodes, assignment, strict=True):
            now += float(node.costs.now.flat[at])
            later += float(node.costs.later.flat[at])
        for (u, v), table in self.edges.items():
            now += float(table[self._choice(assignment, u), self._choice(assignment, v)])
        return now + max(0.0, later), later

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
        inside = len(_axes_within(self.cluster, self.sizes))
        outside = len(self.sizes) - inside

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
            wall = np.full(node.costs.now.shape, np.inf)
            chosen = [at for at, choice in enumerate(node.choices) if test(choice)]
            columns = [at for at, one in enumerate(OPTIONS) if option(one)]
            for at in chosen or range(len(node.choices)):
                usable = [c for c in columns if np.isfinite(node.costs.now[at, c])]
                wall[at, usable or [0]] = 1.0
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
        differences = {"handing on": float(moves[against] - moves[mine])}
        for place in node.layers:
            layer = self.graph.layers[place]
            one = self.prices.parts(layer, node.choices[mine], zero)
            two = self.prices.parts(layer, node.choices[against], zero)
            for what in one:
                differences[what] = differences.get(what, 0.0) + two[what] - one[what]
        what, saved = max(differences.items(), key=lambda item: item[1])
        name = self.said(node.choices[against])
        why = f"saves {saved * 1e3:.3g} ms of {what} against {name}" if saved > 0 else (
            f"as good as {name}"
        )
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


def _fix(planner: Planner, fixed: Mapping[str, Mapping[str, int]]) -> list[Floats]:
    allowed = [np.ones_like(node.costs.now) for node in planner.nodes]
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
            allowed[at][~np.array(fits)] = np.inf
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
