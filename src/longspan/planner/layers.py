"""The cheapest way to split every layer of a model over a cluster (PaSE, arXiv 2407.04001).

``capture`` reads the model, ``price`` says what every choice costs, ``search`` finds the best of
them, and here it becomes a plan that says why.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from torch import nn

from longspan.cluster.spec import Cluster
from longspan.errors import ConfigError
from longspan.plan import LayerChoice, LayerPlan
from longspan.planner.capture import capture
from longspan.planner.choices import Choice, codes_of, given_codes
from longspan.planner.eliminate import Floats
from longspan.planner.layer_search import Assignment, Bools, Found, Planner
from longspan.planner.layer_wires import PARTIAL, REPLICATE, Codes
from longspan.planner.price import OPTIONS, Pricing

__all__ = ["named", "plan_layers", "plan_of", "said"]


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
    return plan_of(planner, best, type(module).__name__, others)


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
                possible = dict.fromkeys(named(choice, planner.sizes) for choice in node.choices)
                raise ConfigError(
                    f"layer {name!r} can't be split as {said(wanted)}: "
                    f"use one of {'; '.join(list(possible)[:12])}"
                )
            allowed[at][~np.array(fits)] = False
    return allowed


def plan_of(
    planner: Planner, found: Found, model: str, alternatives: Mapping[str, float]
) -> LayerPlan:
    """A plan of what was found, with what the alternatives by name take."""
    return _Teller(planner).plan(found, model, alternatives)


class _Teller:
    """Turns assignments into plans."""

    def __init__(self, planner: Planner) -> None:
        self.planner = planner

    def plan(self, found: Found, model: str, alternatives: Mapping[str, float]) -> LayerPlan:
        """The rows of an assignment."""
        rows: list[LayerChoice | None] = [None] * len(self.planner.graph.layers)
        for index, node in enumerate(self.planner.nodes):
            second, more, why = self._runner_up(found.assignment, index)
            at = found.assignment[index]
            choice = node.choices[at // len(OPTIONS)]
            zero, again = OPTIONS[at % len(OPTIONS)]
            for place in node.layers:
                rows[place] = self._row(place, choice, zero, again, (second, more, why))
        return LayerPlan(
            model=model,
            cluster=self.planner.cluster.name,
            axes=self.planner.axes,
            layers=tuple(row for row in rows if row is not None),
            seconds=found.seconds,
            lower_bound_s=found.bound,
            memory_bytes=int(found.memory),
            alternatives=dict(alternatives),
            notes=self.planner.graph.notes,
        )

    def _row(
        self, place: int, choice: Choice, zero: bool, again: bool, told: tuple[str, float, str]
    ) -> LayerChoice:
        layer = self.planner.graph.layers[place]
        now, later, memory = self.planner.prices.layer(layer, choice)
        option = OPTIONS.index((zero, again))
        splits: dict[str, tuple[str, ...]] = {}
        for axis, dim in zip(self.planner.axes, choice.dims, strict=True):
            if dim is not None:
                splits[dim] = (*splits.get(dim, ()), axis)
        inputs = []
        for operand in layer.inputs:
            if operand.source is not None:
                giver = self.planner.graph.layers[operand.source]
                taken, _ = given_codes(operand, giver.output.shape, choice, self.planner.sizes)
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
            output=self._words(self.planner.prices.output(layer, choice)),
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
            for axis, code in zip(self.planner.axes, codes, strict=True)
            if code != REPLICATE
        }

    def _others(self, assignment: Assignment, index: int) -> tuple[Floats, Floats]:
        """Seconds of each choice of one node while all others stay: all, and handing on alone."""
        node = self.planner.nodes[index]
        total = node.costs.now + np.maximum(0.0, node.costs.later)
        moves = np.zeros(len(node.choices))
        for other, table in self.planner.near[index]:
            moves = moves + table[:, self.planner.choice_of(assignment, other)]
        whole = total.min(axis=1) + moves
        mine, option = divmod(assignment[index], len(OPTIONS))
        whole[mine] = total[mine, option] + moves[mine]
        return whole, moves

    def _runner_up(self, assignment: Assignment, index: int) -> tuple[str, float, str]:
        """The next best choice of a node, what it costs more, and why the best is better."""
        node = self.planner.nodes[index]
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
            layer = self.planner.graph.layers[place]
            one = self.planner.prices.parts(layer, node.choices[mine], zero)
            two = self.planner.prices.parts(layer, node.choices[against], zero)
            for part in one:
                saves[part] = saves.get(part, 0.0) + two[part] - one[part]
        name = named(node.choices[against], self.planner.sizes)
        part = max(saves, key=lambda one: saves[one])
        if saves[part] <= 0:
            part, saves["handing on"] = "handing on", float(moves[against] - moves[mine])
        gain = f"{saves[part] * 1e3:.2g} ms of {part}"
        why = f"saves {gain} against {name}" if saves[part] > 0 else f"as good as {name}"
        return named(node.choices[second], self.planner.sizes), more, why


def named(choice: Choice, sizes: Sequence[int]) -> str:
    """A choice in a word: "b×8 out×4", "in×2 → b"."""
    return said(choice.parts(sizes)) + (f" → {choice.to}" if choice.to else "")


def said(parts: Mapping[str, int]) -> str:
    """Dims and into how many parts each is split."""
    return " ".join(f"{dim}×{n}" for dim, n in parts.items()) or "replicated"
