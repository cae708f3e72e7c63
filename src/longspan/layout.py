"""Layout: where the pieces of a tensor live; Order: which tokens of a sequence a rank holds.

In every order a rank's tokens are kept in ascending position, and two ranks' counts differ by at
most one, so any length fits any number of ranks without padding.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum

import torch
from torch.distributed.tensor import Partial, Replicate, Shard
from torch.distributed.tensor.placement_types import Placement

from longspan.errors import LayoutError

__all__ = [
    "Layout",
    "Order",
    "Run",
    "layout_of",
    "local_length",
    "place_runs",
    "positions",
    "runs",
]


class Order(StrEnum):
    """How the tokens of a sequence are dealt to ``world`` ranks.

    ``contiguous``: one piece a rank. ``zigzag``: 2·world pieces, rank i holds pieces i and
    2·world-1-i, so that causal work is even. ``striped``: token t is on rank t mod world.
    """

    CONTIGUOUS = "contiguous"
    ZIGZAG = "zigzag"
    STRIPED = "striped"

    @classmethod
    def of(cls, order: "Order | str") -> "Order":
        """The order of that name; raises LayoutError for an unknown one."""
        try:
            return cls(order)
        except ValueError:
            known = ", ".join(cls)
            raise LayoutError(f"unknown order {order!r}: use one of {known}") from None


@dataclass(frozen=True)
class Layout:
    """A tensor's placement on each mesh axis it is spread over, and its token order.

    ``placements`` maps a mesh axis name to ``Shard(dim)``, ``Replicate()`` or ``Partial()``; an
    axis that isn't named is replicated. ``order`` holds for the sharded sequence dim.
    """

    placements: Mapping[str, Placement] = field(default_factory=dict)
    order: Order = Order.CONTIGUOUS

    def __post_init__(self) -> None:
        for axis, placement in self.placements.items():
            if not isinstance(placement, Placement):
                raise LayoutError(f"axis {axis!r}: {placement!r} is not a torch Placement")
        object.__setattr__(self, "placements", dict(self.placements))
        object.__setattr__(self, "order", Order.of(self.order))


def layout_of(placements: Mapping[str, str]) -> Layout:
    """The layout that a plan writes as "S(dim)", "P" or "R" by mesh axis.

    Raises LayoutError for another word.
    """
    found: dict[str, Placement] = {}
    for axis, word in placements.items():
        if word in ("R", "P"):
            found[axis] = Replicate() if word == "R" else Partial()
        elif (dim := word.removeprefix("S(").removesuffix(")")).isdecimal():
            found[axis] = Shard(int(dim))
        else:
            raise LayoutError(f"axis {axis!r}: {word!r} is no placement: use S(dim), P or R")
    return Layout(found)


@dataclass(frozen=True, slots=True)
class Run:
    """``count`` tokens that lie side by side on a rank: positions start, start+stride, …"""

    local: int
    start: int
    count: int
    stride: int


def _piece(length: int, index: int, pieces: int) -> tuple[int, int]:
    """Start and count of one of ``pieces`` nearly equal pieces; the longer ones come first."""
    share, longer = divmod(length, pieces)
    return index * share + min(index, longer), share + (index < longer)


def runs(length: int, rank: int, world: int, order: Order | str) -> tuple[Run, ...]:
    """The tokens of ``rank`` as runs of constant stride, in ascending position.

    Raises LayoutError if the rank isn't one of ``world``, or the length is negative.
    """
    order = Order.of(order)
    if length < 0:
        raise LayoutError(f"a sequence can't have {length} tokens")
    if not 0 <= rank < world:
        raise LayoutError(f"rank {rank} is not one of {world} ranks")
    if order is Order.STRIPED:
        pieces = [(rank, len(range(rank, length, world)), world)]
    elif order is Order.CONTIGUOUS:
        pieces = [(*_piece(length, rank, world), 1)]
    else:
        mirrored = 2 * world - 1 - rank
        pieces = [(*_piece(length, index, 2 * world), 1) for index in (rank, mirrored)]
    found: list[Run] = []
    local = 0
    for start, count, stride in pieces:
        if count:
            found.append(Run(local, start, count, stride))
            local += count
    return tuple(found)


def place_runs(
    length: int, place: int, places: int, width: int, order: Order | str
) -> tuple[Run, ...]:
    """The tokens that ``width`` ranks side by side hold together, as one place of ``places``.

    In ascending position and as few runs as can be; striped ones rank by rank.
    """
    ranks = range(place * width, (place + 1) * width)
    pieces = [run for rank in ranks for run in runs(length, rank, places * width, order)]
    if Order.of(order) is not Order.STRIPED:
        pieces.sort(key=lambda run: run.start)
    found: list[Run] = []
    local = 0
    for piece in pieces:
        last = found[-1] if found else None
        if last and piece.stride == 1 and last.start + last.count == piece.start:
            found[-1] = Run(last.local, last.start, last.count + piece.count, 1)
        else:
            found.append(Run(local, piece.start, piece.count, piece.stride))
        local += piece.count
    return tuple(found)


def local_length(length: int, rank: int, world: int, order: Order | str) -> int:
    """How many of ``length`` tokens ``rank`` holds."""
    return sum(run.count for run in runs(length, rank, world, order))


def positions(length: int, rank: int, world: int, order: Order | str) -> torch.Tensor:
    """Global positions of a rank's tokens, ascending: LongTensor of shape (local_length,).

    Raises LayoutError for an unknown order, a rank outside ``world`` or a negative length.
    """
    found = [
        torch.arange(run.start, run.start + run.count * run.stride, run.stride)
        for run in runs(length, rank, world, order)
    ]
    return torch.cat(found) if found else torch.empty(0, dtype=torch.long)
