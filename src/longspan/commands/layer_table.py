"""A plan of layers for the terminal: verdict, the layers, the next command."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from longspan.plan import LayerChoice, LayerPlan
from longspan.report.words import clean, duration, percent, size

__all__ = ["layer_table"]

_MOST_ROWS = 60


@dataclass(slots=True)
class _Row:
    """Layers that are alike in all that is shown."""

    name: str
    layer: LayerChoice
    count: int


def layer_table(plan: LayerPlan, free: float | None, rate: float | None) -> RenderableType:
    """What ``longspan plan-layers`` prints.

    ``free``: seconds of the plan in which nothing is fixed. ``rate``: bits a second above which
    data-parallel wins; None never, 0 always, below 0 not asked.
    """
    return Group(
        *(Text(line, style="bold") for line in _verdict(plan, free, rate)),
        Text(),
        _layers(plan),
        *(Text(f"note: {clean(note)}") for note in plan.notes),
    )


def _verdict(plan: LayerPlan, free: float | None, rate: float | None) -> Iterator[str]:
    world = prod(plan.axes.values())
    yield (
        f"{duration(plan.seconds)} a step of {plan.model} on {world} devices, "
        f"{size(plan.memory_bytes)} on each."
    )
    gap = 1 - plan.lower_bound_s / plan.seconds if plan.seconds else 0.0
    others = ", ".join(
        f"{name.replace('_', '-')} {duration(seconds)} ({seconds / plan.seconds:.2f}×)"
        for name, seconds in plan.alternatives.items()
    )
    if others:
        yield f"Others by the same prices: {others}."
    proven = "no plan is quicker" if gap < 5e-4 else f"no plan is more than {percent(gap)} quicker"
    yield f"By these prices {proven}."
    if free is not None:
        more = plan.seconds - free
        yield f"What is fixed costs {duration(max(more, 0.0))}: without it {duration(free)}."
    if rate is None:
        yield "At no bandwidth is data-parallel as good."
    elif rate == 0:
        yield "Data-parallel is as good at any bandwidth."
    elif rate > 0:
        yield f"Above {rate / 1e9:.2g} Gbit/s data-parallel is as good."


def _layers(plan: LayerPlan) -> Table:
    table = Table(box=None, pad_edge=False)
    for name in ("layer", "kind", "split", "own time", "runner-up", "why"):
        table.add_column(name, justify="right" if name == "own time" else "left")
    rows = _folded(plan)
    for row in rows[:_MOST_ROWS]:
        layer = row.layer
        name = clean(row.name) + (f"  ({row.count} alike)" if row.count > 1 else "")
        second = f"{layer.runner_up} +{duration(layer.runner_up_s)}" if layer.runner_up else ""
        table.add_row(
            name, layer.kind, _split(layer, plan), duration(layer.seconds), second, layer.why
        )
    if len(rows) > _MOST_ROWS:
        table.add_row(f"… and {len(rows) - _MOST_ROWS} more", "", "", "", "", "")
    return table


def _folded(plan: LayerPlan) -> list[_Row]:
    """Layers of one place in repeated blocks that are split alike are one row."""
    rows: dict[object, _Row] = {}
    for layer in plan.layers:
        name = re.sub(r"(?<=\.)\d+(?=\.)", "*", layer.name)
        key = (name, layer.kind, _split(layer, plan), layer.runner_up)
        if key in rows:
            rows[key].count += 1
            rows[key].name = name
        else:
            rows[key] = _Row(layer.name, layer, 1)
    return list(rows.values())


def _split(layer: LayerChoice, plan: LayerPlan) -> str:
    parts = {dim: prod(plan.axes[axis] for axis in axes) for dim, axes in layer.splits.items()}
    words = [f"{dim}×{n}" for dim, n in parts.items()] or ["replicated"]
    words += ["sharded"] * layer.zero + ["recomputed"] * layer.recompute
    return " ".join(words)
