"""The command line: thin, and lazy, so that ``--help`` is quick."""

import json
import sys
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from longspan.commands.checkpoints import export, verify
from longspan.commands.doctor import doctor
from longspan.commands.emit import emit
from longspan.commands.init import init
from longspan.commands.plan import plan
from longspan.commands.plan_batches import plan_batches
from longspan.commands.plan_layers import plan_layers
from longspan.commands.plan_sites import plan_sites
from longspan.commands.plan_stages import plan_stages
from longspan.commands.poc import poc
from longspan.commands.rendezvous import rendezvous
from longspan.commands.report import report
from longspan.commands.simulate import app as simulate
from longspan.commands.watch import watch
from longspan.errors import LongspanError
from longspan.lab.commands import app as lab
from longspan.report.words import clean

__all__ = ["demo", "diagnose", "main", "probe", "train"]

app = typer.Typer(
    name="longspan",
    help="Train transformers on long and uneven sequences over few, slow or uneven links.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command()(init)
app.command()(plan)
app.command(name="plan-batches")(plan_batches)
app.add_typer(simulate, name="simulate")
app.add_typer(lab, name="lab")
app.command()(doctor)
app.command()(emit)
app.command()(watch)
app.command()(report)
app.command()(poc)
app.command()(verify)
app.command()(export)
app.command()(plan_stages)
app.command(name="plan-layers")(plan_layers)
app.command()(plan_sites)
app.command()(rendezvous)


@app.command()
def diagnose(
    data: Annotated[Path, typer.Argument(help="A folder of text, a .jsonl or a .parquet file.")],
    field: Annotated[str, typer.Option(help="Where the text is in JSONL and Parquet.")] = "text",
    tokenizer: Annotated[
        Path | None, typer.Option(help="A tokenizer.json; without it bytes are tokens.")
    ] = None,
    end_token: Annotated[
        str | None, typer.Option(help="The tokenizer's end-of-document token.")
    ] = None,
    max_length: Annotated[int, typer.Option(help="Most tokens of a packed sequence.")] = 8192,
    exact: Annotated[
        bool, typer.Option("--exact", help="Tokenise every document, not a sample.")
    ] = False,
    sample: Annotated[int, typer.Option(min=64, help="Documents to tokenise.")] = 4096,
    cluster: Annotated[
        str | None, typer.Option(help="What longspan probe wrote, for the next command.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """How long the documents are, and what their unevenness costs.

    The characters of all documents are counted; of more than 4096 documents a sample is
    tokenised, the longest among it.
    """
    from longspan.data.diagnose import diagnose as measure
    from longspan.data.render import render
    from longspan.data.tokens import load_tokenizer

    found = measure(
        data,
        field=field,
        tokenizer=load_tokenizer(tokenizer, end_token),
        max_length=max_length,
        sample=None if exact else sample,
        cluster=cluster,
    )
    if as_json:
        print(json.dumps(found.to_dict(), indent=2))
    else:
        from rich.console import Console

        Console(highlight=False).print(render(found))
        # As it is, so that a narrow terminal can't break what is copied.
        print(f"\nNext:\n{found.next_command}")


@app.command()
def train(
    config: Annotated[Path, typer.Argument(help="The run's YAML file.")],
    change: Annotated[
        list[str] | None, typer.Option("--set", help="Change a setting: section.key=value.")
    ] = None,
    nproc: Annotated[
        int | None,
        typer.Option(min=1, help="Processes to start here; one a GPU, or one, if not said."),
    ] = None,
) -> None:
    """Train; goes on from the newest checkpoint of a run that was stopped.

    Start it by itself with --nproc, or on several machines as
    ``torchrun … -m longspan train config.yaml``.
    """
    from longspan.train.config import load_config
    from longspan.train.launch import default_nproc, launch, prepare, within_torchrun

    settings = load_config(config, tuple(change or ()))
    if not within_torchrun():
        prepare()
    from longspan.train.inspect import inspect
    from longspan.train.worker import leave, run_worker

    if within_torchrun():
        leave(run_worker(settings))
    processes = nproc or default_nproc()
    inspect(settings, processes, processes)
    code = launch(partial(run_worker, settings), processes)
    if code == 1:
        print("the same command goes on from the last checkpoint", file=sys.stderr)
    raise typer.Exit(code)


@app.command()
def probe(
    out: Annotated[Path, typer.Option(help="Where the cluster is written.")] = Path("cluster.yaml"),
    trace: Annotated[
        Path | None, typer.Option(help="Where the measurements are kept; none: beside it.")
    ] = None,
    site: Annotated[
        str, typer.Option(envvar="LONGSPAN_SITE", help="The name of the site this node is at.")
    ] = "site0",
    nproc: Annotated[
        int | None,
        typer.Option(min=1, help="Processes to start here; one a GPU, or one, if not said."),
    ] = None,
) -> None:
    """Measure the cluster: links at every level, devices, memory.

    Start it by itself with --nproc, or on all machines as ``torchrun … -m longspan probe``.
    """
    from longspan.train.launch import default_nproc, launch, prepare, within_torchrun

    if not within_torchrun():
        prepare()
    from longspan.train.probe import run_probe
    from longspan.train.worker import leave

    work = partial(run_probe, out, trace or out.with_suffix(".jsonl"), site)
    if within_torchrun():
        leave(work())
    raise typer.Exit(launch(work, nproc or default_nproc()))


@app.command()
def demo(
    runs: Annotated[Path, typer.Option(help="Where the run is kept.")] = Path("runs"),
    steps: Annotated[int | None, typer.Option(min=1, help="Optimizer steps.")] = None,
) -> None:
    """Diagnose real documents, train on them with four processes, prove it exact, report."""
    from longspan.train.demo import run_demo

    raise typer.Exit(run_demo(runs, steps))


def main(arguments: list[str] | None = None) -> None:
    """Run the command line; a user's error is one line and exit code 2."""
    try:
        app(arguments)
    except LongspanError as error:
        # A file's name may hold what steers a terminal.
        print(f"longspan: {clean(error)}", file=sys.stderr)
        sys.exit(2)
