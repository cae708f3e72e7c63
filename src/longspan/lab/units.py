"""Amounts as people write them: 200mbit, 20ms, 2GiB.

As in ``tc``, rates are decimal bits per second ("1gbit" = 1e9). Sizes follow the IEC: "2GB" is
2e9 bytes, "2GiB" 2·1024³. A plain number is in the base unit: bits/s, seconds, bytes.
"""

import math
import re
from collections.abc import Mapping

from longspan.errors import LabError

__all__ = ["Amount", "parse_bytes", "parse_rate", "parse_seconds", "show_rate"]

Amount = float | str

_RATES = {"": 1.0, "bit": 1.0, "kbit": 1e3, "mbit": 1e6, "gbit": 1e9, "tbit": 1e12}
_SECONDS = {"": 1.0, "s": 1.0, "ms": 1e-3, "us": 1e-6}
_BYTES = {"": 1.0, "b": 1.0, "kb": 1e3, "mb": 1e6, "gb": 1e9, "kib": 2**10, "mib": 2**20} | {
    "gib": 2**30,
    "tib": 2**40,
}


def _parse(amount: Amount, units: Mapping[str, float], what: str, example: str) -> float:
    if isinstance(amount, str):
        match = re.fullmatch(r"\s*(\d+\.?\d*|\.\d+)(e[+-]?\d+)?\s*([a-z]*)\s*", amount.lower())
        if not match or match[3] not in units:
            raise LabError(f"{amount!r} is not a {what}: write it like {example}")
        amount = float(match[1] + (match[2] or "")) * units[match[3]]
    if not math.isfinite(amount) or amount < 0:
        raise LabError(f"{amount!r} is not a {what}: write it like {example}")
    return float(amount)


def parse_rate(amount: Amount) -> float:
    """Bits/s of "200mbit", "1gbit", 2e8; raises LabError for anything else, and for 0."""
    rate = _parse(amount, _RATES, "rate", "200mbit")
    if rate < 8000:
        raise LabError(f"{amount!r} is too slow a link: 8kbit is the least")
    return rate


def parse_seconds(amount: Amount) -> float:
    """Seconds of "20ms", "1s", 0.02; raises LabError for anything else."""
    return _parse(amount, _SECONDS, "time", "20ms")


def parse_bytes(amount: Amount) -> int:
    """Bytes of "2GiB", "500MB", 2e9; raises LabError for anything else."""
    return int(_parse(amount, _BYTES, "size", "2GiB"))


def show_rate(bits_per_s: float | None) -> str:
    """A rate as ``tc`` writes it: 200mbit; "unshaped" for None."""
    if bits_per_s is None:
        return "unshaped"
    for unit in ("gbit", "mbit", "kbit"):
        if bits_per_s >= _RATES[unit]:
            return f"{bits_per_s / _RATES[unit]:g}{unit}"
    return f"{bits_per_s:g}bit"
