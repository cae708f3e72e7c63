"""Traces: written, read, torn, drawn."""

from pathlib import Path

import pytest

from longspan.errors import DataError
from longspan.trace import Note, Row, Sample, Span, TraceWriter, chrome_trace, curve, read_trace

ROWS: list[Row] = [
    Note("start", {"world": 4}),
    Sample(1, {"loss": 2.0}),
    Span("forward", 0, "compute", 0.5, 0.25, 10),
    Sample(2, {"loss": 1.5, "lr": 0.1}),
    Sample(2, {"loss": 1.25}),
]


def write(path: Path, rows: list[Row]) -> None:
    writer = TraceWriter(path)
    for row in rows:
        writer.write(row)
    writer.close()


def test_rows_come_back(tmp_path: Path) -> None:
    write(tmp_path / "a" / "trace.jsonl", ROWS)
    assert list(read_trace(tmp_path / "a" / "trace.jsonl")) == ROWS


def test_a_torn_line_costs_only_itself(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    write(path, ROWS)
    path.write_bytes(path.read_bytes()[:-9])
    write(path, [Note("resume")])
    assert list(read_trace(path)) == [*ROWS[:-1], Note("resume")]


def test_no_trace(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no trace at"):
        list(read_trace(tmp_path / "trace.jsonl"))
    (tmp_path / "trace.jsonl").write_text("hello\n[1]\n")
    with pytest.raises(DataError, match="not a trace"):
        list(read_trace(tmp_path / "trace.jsonl"))


def test_a_curve_takes_the_last_word_on_a_step() -> None:
    assert curve(ROWS, "loss") == [(1, 2.0), (2, 1.25)]
    assert curve(ROWS, "lr") == [(2, 0.1)]
    assert curve(ROWS, "nothing") == []


def test_chrome_trace() -> None:
    events = chrome_trace(ROWS)["traceEvents"]
    assert [event["ph"] for event in events] == ["M", "X"]
    assert events[1]["ts"] == 500_000 and events[1]["dur"] == 250_000 and events[1]["pid"] == 0
