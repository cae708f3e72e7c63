"""Rounds of ring attention: who holds whose keys and values, what they see, what is sent.

In round r, rank i holds the keys and values of rank i-r (mod world) and hands them to rank i+1.
In backward their gradients follow one round behind, gathering a share on every rank, and the
last rank that has one sends them home; a rank's share of its own keys never leaves it. Nothing
is sent to where nobody further down the ring has a use for it.

Source: ring attention (arXiv 2310.01889), in the form that BurstAttention (arXiv 2403.09347,
section 3) starts from.
"""

import itertools
from bisect import bisect_right
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache

from longspan.errors import LayoutError
from longspan.layout import Order, Run, runs
from longspan.schedule.ops import Comm

__all__ = ["Block", "Ring", "Round", "Transfer", "blocks", "comms", "rounds", "tokens"]


@dataclass(frozen=True, slots=True)
class Ring:
    """One attention over a sequence of ``length`` tokens on a ring of ``world`` ranks.

    ``documents``: where each document starts, and the end of the last: 0, …, length
    (cu_seqlens); tokens attend only inside their document. ``kv_bytes`` and ``grad_bytes``: what
    a token's keys and values, and their gradients, weigh on the wire. ``stop``: only tokens before
    this position take part; if causal, they attend as in the whole sequence.
    """

    length: int
    world: int
    order: Order
    causal: bool
    documents: tuple[int, ...]
    kv_bytes: int
    grad_bytes: int
    stop: int | None = None

    def __post_init__(self) -> None:
        ends = self.documents
        if not ends or ends[0] != 0 or ends[-1] != self.length:
            raise LayoutError(
                f"cu_seqlens must start at 0 and end at the sequence's {self.length} tokens"
            )
        if any(end < start for start, end in itertools.pairwise(ends)):
            raise LayoutError("cu_seqlens must not descend")


@dataclass(frozen=True, slots=True)
class Block:
    """Queries [q_start, q_stop) against keys [kv_start, kv_stop), as indices on their ranks.

    A full block sees everything; a causal one is square and sees its lower triangle.
    """

    q_start: int
    q_stop: int
    kv_start: int
    kv_stop: int
    causal: bool

    @property
    def pairs(self) -> int:
        """Query-key pairs that are seen: attention's flops are proportional to them."""
        rows, columns = self.q_stop - self.q_start, self.kv_stop - self.kv_start
        return rows * (rows + 1) // 2 if self.causal else rows * columns


@dataclass(frozen=True, slots=True)
class Transfer:
    """Keys and values of rank ``source``, or their gradients, on their way between two ranks."""

    sender: int
    receiver: int
    source: int
    bytes: int


@dataclass(frozen=True, slots=True)
class Round:
    """One rank's round: the blocks it computes with the keys and values of rank ``source``.

    ``kv`` is under way while it computes, ``grads`` (backward only) starts when it has computed;
    both name what this rank sends and what it receives.
    """

    source: int
    blocks: tuple[Block, ...]
    kv: tuple[Transfer, ...]
    grads: tuple[Transfer, ...]


@dataclass(frozen=True, slots=True)
class _Piece:
    """A run cut down to one document."""

    document: int
    run: Run


