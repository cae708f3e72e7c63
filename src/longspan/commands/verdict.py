"""A command's answer: a verdict in three lines, the figures, and what to type next."""

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NoReturn

import typer

if TYPE_CHECKING:
    from rich.console import RenderableType

__all__ = ["ADVICE", "BLOCKED", "FINE", "Verdict", "answer"]

FINE, ADVICE, BLOCKED = 0, 1, 2


@dataclass(frozen=True)
class Verdict:
    """Three lines, the exit code (0 fine, 1 advice, 2 blocked), and a command to go on with."""

    lines: tuple[str, str, str]
    code: int
    next_command: str


def answer(
    verdict: Verdict, values: dict[str, Any], shown: "RenderableType", as_json: bool
) -> NoReturn:
    """Print the verdict, with ``values`` as JSON or with what is ``shown``; end with its code."""
    if as_json:
        told = {
            "verdict": verdict.lines,
            "code": verdict.code,
            "next_command": verdict.next_command,
        }
        print(json.dumps(told | values, indent=2))
        raise typer.Exit(verdict.code)
    from rich.console import Console
    from rich.text import Text

    console = Console(highlight=False)
    for line in verdict.lines:
        console.print(Text(line, style="bold"))
    console.print()
    console.print(shown)
    console.print()
    console.print(Text("Next:", style="dim"))
    # As it is, so that a narrow terminal can't break what is copied.
    print(verdict.next_command)
    raise typer.Exit(verdict.code)
