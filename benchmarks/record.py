"""How a benchmark ends: one line of JSON, and a dated log of what it found, or has so far."""

import json
import os
import platform
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

__all__ = ["Timing", "conclude", "keep", "timed"]

RECORDS = Path(__file__).parent / "records"


def conclude(
    name: str, figures: dict[str, Any], targets: dict[str, Any], holds: bool, log: str = ""
) -> None:
    """Print the result as the last line, and keep it with ``log`` under ``records/``."""
    result = {"name": name, "figures": figures, "targets": targets, "holds": holds}
    keep(name, f"{log}{json.dumps(result)}\n")
    print(json.dumps(result))


def keep(name: str, log: str) -> None:
    """Keep ``log`` under ``records/``, in place of what this day's file had."""
    now = datetime.now(UTC)
    # A file of this machine is told by its name only.
    words = (Path(word).name if Path(word).is_absolute() else word for word in sys.argv[1:])
    command = " ".join(["python -m", f"benchmarks.{name}", *words])
    where = f"{platform.machine()}, Python {platform.python_version()}"
    RECORDS.mkdir(exist_ok=True)
    path = RECORDS / f"{now:%Y-%m-%d}-{name}.log"
    path.write_text(
        f"{now:%Y-%m-%d %H:%M} UTC, {where}\n$ {command}\n{log}",
        encoding="utf-8",
    )


@dataclass
class Timing:
    """How long it took; ``lost``: the share of all processors' time that a virtual machine's host
    gave to others meanwhile."""

    seconds: float = 0.0
    lost: float = 0.0


@contextmanager
def timed() -> Iterator[Timing]:
    """What the block takes; filled in at its end."""
    timing, start, before_s = Timing(), time.perf_counter(), _stolen_s()
    yield timing
    timing.seconds = time.perf_counter() - start
    timing.lost = (_stolen_s() - before_s) / timing.seconds / (os.cpu_count() or 1)


def _stolen_s() -> float:
    _, *ticks = Path("/proc/stat").read_text().splitlines()[0].split()
    return int(ticks[7]) / os.sysconf("SC_CLK_TCK")
