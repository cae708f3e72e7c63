"""Rounds of ring attention: who holds what when, what is sent, and in backward which side travels.

Forward hands keys and values around. Backward either does so again, their gradients a round
behind, or keeps them and hands around the queries with what belongs to them (BurstAttention, arXiv
2403.09347, section 3.1), whichever is fewer bytes. A rank's share of the gradient of what is its
own never leaves it; the others' shares are summed on the way, and sent home by the last that has
one. Nothing goes to where nobody further on has a use for it.

On ranks in several nodes the rings are two (BurstEngine, arXiv 2509.19836, section 3.1): each
payload goes from node to node once, from a rank to the one in its place, while inside the nodes
inner rings turn. A round's number is outer hop × ranks of a node + inner hop.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

from longspan.schedule.ops import Comm
from longspan.schedule.ring import Block, Ring, blocks, tokens

__all__ = ["Round", "Transfer", "Travels", "cheapest", "comms", "rounds"]

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

    ``payload`` is under way while it computes, ``grads`` (backward only) starts when it has
    computed; both name what this rank sends and what it receives. What it receives of ``source``
    it received in a round before this one.
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
        count = tokens(ring, source, keys=kv)
        weight = count * (ring.kv_bytes if kv else ring.q_bytes)
        grad_weight = count * (ring.grad_bytes if kv else ring.dq_bytes)
        needs = [self.needs(source, outer) for outer in range(self.nodes)]
        last = max((outer for outer in range(self.nodes) if needs[outer]), default=0)
        away_from_home: tuple[int, int] | None = (
            None  # where the other nodes' sum waits, since when
        )
        for outer in range(last + 1):
            start = outer * ring.node
            if outer < last:
                ends = (self.holder(source, outer, 0), self.holder(source, outer + 1, 0))
                yield start, False, Transfer(*ends, source, weight)
            farthest = max(needs[outer], default=0)
            shared = False
            for inner in range(farthest + 1):
                here = self.holder(source, outer, inner)
                shared = shared or (inner in needs[outer] and here != source)
                if inner < farthest:
                    there = self.holder(source, outer, inner + 1)
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
