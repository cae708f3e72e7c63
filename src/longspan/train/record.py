"""Writes what happens into the run's trace, and shows it to whoever is watching."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from longspan.trace import Note, Sample, Span, TraceWriter

__all__ = ["Recorder"]


@dataclass
class Recorder:
    """Rank 0's trace and progress bar; on the other ranks every call does nothing."""

    run: Path
    leader: bool
    steps: int
    console: Console = field(default_factory=lambda: Console(highlight=False))

    def __post_init__(self) -> None:
        self._start_s = time.perf_counter()
        self._writer = TraceWriter(self.run / "trace.jsonl") if self.leader else None
        self._progress: Progress | None = None
        if self.leader and self.console.is_terminal:
            columns = (TextColumn("step {task.completed}/{task.total}"), BarColumn())
            told = TextColumn("{task.fields[told]}")
            self._progress = Progress(*columns, told, TimeRemainingColumn(), console=self.console)
            self._task = self._progress.add_task("train", total=self.steps, told="")

    def __enter__(self) -> "Recorder":
        if self._progress:
            self._progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        where: TracebackType | None,
    ) -> None:
        if self._progress:
            self._progress.stop()
        if self._writer:
            self._writer.close()

    @property
    def seconds(self) -> float:
        """Seconds since the recorder was made."""
        return time.perf_counter() - self._start_s

    def say(self, words: str) -> None:
        """Print a line."""
        if self.leader:
            self.console.print(words, markup=False, soft_wrap=True)

    def note(self, kind: str, about: dict[str, Any]) -> None:
        """Write an event."""
        if self._writer:
            self._writer.write(Note(kind, about))

    def step(self, step: int, figures: dict[str, float]) -> None:
        """Write a step's figures and move the bar; off a terminal, print one line in twenty."""
        if not self._writer:
            return
        self._writer.write(Sample(step, figures))
        if "loss" not in figures:
            return
        told = f"loss {figures['loss']:.4f}  {figures['tokens_per_s']:,.0f} tokens/s"
        if self._progress:
            self._progress.update(self._task, completed=step, told=told)
        elif step % max(1, self.steps // 20) == 0 or step in (1, self.steps):
            self.say(f"step {step}/{self.steps}  {told}")

    @contextmanager
    def span(self, name: str, lane: str = "compute") -> Iterator[None]:
        """Time what happens inside, as a span of rank 0."""
        start = self.seconds
        yield
        if self._writer:
            self._writer.write(Span(name, 0, lane, start, self.seconds - start))
