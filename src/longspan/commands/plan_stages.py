"""``longspan plan-stages``: which dim is sharded in each stage of a model, and what that sends."""

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from rich.console import RenderableType

    from longspan.plan import StagePlan, StageRow

__all__ = ["plan_stages"]

_INSIDE = {"nothing": "–", "heads": "head exchange", "ring": "ring"}
_RIVALS = {
    "ulysses": "Ulysses on the mixed dim",
    "ring": "ring on the mixed dim",
    "gather": "gather before a stage that mixes it",
    "megatron": "Megatron-style sequence parallelism",
}


def plan_stages(
    stages: Annotated[
        str, typer.Argument(help="A YAML file, or an example: axial, plant, text, video.")
    ],
    cluster: Annotated[
        str, typer.Option(help="A preset's name, or a cluster's YAML file.")
    ] = "8xh100-80gb",
    ranks: Annotated[
        int | None, typer.Option(help="Use the first so many devices; all, if not said.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Write the plan: a JSON file.")] = None,
    picture: Annotated[Path | None, typer.Option(help="Draw it: an SVG file.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Which dim each stage of a model shards, and how it gets there: the cheapest way.

    Forward and backward, beside the known ways. JSON: the plan, as it is kept.
    """
    from longspan.cluster.spec import read_cluster
    from longspan.plan import write_plan
    from longspan.planner.stage_file import read_stages
    from longspan.planner.stages import plan_stages as plan

    told, where = read_stages(stages), read_cluster(cluster)
    found = plan(
        told.build(), sequence=told.sequence, cluster=where, ranks=ranks, outside=told.outside
    )
    if out:
        write_plan(found, out)
    if picture:
        from longspan.report.stages import write_stages

        write_stages(found, picture)
    if as_json:
        print(json.dumps(asdict(found), indent=2))
        return
    from rich.console import Console

    # Where it is not a terminal, a table is given the width it needs.
    width = None if sys.stdout.isatty() else 130
    Console(highlight=False, soft_wrap=True, width=width).print(_told(found))


def _told(plan: "StagePlan") -> "RenderableType":
    from rich.console import Group
    from rich.text import Text

    from longspan.report.words import duration, percent, size

    axes = " × ".join(f"{name} {ranks}" for name, ranks in plan.axes.items())
    lines = [
        f"{duration(plan.seconds)} for the stages, forward and backward; the busiest rank sends "
        f"{size(plan.sent_bytes)}. Mesh: {axes}; outside {_layout(plan, plan.outside)}."
    ]
    if rivals := sorted(plan.rivals, key=lambda one: one.seconds):
        next_best = rivals[0]
        less = 1 - plan.sent_bytes / next_best.sent_bytes if next_best.sent_bytes else 0.0
        sends = f"sends {percent(abs(less))} {'less' if less >= 0 else 'more'}"
        lines.append(
            f"The next best known way, {_RIVALS[next_best.name]}, takes "
            f"{next_best.seconds / plan.seconds:.2f} times as long; this one {sends}."
        )
    texts = (Text(line, style="bold") for line in lines)
    return Group(*texts, Text(), _stages(plan), Text(), _rivals(plan))


def _layout(plan: "StagePlan", sharded: tuple[str | None, ...]) -> str:
    named = zip(plan.axes, sharded, strict=True)
    if len(plan.axes) == 1:
        return sharded[0] or "whole"
    return ", ".join(f"{axis} {dim or 'whole'}" for axis, dim in named)


def _stages(plan: "StagePlan") -> "RenderableType":
    from rich.table import Table

    table = Table(box=None, pad_edge=False, padding=(0, 3, 0, 0))
    for name in ("stage", "mixes", "sharded", "on arrival", "inside"):
        table.add_column(name)
    for name in ("sent, moved", "inside", "ms moved", "inside", "computed"):
        table.add_column(name, justify="right")

    def alike(row: "StageRow") -> tuple[object, ...]:
        return tuple({**asdict(row), "name": "", "sizes": "", "after": ""}.values())

    # Stages that come again in the same way are told once.
    times: dict[tuple[object, ...], list[StageRow]] = {}
    for row in plan.stages:
        times.setdefault((row.name.rpartition(".")[0] or row.name, *alike(row)), []).append(row)
    for rows in times.values():
        row = rows[0]
        name = row.name if len(rows) == 1 else f"{row.name} … {rows[-1].name} ({len(rows)})"
        table.add_row(
            *(name, ", ".join(row.mixes), _layout(plan, row.sharded), _ways(row.arrives)),
            *(_INSIDE[row.inside], *_sent(row.moved_bytes, row.inside_bytes)),
            *(_ms(value) for value in (row.moved_s, row.inside_s, row.computed_s)),
        )
    outside = (_layout(plan, plan.outside), _ways(plan.leaves), "–")
    sent = (*_sent(plan.left_bytes, 0), _ms(plan.left_s), "–", "–")
    table.add_row("after the last one", "", *outside, *sent)
    return table


def _ways(ways: tuple[str, ...]) -> str:
    if not ways:
        return "nothing"
    return "; ".join(way.removeprefix("sp: ") for way in ways)


def _sent(*sizes: int) -> tuple[str, ...]:
    from longspan.report.words import size

    return tuple(size(value) if value else "–" for value in sizes)


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.3g}" if seconds else "–"


def _rivals(plan: "StagePlan") -> "RenderableType":
    from rich.table import Table

    table = Table(box=None, pad_edge=False, padding=(0, 3, 0, 0))
    table.add_column("all stages, forward and backward")
    for name in ("sent", "ms", "times as long"):
        table.add_column(name, justify="right")
    rows = [("this plan", plan.sent_bytes, plan.seconds)]
    rows += [(_RIVALS[one.name], one.sent_bytes, one.seconds) for one in plan.rivals]
    for name, sent, seconds in rows:
        table.add_row(name, *_sent(sent), _ms(seconds), f"{seconds / plan.seconds:.2f}")
    return table
