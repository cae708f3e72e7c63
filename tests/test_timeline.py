"""The timeline: every span is in it, or counted in a column; it stays small, and is safe XML."""

import math
import re
from pathlib import Path
from xml.etree import ElementTree

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from longspan.cluster.ring import predict_ring
from longspan.cluster.spec import read_cluster
from longspan.errors import DataError
from longspan.report.svg import DARK, LIGHT
from longspan.report.timeline import timeline, write_timeline
from longspan.schedule.ring_tasks import AttentionKernels
from longspan.trace import Note, Sample, Span

SVG = "{http://www.w3.org/2000/svg}"
SOME = [
    Span("forward", 0, "compute", 10.0, 0.5),
    Span("send", 0, "comm", 10.5, 0.25, 2_000_000),
    Span("forward", 1, "compute", 10.25, 0.75),
]


def texts(drawing: str) -> list[str]:
    return [node.text or "" for node in ElementTree.fromstring(drawing).iter(f"{SVG}text")]


def titles(drawing: str) -> list[str]:
    return [node.text or "" for node in ElementTree.fromstring(drawing).iter(f"{SVG}title")]


def test_it_names_ranks_lanes_and_spans() -> None:
    drawing = timeline([Note("start"), *SOME, Sample(1, {"loss": 2.0})])
    words = texts(drawing)
    assert {"rank 0", "rank 1", "compute", "comm", "forward", "send", "time in s"} <= set(words)
    assert words[0] == "Timeline of 2 ranks" and words[1] == "1 s, 3 spans"
    assert "send: 0.25 s from 0.5 s, 2 MB" in titles(drawing)
    description = ElementTree.fromstring(drawing).find(f"{SVG}desc")
    assert description is not None and "compute 50 % to 75 % of the time" in str(description.text)


def test_a_span_lies_where_its_time_is() -> None:
    root = ElementTree.fromstring(timeline(SOME))
    spans = [rect for rect in root.iter(f"{SVG}rect") if rect.find(f"{SVG}title") is not None]
    width = next(
        float(r.get("width", 0)) for r in root.iter(f"{SVG}rect") if r.get("class") == "track"
    )
    places = [(float(r.get("x", 0)) / width, float(r.get("width", 0)) / width) for r in spans]
    for (x, wide), span in zip(places, SOME, strict=True):
        assert x == pytest.approx(span.start_s - 10, abs=2e-3)
        assert wide == pytest.approx(span.seconds, abs=2e-3)


def test_it_follows_light_and_dark() -> None:
    drawing = timeline(SOME)
    light, dark = drawing.split("@media (prefers-color-scheme: dark)")
    assert LIGHT["paper"] in light and DARK["paper"] not in light
    assert DARK["paper"] in dark and "var(" not in drawing


@pytest.mark.parametrize(("scale", "unit"), [(1, "s"), (1e-3, "ms"), (1e-6, "µs")])
def test_the_axis_has_a_fitting_unit(scale: float, unit: str) -> None:
    words = texts(timeline([Span("a", 0, "compute", 0, 4 * scale)]))
    assert words[-1] == f"time in {unit}" and {"0", "2", "4"} <= set(words)


def test_thousands_of_spans_are_thinned() -> None:
    spans = [
        Span("even" if i % 2 else "odd", rank, "compute", i * 1e-3, 1e-3 if i < 1000 else 5e-4)
        for rank in range(120)
        for i in range(2000)
    ]
    drawing = timeline(spans)
    assert len(drawing) < 1_500_000
    words = texts(drawing)
    assert "80 of 120 ranks are drawn" in words[1] and {"rank 0", "rank 119"} <= set(words)
    drawn = re.findall(r'y="[\d.]+" width="[\d.]+" height="([\d.]+)" class="(one|two)"/', drawing)
    high = sorted(float(height) for height, _ in drawn)
    full, half = high[-1], high[len(high) // 10]
    assert half == pytest.approx(full / 2, rel=0.1), "a column is as high as its busy share"


def test_names_beyond_the_colours_are_one() -> None:
    spans = [Span(f"name{i}", 0, "compute", i, 1 + i) for i in range(20)]
    words = texts(timeline(spans))
    assert "other" in words and "name19" in words and "name0" not in words


def test_hostile_and_odd_spans() -> None:
    hostile = '<script>\x1b\ud800\u202e&"'
    odd = [Span("a", 0, "compute", math.nan, 1), Span("a", 0, "compute", 0, -1)]
    odd += [Span("a", 0, "compute", 0, math.inf), Span("a", 0, "compute", "x", 1)]  # type: ignore[arg-type]
    drawing = timeline([Span(hostile, 0, hostile, 0, 1), *odd])
    assert "<script" not in drawing and "1 spans" not in drawing
    for empty in ([], [Note("start")], odd):
        with pytest.raises(DataError, match="no spans"):
            timeline(empty)


@settings(max_examples=50, deadline=None)
@given(
    st.lists(
        st.builds(
            Span,
            st.sampled_from("abcdefghij"),
            st.integers(0, 300),
            st.sampled_from(["compute", "comm", "x"]),
            st.floats(-1e6, 1e6),
            st.floats(0, 1e6),
            st.integers(0, 10**12),
        ),
        min_size=1,
        max_size=60,
    )
)
def test_any_spans_give_a_picture(spans: list[Span]) -> None:
    root = ElementTree.fromstring(timeline(spans))
    wide, tall = float(root.get("width", 0)), float(root.get("height", 0))
    assert wide == 1000 and 0 < tall < 1400
    assert "nan" not in timeline(spans)


def test_a_simulated_ring_is_drawn_and_written(tmp_path: Path) -> None:
    kernels = AttentionKernels(4, 2, 64)
    played = predict_ring(read_cluster("workstations-10gbe"), kernels, 4096, "zigzag").timeline
    out = write_timeline(played.spans(), tmp_path / "new" / "ring.svg")
    words = texts(out.read_text(encoding="utf-8"))
    assert {"forward", "backward", "keys and values", "gradients", "rank 7"} <= set(words)
