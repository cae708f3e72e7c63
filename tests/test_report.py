"""Reports: what a trace says is what the page, the picture and the table say, and nothing else."""

import math
import subprocess
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from longspan.errors import DataError
from longspan.layout import Order, positions
from longspan.report import svg
from longspan.report.batch import Batch
from longspan.report.charts import Bars, Curve, bar_chart, line_chart, shard_strip
from longspan.report.page import write_picture, write_report
from longspan.report.summary import summarise
from longspan.report.table import sparkline, summary_table
from longspan.report.words import clean, count, duration, figure, percent, short, size
from longspan.trace import Note, Row, Sample, TraceWriter

SVG = "{http://www.w3.org/2000/svg}"


def a_run(steps: int = 120, **start: Any) -> list[Row]:
    """A trace as the training loop writes it; the figures come from simple formulas."""
    bounds = [0]
    for i in range(24):
        bounds.append(bounds[-1] + 40 + (i * i * 37) % 900)
    rows: list[Row] = [
        Note(
            "start",
            {"run": "demo", "world": 4, "axes": {"dp": 1, "sp": 4}, "order": "zigzag"}
            | {"device": "cpu", "backend": "gloo", "dtype": "float32", "parameters": 1_234_567}
            | {"model_type": "llama", "torch": "2.13.0", "longspan": "0.1.0"}
            | {"max_length": 16384, "steps": steps}
            | start,
        ),
        Note(
            "data",
            {"documents": 1600, "tokens": 21_000_000, "longest": 251_000, "padding_waste": 0.934}
            | {"percentiles": {"50": 6100, "90": 31_000, "99": 110_000}, "packed_fill": 0.994}
            | {"split_documents": 12, "validation_documents": 64}
            | {
                "histogram": [
                    [
                        2**i,
                        round(400 * math.exp(-(((i - 12.5) / 2) ** 2))),
                        0.3 / (1 + (i - 15) ** 2),
                    ]
                    for i in range(6, 19)
                ]
            },
        ),
        Note("leak_probe", {"probes": 8, "leaks": 0, "outputs": 131_072}),
        Note("batch", {"step": 1, "cu_seqlens": bounds, "world": 4, "order": "zigzag"}),
    ]
    for step in range(1, steps + 1):
        loss = 2.1 + 3.4 * math.exp(-step / 30) + 0.15 * math.sin(step * 12.9898)
        figures = {"loss": loss, "lr": 1e-3, "grad_norm": 1.0, "tokens": 16384, "step_s": 1.25}
        speed = {"tokens_per_s": 13000 + 400 * math.sin(step), "attention_imbalance": 1.03}
        rows.append(Sample(step, figures | speed | {"ring_bytes": 2**20, "documents": 12}))
        if step % 20 == 0:
            rows.append(Sample(step, {"validation_loss": 2.2 + 3.4 * math.exp(-step / 30)}))
            where = {"path": f"checkpoints/step-{step}", "seconds": 0.21, "bytes": 14_800_000}
            rows.append(Note("checkpoint", {"step": step} | where))
    exact = {"loss": 2.1534211, "loss_one_process": 2.1534213, "loss_difference": 9.3e-8}
    rest = {"gradient_difference": 3.1e-6, "gradients": 38, "tokens": 9000, "documents": 24}
    return [
        *rows,
        Note("exactness", exact | rest),
        Note("end", {"reason": "done", "seconds": 171.0}),
    ]


def write(folder: Path, rows: list[Row]) -> Path:
    writer = TraceWriter(folder / "trace.jsonl")
    for row in rows:
        writer.write(row)
    writer.close()
    return folder


def page_of(folder: Path, rows: list[Row]) -> str:
    return write_report(write(folder, rows)).read_text(encoding="utf-8")


def without(rows: list[Row], *kinds: str) -> list[Row]:
    return [row for row in rows if not (isinstance(row, Note) and row.kind in kinds)]


def printed(rows: list[Row]) -> str:
    console = Console(width=120, color_system=None)
    with console.capture() as shown:
        console.print(summary_table(summarise(rows)))
    return shown.get()


