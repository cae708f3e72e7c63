"""The command ``longspan poc``."""

import os
import shlex
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from longspan.commands.verdict import ADVICE, BLOCKED, FINE, Verdict, answer

if TYPE_CHECKING:
    from longspan.report.poc import Poc

__all__ = ["poc"]


def poc(
    config: Annotated[Path, typer.Argument(help="The plan: a run's YAML file.")],
    baseline: Annotated[
        Path | None,
        typer.Option(help="What it is measured against; the plain way of CONFIG, if not said."),
    ] = None,
    minutes: Annotated[float, typer.Option(min=0.05, help="How long it may take.")] = 30.0,
    criterion: Annotated[
        float, typer.Option(min=0.0, help="The least speed-up that passes; set before the start.")
    ] = 1.1,
    predicted: Annotated[
        float | None, typer.Option(help="The speed-up that longspan plan promised.")
    ] = None,
    turns: Annotated[int, typer.Option(min=1, help="Runs of each, one after the other.")] = 6,
    nproc: Annotated[int | None, typer.Option(min=1, help="Processes to start here.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Measure the plan against the plain way, in turns, on the real cluster or in the lab.

    Leaks and exactness are checked first. Start it with --nproc, or on several machines as
    ``torchrun … -m longspan poc config.yaml``. Ends with 0 if it passes, 1 if not, 2 if it leaks.
    """
    from longspan.plan import read_plan
    from longspan.report.poc import Poc
    from longspan.train.config import load_config
    from longspan.train.launch import default_nproc, launch, prepare, within_torchrun

    settings = load_config(config)
    if not within_torchrun():
        prepare()
    from longspan.train.poc import Criterion, Way, baseline_of, poc_folder, run_poc
    from longspan.train.worker import leave

    plain = load_config(baseline) if baseline else baseline_of(settings)
    ways = Way(settings, str(config)), Way(plain, str(baseline or ""))
    work = partial(run_poc, *ways, Criterion(minutes, criterion, predicted, turns))
    if within_torchrun():
        code = work()
        if code or os.environ["RANK"] != "0":
            leave(code)
        try:
            _tell(read_plan(Poc, poc_folder(settings) / "poc.json"), poc_folder(settings), as_json)
        except typer.Exit as exit_:
            leave(exit_.exit_code)
    if code := launch(work, nproc or default_nproc()):
        raise typer.Exit(code)
    _tell(read_plan(Poc, poc_folder(settings) / "poc.json"), poc_folder(settings), as_json)


def _tell(found: "Poc", folder: Path, as_json: bool) -> None:
    from rich.table import Table

    gain = found.speedup
    promised = f"; {found.predicted:.2f}× was predicted" if found.predicted else ""
    lines = (
        f"{'Passed' if found.passed else 'Failed'}: {gain.middle:.2f}× the plain way's speed "
        f"({gain.low:.2f} to {gain.high:.2f}×, 95 of 100 times); {found.criterion:.2f}× was asked.",
        f"{found.leaks or 0} leaks; loss and gradients differ from one process's by "
        f"{found.difference or 0.0:.1e}{promised}.",
        f"{len(found.plan_tokens_per_s)} turns of each on {found.ranks} ranks in "
        f"{found.minutes:.0f} minutes.",
    )
    table = Table("turn", box=None, pad_edge=False, header_style="dim")
    for name in (found.baseline_name, found.plan_name, "ratio"):
        table.add_column(name, justify="right")
    pairs = zip(found.baseline_tokens_per_s, found.plan_tokens_per_s, strict=True)
    for turn, (plain, plan) in enumerate(pairs, 1):
        table.add_row(str(turn), f"{plain:,.0f}", f"{plan:,.0f} tokens/s", f"{plan / plain:.2f}")
    code = BLOCKED if found.leaks else FINE if found.passed else ADVICE
    values = {"poc": asdict(found), "speedup": asdict(gain), "passed": found.passed}
    command = f"longspan report {shlex.quote(str(folder))} --audience exec"
    answer(Verdict(lines, code, command), values, table, as_json)
