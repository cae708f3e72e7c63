"""Layout: where the pieces of a tensor live; Order: which tokens of a sequence a rank holds.

In every order a rank's tokens are kept in ascending position, and any length fits any number of
ranks without padding: two ranks' counts differ by at most one, in balanced order by a few percent.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from itertools import pairwise

import torch
from torch.distributed.tensor.placement_types import Placement

from longspan.balance import balanced, piece
from longspan.errors import LayoutError

__all__ = [
    "Layout",
    "Order",
    "Run",
    "check_documents",
    "local_length",
    "place_runs",
    "positions",
    "runs",
]


class Order(StrEnum):
    """How the tokens of a sequence are dealt to ``world`` ranks.

    ``contiguous``: one piece a rank. ``zigzag``: 2·world pieces, rank i holds pieces i and
    2·world-1-i, so that causal work is even. ``striped``: token t is on rank t mod world.
    ``balanced``: for packed documents, short ones whole and long ones cut, so that both tokens and
    attention's work are even (``longspan.balance``); one document is in zigzag order.
    """

    CONTIGUOUS = "contiguous"
    ZIGZAG = "zigzag"
    STRIPED = "striped"
    BALANCED = "balanced"

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
    axis that isn't named is replicated. ``order`` holds for the sharded sequence dim; it can't be
    balanced, as a layout knows no documents.
    """

    placements: Mapping[str, Placement] = field(default_factory=dict)
    order: Order = Order.CONTIGUOUS

    def __post_init__(self) -> None:
        for axis, placement in self.placements.items():
            if not isinstance(placement, Placement):
                raise LayoutError(f"axis {axis!r}: {placement!r} is not a torch Placement")
        object.__setattr__(self, "placements", dict(self.placements))
        object.__setattr__(self, "order", Order.of(self.order))
        if self.order is Order.BALANCED:
            raise LayoutError("a layout can't be in balanced order: it knows no documents")


@dataclass(frozen=True, slots=True)
class Run:
    """``count`` tokens that lie side by side on a rank: positions start, start+stride, …"""

    local: int
    start: int
    count: int
    stride: int


def runs(
    length: int,
    rank: int,
    world: int,
    order: Order | str,
    documents: Sequence[int] | None = None,
) -> tuple[Run, ...]:
    """The tokens of ``rank`` as runs of constant stride, in ascending position.

    ``documents``: where packed documents start, and the end of the last (cu_seqlens), which only
    balanced order asks for; without them there is one. Raises LayoutError if the rank isn't one of
    ``world``, the length is negative, or the documents don't make it up.
    """
    order = Order.of(order)
    if length < 0:
        raise LayoutError(f"a sequence can't have {length} tokens")
    if not 0 <= rank < world:
        raise LayoutError(f"rank {rank} is not one of {world} ranks")
    if order is Order.STRIPED:
        pieces = [(rank, len(range(rank, length, world)), world)]
    elif order is Order.CONTIGUOUS:
        pieces = [(*piece(length, rank, world), 1)]
    elif order is Order.BALANCED:
        ends = (0, length) if documents is None else tuple(map(int, documents))
        check_documents(ends, length)
        pieces = [(start, stop - start, 1) for start, stop in balanced(ends, world)[rank]]
    else:
        mirrored = 2 * world - 1 - rank
        pieces = [(*piece(length, index, 2 * world), 1) for index in (rank, mirrored)]
    found: list[Run] = []
    local = 0
    for start, count, stride in pieces:
        if count:
            found.append(Run(local, start, count, stride))
            local += count
    return tuple(found)


def check_documents(documents: Sequence[int], length: int) -> None:
    """Raise LayoutError unless these are documents' starts and last end in so many tokens."""
    if not documents or documents[0] != 0 or documents[-1] != length:
        raise LayoutError(f"cu_seqlens must start at 0 and end at the sequence's {length} tokens")
    if any(stop < start for start, stop in pairwise(documents)):
        raise LayoutError("cu_seqlens must not descend")


def place_runs(
    length: int,
    place: int,
    places: int,
    width: int,
    order: Order | str,
    documents: Sequence[int] | None = None,
) -> tuple[Run, ...]:
    """The tokens that ``width`` ranks side by side hold together, as one place of ``places``.

    In ascending position and as few runs as can be; striped ones rank by rank.
    """
    ranks = range(place * width, (place + 1) * width)
    pieces = [run for rank in ranks for run in runs(length, rank, places * width, order, documents)]
    if Order.of(order) is not Order.STRIPED:
        pieces.sort(key=lambda run: run.start)
    found: list[Run] = []
    local = 0
    for run in pieces:
        last = found[-1] if found else None
        if last and run.stride == 1 and last.start + last.count == run.start:
            found[-1] = Run(last.local, last.start, last.count + run.count, 1)
        else:
            found.append(Run(local, run.start, run.count, run.stride))
        local += run.count
    return tuple(found)


def local_length(
    length: int,
    rank: int,
    world: int,
    order: Order | str,
    documents: Sequence[int] | None = None,
) -> int:
    """How many of ``length`` tokens ``rank`` holds."""
    return sum(run.count for run in runs(length, rank, world, order, documents))


def positions(
    length: int,
    rank: int,
    world: int,
    order: Order | str,
    documents: Sequence[int] | None = None,
) -> torch.Tensor:
    """Global positions of a rank's tokens, ascending: LongTensor of shape (local_length,).

    ``documents``: their boundaries (cu_seqlens), for balanced order. Raises LayoutError for an
    unknown order, a rank outside ``world``, a negative length or documents of another length.
    """
    found = [
        torch.arange(run.start, run.start + run.count * run.stride, run.stride)
        for run in runs(length, rank, world, order, documents)
    ]
    return torch.cat(found) if found else torch.empty(0, dtype=torch.long)
