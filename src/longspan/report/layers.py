"""A plan of layers as a picture: every layer in the colour of its split, joined as data flows."""

from math import prod
from pathlib import Path

from longspan.plan import LayerChoice, LayerPlan
from longspan.report import svg
from longspan.report.words import duration, size

__all__ = ["draw_layers", "hue", "write_layers"]

_WIDTH, _BOX, _ROW, _LEFT, _TOP = 900.0, 20.0, 26.0, 160.0, 92.0
# What a layer is split by decides its colour; the first of these that it has.
_HUES = {
    "vocab": "bad",
    "in": "rank3",
    "out": "two",
    "heads": "two",
    "c": "two",
    "s": "rank1",
    "b": "one",
}
_LEGEND = (
    ("one", "batch"),
    ("rank1", "sequence"),
    ("two", "outputs, heads, channels"),
    ("rank3", "inputs (partial sums)"),
    ("bad", "vocabulary"),
    ("muted", "replicated"),
)


def write_layers(plan: LayerPlan, out: Path) -> Path:
    """Write the picture of a plan to ``out``."""
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(draw_layers(plan) + "\n", encoding="utf-8")
    return out


def draw_layers(plan: LayerPlan) -> str:
    """The picture as SVG: layers from top to bottom, joined by arcs where data skips some."""
    place = {layer.name: row for row, layer in enumerate(plan.layers)}
    parts = [
        svg.text(20, 32, plan.model, "title"),
        svg.text(
            20,
            54,
            f"{duration(plan.seconds)} a step, {size(plan.memory_bytes)} a device, "
            f"on {prod(plan.axes.values())} devices",
        ),
        *_legend(),
    ]
    for row, layer in enumerate(plan.layers):
        parts += [_edge(place[name], row) for name, _ in layer.inputs if name in place]
    longest = max((layer.seconds for layer in plan.layers), default=0.0) or 1.0
    for row, layer in enumerate(plan.layers):
        y = _TOP + row * _ROW
        words = _split(layer, plan)
        told = f"{layer.name}: {layer.kind}, {words}, {duration(layer.seconds)}. {layer.why}"
        parts.append(svg.rect(_LEFT, y, 330, _BOX, hue(layer), told, r=4))
        parts.append(svg.text(_LEFT + 340, y + 14, f"{layer.name}  {words}"))
        parts.append(svg.rect(_LEFT, y + _BOX - 3, 330 * layer.seconds / longest, 3, "band0"))
    height = _TOP + len(plan.layers) * _ROW + 16
    return svg.svg(
        _WIDTH,
        height,
        f"{plan.model} over {prod(plan.axes.values())} devices",
        "Layers from top to bottom, coloured by what they are split by",
        *parts,
        colours=svg.LIGHT,
        dark=svg.DARK,
    )


def hue(layer: LayerChoice) -> str:
    """The colour of a layer's split."""
    return next((colour for dim, colour in _HUES.items() if dim in layer.splits), "muted")


def _split(layer: LayerChoice, plan: LayerPlan) -> str:
    sizes = {dim: prod(plan.axes[axis] for axis in axes) for dim, axes in layer.splits.items()}
    return " ".join(f"{dim}×{n}" for dim, n in sizes.items()) or "replicated"


def _legend() -> list[str]:
    parts, x = [], 20.0
    for colour, words in _LEGEND:
        parts.append(svg.rect(x, 66, 12, 12, colour, r=3))
        parts.append(svg.text(x + 18, 76, words))
        x += 34 + 7 * len(words)
    return parts


def _edge(before: int, after: int) -> str:
    top = _TOP + before * _ROW + _BOX / 2
    bottom = _TOP + after * _ROW + _BOX / 2
    reach = min(130.0, 12.0 * (after - before) ** 0.5) if after - before > 1 else 8.0
    path = f"M{_LEFT:g} {top:g} C{_LEFT - reach:g} {top:g} {_LEFT - reach:g} {bottom:g} "
    return svg.element("path", d=path + f"{_LEFT:g} {bottom:g}", class_="line faint muted")
