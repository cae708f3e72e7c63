"""The command ``longspan watch``."""

import contextlib
from pathlib import Path
from typing import Annotated

import typer

__all__ = ["watch"]


def watch(
    run: Annotated[Path, typer.Argument(help="A run's folder: runs/NAME.")],
    port: Annotated[int, typer.Option(min=0, help="0: any that is free.")] = 0,
) -> None:
    """A page over a run while it trains: loss, speed, figures, alerts. Ctrl-C ends it.

    It can be read on this machine only, with the address that is printed.
    """
    from longspan.report.watch import serve

    with serve(run, port) as server:
        print(f"open {server.address}", flush=True)
        with contextlib.suppress(KeyboardInterrupt):
            server.serve_forever()