def test_summary_tells_what_happened() -> None:
    rows = a_run()
    run = summarise([*rows[:-1], Note("resume", {"step": 60}), rows[-1]])
    assert (run.name, run.steps, run.world, run.resumes) == ("demo", 120, 4, (60,))
    assert run.first_loss == run.loss[0][1] and run.last_loss == run.loss[-1][1]
    assert run.best_validation == run.validation[-1] and run.best_validation[0] == 120
    assert run.tokens == 120 * 16384 and run.step_s == pytest.approx(150)
    assert run.tokens_per_s == pytest.approx(13000, rel=0.02)
    assert run.ring_bytes == 120 * 2**20 and len(run.checkpoints) == 6
    assert run.difference == 3.1e-6
    assert [line.state for line in run.verdict] == ["good", "good", "good"]
    assert run.end["reason"] == "done"


def test_a_step_done_twice_counts_once() -> None:
    run = summarise([Sample(i, {"loss": 3.0, "tokens": 10}) for i in (1, 2, 3, 2, 3, 4)])
    assert run.tokens == 40 and len(run.loss) == 4


def test_a_run_started_again_has_not_ended() -> None:
    assert not summarise([*a_run(), Note("start", {"run": "demo"})]).end


@pytest.mark.parametrize(
    ("rows", "line", "state", "words"),
    [
        (
            [Note("leak_probe", {"probes": 8, "leaks": 3, "outputs": 9})],
            0,
            "bad",
            "Leaks: 3 outputs",
        ),
        ([Note("exactness", {"gradient_difference": 2e-3})], 0, "bad", "Not exact"),
        ([Note("exactness", {"loss_difference": math.nan})], 0, "bad", "not a number"),
        ([Note("x")], 0, "unknown", "not measured"),
        ([Sample(1, {"loss": 2.0}), Sample(2, {"loss": math.nan})], 1, "bad", "at step 2"),
        ([Sample(1, {"loss": 2.0}), Sample(2, {"loss": 3.0})], 1, "bad", "Did not learn"),
        ([Sample(1, {"loss": 2.0})], 1, "unknown", "One step only"),
        ([Note("x")], 1, "unknown", "No training step"),
        ([Note("x")], 2, "unknown", "not measured"),
    ],
)
def test_verdict_says_bad_news(rows: list[Row], line: int, state: str, words: str) -> None:
    verdict = summarise(rows).verdict[line]
    assert verdict.state == state and words in verdict.words


