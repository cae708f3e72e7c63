"""A predicted ring attention for the terminal: verdict, orders side by side, the next command."""

from collections.abc import Mapping
from pathlib import Path
from statistics import mean

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from longspan.cluster.ring import RingPrediction
from longspan.layout import Order
from longspan.report.words import percent, size

__all__ = ["ring_verdict"]

_MOST_RANKS = 16


def ring_verdict(
    found: Mapping[Order, RingPrediction], chosen: Order, command: str, drawn: Path | None
) -> RenderableType:
    """What ``longspan simulate ring`` prints; ``command`` is the one given, but for its order."""
    best = min(found, key=lambda order: found[order].seconds)
    # Orders that take the same time are told apart by rounding only: the chosen one stays.
    if found[chosen].seconds <= found[best].seconds * 1.001:
        best = chosen
    return Group(
        *(Text(line, style="bold") for line in _verdict(found, chosen, best)),
        Text(),
        _orders(found),
        Text(),
        _ranks(found),
        *((Text(), Text(f"timeline: {drawn}")) if drawn else ()),
        Text(),
        Text("Next:", style="dim"),
        Text(_next(command, chosen, best, drawn), style="bold cyan"),
    )


def _verdict(
    found: Mapping[Order, RingPrediction], chosen: Order, best: Order
) -> tuple[str, str, str]:
    one = found[chosen]
    compared = (
        "no order is quicker"
        if best is chosen
        else f"{best} would take {_seconds(found[best].seconds)}"
    )
    world = one.ring.world
    pipe, share = one.busiest_pipe
    busy = mean(one.utilisation)
    bound = (
        "computing sets the pace"
        if max(one.utilisation) >= share
        else f"the links set the pace: {_pipe(pipe)} is at work {percent(share)} of it"
    )
    return (
        f"{_seconds(one.seconds)} for one attention, forward and backward, over "
        f"{one.ring.length:,} tokens in {chosen} order on {world} ranks; {compared}.",
        f"Devices compute {percent(busy)} of the time; {bound}.",
        f"{size(one.sent_bytes)} are sent, {size(one.between_nodes_bytes)} of them between nodes.",
    )


def _seconds(value: float) -> str:
    for unit, name in ((1.0, "s"), (1e-3, "ms")):
        if value >= unit:
            return f"{value / unit:.3g} {name}"
    return f"{value * 1e6:.3g} µs"


def _pipe(name: str) -> str:
    """A pipe of the fabric, for people."""
    if not name:
        return "none"
    level, index, way = name.split()
    return f"rank {index} NIC {way}" if level == "share" else f"{level} {index} {way}"


def _table(first: str, found: Mapping[Order, RingPrediction]) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 3, 0, 0))
    table.add_column(first)
    for order in found:
        table.add_column(str(order), justify="right")
    return table


def _orders(found: Mapping[Order, RingPrediction]) -> Table:
    table = _table("one attention", found)
    ones = found.values()
    table.add_row("time", *(_seconds(one.seconds) for one in ones))
    table.add_row("sent, all ranks", *(size(one.sent_bytes) for one in ones))
    table.add_row("between nodes", *(size(one.between_nodes_bytes) for one in ones))
    table.add_row("work, most / mean", *(f"{one.imbalance:.2f}" for one in ones))
    table.add_row("busiest link", *(_pipe(one.busiest_pipe[0]) for one in ones))
    table.add_row("  at work", *(percent(one.busiest_pipe[1]) for one in ones))
    return table


def _ranks(found: Mapping[Order, RingPrediction]) -> Table:
    """Each rank's share of time computing, or where there are many, some of them and the range."""
    table = _table("computing", found)
    ones = list(found.values())
    world = ones[0].ring.world
    if world <= _MOST_RANKS:
        for rank in range(world):
            table.add_row(f"rank {rank}", *(percent(one.utilisation[rank]) for one in ones))
    else:
        for name, of in (("least of all ranks", min), ("mean", mean), ("most", max)):
            table.add_row(name, *(percent(of(one.utilisation)) for one in ones))
    return table


def _next(command: str, chosen: Order, best: Order, drawn: Path | None) -> str:
    if best is not chosen:
        return f"{command} --order {best}"
    if drawn is None:
        return f"{command} --order {chosen} --timeline ring.svg"
    return f"longspan train config.yaml --set parallel.order={chosen}"
