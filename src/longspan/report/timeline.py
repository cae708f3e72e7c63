"""Timeline: the spans of a trace, measured or simulated, as one SVG: ranks × lanes over time.

Where a lane has more spans than a picture can show, time is cut into columns; a column has the
colour of what takes most of it, and is as high as the share of it that is taken.
"""

import math
from collections.abc import Iterable, Sequence
from pathlib import Path

from longspan.errors import DataError
from longspan.report import svg
from longspan.report.words import clean, count, duration, percent, size
from longspan.trace import Row, Span

__all__ = ["timeline", "write_timeline"]

_WIDTH, _LEFT, _RIGHT, _TOP = 1000.0, 132.0, 24.0, 64.0
_HUES = ("one", "two", "rank1", "rank3", "good", "bad")
_MOST_ROWS, _MOST_RECTS = 80, 9000
_UNITS = ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs"))


def write_timeline(rows: Iterable[Row], out: Path) -> Path:
    """Write the picture of a trace's spans to ``out``; raises DataError if it has none."""
    drawn = timeline(rows)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(drawn + "\n", encoding="utf-8")
    return out


def timeline(rows: Iterable[Row]) -> str:
    """The picture as SVG; it follows the viewer's light or dark scheme where that is told.

    Raises DataError if there are no spans.
    """
    spans = [row for row in rows if isinstance(row, Span) and _can_be_drawn(row)]
    if not spans:
        raise DataError("the trace has no spans: there is no timeline to draw")
    begin = min(span.start_s for span in spans)
    end = max(span.start_s + span.seconds for span in spans)
    total = end - begin or 1e-9
    hues = _hues(spans)
    lanes = _lanes(spans)
    ranks = sorted({rank for rank, _ in lanes})
    shown = _spread(ranks, max(1, _MOST_ROWS * len(ranks) // len(lanes)))
    kept = [lane for lane in lanes if lane[0] in shown]
    row = max(9.0, min(18.0, 800 / len(kept)))
    width = _WIDTH - _LEFT - _RIGHT
    columns = max(50, min(int(width), _MOST_RECTS // len(kept)))

    legend, top = _legend(spans, hues)
    parts, y = [], top
    for rank in sorted(shown):
        own = [lane for other, lane in kept if other == rank]
        parts.append(svg.text(20, y + row * len(own) / 2 + 4, f"rank {rank}", "strong"))
        for lane in own:
            parts.append(svg.text(_LEFT - 8, y + row / 2 + 2.5, lane[:11], "small", "end"))
            parts.append(svg.rect(_LEFT, y, width, row - 1, "track"))
            mine = [(s.start_s - begin, s) for s in lanes[rank, lane]]
            draw = _each if len(mine) <= columns else _columns
            parts.append(svg.place(_LEFT, y, draw(mine, hues, total, width, row - 1, columns)))
            y += row
        y += 6
    title = f"Timeline of {_counted(len(ranks), 'rank')}"
    told = f"{duration(total)}, {_counted(len(spans), 'span')}"
    if len(shown) < len(ranks):
        told += f"; {len(shown)} of {len(ranks)} ranks are drawn"
    heading = svg.text(20, 34, title, "title") + svg.text(_WIDTH - _RIGHT, 34, told, "", "end")
    described = f"{told}. {_described(spans, ranks)}"
    inside = (heading, legend, *parts, _axis(total, width, y))
    return svg.svg(_WIDTH, y + 44, title, described, *inside, colours=svg.LIGHT, dark=svg.DARK)


def _counted(number: int, what: str) -> str:
    return f"{count(number)} {what}{'s' * (number != 1)}"


def _can_be_drawn(span: Span) -> bool:
    numbers = (span.start_s, span.seconds)
    return (
        all(isinstance(value, int | float) and math.isfinite(value) for value in numbers)
        and span.seconds >= 0
        and isinstance(span.rank, int)
    )


def _hues(spans: Sequence[Span]) -> dict[str, str]:
    """A colour for each of the names that take most time, in the order they first appear."""
    took: dict[str, float] = {}
    for span in spans:
        took[clean(span.name)] = took.get(clean(span.name), 0.0) + span.seconds
    most = sorted(took, key=lambda name: -took[name])[: len(_HUES)]
    return dict(zip((name for name in took if name in most), _HUES, strict=False))


def _lanes(spans: Sequence[Span]) -> dict[tuple[int, str], list[Span]]:
    """The spans of each rank and lane: ranks ascending, computation first, then as they appear."""
    found: dict[tuple[int, str], list[Span]] = {}
    for span in spans:
        found.setdefault((span.rank, clean(span.lane)), []).append(span)
    seen = list(dict.fromkeys(lane for _, lane in found))
    order = sorted(found, key=lambda key: (key[0], key[1] != "compute", seen.index(key[1])))
    return {key: found[key] for key in order}


def _spread(ranks: Sequence[int], most: int) -> set[int]:
    """At most so many of them, evenly apart, the first and the last among them."""
    if len(ranks) <= most:
        return set(ranks)
    step = (len(ranks) - 1) / max(1, most - 1)
    return {ranks[round(i * step)] for i in range(most)}


def _legend(spans: Sequence[Span], hues: dict[str, str]) -> tuple[str, float]:
    """The names beside their colours, and where what is below may begin."""
    names = list(hues.items())
    if any(clean(span.name) not in hues for span in spans):
        names.append(("other", "muted"))
    x, y, parts = 20.0, _TOP, []
    for name, hue in names:
        told = name if len(name) <= 28 else name[:27] + "…"
        wide = 30 + 7.2 * len(told)
        if x + wide > _WIDTH - _RIGHT:
            x, y = 20.0, y + 20
        parts += [svg.rect(x, y - 10, 11, 11, hue, r=2), svg.text(x + 17, y, told)]
        x += wide
    return "".join(parts), y + 18


def _each(
    spans: Sequence[tuple[float, Span]],
    hues: dict[str, str],
    total: float,
    width: float,
    tall: float,
    columns: int,
) -> str:
    """Every span by itself; what it is shows when it is pointed at."""
    scale = width / total
    parts = []
    for start, span in spans:
        moved = f", {size(span.bytes)}" if span.bytes else ""
        told = f"{span.name}: {duration(span.seconds)} from {duration(start)}{moved}"
        wide = max(0.6, span.seconds * scale - 0.2)
        hue = hues.get(clean(span.name), "muted")
        parts.append(svg.rect(start * scale, 0, wide, tall, hue, told))
    return "".join(parts)


def _columns(
    spans: Sequence[tuple[float, Span]],
    hues: dict[str, str],
    total: float,
    width: float,
    tall: float,
    columns: int,
) -> str:
    """Many spans as columns of what takes most of the time in each."""
    taken: list[dict[str, float]] = [{} for _ in range(columns)]
    each = total / columns
    for start, span in spans:
        hue = hues.get(clean(span.name), "muted")
        end = start + span.seconds
        first, last = int(start / each), min(columns - 1, int(end / each))
        for i in range(min(first, columns - 1), last + 1):
            share = (min(end, (i + 1) * each) - max(start, i * each)) / each
            taken[i][hue] = taken[i].get(hue, 0.0) + max(0.0, share)
    wide = width / columns
    parts = []
    for i, shares in enumerate(taken):
        busy = min(1.0, sum(shares.values()))
        if busy > 0:
            hue = max(shares, key=lambda name: shares[name])
            high = max(0.5, tall * busy)
            parts.append(svg.rect(i * wide, tall - high, wide, high, hue))
    return "".join(parts)


def _axis(total: float, width: float, bottom: float) -> str:
    unit, name = next(((u, n) for u, n in _UNITS if total >= u), _UNITS[-1])
    parts = []
    for value in svg.ticks(0.0, total / unit, 8):
        x = _LEFT + value * unit / total * width
        parts.append(svg.element("line", x1=x, x2=x, y1=bottom - 4, y2=bottom + 2, class_="axis"))
        parts.append(svg.text(x, bottom + 16, f"{value:g}", anchor="middle"))
    parts.append(svg.text(_WIDTH - _RIGHT, bottom + 34, f"time in {name}", anchor="end"))
    return "".join(parts)


def _described(spans: Sequence[Span], ranks: Sequence[int]) -> str:
    """What a reader who doesn't see the picture is told: how much of the time ranks compute."""
    begin = min(span.start_s for span in spans)
    total = max(span.start_s + span.seconds for span in spans) - begin or 1e-9
    busy = dict.fromkeys(ranks, 0.0)
    for span in spans:
        if span.lane == "compute":
            busy[span.rank] += span.seconds
    least, most = min(busy.values()) / total, max(busy.values()) / total
    return f"Ranks compute {percent(least)} to {percent(most)} of the time."
