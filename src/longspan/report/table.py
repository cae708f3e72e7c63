"""Table: the summary of a run for the terminal."""

import math
from collections.abc import Sequence
from itertools import pairwise

from rich.table import Table
from rich.text import Text

from longspan.report.summary import Summary
from longspan.report.words import MISSING, clean, count, duration, figure, short

__all__ = ["sparkline", "summary_table"]

_BLOCKS = "▁▂▃▄▅▆▇█"
_COLOURS = {"good": "green", "bad": "red", "unknown": "yellow"}


def sparkline(values: Sequence[float], width: int = 40) -> str:
    """The values as blocks of eight heights, at most ``width`` of them; gaps aren't finite."""
    if len(values) > width:
        bounds = [i * len(values) // width for i in range(width + 1)]
        buckets = [values[a:b] for a, b in pairwise(bounds)]
        values = [sum(bucket) / len(bucket) for bucket in buckets]
    finite = [value for value in values if math.isfinite(value)]
    if not finite:
        return ""
    low, span = min(finite), max(finite) - min(finite)
    return "".join(
        _BLOCKS[round((value - low) / span * 7) if span else 0] if math.isfinite(value) else " "
        for value in values
    )


def summary_table(summary: Summary) -> Table:
    """The verdict, the loss as an inline curve, and the key figures."""
    table = Table(title=Text(f"run {clean(summary.name)}"), show_header=False, title_justify="left")
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, line in zip(("exactness", "learning", "speed"), summary.verdict, strict=True):
        table.add_row(name, Text(line.words, style=_COLOURS[line.state]))
    table.add_section()
    table.add_row("loss curve", Text(sparkline([loss for _, loss in summary.loss]) or MISSING))
    table.add_row("loss", f"{figure(summary.first_loss)} → {figure(summary.last_loss)}")
    if summary.best_validation:
        step, best = summary.best_validation
        table.add_row("best validation loss", f"{figure(best)} at step {count(step)}")
    table.add_row("tokens/s (median)", count(summary.tokens_per_s))
    table.add_row("tokens", short(summary.tokens))
    table.add_row("time in steps", duration(summary.step_s))
    if summary.resumes:
        table.add_row("resumed at step", ", ".join(count(step) for step in summary.resumes))
    if summary.checkpoints:
        table.add_row("checkpoints", count(len(summary.checkpoints)))
    return table
