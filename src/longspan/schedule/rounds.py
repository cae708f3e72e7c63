"""Rounds of ring attention: who holds what when, what is sent, and in backward which side travels.

Forward hands keys and values around. Backward either does so again, their gradients a round
behind, or keeps them and hands around the queries with what belongs to them (BurstAttention, arXiv
2403.09347, section 3.1), whichever is fewer bytes. A rank's share of the gradient of what is its
own never leaves it; the others' shares are summed on the way, and sent home by the last that has
one. Of a rank's tokens only those travel that another rank needs, and they go straight from one
that needs any of them to the next.

On ranks in several nodes the rings are two (BurstEngine, arXiv 2509.19836, section 3.1): each
payload goes from node to node once, from a rank to the one in its place, while inside the nodes
inner rings turn. A round's number is outer hop × ranks of a node + inner hop.
"""

from bisect import bisect_right
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import zip_longest
from typing import Literal

from longspan.schedule.ops import Comm
from longspan.schedule.ring import Block, Ring, blocks

__all__ = ["Round", "Transfer", "Travels", "cheapest", "comms", "rounds", "travelling"]

Travels = Literal["kv", "q"]


@dataclass(frozen=True, slots=True)
class Transfer:
    """What is rank ``source``'s, or the gradient of it, on its way between two ranks."""

    sender: int
    receiver: int
    source: int
    bytes: int


@dataclass(frozen=True, slots=True)
class Round:
    """One rank's round: the blocks it computes with what is rank ``source``'s.

    Of its own tokens a rank has all, of another's those that travel: on that side the indices of
    ``blocks`` count what it has. ``payload`` is under way while it computes, ``grads`` (backward
    only) starts when it has computed; both name what this rank sends and what it receives. What it
    receives of ``source`` it received in a round before this one.
    """

    source: int
    blocks: tuple[Block, ...]
    payload: tuple[Transfer, ...]
    grads: tuple[Transfer, ...]


@dataclass(frozen=True)
class _Travel:
    """The way of every rank's payload, and of its gradient."""

    ring: Ring
    travels: Travels

    @property
    def nodes(self) -> int:
        return self.ring.world // self.ring.node

    def holder(self, source: int, outer: int, inner: int) -> int:
        """Who holds the source's payload after so many hops; queries go the other way round."""
        ring, way = self.ring, 1 if self.travels == "kv" else -1
        node, place = divmod(source, ring.node)
        return (node + way * outer) % self.nodes * ring.node + (place + way * inner) % ring.node

    def source(self, rank: int, outer: int, inner: int) -> int:
        """Whose payload a rank holds after so many hops."""
        ring, way = self.ring, 1 if self.travels == "kv" else -1
        node, place = divmod(rank, ring.node)
        return (node - way * outer) % self.nodes * ring.node + (place - way * inner) % ring.node

    def seen(self, holder: int, source: int) -> tuple[Block, ...]:
        """The blocks that the holder computes with what it holds of the source."""
        pair = (holder, source) if self.travels == "kv" else (source, holder)
        return blocks(self.ring, *pair)

    def needs(self, source: int, outer: int) -> list[int]:
        """The inner hops at which the payload is needed in that node."""
        return [
            inner
            for inner in range(self.ring.node)
            if self.seen(self.holder(source, outer, inner), source)
        ]

    def transfers(self, source: int) -> Iterator[tuple[int, bool, Transfer]]:
        """(round, whether it is a gradient, transfer) of all that is sent for one source."""
        ring, kv = self.ring, self.travels == "kv"
        count = sum(stop - start for start, stop in travelling(ring, source, self.travels))
        weight = count * (ring.kv_bytes if kv else ring.q_bytes)
        grad_weight = count * (ring.grad_bytes if kv else ring.dq_bytes)
        needs = [self.needs(source, outer) for outer in range(self.nodes)]
        stops = [outer for outer in range(self.nodes) if needs[outer] or outer == 0]
        away_from_home: tuple[int, int] | None = (
            None  # where the other nodes' sum waits, since when
        )
        for outer, further in zip_longest(stops, stops[1:]):
            start = outer * ring.node
            if further:
                ends = (self.holder(source, outer, 0), self.holder(source, further, 0))
                yield start, False, Transfer(*ends, source, weight)
            hops = sorted({0, *needs[outer]})
            farthest = hops[-1]
            shared = False
            for inner, next_inner in zip_longest(hops, hops[1:]):
                here = self.holder(source, outer, inner)
                shared = shared or (inner in needs[outer] and here != source)
                if next_inner:
                    there = self.holder(source, outer, next_inner)
                    yield start + inner, False, Transfer(here, there, source, weight)
                    if shared:
                        grad = Transfer(here, there, source, grad_weight)
                        yield start + inner, True, grad
            if not shared:
                continue
            end = self.holder(source, outer, farthest)
            if outer == 0:
                yield start + farthest, True, Transfer(end, source, source, grad_weight)
                continue
            if away_from_home:
                when, where = away_from_home
                yield when, True, Transfer(where, end, source, grad_weight)
            away_from_home = (start + farthest, end)
        if away_from_home:
            when, where = away_from_home
            yield when, True, Transfer(where, source, source, grad_weight)


