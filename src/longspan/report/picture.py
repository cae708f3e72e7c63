"""Picture: a run at a glance, as one SVG that stands alone."""

from longspan.report import svg
from longspan.report.charts import Bars, Curve, bar_chart, line_chart, shard_strip
from longspan.report.summary import Summary
from longspan.report.words import count, short

__all__ = ["histogram", "loss_curves", "picture"]

_WIDTH, _HEIGHT = 960, 420
_MOST_RANKS = 8


def histogram(run: Summary) -> tuple[list[str], list[Bars]]:
    """The labels and bars of the documents' lengths: share of documents, share of tokens."""
    rows = []
    found = run.data.get("histogram")
    for row in found if isinstance(found, list) else ():
        if isinstance(row, list) and len(row) == 3 and all(isinstance(v, int | float) for v in row):
            rows.append(row)
    documents = sum(row[1] for row in rows)
    if not documents:
        return [], []
    return [_bound(row[0]) for row in rows], [
        Bars("documents", [row[1] / documents for row in rows], "one"),
        Bars("tokens", [row[2] for row in rows], "two"),
    ]


def loss_curves(run: Summary) -> list[Curve]:
    """The loss in training and in validation."""
    return [
        Curve("training", run.loss, "one", trail=True),
        Curve("validation", run.validation, "two", dots=True),
    ]


def _bound(tokens: float) -> str:
    """A power of two as people write it: 512, 4k, 1M."""
    for unit, name in ((2**20, "M"), (2**10, "k")):
        if tokens >= unit and tokens % unit == 0:
            return f"{tokens // unit:.0f}{name}"
    return f"{tokens:.0f}"


def picture(run: Summary) -> str:
    """The picture of a run: its documents, who holds which tokens, the loss, and the verdict."""
    top, tall = 128.0, 214.0
    labels, bars = histogram(run)
    panels = (
        (28.0, "Uneven documents", _told_data(run), bar_chart(labels, bars, 262, tall)),
        (322.0, _told_ranks(run), _told_batch(run), _strip(run, 306, tall)),
        (664.0, "Training", _told_loss(run), _loss(run, 268, tall)),
    )
    parts = [svg.text(28, 42, f"longspan · {_cut(run.name, 40)}", "title")]
    parts.append(svg.text(28, 64, _cut(_told_model(run), 120)))
    for left, title, told, drawn in panels:
        parts.append(svg.text(left, 98, title, "strong big"))
        parts.append(svg.text(left, 115, told))
        parts.append(svg.place(left, top, drawn) if drawn else "")
    line = run.verdict[0]
    hue = line.state if line.state != "unknown" else "muted"
    words = [_cut(sentence, 120) for sentence in line.words.replace(". ", ".\n").split("\n")]
    parts.append(svg.rect(28, 358, _WIDTH - 56, 44, "track", r=6))
    parts.append(svg.rect(28, 358, 5, 44, hue, r=2))
    for i, told in enumerate(words):
        parts.append(
            svg.text(46, 384 + 18 * (i - (len(words) - 1) / 2), told, "" if i else "strong")
        )
    description = " ".join(verdict.words for verdict in run.verdict)
    return svg.svg(
        _WIDTH, _HEIGHT, f"longspan · {run.name}", description, *parts, colours=svg.LIGHT
    )


def _cut(words: str, most: int) -> str:
    return words if len(words) <= most else words[: most - 1] + "…"


def _told_model(run: Summary) -> str:
    start = run.start
    parameters = start.get("parameters")
    told = [
        f"{start['model_type']} model" if "model_type" in start else "",
        f"{short(parameters)} parameters" if isinstance(parameters, int) else "",
        f"{run.world} ranks" if run.world else "",
        f"on {start['device']}" if "device" in start else "",
        f"over {start['backend']}" if "backend" in start else "",
    ]
    return ", ".join(word for word in told if word)


def _told_data(run: Summary) -> str:
    documents, longest = run.data.get("documents"), run.data.get("longest")
    if not isinstance(documents, int) or not isinstance(longest, int):
        return "not measured"
    return f"{count(documents)} documents, up to {count(longest)} tokens"


def _told_ranks(run: Summary) -> str:
    return f"Sharded over {run.batch.world} ranks" if run.batch else "Sharding"


def _told_batch(run: Summary) -> str:
    return f"a packed batch, {run.batch.order} order" if run.batch else "no batch in the trace"


def _told_loss(run: Summary) -> str:
    if not run.loss:
        return "no step in the trace"
    speed = f", {count(run.tokens_per_s)} tokens/s" if run.tokens_per_s is not None else ""
    return f"loss in {count(run.steps)} steps{speed}"


def _strip(run: Summary, width: float, tall: float) -> str:
    """The strip of the batch, its rows as high as ``tall`` lets them be."""
    if not run.batch:
        return ""
    ranks = min(run.batch.world, _MOST_RANKS)
    row = min(34.0, (tall - 14 - 20 * (run.batch.world > ranks)) / (ranks + 1) - 6)
    return shard_strip(run.batch, width, row, wide=False, most=_MOST_RANKS)


def _loss(run: Summary, width: float, tall: float) -> str:
    return line_chart(loss_curves(run), width, tall)
