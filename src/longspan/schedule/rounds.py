"""Rounds of ring attention: who holds what when, what is sent, and in backward which side travels.

Forward hands keys and values around. Backward either does so again, their gradients a round
behind, or keeps them and hands around the queries with what belongs to them (BurstAttention, arXiv
2403.09347, section 3.1), whichever is fewer bytes. A rank's share of the gradient of what is its
own never leaves it; the others' shares are summed on the way, and sent home by the last that has
one. Of a rank's tokens only those travel that another rank needs, and they go straight from one
that needs any of them to the next.

On ranks in several nodes the rings are two (BurstEngine, arXiv 2509.19836, section 3.1): each
payload goes from node to node once, from a rank to the one in its place, while inside the nodes
inner rings turn. A *turn* is an inner ring's whole turn, a *round* one hop of it; a flat ring's
nodes are of one rank. The heads may be cut into parts, so that one part is sent between nodes while
another is computed (``turns``).
"""

from bisect import bisect_right
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import product, zip_longest
from typing import Literal

from longspan.schedule.ops import Comm
from longspan.schedule.ring import Block, Ring, blocks, pairs

__all__ = ["Round", "Transfer", "Travels", "cheapest", "comms", "rounds", "travelling", "turns"]

Travels = Literal["kv", "q"]

_AS_EVEN = 1.05


@dataclass(frozen=True, slots=True)
class Transfer:
    """A part of what is rank ``source``'s, or the gradient of it, on its way between two ranks."""

    sender: int
    receiver: int
    source: int
    bytes: int
    part: int = 0


@dataclass(frozen=True, slots=True)
class Round:
    """One rank's round: the blocks it computes with a part of what is rank ``source``'s.

    Of its own tokens a rank has all, of another's those that travel: on that side the indices of
    ``blocks`` count what it has. ``payload`` is under way while it computes, ``grads`` (backward
    only) starts when it has computed; both name what this rank sends and what it receives. What it
    receives of ``source`` it received in a round before this one. ``part`` is one of ``parts``.
    """

    source: int
    blocks: tuple[Block, ...]
    payload: tuple[Transfer, ...]
    grads: tuple[Transfer, ...]
    part: int = 0
    parts: int = 1


def turns(ring: Ring, backward: bool) -> list[tuple[int, int]]:
    """The turns, each by its outer hop and its part of the heads.

    At home first, while the parts cross to the next node, each a turn after the other. In backward
    the last part is at home last, as its gradients needn't cross while others' still do.
    """
    home = [(0, part) for part in range(ring.parts)]
    away = [(outer, part) for outer in range(1, ring.nodes) for part in range(ring.parts)]
    if backward and ring.parts > 1:
        return [*home[:-1], *away, home[-1]]
    return home + away


