"""Ring attention, cut into blocks: what the queries of one rank see of another rank's keys.

Documents, causality and the order of tokens are all in the blocks, so that a kernel needs to know
nothing but full and lower triangular squares. When blocks are computed, and what is sent for it,
is told by ``schedule.rounds``.
"""

from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import pairwise

from longspan.errors import LayoutError
from longspan.layout import Order, Run, check_documents, place_runs

__all__ = [
    "Block",
    "Ring",
    "blocks",
    "imbalance",
    "mean_document",
    "pairs",
    "paying_parts",
    "tokens",
]

_TURNS = 8  # with so many turns, little is left that the first and the last can't hide
_MESSAGE_BYTES = 1 << 17  # a smaller one is mostly latency


@dataclass(frozen=True, slots=True)
class Ring:
    """One attention over a sequence of ``length`` tokens on a ring of ``world`` ranks.

    ``documents``: where each document starts, and the end of the last: 0, …, length
    (cu_seqlens); tokens attend only inside their document, and with a ``window`` only to
    themselves and the window-1 tokens before. What a token's things weigh on the wire:
    ``kv_bytes`` its keys and values, ``grad_bytes`` their gradients, ``q_bytes`` its query with
    its output's gradient and row statistics, ``dq_bytes`` the query's gradient. ``node_ranks``:
    how many ranks, side by side, are in a node; 0: all. ``width``: how many ranks of the order
    hold a rank's tokens together (after a head exchange among them). ``stop``: only tokens before
    this position take part; if causal, they attend as in the whole sequence. ``kv_documents``, in
    cross attention: where the documents of the keys' own sequence start, and the end of the last;
    a query's document sees the keys of the document with its number. ``parts``: in how many equal
    parts of the heads all goes around, one after another.
    """

    length: int
    world: int
    order: Order
    causal: bool
    documents: tuple[int, ...]
    kv_bytes: int
    grad_bytes: int
    q_bytes: int = 0
    dq_bytes: int = 0
    node_ranks: int = 0
    width: int = 1
    window: int | None = None
    stop: int | None = None
    kv_documents: tuple[int, ...] | None = None
    parts: int = 1

    def __post_init__(self) -> None:
        check_documents(self.documents, self.length)
        if self.kv_documents is not None:
            self._check_cross(self.kv_documents)
        if self.window is not None and self.window < 1:
            raise LayoutError(f"a window of {self.window} sees nothing: use 1 or more, or None")
        if self.window is not None and not self.causal:
            raise LayoutError("a window looks back: it needs causal attention")
        if self.node_ranks < 0 or self.world % self.node:
            raise LayoutError(f"{self.world} ranks are no whole nodes of {self.node_ranks}")
        weights = (self.kv_bytes, self.grad_bytes, self.q_bytes, self.dq_bytes)
        if self.parts < 1 or any(weight % self.parts for weight in weights):
            raise LayoutError(f"what a token weighs can't be cut in {self.parts} equal parts")
        if 0 < (self.stop or 0) < self.length and not self.ascending:
            raise LayoutError("stripes of several ranks have no first tokens to stop after")

    def _check_cross(self, ends: tuple[int, ...]) -> None:
        if self.causal:
            raise LayoutError(
                "causal attention looks back in one sequence: queries and keys of different "
                "lengths or documents (cross attention) need causal=False"
            )
        if len(ends) != len(self.documents):
            raise LayoutError(
                f"queries have {len(self.documents) - 1} documents and keys {len(ends) - 1}: "
                "cu_seqlens and cu_seqlens_k must pair them"
            )
        if ends[0] != 0 or any(end < start for start, end in pairwise(ends)):
            raise LayoutError("cu_seqlens_k must start at 0 and not descend")
        if self.stop:
            raise LayoutError("cross attention is stopped before its first token or not at all")

    @property
    def ascending(self) -> bool:
        """Whether the tokens of a rank are in ascending position."""
        return self.width == 1 or self.order is not Order.STRIPED

    @property
    def node(self) -> int:
        """Ranks of a node, of the inner ring: in a flat ring each is by itself."""
        return self.node_ranks or 1

    @property
    def nodes(self) -> int:
        """Nodes: places of the outer ring."""
        return self.world // self.node

    def cuts(self, kv_heads: int) -> list[int]:
        """Numbers of parts of the KV heads that may pay, ascending.

        One part's messages go between nodes while another is computed; so does what a turn of the
        outer ring can't hide by itself: the first one's keys, the last one's gradients. Many nodes
        make many turns anyway, and small messages wait for latency only. Each part has its own
        kernels for every document, so that it's the mean document's share that mustn't be small.
        """
        if self.nodes == 1:
            return [1]
        ends = self.documents if self.kv_documents is None else self.kv_documents
        message = mean_document(ends) // self.world * self.kv_bytes
        return paying_parts(_divisors(kv_heads), message, self.nodes)

    def in_parts(self, kv_heads: int, parts: int | None = None) -> "Ring":
        """The same in so many parts of the KV heads, or fewer that are equal; None: the most.

        In one where nothing goes between nodes: it would hide nothing.
        """
        if parts is None or self.nodes == 1:
            return replace(self, parts=self.cuts(kv_heads)[-1])
        return replace(self, parts=max(n for n in _divisors(kv_heads) if n <= parts))


def _divisors(kv_heads: int) -> list[int]:
    return [n for n in range(1, kv_heads + 1) if kv_heads % n == 0] or [1]


