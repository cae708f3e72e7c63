"""Groups: one planned batch as a picture, ranks over time, coloured by the sequences' lengths."""

import math

from longspan.plan import BatchPlan, Group
from longspan.report import svg
from longspan.report.words import count, duration, percent

__all__ = ["draw_groups"]

_WIDTH, _LEFT, _RIGHT, _TOP = 1000.0, 84.0, 24.0, 92.0
# From short to long (the colour map viridis, readable in both schemes and without colour vision).
_COLOURS = ("#fde725", "#7ad151", "#22a884", "#2a788e", "#414487", "#440154")


def draw_groups(plan: BatchPlan, world: int) -> str:
    """The picture as SVG: a group is as high as its ranks, and as wide as it takes.

    Inside it, each sequence has the share of its tokens.
    """
    tall = max(3.0, min(18.0, 560 / world))
    width = _WIDTH - _LEFT - _RIGHT
    total = sum(micro.seconds for micro in plan.micro_batches)
    scale, bottom = width / total, _TOP + tall * world
    tops = _tops(plan.lengths)
    parts = [svg.rect(_LEFT, _TOP, width, tall * world, "track")]
    start = 0.0
    for micro in plan.micro_batches:
        x = _LEFT + start * scale
        for group in micro.groups:
            for first, held in _runs(group.ranks):
                y = _TOP + first * tall
                parts += _group(group, plan.lengths, tops, x, y, scale, held * tall)
        start += micro.seconds
        end = _LEFT + start * scale
        parts.append(svg.element("line", x1=end, x2=end, y1=_TOP - 6, y2=bottom, class_="axis"))
    for rank in svg.ticks(0, world, 8):
        if rank < world and rank == int(rank):
            y = _TOP + (rank + 0.5) * tall + 4
            parts.append(svg.text(_LEFT - 8, y, f"rank {rank:g}", "", "end"))
    for value in svg.ticks(0.0, total, 8):
        x = _LEFT + value * scale
        parts.append(svg.text(x, bottom + 18, f"{value:g}", "", "middle"))
    parts.append(svg.text(_WIDTH - _RIGHT, bottom + 38, "seconds", "", "end"))
    busy = sum(
        len(group.ranks) * group.seconds for micro in plan.micro_batches for group in micro.groups
    ) / (world * total)
    turns = len(plan.micro_batches)
    told = (
        f"{count(len(plan.lengths))} sequences on {count(world)} ranks in "
        f"{turns} micro-batch{'es' * (turns > 1)}, {duration(plan.seconds)}; "
        f"ranks are at work {percent(busy)} of the time"
    )
    heading = svg.text(20, 34, "A batch on flexible groups", "title")
    return svg.svg(
        *(_WIDTH, bottom + 52, "A batch on flexible groups", told),
        *(heading, svg.text(20, 56, told), _legend(tops), *parts),
        colours=svg.LIGHT,
        dark=svg.DARK,
    )


def _tops(lengths: tuple[int, ...]) -> list[int]:
    """The most tokens of each colour: powers of two, the last one above the longest."""
    low = max(5, math.ceil(math.log2(sorted(lengths)[len(lengths) // 2])))
    high = max(low + 1, math.ceil(math.log2(max(lengths))))
    steps = min(len(_COLOURS), high - low + 1)
    return [2 ** round(low + (high - low) * i / (steps - 1)) for i in range(steps)]


def _colour(tokens: int, tops: list[int]) -> str:
    place = next(i for i, top in enumerate(tops) if tokens <= top)
    return _COLOURS[round(place * (len(_COLOURS) - 1) / (len(tops) - 1))]


def _legend(tops: list[int]) -> str:
    parts, x = [], 20.0
    for top in tops:
        colour = _colour(top, tops)
        words = f"up to {count(top)} tokens"
        parts.append(svg.element("rect", x=x, y=68.0, width=11.0, height=11.0, fill=colour, rx=2.0))
        parts.append(svg.text(x + 17, 78, words))
        x += 34 + 6.6 * len(words)
    return "".join(parts)


def _runs(ranks: tuple[int, ...]) -> list[tuple[int, int]]:
    """First rank and number of each run of neighbours."""
    found: list[tuple[int, int]] = []
    for rank in ranks:
        if found and sum(found[-1]) == rank:
            found[-1] = (found[-1][0], found[-1][1] + 1)
        else:
            found.append((rank, 1))
    return found


def _group(
    group: Group,
    lengths: tuple[int, ...],
    tops: list[int],
    x: float,
    y: float,
    scale: float,
    tall: float,
) -> list[str]:
    held = sum(lengths[index] for index in group.sequences)
    wide = max(0.5, group.seconds * scale - 0.6)
    told = (
        f"{count(len(group.ranks))} ranks, {count(len(group.sequences))} sequences, "
        f"{count(held)} tokens, {duration(group.seconds)}"
    )
    parts, at = [], x
    for index in group.sequences:
        part = wide * lengths[index] / held
        parts.append(
            svg.element(
                "rect",
                svg.element("title", f"{count(lengths[index])} tokens; group: {told}"),
                x=round(at, 2),
                y=y,
                width=max(0.1, part),
                height=max(1.0, tall - 0.7),
                fill=_colour(lengths[index], tops),
            )
        )
        at += part
    return parts
