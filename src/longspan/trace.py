"""Trace: what happened in a run, or what the simulator says would happen, in one format.

A trace is a list of rows. A ``Span`` is something that took time on a rank's lane; a ``Sample``
is a set of figures at a training step; a ``Note`` is an event worth telling. On disk it is JSONL,
one row a line; spans can be looked at in any viewer of Chrome traces.
"""

import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TextIO

from longspan.errors import DataError

__all__ = ["Note", "Row", "Sample", "Span", "TraceWriter", "chrome_trace", "curve", "read_trace"]


@dataclass(frozen=True, slots=True)
class Span:
    """Something that took ``seconds`` on a lane ("compute", "comm", …) of a rank."""

    name: str
    rank: int
    lane: str
    start_s: float
    seconds: float
    bytes: int = 0


@dataclass(frozen=True, slots=True)
class Sample:
    """Figures of one training step, by name with its unit: ``loss``, ``step_s``, …"""

    step: int
    figures: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Note:
    """An event: its kind ("start", "resume", "checkpoint", …) and what is to be known of it."""

    kind: str
    about: dict[str, Any] = field(default_factory=dict)


Row = Span | Sample | Note
_KINDS: dict[str, type[Span] | type[Sample] | type[Note]] = {
    "span": Span,
    "sample": Sample,
    "note": Note,
}


def _line(row: Row) -> str:
    return json.dumps({"row": type(row).__name__.lower()} | asdict(row), separators=(",", ":"))


class TraceWriter:
    """Appends rows to a JSONL file; every row is on disk's way as soon as it is written."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        # A row that a killed run left half written must not swallow the next one.
        torn = path.exists() and path.stat().st_size > 0 and path.read_bytes()[-1:] != b"\n"
        self._file: TextIO = path.open("a", encoding="utf-8", buffering=1)
        if torn:
            self._file.write("\n")

    def write(self, row: Row) -> None:
        """Append one row."""
        self._file.write(_line(row) + "\n")

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def read_trace(path: Path) -> Iterator[Row]:
    """The rows of a trace file; lines that a crash left half written are passed over.

    Raises DataError if there is no such file, or no line in it is a row.
    """
    if not path.is_file():
        raise DataError(f"no trace at {path}: give the folder of a run")
    rows = 0
    with path.open(encoding="utf-8") as file:
        for line in file:
            try:
                values = json.loads(line)
                row = _KINDS[values.pop("row")](**values)
            except (ValueError, KeyError, TypeError, AttributeError):
                continue
            rows += 1
            yield row
    if not rows:
        raise DataError(f"{path} is not a trace: none of its lines is a row")


def curve(rows: Iterable[Row], figure: str) -> list[tuple[int, float]]:
    """(step, value) of one figure; where a step was done twice, after a resume, the last counts."""
    values = {
        row.step: row.figures[figure]
        for row in rows
        if isinstance(row, Sample) and figure in row.figures
    }
    return sorted(values.items())


def chrome_trace(rows: Iterable[Row]) -> dict[str, Any]:
    """The spans as a Chrome trace (``chrome://tracing``, Perfetto): ranks as processes."""
    spans = [row for row in rows if isinstance(row, Span)]
    lanes = sorted({(span.rank, span.lane) for span in spans})
    thread = {lane: index for index, lane in enumerate(lanes)}
    names = [
        {"ph": "M", "pid": rank, "tid": thread[rank, lane], "name": "thread_name"}
        | {"args": {"name": lane}}
        for rank, lane in lanes
    ]
    events = [
        {"ph": "X", "pid": span.rank, "tid": thread[span.rank, span.lane], "name": span.name}
        | {"ts": span.start_s * 1e6, "dur": span.seconds * 1e6, "args": {"bytes": span.bytes}}
        for span in spans
    ]
    return {"traceEvents": names + events, "displayTimeUnit": "ms"}
