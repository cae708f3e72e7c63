"""SVG: elements, colours and ticks; everything that is written is escaped here.

Colours are CSS variables in a page, which follows the reader's light or dark scheme, and plain
values in a picture that stands alone.
"""

import math
import re
from html import escape

from longspan.report.words import clean

__all__ = [
    "DARK",
    "LIGHT",
    "RULES",
    "element",
    "log_ticks",
    "place",
    "rect",
    "svg",
    "text",
    "ticks",
    "variables",
]

LIGHT = {
    "paper": "#ffffff",
    "ink": "#1c2733",
    "muted": "#5b6b7c",
    "grid": "#e3e8ee",
    "track": "#eef1f5",
    "good": "#15803d",
    "bad": "#b91c1c",
    "one": "#2563eb",
    "two": "#d97706",
    "rank0": "#2563eb",
    "rank1": "#0d9488",
    "rank2": "#d97706",
    "rank3": "#9333ea",
}
DARK = {
    "paper": "#12181f",
    "ink": "#e6ebf0",
    "muted": "#96a5b5",
    "grid": "#2a343f",
    "track": "#1f2832",
    "good": "#4ade80",
    "bad": "#f87171",
    "one": "#6ea8fe",
    "two": "#f5b14c",
    "rank0": "#6ea8fe",
    "rank1": "#3fcfbe",
    "rank2": "#f5b14c",
    "rank3": "#c792f5",
}

_FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, sans-serif"
_HUES = ("muted", "good", "bad", "one", "two", "rank0", "rank1", "rank2", "rank3")
RULES = "\n".join(
    [
        f"svg {{ font-family: {_FONT}; font-size: 12px; font-variant-numeric: tabular-nums; }}",
        "svg text { fill: var(--muted); }",
        "svg .strong { fill: var(--ink); font-weight: 600; }",
        "svg .title { fill: var(--ink); font-size: 20px; font-weight: 700; }",
        "svg .big { font-size: 14px; }",
        "svg .small { font-size: 9px; }",
        "svg .grid { stroke: var(--grid); stroke-width: 1; }",
        "svg .axis { stroke: var(--muted); stroke-width: 1; }",
        "svg .paper { fill: var(--paper); stroke: var(--grid); }",
        "svg .track { fill: var(--track); }",
        "svg .band0 { fill: var(--muted); opacity: .75; }",
        "svg .band1 { fill: var(--muted); opacity: .4; }",
        "svg .pale { opacity: .55; }",
        "svg .line { fill: none; stroke-width: 2; stroke-linejoin: round; }",
        "svg .faint { stroke-width: 1; opacity: .35; }",
        *(f"svg .{hue} {{ fill: var(--{hue}); }}" for hue in _HUES),
        *(f"svg .line.{hue} {{ fill: none; stroke: var(--{hue}); }}" for hue in _HUES),
    ]
)


def variables(colours: dict[str, str]) -> str:
    """The colours as CSS declarations."""
    return " ".join(f"--{name}: {value};" for name, value in colours.items())


def element(name: str, *children: str, **attributes: str | float) -> str:
    """An element; ``children`` are markup already, attributes are escaped (``class_`` is class)."""
    written = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{_value(value)}"'
        for key, value in attributes.items()
        if value != ""
    )
    return f"<{name}{written}>{''.join(children)}</{name}>" if children else f"<{name}{written}/>"


def _value(value: str | float) -> str:
    if isinstance(value, str):
        return escape(clean(value))
    return f"{value:.1f}".removesuffix(".0")


def text(x: float, y: float, words: object, kind: str = "", anchor: str = "") -> str:
    """Words at a point; ``anchor`` is "", "middle" or "end"."""
    return element("text", escape(clean(words)), x=x, y=y, class_=kind, text_anchor=anchor)


def rect(
    x: float, y: float, width: float, height: float, kind: str, told: str = "", r: float = 0
) -> str:
    """A rectangle with corners of radius ``r``; ``told`` shows when it is pointed at."""
    title = (element("title", escape(clean(told))),) if told else ()
    corners = {"rx": r} if r else {}
    return element("rect", *title, x=x, y=y, width=width, height=height, class_=kind, **corners)


def place(x: float, y: float, *parts: str) -> str:
    """The parts moved to (x, y)."""
    return element("g", *parts, transform=f"translate({x:g} {y:g})")


def svg(
    width: float,
    height: float,
    title: str,
    description: str,
    *parts: str,
    colours: dict[str, str] | None = None,
    dark: dict[str, str] | None = None,
) -> str:
    """A whole drawing with its title and description.

    With ``colours`` it stands alone: it carries its style and an opaque sheet of paper, in the
    ``dark`` colours where the viewer asks for a dark scheme.
    """
    sheet = ""
    if colours:
        rules = _plain(colours)
        if dark:
            rules += f"\n@media (prefers-color-scheme: dark) {{\n{_plain(dark)}\n}}"
        sheet = element("style", rules) + rect(0.5, 0.5, width - 1, height - 1, "paper", r=10)
    return element(
        "svg",
        element("title", escape(clean(title))),
        element("desc", escape(clean(description))),
        sheet,
        *parts,
        xmlns="http://www.w3.org/2000/svg",
        viewBox=f"0 0 {width:g} {height:g}",
        width=width,
        height=height,
        role="img",
    )


def _plain(colours: dict[str, str]) -> str:
    return re.sub(r"var\(--(\w+)\)", lambda match: colours[match[1]], RULES)


def ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Round numbers in [low, high], some ``about`` of them: steps of 1, 2 or 5 times a power."""
    if not low < high:
        return [low]
    rough = (high - low) / max(about, 1)
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= rough * (1 - 1e-9))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(i * step, 12 - math.floor(math.log10(step))) for i in range(first, last + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten in [low, high]; 2 and 5 times them too where the range is short."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    steps = (1, 2, 5) if high / low < 200 else (1,)
    found = [m * 10.0**e for e in range(first, last + 1) for m in steps]
    return [value for value in found if low * (1 - 1e-9) <= value <= high * (1 + 1e-9)]
