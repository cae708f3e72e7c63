"""Page: a run's report as one self-contained HTML file, and its picture as one SVG."""

import shlex
from pathlib import Path

import jinja2
from markupsafe import Markup

from longspan.report import svg
from longspan.report.charts import Curve, bar_chart, line_chart, shard_strip, strip_height
from longspan.report.picture import histogram, loss_curves, picture
from longspan.report.summary import Summary, summarise
from longspan.report.words import clean, count, duration, figure, percent, size
from longspan.trace import read_trace

__all__ = ["charts", "figures", "write_picture", "write_report"]

_WIDTH = 860
_ENVIRONMENT = {
    "model_type": "model",
    "parameters": "parameters",
    "max_length": "longest sequence, tokens",
    "world": "ranks",
    "axes": "mesh axes",
    "order": "token order",
    "dtype": "dtype",
    "device": "device",
    "backend": "backend",
    "torch": "torch",
    "longspan": "longspan",
}


def write_report(run: Path, out: Path | None = None) -> Path:
    """Write the report of the run in folder ``run`` to ``out`` (``run/report.html``).

    Raises DataError if the folder holds no trace.
    """
    out = out or run / "report.html"
    page = _page(summarise(read_trace(run / "trace.jsonl"), run.resolve().name), run)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(page, encoding="utf-8")
    return out


def write_picture(run: Path, out: Path) -> Path:
    """Write the run's picture, an SVG with its own paper, to ``out``.

    Raises DataError if the folder holds no trace.
    """
    drawn = picture(summarise(read_trace(run / "trace.jsonl"), run.resolve().name))
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(drawn + "\n", encoding="utf-8")
    return out


def _page(summary: Summary, run: Path) -> str:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("longspan.report", "."),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "count": count,
        "duration": duration,
        "figure": figure,
        "percent": percent,
        "size": size,
    }
    return environment.get_template("page.html.j2").render(
        run=summary,
        light=Markup(svg.variables(svg.LIGHT)),
        dark=Markup(svg.variables(svg.DARK)),
        rules=Markup(svg.RULES),
        charts=charts(summary),
        figures=figures(summary),
        data=_facts(summary.data),
        sites=_sites(summary),
        exactness=_facts(summary.exactness),
        leak_probe=_facts(summary.leak_probe),
        checkpoints=[(about.get("path", ""), _facts(about)) for about in summary.checkpoints],
        environment=_environment(summary),
        percentiles=_percentiles(summary),
        commands=_commands(summary, run),
    )


def _chart(height: float, title: str, description: str, drawn: str) -> Markup | None:
    """A drawing of the page's width, or None where there was nothing to draw."""
    return Markup(svg.svg(_WIDTH, height, title, description, drawn)) if drawn else None


def charts(run: Summary) -> dict[str, Markup | None]:
    """The page's charts as SVG, by name; None where there is nothing to draw."""
    speed = [Curve("tokens/s", run.speed, trail=True)]
    labels, bars = histogram(run)
    batch = run.batch
    return {
        "loss": _chart(
            280,
            "Loss",
            f"Training loss from {figure(run.first_loss)} to {figure(run.last_loss)}.",
            line_chart(loss_curves(run), _WIDTH, 280, x_label="step"),
        ),
        "speed": _chart(
            180,
            "Tokens per second",
            f"Median {count(run.tokens_per_s)} tokens per second.",
            line_chart(speed, _WIDTH, 180, x_label="step", from_zero=True),
        ),
        "histogram": _chart(
            220,
            "Lengths of the documents",
            "Share of the documents, and of all tokens, by length of the document.",
            bar_chart(labels, bars, _WIDTH, 220, x_label="tokens in the document, up to"),
        ),
        "outer_cosine": _chart(
            180,
            "Agreement of the sites",
            "Mean cosine between the sites' outer gradients, merge by merge.",
            line_chart(
                [Curve("cosine", run.outer_cosine, trail=True)], _WIDTH, 180, x_label="step"
            ),
        ),
        "batch": _chart(
            strip_height(batch),
            "Who holds which tokens",
            f"A packed sequence of {count(batch.documents)} documents in {batch.order} order.",
            shard_strip(batch, _WIDTH),
        )
        if batch
        else None,
    }


def _facts(about: dict[str, object]) -> dict[str, float | None]:
    """The numbers of a note; asking for one that isn't there gives None."""
    return _Facts({k: v for k, v in about.items() if isinstance(v, int | float)})


class _Facts(dict[str, float | None]):
    def __missing__(self, key: str) -> None:
        return None


def figures(run: Summary) -> list[tuple[str, str]]:
    """The run's figures in words: (name, value)."""
    best = run.best_validation
    return [
        ("steps", count(run.steps)),
        ("first loss", figure(run.first_loss)),
        ("last loss", figure(run.last_loss)),
        (
            "best validation loss",
            f"{figure(best[1])} at step {count(best[0])}" if best else figure(None),
        ),
        ("tokens trained on", count(run.tokens)),
        ("tokens/s, median", count(run.tokens_per_s)),
        ("time in steps", duration(run.step_s)),
        ("whole time", duration(_facts(run.end)["seconds"])),
        ("attention work, busiest rank / mean", figure(run.attention_imbalance)),
        ("sent between ranks for attention", size(run.ring_bytes)),
    ]


def _sites(run: Summary) -> list[tuple[str, str]]:
    """How sites are kept together, and what it costs."""
    if not run.outer:
        return []
    settings = _facts(run.outer)
    return [
        ("sites", count(settings["sites"])),
        ("steps between two exchanges of a fragment", count(settings["sync_every"])),
        ("steps until it is merged", count(settings["delay"])),
        ("sent as", str(run.outer.get("codec", ""))),
        ("sent by rank 0's site", size(run.outer_bytes)),
        ("waited for other sites", duration(run.outer_wait_s)),
        ("time not spent waiting for them", percent(run.outer_utilisation)),
    ]


def _environment(run: Summary) -> list[tuple[str, str]]:
    def told(value: object) -> str:
        if isinstance(value, dict):
            return " × ".join(f"{axis} {length}" for axis, length in value.items())
        return count(value) if isinstance(value, int) else str(value)

    return [
        (words, told(run.start[key])) for key, words in _ENVIRONMENT.items() if key in run.start
    ]


def _percentiles(run: Summary) -> list[tuple[str, str]]:
    found = run.data.get("percentiles")
    rows = found.items() if isinstance(found, dict) else ()
    named = [(f"{name} %", count(value)) for name, value in rows if isinstance(value, int | float)]
    longest = _facts(run.data)["longest"]
    return named + ([("longest", count(longest))] if named and longest is not None else [])


def _commands(run: Summary, folder: Path) -> list[tuple[str, str]]:
    """What to do next, and what to type for it."""
    config = folder / "config.yaml"
    if not config.is_file():
        return []
    train = f"longspan train {shlex.quote(clean(config))} --nproc {run.world or 1}"
    return [("Carry this run on; it starts from the last checkpoint:", train)]
