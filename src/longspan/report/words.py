"""Words: figures and foreign text, written so that people, pages and terminals can bear them."""

import math
import re

__all__ = ["MISSING", "clean", "count", "duration", "figure", "percent", "short", "size"]

MISSING = "–"

# Control characters (ANSI escapes start with one), lone surrogates, marks that turn the direction
# of text, and what XML forbids.
_UNSAFE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\u202a-\u202e\u2066-\u2069\ufffe\uffff]"
)


def clean(text: object) -> str:
    """``str(text)`` with every character that could steer a terminal or break a page replaced."""
    return _UNSAFE.sub("\ufffd", str(text))


def _odd(value: float | None) -> str | None:
    """The word for a value that has no digits."""
    if value is None:
        return MISSING
    return None if math.isfinite(value) else "not a number" if math.isnan(value) else "infinite"


def count(value: float | None) -> str:
    """A whole number with its thousands apart: 1,234,567."""
    return _odd(value) or f"{value:,.0f}"


def figure(value: float | None, digits: int = 4) -> str:
    """A number to so many significant digits; powers of ten where it is very small or large."""
    return _odd(value) or re.sub(r"e([+-])0*", r"e\1", f"{value:.{digits}g}").replace("e+", "e")


def percent(share: float | None) -> str:
    """A share as per cent: 12 %, 0.3 %."""
    if odd := _odd(share):
        return odd
    value = 100 * (share or 0.0)
    return f"{value:.1f} %" if 0 < abs(value) < 10 or 99 < value < 100 else f"{value:.0f} %"


def _scaled(value: float, base: float, units: tuple[str, ...]) -> str:
    index = 0
    while abs(value) >= base and index < len(units) - 1:
        value, index = value / base, index + 1
    digits = 0 if index == 0 or abs(value) >= 100 else 1
    return f"{value:.{digits}f}".removesuffix(".0") + (f" {units[index]}" if units[index] else "")


def short(value: float | None) -> str:
    """A number in a few characters: 950, 1.2 k, 34 M."""
    return _odd(value) or _scaled(value or 0.0, 1000.0, ("", "k", "M", "G", "T", "P"))


def size(value: float | None) -> str:
    """Bytes: 12 B, 3.4 MB."""
    return _odd(value) or _scaled(value or 0.0, 1000.0, ("B", "kB", "MB", "GB", "TB", "PB"))


def duration(seconds: float | None) -> str:
    """A time: 0.31 s, 42 s, 3 min 12 s, 2 h 05 min."""
    if odd := _odd(seconds):
        return odd
    value = seconds or 0.0
    if value < 60:
        return f"{value:.2g} s" if value < 10 else f"{value:.0f} s"
    minutes, rest = divmod(round(value), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"
