"""How a benchmark ends: one line of JSON, and a dated log of what it found, or has so far."""

import json
import os
import platform
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

__all__ = ["conclude", "keep", "stolen_s"]

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


def stolen_s() -> float:
    """Seconds since boot in which a virtual machine's host gave its processors to others."""
    _, *ticks = Path("/proc/stat").read_text().splitlines()[0].split()
    return int(ticks[7]) / os.sysconf("SC_CLK_TCK")
