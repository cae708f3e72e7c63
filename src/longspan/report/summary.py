"""Summary: what happened in a run, told from its trace as plain data."""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any, Literal

from longspan.report.batch import Batch
from longspan.report.words import clean, count, duration, figure, percent, short
from longspan.trace import Note, Row, Sample, curve

__all__ = ["Summary", "Verdict", "summarise"]

State = Literal["good", "bad", "unknown"]
Curve = tuple[tuple[int, float], ...]
About = dict[str, Any]

# How far two sums of the same numbers in another order may differ, relative, by dtype.
_ROUNDING = {"float64": 1e-12, "float32": 1e-5, "bfloat16": 2**-6, "float16": 2**-9}


@dataclass(frozen=True, slots=True)
class Verdict:
    """One line of the verdict, and whether it is good news."""

    state: State
    words: str


@dataclass(frozen=True, slots=True)
class Summary:
    """What happened in a run; what its trace doesn't tell is None or empty.

    ``start``, ``data``, ``leak_probe``, ``exactness``, ``outer`` and ``end`` are what the last
    note of that kind says; curves are (step, value). ``tokens`` and ``step_s`` are sums over the
    steps.
    """

    name: str
    start: About = field(default_factory=dict)
    data: About = field(default_factory=dict)
    leak_probe: About = field(default_factory=dict)
    exactness: About = field(default_factory=dict)
    end: About = field(default_factory=dict)
    loss: Curve = ()
    validation: Curve = ()
    speed: Curve = ()
    tokens: float | None = None
    step_s: float | None = None
    attention_imbalance: float | None = None
    ring_bytes: float | None = None
    outer: About = field(default_factory=dict)
    outer_bytes: float | None = None
    outer_wait_s: float | None = None
    outer_cosine: Curve = ()
    batch: Batch | None = None
    checkpoints: tuple[About, ...] = ()
    resumes: tuple[int, ...] = ()

    @property
    def steps(self) -> int:
        """Steps done."""
        return self.loss[-1][0] if self.loss else 0

    @property
    def first_loss(self) -> float | None:
        """Loss of the first step told of."""
        return self.loss[0][1] if self.loss else None

    @property
    def last_loss(self) -> float | None:
        """Loss of the last step."""
        return self.loss[-1][1] if self.loss else None

    @property
    def best_validation(self) -> tuple[int, float] | None:
        """Step and value of the lowest validation loss."""
        finite = [point for point in self.validation if math.isfinite(point[1])]
        return min(finite, key=lambda point: point[1], default=None)

    @property
    def tokens_per_s(self) -> float | None:
        """Median of the steps' tokens per second."""
        return _median(self.speed)

    @property
    def outer_utilisation(self) -> float | None:
        """Share of the steps' time in which rank 0 did not wait for another site."""
        if self.outer_wait_s is None or not self.step_s:
            return None
        return 1 - self.outer_wait_s / self.step_s

    @property
    def broken_at(self) -> int | None:
        """The first step whose loss isn't a finite number."""
        return next((step for step, loss in self.loss if not math.isfinite(loss)), None)

    @property
    def world(self) -> int | None:
        """Ranks of the run."""
        world = self.start.get("world")
        return world if isinstance(world, int) else None

    @property
    def difference(self) -> float | None:
        """The larger of the relative differences in loss and gradient from one process."""
        found = [_number(self.exactness, f"{what}_difference") for what in ("loss", "gradient")]
        known = [value for value in found if value is not None]
        return next((v for v in known if math.isnan(v)), max(known, default=None))

    @property
    def verdict(self) -> tuple[Verdict, Verdict, Verdict]:
        """Is it exact, did it learn, how fast was it: a line each."""
        return _exact(self), _learnt(self), _fast(self)


def summarise(rows: Iterable[Row], name: str = "") -> Summary:
    """The summary of a trace's rows; ``name`` is the run's where no note tells it.

    All text in it is safe to print: control characters are replaced.
    """
    rows = list(_sound(rows))
    notes: dict[str, list[About]] = {}
    for row in rows:
        if isinstance(row, Note):
            notes.setdefault(row.kind, []).append(row.about)
    last = {kind: found[-1] for kind, found in notes.items()}
    start = last.get("start", {})
    tokens, times = curve(rows, "tokens"), curve(rows, "step_s")
    ring_bytes = curve(rows, "ring_bytes")
    outer_bytes, outer_wait = curve(rows, "outer_bytes"), curve(rows, "outer_wait_s")
    return Summary(
        name=str(start.get("run") or clean(name)),
        start=start,
        data=last.get("data", {}),
        leak_probe=last.get("leak_probe", {}),
        exactness=last.get("exactness", {}),
        end=_ending(rows),
        loss=tuple(curve(rows, "loss")),
        validation=tuple(curve(rows, "validation_loss")),
        speed=tuple(curve(rows, "tokens_per_s")),
        tokens=sum(value for _, value in tokens) if tokens else None,
        step_s=sum(value for _, value in times) if times else None,
        attention_imbalance=_median(curve(rows, "attention_imbalance")),
        ring_bytes=sum(value for _, value in ring_bytes) if ring_bytes else None,
        outer=last.get("outer", {}),
        outer_bytes=sum(value for _, value in outer_bytes) if outer_bytes else None,
        outer_wait_s=sum(value for _, value in outer_wait) if outer_wait else None,
        outer_cosine=tuple(curve(rows, "outer_cosine")),
        batch=_batch(last.get("batch", {})),
        checkpoints=tuple(notes.get("checkpoint", ())),
        resumes=tuple(
            about["step"] for about in notes.get("resume", ()) if _number(about, "step") is not None
        ),
    )