def mean_document(ends: Sequence[int]) -> int:
    """Mean tokens of documents: ``ends`` are where they start, and the end of the last."""
    return ends[-1] // max(1, len(ends) - 1)


def paying_parts(ways: Iterable[int], size: int, turns: int = 1) -> list[int]:
    """Those numbers of parts that may pay, where each part makes ``turns`` turns; one always may.

    A message of ``size`` bytes mustn't be cut too small.
    """
    most = min(-(-_TURNS // turns), size // _MESSAGE_BYTES)
    return [parts for parts in ways if parts <= max(1, most)]


@dataclass(frozen=True, slots=True)
class Block:
    """Queries [q_start, q_stop) against keys [kv_start, kv_stop), as indices on their ranks.

    A full block sees everything; a causal one is square and sees its lower triangle. A causal
    one that is ``flipped`` sees its upper triangle instead, the diagonal with it: it is causal
    when queries and keys are read from their ends.
    """

    q_start: int
    q_stop: int
    kv_start: int
    kv_stop: int
    causal: bool
    flipped: bool = False

    @property
    def pairs(self) -> int:
        """Query-key pairs that are seen: attention's flops are proportional to them."""
        rows, columns = self.q_stop - self.q_start, self.kv_stop - self.kv_start
        return rows * (rows + 1) // 2 if self.causal else rows * columns


@dataclass(frozen=True, slots=True)
class _Piece:
    """A run cut down to one document."""

    document: int
    run: Run


@lru_cache(maxsize=256)
def _pieces(ring: Ring, rank: int, keys: bool) -> tuple[_Piece, ...]:
    found = []
    ends = ring.kv_documents if keys and ring.kv_documents is not None else ring.documents
    for run in place_runs(ends[-1], rank, ring.world, ring.width, ring.order, ends):
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


def _between(q: Run, kv: Run, causal: bool, window: int | None) -> Iterator[Block]:
    """What the tokens of one run see of a run of the same document and stride."""
    q_stop, kv_stop = q.local + q.count, kv.local + kv.count
    if not causal:
        yield Block(q.local, q_stop, kv.local, kv_stop, False)
        return
    # Query a sees key b if least <= a - b <= most, as indices on their ranks.
    shift, ahead = q.local - kv.local, q.start - kv.start
    least = shift - ahead // q.stride
    most = q_stop - kv.local if window is None else shift + (window - 1 - ahead) // q.stride
    if most < least:
        return
    width, end = most - least + 1, min(q_stop, kv_stop + most)
    for start in range(max(q.local, kv.local + least), end, width):
        stop = min(start + width, end)
        # All of these rows see the keys between the two edges; each edge is a triangle, the far
        # one smaller by a row where they would share a key.
        far = stop - (stop - start == width)
        left, right = max(kv.local, far - most), min(kv_stop, start - least)
        if left < right:
            yield Block(start, stop, left, right, False)
        yield from _lower(start, stop, least, kv)
        yield from _upper(start, far, most, kv)


def _lower(start: int, stop: int, offset: int, kv: Run) -> Iterator[Block]:
    """Rows that see columns from the first one's own up to their own, row - offset; cut to kv."""
    edge = min(stop, kv.local + kv.count + offset)
    if start < edge:
        yield Block(start, edge, start - offset, edge - offset, True)
        if edge < stop:
            yield Block(edge, stop, start - offset, edge - offset, False)


def _upper(start: int, stop: int, offset: int, kv: Run) -> Iterator[Block]:
    """Rows that see columns from their own up to the last one's own, row - offset; cut to kv."""
    edge = max(start, kv.local + offset)
    if edge < stop:
        if start < edge:
            yield Block(start, edge, edge - offset, stop - offset, False)
        yield Block(edge, stop, edge - offset, stop - offset, True, True)


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


def _by_document(ring: Ring, rank: int, keys: bool) -> dict[int, list[Run]]:
    found: dict[int, list[Run]] = {}
    for piece in _pieces(ring, rank, keys):
        found.setdefault(piece.document, []).append(piece.run)
    return found


@lru_cache(maxsize=1 << 14)
def blocks(ring: Ring, q_rank: int, kv_rank: int) -> tuple[Block, ...]:
    """The blocks that the queries of one rank see of the keys of another; none if they see none."""
    found: list[Block] = []
    theirs = _by_document(ring, kv_rank, True)
    alike = q_rank == kv_rank and ring.ascending and ring.kv_documents is None
    for document, own in _by_document(ring, q_rank, False).items():
        size = ring.documents[document + 1] - ring.documents[document]
        window = ring.window if ring.window and ring.window < size else None
        if alike and window is None:
            # A rank's own part of a document is one triangle or square.
            start, stop = own[0].local, own[-1].local + own[-1].count
            found.append(Block(start, stop, start, stop, ring.causal))
            continue
        for q in own:
            for kv in theirs.get(document, ()):
                found += _between(q, kv, ring.causal, window)
    return tuple(_joined(_joined(found)))


def tokens(ring: Ring, rank: int) -> int:
    """How many tokens of a rank take part, of queries in cross attention: its first ones."""
    return sum(piece.run.count for piece in _pieces(ring, rank, keys=False))


def pairs(ring: Ring, rank: int) -> int:
    """Query-key pairs that a rank's queries see on all ranks: its work in attention."""
    return sum(block.pairs for other in range(ring.world) for block in blocks(ring, rank, other))


def imbalance(work: Sequence[int]) -> float:
    """The busiest rank's work over the mean; 1 is even."""
    return max(work) * len(work) / max(1, sum(work))