@lru_cache(maxsize=256)
def _pieces(ring: Ring, rank: int) -> tuple[_Piece, ...]:
    found = []
    ends = ring.documents
    for run in runs(ring.length, rank, ring.world, ring.order):
        done, total = 0, run.count
        if ring.stop is not None:
            total = min(total, -(-(ring.stop - run.start) // run.stride))
        while done < total:
            start = run.start + done * run.stride
            document = bisect_right(ends, start) - 1
            count = min(total - done, -(-(ends[document + 1] - start) // run.stride))
            found.append(_Piece(document, Run(run.local + done, start, count, run.stride)))
            done += count
    return tuple(found)


def _between(q: Run, kv: Run, causal: bool) -> Block | None:
    """What the tokens of one run see of another rank's run of the same document."""
    q_stop, kv_stop = q.local + q.count, kv.local + kv.count
    if not causal:
        return Block(q.local, q_stop, kv.local, kv_stop, False)
    if q.stride == 1:
        return Block(q.local, q_stop, kv.local, kv_stop, False) if kv.start < q.start else None
    # Stripes interleave: query a sees keys up to a, or up to a-1 if the keys' stripe comes later.
    skipped = int(kv.start > q.start)
    size = min(q.count - skipped, kv.count)
    if size <= 0:
        return None
    first = q.local + skipped
    return Block(first, first + size, kv.local, kv.local + size, True)


def _joined(found: Iterable[Block]) -> Iterator[Block]:
    """Full blocks that lie side by side, as one: fewer, larger kernel calls."""
    last: Block | None = None
    for block in found:
        if last and not last.causal and not block.causal:
            same_q = (last.q_start, last.q_stop) == (block.q_start, block.q_stop)
            same_kv = (last.kv_start, last.kv_stop) == (block.kv_start, block.kv_stop)
            if same_q and last.kv_stop == block.kv_start:
                last = replace(last, kv_stop=block.kv_stop)
                continue
            if same_kv and last.q_stop == block.q_start:
                last = replace(last, q_stop=block.q_stop)
                continue
        if last:
            yield last
        last = block
    if last:
        yield last


@lru_cache(maxsize=4096)
def blocks(ring: Ring, q_rank: int, kv_rank: int) -> tuple[Block, ...]:
    """The blocks that the queries of one rank see of the keys of another; none if they see none."""
    by_document: dict[int, list[Run]] = {}
    for piece in _pieces(ring, kv_rank):
        by_document.setdefault(piece.document, []).append(piece.run)
    if q_rank == kv_rank:
        # Positions ascend on a rank, so its own part of a document is one triangle or square.
        own = [(part[0].local, part[-1].local + part[-1].count) for part in by_document.values()]
        return tuple(Block(start, stop, start, stop, ring.causal) for start, stop in own)
    found = [
        block
        for piece in _pieces(ring, q_rank)
        for kv in by_document.get(piece.document, ())
        if (block := _between(piece.run, kv, ring.causal))
    ]
    return tuple(_joined(_joined(found)))


def _last_needed(ring: Ring, source: int) -> int:
    """How many hops from ``source`` the last rank is that sees its keys."""
    hops = range(ring.world - 1, 0, -1)
    return next((h for h in hops if blocks(ring, (source + h) % ring.world, source)), 0)


def tokens(ring: Ring, rank: int) -> int:
    """How many tokens of ``rank`` take part: its first ones."""
    return sum(piece.run.count for piece in _pieces(ring, rank))


def _kv_transfer(ring: Ring, sender: int, hops: int) -> Iterator[Transfer]:
    """What ``sender`` hands on in the round in which it holds keys from ``hops`` ranks before."""
    source = (sender - hops) % ring.world
    if hops < _last_needed(ring, source):
        size = tokens(ring, source) * ring.kv_bytes
        yield Transfer(sender, (sender + 1) % ring.world, source, size)


def _grad_transfer(ring: Ring, sender: int, hops: int) -> Iterator[Transfer]:
    """The gradients that ``sender`` hands on, or home, after that round."""
    source = (sender - hops) % ring.world
    last = _last_needed(ring, source)
    shared = any(blocks(ring, (source + h) % ring.world, source) for h in range(1, hops + 1))
    if shared and 1 <= hops <= last:
        receiver = source if hops == last else (sender + 1) % ring.world
        yield Transfer(sender, receiver, source, tokens(ring, source) * ring.grad_bytes)


@lru_cache(maxsize=256)
def rounds(ring: Ring, rank: int, backward: bool = False) -> tuple[Round, ...]:
    """The rounds of ``rank``, in forward or backward."""
    found = []
    for hops in range(ring.world):
        kv = [t for sender in range(ring.world) for t in _kv_transfer(ring, sender, hops)]
        grads = [t for sender in range(ring.world) for t in _grad_transfer(ring, sender, hops)]
        source = (rank - hops) % ring.world
        found.append(
            Round(
                source,
                blocks(ring, rank, source),
                tuple(t for t in kv if rank in (t.sender, t.receiver)),
                tuple(t for t in grads if backward and rank in (t.sender, t.receiver)),
            )
        )
    return tuple(found)


def comms(ring: Ring, rank: int, backward: bool = False) -> tuple[Comm, ...]:
    """What ``rank`` sends, as ops of the score."""
    return tuple(
        Comm("send", (transfer.sender, transfer.receiver), (transfer.bytes,))
        for turn in rounds(ring, rank, backward)
        for transfer in (*turn.kv, *turn.grads)
        if transfer.sender == rank
    )
