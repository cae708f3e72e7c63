"""Charts: curves, bars, and the strip that shows which rank holds which tokens."""

import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from unicodedata import east_asian_width

from longspan.report.batch import Batch
from longspan.report.svg import element, log_ticks, rect, text, ticks
from longspan.report.words import clean, count, figure, percent, short

__all__ = ["Bars", "Curve", "bar_chart", "line_chart", "shard_strip", "strip_height"]

Points = Sequence[tuple[float, float]]
_CHAR = 7.0  # a digit at 12 px is a little narrower than this in any usual font
_MOST_POINTS = 800


@dataclass(frozen=True, slots=True)
class Curve:
    """A named line; ``hue`` is a colour's name. ``points`` that aren't finite break the line.

    ``dots`` marks every point; ``trail`` draws the values faintly and their running mean boldly.
    """

    name: str
    points: Points
    hue: str = "one"
    dots: bool = False
    trail: bool = False


@dataclass(frozen=True, slots=True)
class Bars:
    """A named row of bars, one share of the whole (0 to 1) for each label."""

    name: str
    shares: Sequence[float]
    hue: str = "one"


def _thinned(points: Points) -> Points:
    """The lowest and highest point of each bucket, where there are more than a screen shows."""
    if len(points) <= _MOST_POINTS:
        return points
    width = math.ceil(2 * len(points) / _MOST_POINTS)
    kept: list[tuple[float, float]] = []
    for start in range(0, len(points), width):
        bucket = points[start : start + width]
        ends = {min(bucket, key=lambda point: point[1]), max(bucket, key=lambda point: point[1])}
        kept.extend(sorted(ends))
    return kept


def _smooth(points: Points) -> Points:
    """The mean of each point and its neighbours, over about a twentieth of the curve."""
    reach = len(points) // 40
    means = []
    for i, (x, _) in enumerate(points):
        near = min(reach, i, len(points) - 1 - i)
        window = [y for _, y in points[i - near : i + near + 1]]
        means.append((x, sum(window) / len(window)))
    return means


def _path(points: Points, x: Callable[[float], float], y: Callable[[float], float]) -> str:
    steps: list[str] = []
    pen = "M"
    for across, up in points:
        if math.isfinite(up):
            steps.append(f"{pen}{x(across):.1f} {y(up):.1f}")
        pen = "L" if math.isfinite(up) else "M"
    return "".join(steps)


def _legend(names: Sequence[tuple[str, str]], right: float, kind: str) -> str:
    """Names with a mark of their colour, ending at ``right``."""
    parts = []
    for name, hue in reversed(names):
        right -= sum(12.0 if east_asian_width(char) in "WF" else _CHAR for char in name)
        parts.append(text(right, 11, name))
        parts.append(
            rect(right - 18, 6 if kind == "line" else 2, 13, 3 if kind == "line" else 10, hue)
        )
        right -= 34
    return "".join(parts)


def _scale(
    low: float, high: float, start: float, end: float, log: bool
) -> Callable[[float], float]:
    bend = math.log10 if log else float
    first, last = bend(low), bend(high)
    return lambda value: start + (bend(value) - first) / (last - first) * (end - start)


def _range(values: Sequence[float], from_zero: bool, log: bool) -> tuple[float, float]:
    low, high = min(values), max(values)
    if log:
        return (low / 1.1, high * 1.1)
    if from_zero:
        low = min(low, 0.0)
    margin = 0.06 * (high - low) or 0.1 * abs(high) or 1.0
    return (low if from_zero and low == 0 else low - margin), high + margin