def test_page_is_self_contained(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("model: {}\n")
    page = page_of(tmp_path, a_run())
    assert "Content-Security-Policy" in page and "default-src 'none'" in page
    assert "<script" not in page and "src=" not in page and "url(" not in page
    assert page.count("http") == page.count("http://www.w3.org/2000/svg") + page.count("http-equiv")
    assert page.count("<svg") == 4
    for words in ("Exact on 4 ranks", "Learnt: loss", "tokens/s (median)", "2.1534211", "zigzag"):
        assert words in page
    assert "longspan train" in page and "--nproc 4" in page
    assert write_report(tmp_path).read_text() == page, "the same trace gives the same page"


@pytest.mark.parametrize("kind", ["start", "data", "leak_probe", "exactness", "batch", "end"])
@pytest.mark.parametrize("empty", [True, False])
def test_missing_notes_do_not_break_it(tmp_path: Path, kind: str, empty: bool) -> None:
    rows = without(a_run(steps=3), kind) + ([Note(kind, {})] if empty else [])
    assert page_of(tmp_path, rows)
    ElementTree.parse(write_picture(tmp_path, tmp_path / "a" / "picture.svg"))
    assert printed(rows)


def test_a_run_without_steps_says_so(tmp_path: Path) -> None:
    page = page_of(tmp_path, [row for row in a_run() if not isinstance(row, Sample)])
    assert "No training step is in the trace." in page and "no loss to draw" in page
    picture = write_picture(tmp_path, tmp_path / "picture.svg").read_text()
    assert "no step in the trace" in picture


def test_a_run_without_trace_is_one_clear_line(tmp_path: Path) -> None:
    for write_it in (
        lambda: write_report(tmp_path),
        lambda: write_picture(tmp_path, tmp_path / "x"),
    ):
        with pytest.raises(DataError, match="no trace at"):
            write_it()
    assert not list(tmp_path.iterdir())


HOSTILE = "<script>alert('x')</script>\x1b[31m\ud800\u202e\"&"


def test_hostile_strings_are_escaped(tmp_path: Path) -> None:
    start = dict.fromkeys(("run", "order", "device", "backend", "model_type", "dtype"), HOSTILE)
    notes = [
        Note("checkpoint", {"step": HOSTILE, "path": HOSTILE, "bytes": HOSTILE}),
        Note("data", {"percentiles": {HOSTILE: 1, "50": HOSTILE}, "documents": HOSTILE}),
        Note("data", {"histogram": [[HOSTILE, 1, 1], [1], 7], "percentiles": 3, "longest": 2}),
        Note("batch", {"cu_seqlens": HOSTILE, "world": 2, "order": HOSTILE}),
        Note("resume", {"step": HOSTILE}),
        Note("end", {"reason": HOSTILE, "seconds": HOSTILE}),
    ]
    rows = [*a_run(axes={HOSTILE: HOSTILE}, **start), *notes]
    rows.append(Sample(9, {HOSTILE: 1.0, "loss": HOSTILE}))  # type: ignore[dict-item]
    page = page_of(tmp_path, rows)
    picture = write_picture(tmp_path, tmp_path / "picture.svg").read_text(encoding="utf-8")
    ElementTree.fromstring(picture)
    for written in (page, picture, printed(rows)):
        assert "\x1b" not in written and "\u202e" not in written
    for written in (page, picture):
        assert "<script" not in written and "&lt;script&gt;" in written


def test_table_shows_markup_as_text() -> None:
    shown = printed(a_run(run="[red]x[/red]"))
    assert "[red]x[/red]" in shown and "▁" in shown and "Exact on 4 ranks" in shown


def test_picture_stands_alone(tmp_path: Path) -> None:
    out = write_picture(write(tmp_path, a_run()), tmp_path / "picture.svg")
    root = ElementTree.parse(out).getroot()
    assert root.get("viewBox") == "0 0 960 420"
    assert root[0].tag == f"{SVG}title" and root[1].tag == f"{SVG}desc"
    assert "var(" not in out.read_text()
    paper = next(rect for rect in root.iter(f"{SVG}rect") if rect.get("class") == "paper")
    assert float(paper.get("width", "0")) >= 958
    assert "Exact on 4 ranks" in "".join(root.itertext())


@given(
    lengths=st.lists(st.integers(0, 40), min_size=1, max_size=12).filter(any),
    world=st.integers(1, 5),
    order=st.sampled_from(list(Order)),
)
def test_batch_is_dealt_as_layout_deals_it(lengths: list[int], world: int, order: Order) -> None:
    bounds = [sum(lengths[:i]) for i in range(len(lengths) + 1)]
    batch = Batch(tuple(bounds), world, str(order))
    in_document = [position for length in lengths for position in range(length)]
    for rank in range(world):
        held = [position for piece in batch.held(rank) for position in piece]
        assert held == positions(batch.length, rank, world, order, bounds).tolist()
        assert batch.tokens(rank) == len(held)
        assert batch.work(rank) == sum(in_document[position] + 1 for position in held)
    bands = list(batch.bands(0, batch.length))
    assert [b - a for a, b, _ in bands] == [length for length in lengths if length]
    assert ElementTree.fromstring(svg.svg(400, 200, "t", "d", shard_strip(batch, 400))) is not None


def test_documents_finer_than_a_hair_still_show_as_held() -> None:
    batch = Batch(tuple(range(0, 200_001, 2)), 2, "contiguous")
    root = ElementTree.fromstring(svg.svg(400, 200, "t", "d", shard_strip(batch, 400)))
    kinds = [path.get("class") for path in root.iter(f"{SVG}path")]
    assert kinds == ["band1", "rank0 pale", "rank1 pale"]


@pytest.mark.parametrize(
    "values",
    [((0, 5), 2, "spiral"), ((0, 5), 0, "zigzag"), ((1, 5), 2, "zigzag"), ((0, 0), 1, "striped")],
)
def test_an_impossible_batch_is_refused(values: tuple[tuple[int, ...], int, str]) -> None:
    with pytest.raises(ValueError):
        Batch(*values)


@given(
    points=st.lists(
        st.tuples(st.integers(0, 10**7), st.floats(-1e300, 1e300) | st.just(math.nan)), max_size=30
    ),
    log=st.booleans(),
    from_zero=st.booleans(),
)
def test_any_curve_can_be_drawn(
    points: list[tuple[float, float]], log: bool, from_zero: bool
) -> None:
    points = sorted(points, key=lambda point: point[0])
    drawn = line_chart(
        [Curve("a", points, trail=True, dots=True)], 400, 200, log=log, from_zero=from_zero
    )
    assert "nan" not in drawn and "inf" not in drawn
    ElementTree.fromstring(svg.svg(400, 200, "t", "d", drawn))


def test_long_curves_are_thinned_and_keep_their_peaks() -> None:
    points = [(float(i), 1.0 if i != 54321 else 9.0) for i in range(100_000)]
    drawn = line_chart([Curve("a", points)], 400, 200)
    assert len(drawn) < 40_000
    heights = [float(step.split()[1]) for step in drawn.split('d="M')[1].split('"')[0].split("L")]
    assert min(heights) < 60 < 160 < max(heights)


def test_bars_are_as_tall_as_their_shares() -> None:
    drawn = bar_chart(["1", "2"], [Bars("x", [0.25, 0.5])], 400, 200)
    root = ElementTree.fromstring(svg.svg(400, 200, "t", "d", drawn))
    heights = [float(r.get("height", "0")) for r in root.iter(f"{SVG}rect") if len(r)]
    assert heights[1] == pytest.approx(2 * heights[0], abs=0.2)
    assert bar_chart([], [], 400, 200) == "" == bar_chart(["1"], [Bars("x", [0.0])], 400, 200)


@given(st.floats(-1e12, 1e12), st.floats(1e-6, 1e12), st.integers(1, 12))
def test_ticks_are_few_round_and_inside(low: float, span: float, about: int) -> None:
    high = low + span
    found = svg.ticks(low, high, about)
    assert len(found) <= 2 * about + 2
    assert all(
        low - 1e-6 * span <= tick <= high + 1e-6 * span for tick in found
    ) or span < 1e-9 * abs(low)


def test_ticks_by_hand() -> None:
    assert svg.ticks(0, 10, 5) == [0, 2, 4, 6, 8, 10]
    assert svg.ticks(2.1, 5.6, 4) == [3, 4, 5]
    assert svg.ticks(0, 0.31, 4) == [0, 0.1, 0.2, 0.3]
    assert svg.log_ticks(0.5, 20) == [0.5, 1, 2, 5, 10, 20]
    assert svg.log_ticks(1, 1e6) == [10.0**e for e in range(7)]


def test_words() -> None:
    assert (count(1234567), count(None), figure(math.nan)) == ("1,234,567", "–", "not a number")
    assert (figure(9.3e-8, 2), figure(1e20), figure(2.5)) == ("9.3e-8", "1e20", "2.5")
    assert (short(950), short(1234), short(34_000_000), size(3.4e6)) == (
        "950",
        "1.2 k",
        "34 M",
        "3.4 MB",
    )
    assert (percent(0.934), percent(0.003), percent(0.9941)) == ("93 %", "0.3 %", "99.4 %")
    assert (duration(0.31), duration(192), duration(7500)) == ("0.31 s", "3 min 12 s", "2 h 05 min")
    assert clean("a\x1b[0m\x00\ud800b") == "a�[0m��b"
    assert sparkline([0, 1, math.nan, 7]) == "▁▂ █" and len(sparkline(range(1000))) == 40


def test_report_needs_no_torch() -> None:
    code = (
        "import sys, longspan.report.page, longspan.report.table\n"
        "assert not {'torch', 'transformers'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