def _sound(rows: Iterable[Row]) -> Iterator[Row]:
    """The rows, with figures that are numbers only and text that is clean."""
    for row in rows:
        if isinstance(row, Sample) and isinstance(row.step, int) and isinstance(row.figures, dict):
            figures = {k: v for k, v in row.figures.items() if isinstance(v, int | float)}
            yield Sample(row.step, figures)
        elif isinstance(row, Note) and isinstance(row.about, dict):
            yield Note(clean(row.kind), _clean(row.about))


def _clean(value: Any) -> Any:
    if isinstance(value, dict):
        return {clean(key): _clean(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_clean(item) for item in value]
    return clean(value) if isinstance(value, str) else value


def _number(about: About, key: str) -> float | None:
    value = about.get(key)
    return value if isinstance(value, int | float) else None


def _median(points: Sequence[tuple[int, float]]) -> float | None:
    values = [value for _, value in points if math.isfinite(value)]
    return median(values) if values else None


def _ending(rows: Sequence[Row]) -> About:
    """The last "end" note, unless the run was started again after it."""
    ending: About = {}
    for row in rows:
        if isinstance(row, Note) and row.kind in ("start", "resume", "end"):
            ending = row.about if row.kind == "end" else {}
    return ending


def _batch(about: About) -> Batch | None:
    try:
        return Batch(tuple(int(b) for b in about["cu_seqlens"]), about["world"], about["order"])
    except (KeyError, TypeError, ValueError):
        return None


def _exact(run: Summary) -> Verdict:
    leaks, probes = _number(run.leak_probe, "leaks"), _number(run.leak_probe, "probes")
    ranks = (
        f"{run.world} ranks"
        if run.world and run.world > 1
        else "one rank"
        if run.world
        else "its ranks"
    )
    if leaks:
        return Verdict("bad", f"Leaks: {count(leaks)} outputs changed that must not.")
    told = (
        f" {count(probes)} leak probes found no leak." if leaks == 0 else " No leak probe was run."
    )
    if run.difference is None:
        return Verdict("unknown", f"Exactness on {ranks} was not measured.{told}")
    rounding = _ROUNDING.get(str(run.start.get("dtype")), _ROUNDING["float32"])
    exact = run.difference <= rounding
    loss, gradient = (_number(run.exactness, f"{k}_difference") for k in ("loss", "gradient"))
    words = (
        f"{'Exact' if exact else 'Not exact'} on {ranks}: the loss differs from one process's by "
        f"{figure(loss, 2)}, gradients by at most {figure(gradient, 2)} (relative)."
    )
    return Verdict("good" if exact else "bad", words + told)


def _learnt(run: Summary) -> Verdict:
    if run.first_loss is None or run.last_loss is None:
        return Verdict("unknown", "No training step is in the trace.")
    if run.broken_at is not None:
        return Verdict("bad", f"The loss stopped being a number at step {count(run.broken_at)}.")
    planned = _number(run.start, "steps")
    words = f"loss {figure(run.first_loss)} → {figure(run.last_loss)} in {count(run.steps)} steps"
    if planned and planned > run.steps:
        words += f" of {count(planned)}"
    if run.best_validation:
        step, best = run.best_validation
        words += f"; best validation loss {figure(best)} at step {count(step)}"
    if len(run.loss) < 2:
        return Verdict("unknown", f"One step only: {words}.")
    # A single step's loss is noisy, so the last tenth speaks.
    late = median(loss for _, loss in run.loss[-max(1, len(run.loss) // 10) :])
    if late < run.first_loss:
        return Verdict("good", f"Learnt: {words}.")
    return Verdict("bad", f"Did not learn: {words}.")


def _fast(run: Summary) -> Verdict:
    if run.tokens_per_s is None:
        return Verdict("unknown", "Speed was not measured.")
    words = f"{count(run.tokens_per_s)} tokens/s (median)"
    if run.tokens is not None and run.step_s is not None:
        words += f": {short(run.tokens)} tokens in {duration(run.step_s)} of steps"
    fill, waste = _number(run.data, "packed_fill"), _number(run.data, "padding_waste")
    if fill is not None and waste is not None:
        words += f"; packing fills {percent(fill)}, padding would waste {percent(waste)}"
    return Verdict("good", f"{words}.")
