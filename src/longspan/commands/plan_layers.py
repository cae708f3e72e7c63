"""The command ``longspan plan-layers``."""

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from longspan.errors import ConfigError

if TYPE_CHECKING:
    from longspan.planner.price import Pricing

__all__ = ["plan_layers"]


def plan_layers(
    module: Annotated[
        str, typer.Argument(help="package.module:Class, or the path of a transformers config.")
    ],
    cluster: Annotated[str, typer.Option(help="A preset's name, or a cluster's YAML file.")],
    ranks: Annotated[
        int | None, typer.Option(help="Use the first so many devices; all, if not said.")
    ] = None,
    batch: Annotated[int, typer.Option(help="Sequences in the batch of all devices.")] = 64,
    length: Annotated[int, typer.Option(help="Tokens of a sequence.")] = 2048,
    tensor: Annotated[
        list[str] | None,
        typer.Option("--input", help="An input's shape: 128x3x224x224, or 128:int64."),
    ] = None,
    dtype: Annotated[str, typer.Option(help="Of parameters and activations.")] = "float32",
    memory: Annotated[
        str | None, typer.Option(help="Most of a device: 40GB, or none; its own, if not said.")
    ] = None,
    fix: Annotated[
        list[str] | None, typer.Option(help="Keep a layer so: fc1=b:4,out:2. May be repeated.")
    ] = None,
    prices: Annotated[str, typer.Option(help="longspan, or pase for PaSE's own.")] = "longspan",
    overlap: Annotated[
        float, typer.Option(help="Share of backward that gradient sums can hide behind.")
    ] = 1.0,
    crossing: Annotated[
        bool, typer.Option(help="Find the bandwidth above which data-parallel wins.")
    ] = False,
    out: Annotated[Path | None, typer.Option(help="Write the plan: a JSON file.")] = None,
    picture: Annotated[Path | None, typer.Option("--svg", help="Draw it: an SVG file.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """How to split every layer of a model so that a step is quickest, and what else would cost."""
    pricing = _pricing(prices, overlap)
    fixed = dict(map(_fixed, fix or ()))
    import json
    from dataclasses import asdict

    from longspan.cluster.spec import read_cluster
    from longspan.plan import write_plan
    from longspan.planner.layers import plan_layers as make
    from longspan.planner.load import load

    where = read_cluster(cluster)
    model, inputs = load(module, batch=batch, length=length, inputs=tensor or (), dtype=dtype)
    search = partial(
        make,
        model,
        inputs,
        cluster=where,
        ranks=ranks,
        memory_limit=_bytes(memory),
        pricing=pricing,
    )
    plan = search(fixed=fixed)
    free = search(alternatives=False).seconds if fixed else None
    rate: float | None = -1.0
    if crossing:
        from longspan.planner.capture import capture
        from longspan.planner.crossing import crossing_bits_per_s

        rate = crossing_bits_per_s(capture(model, inputs), where, pricing, ranks)
    if out:
        write_plan(plan, out)
    if picture:
        from longspan.report.layers import write_layers

        write_layers(plan, picture)
    if as_json:
        told = asdict(plan) | ({"crossing_bits_per_s": rate} if crossing else {})
        print(json.dumps(told | ({"unfixed_seconds": free} if fixed else {}), indent=2))
        return
    from rich.console import Console

    from longspan.commands.layer_table import layer_table

    Console(highlight=False, soft_wrap=True).print(layer_table(plan, free, rate))


def _pricing(prices: str, overlap: float) -> "Pricing":
    if not 0 <= overlap <= 1:
        raise ConfigError(f"--overlap {overlap:g}: a share from 0 to 1")
    from longspan.planner.price import Pricing

    if prices == "longspan":
        return Pricing(overlap=overlap)
    if prices == "pase":
        return Pricing(model="pase", overlap=0.0, zero=False, recompute=False)
    raise ConfigError(f"unknown prices {prices!r}: use longspan or pase")


def _fixed(text: str) -> tuple[str, dict[str, int]]:
    name, equals, splits = text.partition("=")
    pairs = [part.partition(":") for part in splits.split(",") if part]
    if not name or not equals or not all(parts.isdecimal() for _, _, parts in pairs):
        raise ConfigError(f"--fix {text!r}: write it like fc1=b:4,out:2, or fc1= for replicated")
    return name, {dim: int(parts) for dim, _, parts in pairs}


def _bytes(text: str | None) -> float | None:
    if text is None:
        return None
    if text == "none":
        return float("inf")
    from pydantic import ByteSize, TypeAdapter, ValidationError

    try:
        return float(TypeAdapter(ByteSize).validate_python(text))
    except ValidationError:
        raise ConfigError(f"--memory {text!r}: write it like 40GB, or none") from None