@dataclass(frozen=True)
class _Travel:
    """The way of every rank's payload, and of its gradient."""

    ring: Ring
    travels: Travels

    def holder(self, source: int, outer: int, inner: int) -> int:
        """Who holds the source's payload after so many hops; queries go the other way round."""
        ring, way = self.ring, 1 if self.travels == "kv" else -1
        node, place = divmod(source, ring.node)
        return (node + way * outer) % ring.nodes * ring.node + (place + way * inner) % ring.node

    def source(self, rank: int, outer: int, inner: int) -> int:
        """Whose payload a rank holds after so many hops."""
        ring, way = self.ring, 1 if self.travels == "kv" else -1
        node, place = divmod(rank, ring.node)
        return (node - way * outer) % ring.nodes * ring.node + (place - way * inner) % ring.node

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

    def transfers(self, source: int) -> Iterator[tuple[tuple[int, int], bool, Transfer]]:
        """(hops, whether it is a gradient, transfer) of all that is sent of one source's part."""
        ring, kv = self.ring, self.travels == "kv"
        count = sum(stop - start for start, stop in travelling(ring, source, self.travels))
        weight = count * (ring.kv_bytes if kv else ring.q_bytes) // ring.parts
        grad_weight = count * (ring.grad_bytes if kv else ring.dq_bytes) // ring.parts
        needs = [self.needs(source, outer) for outer in range(ring.nodes)]
        stops = [outer for outer in range(ring.nodes) if needs[outer] or outer == 0]
        # Where the other nodes' sum waits, since when.
        away_from_home: tuple[tuple[int, int], int] | None = None
        for outer, further in zip_longest(stops, stops[1:]):
            if further:
                ends = (self.holder(source, outer, 0), self.holder(source, further, 0))
                yield (outer, 0), False, Transfer(*ends, source, weight)
            hops = sorted({0, *needs[outer]})
            farthest = hops[-1]
            shared = False
            for inner, next_inner in zip_longest(hops, hops[1:]):
                here = self.holder(source, outer, inner)
                shared = shared or (inner in needs[outer] and here != source)
                if next_inner:
                    there = self.holder(source, outer, next_inner)
                    yield (outer, inner), False, Transfer(here, there, source, weight)
                    if shared:
                        grad = Transfer(here, there, source, grad_weight)
                        yield (outer, inner), True, grad
            if not shared:
                continue
            end = self.holder(source, outer, farthest)
            if outer == 0:
                yield (outer, farthest), True, Transfer(end, source, source, grad_weight)
                continue
            if away_from_home:
                when, where = away_from_home
                yield when, True, Transfer(where, end, source, grad_weight)
            away_from_home = ((outer, farthest), end)
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
def _by_rank(
    ring: Ring, backward: bool, travels: Travels
) -> list[list[tuple[list[Transfer], list[Transfer]]]]:
    """For each rank and round the payload and the gradients that it sends or receives."""
    travel = _Travel(ring, travels)
    place = {turn: number for number, turn in enumerate(turns(ring, backward))}
    found: list[list[tuple[list[Transfer], list[Transfer]]]] = [
        [([], []) for _ in range(ring.world * ring.parts)] for _ in range(ring.world)
    ]
    for source, part in product(range(ring.world), range(ring.parts)):
        for (outer, inner), is_grad, transfer in travel.transfers(source):
            turn = place[outer, part]
            ends = (transfer.sender, transfer.receiver)
            if outer == 0 and not is_grad and ends[0] // ring.node != ends[1] // ring.node:
                turn = part  # it needn't wait for its own part's turn at home
            for rank in ends:
                number = turn * ring.node + inner
                found[rank][number][is_grad].append(replace(transfer, part=part))
    return found


@lru_cache(maxsize=1024)
def rounds(
    ring: Ring, rank: int, backward: bool = False, travels: Travels = "kv"
) -> tuple[Round, ...]:
    """The rounds of ``rank``, in forward or backward; forward's payload is keys and values."""
    travel = _Travel(ring, travels if backward else "kv")
    hops = product(turns(ring, backward), range(ring.node))
    found = []
    for ((outer, part), inner), (payload, grads) in zip(
        hops, _by_rank(ring, backward, travel.travels)[rank], strict=True
    ):
        source = travel.source(rank, outer, inner)
        seen = travel.seen(rank, source)
        if source != rank:
            seen = tuple(_unpacked(ring, seen, source, travel.travels))
        sent = tuple(payload), tuple(grads) if backward else ()
        found.append(Round(source, seen, *sent, part, ring.parts))
    return tuple(found)


@lru_cache(maxsize=128)
def cheapest(ring: Ring) -> Travels:
    """Which side backward hands around for fewer bytes in all; keys and values if it's the same.

    Not one whose busiest rank computes much more: parts of packed documents that are even for
    queries that stay at home needn't be for those that travel.
    """
    ways: tuple[Travels, Travels] = ("kv", "q")
    work = {travels: _most_pairs(ring, travels) for travels in ways}
    even = [travels for travels in ways if work[travels] <= min(work.values()) * _AS_EVEN]
    return min(even, key=lambda travels: _sent(ring, travels))


def _most_pairs(ring: Ring, travels: Travels) -> int:
    """The busiest rank's query-key pairs in backward."""
    every = range(ring.world)
    if travels == "kv":
        return max(pairs(ring, rank) for rank in every)
    return max(sum(b.pairs for other in every for b in blocks(ring, other, rank)) for rank in every)


def _sent(ring: Ring, travels: Travels) -> int:
    travel = _Travel(ring, travels)
    sent = sum(t.bytes for source in range(ring.world) for *_, t in travel.transfers(source))
    return sent * ring.parts


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
