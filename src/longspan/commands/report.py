"""The command ``longspan report``."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from longspan.errors import ConfigError

__all__ = ["Audience", "Lang", "report"]


class Audience(StrEnum):
    """Who reads it."""

    ENGINEER = "engineer"
    EXEC = "exec"


class Lang(StrEnum):
    """In which language; the engineer's report is in English."""

    EN = "en"
    JA = "ja"


def report(
    run: Annotated[Path, typer.Argument(help="A run's folder: runs/NAME.")],
    audience: Annotated[Audience, typer.Option(help="Who reads it.")] = Audience.ENGINEER,
    lang: Annotated[Lang, typer.Option(help="The executive's report: en or ja.")] = Lang.EN,
    out: Annotated[Path | None, typer.Option("-o", "--out", help="The page.")] = None,
    currency: Annotated[str, typer.Option(help="Of the prices.")] = "JPY",
    device_hour: Annotated[float, typer.Option(help="Price of an hour of a device.")] = 400.0,
    device_kw: Annotated[float, typer.Option(help="Power of a device, with cooling.")] = 1.0,
    kwh: Annotated[float, typer.Option(help="Price of a kWh.")] = 30.0,
) -> None:
    """One self-contained page on what a run did: nothing is fetched to show it; it prints on A4."""
    if min(device_hour, device_kw, kwh) < 0:
        raise ConfigError("a price or a power below zero: give 0 or more")
    if audience is Audience.ENGINEER:
        from longspan.report.page import write_report

        if lang is not Lang.EN:
            raise ConfigError("the engineer's report is in English: leave --lang out")
        written = write_report(run, out)
    else:
        from longspan.report.executive import write_executive
        from longspan.report.poc import Prices

        prices = Prices(currency, device_hour, device_kw, kwh)
        written = write_executive(run, out or run / f"executive.{lang}.html", lang.value, prices)
    print(f"report: {written}")