def line_chart(
    curves: Sequence[Curve],
    width: float,
    height: float,
    *,
    x_label: str = "",
    log: bool = False,
    from_zero: bool = False,
) -> str:
    """Curves over a common x, as markup of that size; "" if there is nothing finite to draw.

    ``log`` makes the y axis logarithmic and leaves out what isn't positive; ``from_zero`` starts
    it at zero.
    """
    if log:
        least = sys.float_info.min  # what is smaller has too few digits for a scale around it
        curves = [
            replace(c, points=[(x, y if y >= least else math.nan) for x, y in c.points])
            for c in curves
        ]
    shown = [c for c in curves if any(math.isfinite(y) for _, y in c.points)]
    if not shown:
        return ""
    low, high = _range([y for c in shown for _, y in c.points if math.isfinite(y)], from_zero, log)
    y_ticks = log_ticks(low, high) if log else ticks(low, high, max(2, int(height // 45)))
    left = 12 + _CHAR * max((len(_tick(value)) for value in y_ticks), default=1)
    top, bottom, right = 26.0, height - (38 if x_label else 22), width - 16
    steps = [x for c in shown for x, _ in c.points]
    first, last = min(steps), max(steps)
    if first == last:
        first, last = first - 1, last + 1
    x, y = _scale(first, last, left, right, False), _scale(low, high, bottom, top, log)
    parts = [_legend([(c.name, c.hue) for c in shown], right, "line")]
    for value in y_ticks:
        parts.append(_line(left, y(value), right, y(value), "grid"))
        parts.append(text(left - 7, y(value) + 4, _tick(value), anchor="end"))
    for value in ticks(first, last, max(2, int(width // 70))):
        if value == round(value):
            parts.append(_line(x(value), bottom, x(value), bottom + 4, "axis"))
            parts.append(text(x(value), bottom + 17, short(value), anchor="middle"))
    parts.append(_line(left, bottom, right, bottom, "axis"))
    if x_label:
        parts.append(text((left + right) / 2, height - 4, x_label, anchor="middle"))
    for c in shown:
        parts.append(_drawn(c, x, y))
    return "".join(parts)


def _drawn(c: Curve, x: Callable[[float], float], y: Callable[[float], float]) -> str:
    """A curve's line, its trail and its dots."""
    finite = [point for point in c.points if math.isfinite(point[1])]
    parts = []
    if c.trail and len(finite) >= 40:
        parts.append(
            element("path", d=_path(_thinned(c.points), x, y), class_=f"line faint {c.hue}")
        )
        parts.append(
            element("path", d=_path(_thinned(_smooth(finite)), x, y), class_=f"line {c.hue}")
        )
    elif len(finite) > 1:
        parts.append(element("path", d=_path(_thinned(c.points), x, y), class_=f"line {c.hue}"))
    if c.dots or len(finite) == 1:
        for across, up in finite[:: math.ceil(len(finite) / 100)]:
            told = element("title", clean(f"step {across:g}: {figure(up)}"))
            parts.append(element("circle", told, cx=x(across), cy=y(up), r=3.5, class_=c.hue))
    return "".join(parts)


def _tick(value: float) -> str:
    return short(value) if abs(value) >= 1000 else figure(value)


def _line(x1: float, y1: float, x2: float, y2: float, kind: str) -> str:
    return element("line", x1=x1, y1=y1, x2=x2, y2=y2, class_=kind)


def bar_chart(
    labels: Sequence[str], bars: Sequence[Bars], width: float, height: float, *, x_label: str = ""
) -> str:
    """Bars side by side for each label, in per cent; "" if there is nothing to draw."""
    top = max((share for row in bars for share in row.shares), default=0.0)
    if not labels or top <= 0:
        return ""
    y_ticks = ticks(0.0, top * 1.04, max(2, int(height // 50)))
    left = 12 + _CHAR * max(len(percent(value)) for value in y_ticks)
    bottom, right = height - (38 if x_label else 22), width - 6
    y = _scale(0.0, top * 1.04, bottom, 26.0, False)
    parts = [_legend([(row.name, row.hue) for row in bars], right, "bars")]
    for value in y_ticks:
        parts.append(_line(left, y(value), right, y(value), "grid"))
        parts.append(text(left - 7, y(value) + 4, percent(value), anchor="end"))
    slot = (right - left) / len(labels)
    every = math.ceil((_CHAR * max(map(len, labels)) + 8) / slot)
    thick = 0.8 * slot / len(bars)
    for i, label in enumerate(labels):
        start = left + i * slot + 0.1 * slot
        for j, row in enumerate(bars):
            tall = bottom - y(row.shares[i])
            told = f"up to {label}: {percent(row.shares[i])} of the {row.name}"
            if tall > 0:
                parts.append(rect(start + j * thick, bottom - tall, thick, tall, row.hue, told))
        # Counted from the right, so that the longest documents keep their label.
        if (len(labels) - 1 - i) % every == 0:
            parts.append(text(left + (i + 0.5) * slot, bottom + 16, label, anchor="middle"))
    parts.append(_line(left, bottom, right, bottom, "axis"))
    if x_label:
        parts.append(text((left + right) / 2, height - 4, x_label, anchor="middle"))
    return "".join(parts)


_MOST_RANKS = 16


def strip_height(batch: Batch, row: float = 24) -> float:
    """How tall the strip of a batch is."""
    return (min(batch.world, _MOST_RANKS) + 1) * (row + 6) + 30 + 20 * (batch.world > _MOST_RANKS)


def shard_strip(
    batch: Batch, width: float, row: float = 24, *, wide: bool = True, most: int = _MOST_RANKS
) -> str:
    """The packed documents as alternating bands and, below, the tokens of them each rank holds.

    ``wide`` tells each rank's tokens beside its share of the causal attention work; at most
    ``most`` ranks are drawn.
    """
    work = [batch.work(rank) for rank in range(batch.world)]
    ranks = min(batch.world, most)
    left, right = 20 + _CHAR * len("documents"), width - (_CHAR * 29 if wide else 46)
    scale = (right - left) / batch.length
    parts = [
        text(left - 8, row / 2 + 4, "documents", anchor="end"),
        _bands(batch, range(batch.length), left, 0, row, scale, ("band0", "band1")),
        text(right + 8, row / 2 + 4, f"{count(batch.documents)} in {count(batch.length)} tokens")
        if wide
        else text(right + 8, row / 2 + 4, "work"),
    ]
    for rank in range(ranks):
        y = (rank + 1) * (row + 6)
        hue = f"rank{rank % 4}"
        share = percent(work[rank] / sum(work))
        told = f"{count(batch.tokens(rank))} tokens, {share} of work" if wide else share
        parts.append(text(left - 8, y + row / 2 + 4, f"rank {rank}", anchor="end"))
        parts.append(rect(left, y, right - left, row, "track"))
        parts.extend(
            _bands(batch, piece, left, y, row, scale, (hue, f"{hue} pale"))
            for piece in batch.held(rank)
        )
        parts.append(text(right + 8, y + row / 2 + 4, told))
    y = (ranks + 1) * (row + 6)
    if batch.world > ranks:
        parts.append(text(left, y + 10, f"and {batch.world - ranks} more ranks"))
        y += 20
    parts.append(text(left, y + 12, "0"))
    parts.append(text(right, y + 12, f"token {count(batch.length)}", anchor="end"))
    return "".join(parts)


def _bands(
    batch: Batch,
    piece: range,
    left: float,
    y: float,
    row: float,
    scale: float,
    kinds: tuple[str, str],
) -> str:
    """The tokens of ``piece`` as one area in the second kind, every other document in the first.

    So documents narrower than a hair, which are left out, still show as tokens that are held.
    """
    if piece.step == 1 or piece.step * scale < 4:
        # Stripes finer than the eye can part fill a share of the row's height instead.
        tall = max(row / piece.step, 4.0)
        spans = [(piece.start, piece.stop)]
    else:
        tall = row
        spans = [(position, position + 1) for position in piece]

    def path(pieces: list[tuple[int, int]], kind: str) -> str:
        d = ""
        for start, stop in pieces:
            across = (stop - start) * scale
            d += f"M{left + start * scale:.2f} {y + (row - tall) / 2:.2f}"
            d += f"h{across:.2f}v{tall:.2f}h{-across:.2f}z"
        return element("path", d=d, class_=kind) if d else ""

    hair = 0.25 / scale
    first = [
        (a, b)
        for start, stop in spans
        for a, b, parity in batch.bands(start, stop)
        if parity == 0 and b - a >= hair
    ]
    return path(spans, kinds[1]) + path(first, kinds[0])
