"""A plan of stages as a picture: which dims each stage mixes, which is sharded, what moves."""

from pathlib import Path

from longspan.plan import StagePlan, StageRow
from longspan.report import svg
from longspan.report.words import count, duration, size

__all__ = ["draw_stages", "write_stages"]

_LEFT, _TOP, _CELL, _ROW, _GAP, _BAR = 130.0, 110.0, 92.0, 34.0, 8.0, 60.0
_MOST = 9  # stages in a picture: models repeat theirs
_LEGEND = (("one", "mixed here"), ("two", "sharded"), ("rank3", "mixed though sharded"))


def write_stages(plan: StagePlan, out: Path) -> Path:
    """Write the picture of a plan to ``out``."""
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(draw_stages(plan) + "\n", encoding="utf-8")
    return out


def draw_stages(plan: StagePlan) -> str:
    """The picture as SVG: stages from left to right, their dims below each other.

    The bars are what the busiest rank sends before and in a stage, forward and backward.
    """
    shown = plan.stages[:_MOST]
    moving = {dim for row in plan.stages for dim in (*row.sharded, *row.mixes) if dim}
    dims = [dim for dim in shown[0].sizes if dim in moving]
    bottom = _TOP + 22 + _ROW * len(dims) + _BAR
    most = max(1, *(row.moved_bytes + row.inside_bytes for row in shown))
    parts = [*_legend()]
    for place, dim in enumerate(dims):
        y = _TOP + 22 + _ROW * place
        told = f"{dim} ({count(shown[0].sizes[dim])})"
        parts.append(svg.text(20, y + _ROW / 2 + 2, told, "strong"))
    parts.append(svg.text(20, bottom - 4, "sent"))
    for place, row in enumerate(shown):
        parts += _stage(row, _LEFT + place * (_CELL + _GAP), dims, bottom, most)
    ranks = " × ".join(f"{axis} {number}" for axis, number in plan.axes.items())
    told = f"{duration(plan.seconds)} and {size(plan.sent_bytes)} a rank, forward and backward"
    if hidden := len(plan.stages) - len(shown):
        told += f"; the first {len(shown)} of {len(shown) + hidden} stages"
    width = max(640.0, _LEFT + len(shown) * (_CELL + _GAP) + 20)
    title = f"Stages over {ranks}"
    heading = svg.text(20, 34, title, "title"), svg.text(20, 56, told)
    return svg.svg(
        *(width, bottom + 34, title, told),
        *(*heading, *parts),
        colours=svg.LIGHT,
        dark=svg.DARK,
    )


def _stage(row: StageRow, x: float, dims: list[str], bottom: float, most: int) -> list[str]:
    parts = [svg.text(x + _CELL / 2, _TOP + 12, row.name, "strong", "middle")]
    for place, dim in enumerate(dims):
        hue = _hue(row, dim)
        y = _TOP + 22 + _ROW * place
        inside = f", {row.inside} inside" if dim in row.mixes and row.inside != "nothing" else ""
        words = f"{row.name}: {dim}{inside}"
        parts.append(svg.rect(x, y, _CELL, _ROW - 6, hue, words, r=4))
    sent = row.moved_bytes + row.inside_bytes
    tall = (_BAR - 24) * sent / most
    parts.append(svg.rect(x, bottom - tall, _CELL, tall, "band0", "; ".join(row.arrives)))
    parts.append(svg.text(x + _CELL / 2, bottom + 16, size(sent) if sent else "–", "", "middle"))
    return parts


def _hue(row: StageRow, dim: str) -> str:
    sharded, mixed = dim in row.sharded, dim in row.mixes
    return "rank3" if sharded and mixed else "two" if sharded else "one" if mixed else "track"


def _legend() -> list[str]:
    parts, x = [], 20.0
    for hue, words in _LEGEND:
        parts.append(svg.rect(x, 72, 12, 12, hue, r=3))
        parts.append(svg.text(x + 18, 82, words))
        x += 40 + 7 * len(words)
    return parts