@lru_cache(maxsize=1 << 12)
def travelling(ring: Ring, source: int, travels: Travels) -> tuple[tuple[int, int], ...]:
    """Which of a rank's tokens others need, as spans [start, stop) of their indices, ascending."""
    spans = sorted(
        (block.kv_start, block.kv_stop) if travels == "kv" else (block.q_start, block.q_stop)
        for other in range(ring.world)
        for block in (
            blocks(ring, other, source) if travels == "kv" else blocks(ring, source, other)
        )
        if other != source
    )
    found: list[tuple[int, int]] = []
    for start, stop in spans:
        if found and start <= found[-1][1]:
            found[-1] = (found[-1][0], max(stop, found[-1][1]))
        else:
            found.append((start, stop))
    return tuple(found)


def _unpacked(ring: Ring, seen: Iterable[Block], source: int, travels: Travels) -> Iterator[Block]:
    """The blocks, their indices of the source's tokens as they are among those that travel."""
    starts, before = [], [0]
    for start, stop in travelling(ring, source, travels):
        starts.append(start)
        before.append(before[-1] + stop - start)
    for block in seen:
        first = block.kv_start if travels == "kv" else block.q_start
        span = bisect_right(starts, first) - 1
        gone = starts[span] - before[span]
        if travels == "kv":
            yield replace(block, kv_start=first - gone, kv_stop=block.kv_stop - gone)
        else:
            yield replace(block, q_start=first - gone, q_stop=block.q_stop - gone)


@lru_cache(maxsize=128)
def _by_rank(ring: Ring, travels: Travels) -> list[list[tuple[list[Transfer], list[Transfer]]]]:
    """For each rank and round the payload and the gradients that it sends or receives."""
    travel = _Travel(ring, travels)
    found: list[list[tuple[list[Transfer], list[Transfer]]]] = [
        [([], []) for _ in range(ring.world)] for _ in range(ring.world)
    ]
    for source in range(ring.world):
        for turn, is_grad, transfer in travel.transfers(source):
            for rank in (transfer.sender, transfer.receiver):
                found[rank][turn][is_grad].append(transfer)
    return found


@lru_cache(maxsize=1024)
def rounds(
    ring: Ring, rank: int, backward: bool = False, travels: Travels = "kv"
) -> tuple[Round, ...]:
    """The rounds of ``rank``, in forward or backward; forward's payload is keys and values."""
    travel = _Travel(ring, travels if backward else "kv")
    found = []
    for number, (payload, grads) in enumerate(_by_rank(ring, travel.travels)[rank]):
        source = travel.source(rank, *divmod(number, ring.node))
        seen = travel.seen(rank, source)
        if source != rank:
            seen = tuple(_unpacked(ring, seen, source, travel.travels))
        found.append(Round(source, seen, tuple(payload), tuple(grads) if backward else ()))
    return tuple(found)


@lru_cache(maxsize=128)
def cheapest(ring: Ring) -> Travels:
    """Which side backward hands around for fewer bytes in all; keys and values if it's the same."""
    ways: tuple[Travels, Travels] = ("kv", "q")
    return min(ways, key=lambda travels: _sent(ring, travels))


def _sent(ring: Ring, travels: Travels) -> int:
    travel = _Travel(ring, travels)
    return sum(t.bytes for source in range(ring.world) for *_, t in travel.transfers(source))


def comms(
    ring: Ring, rank: int, backward: bool = False, travels: Travels = "kv"
) -> tuple[Comm, ...]:
    """What ``rank`` sends, as ops of the score."""
    return tuple(
        Comm("send", (transfer.sender, transfer.receiver), (transfer.bytes,))
        for turn in rounds(ring, rank, backward, travels)
        for transfer in (*turn.payload, *turn.grads)
        if transfer.sender == rank
    )
