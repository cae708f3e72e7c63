"""Head exchange: ranks swap a share of the tokens for a share of the heads, and back.

Attention over all tokens of a few heads needs no other rank (DeepSpeed-Ulysses, arXiv 2309.14509).
Head counts need not divide: query heads are dealt as evenly as can be, and each rank gets the KV
heads that its query heads attend to, a KV head that several ranks need being sent to each.

A rank's heads may come in parts: all set off one after another, each part is attended as soon as it
is there, and its result goes back meanwhile. Backward takes the parts from the last to the first.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

from longspan.layout import Order, Run, runs
from longspan.schedule.ops import Comm
from longspan.schedule.ring import paying_parts

__all__ = ["GPU_ROWS", "HeadShares", "exchange_op", "gathered", "trips"]

GPU_ROWS = 1 << 15  # kernels take 128 at a time, on each of more than a hundred multiprocessors


@dataclass(frozen=True)
class HeadShares:
    """Which heads each of ``world`` ranks attends with; a rank may have none.

    In ``parts``: with which of them in a part, by default in all. A KV head that several parts
    attend to comes with the first of them.
    """

    heads: int
    kv_heads: int
    world: int
    parts: int = 1

    def q(self, rank: int, part: int | None = None) -> range:
        """The query heads of a rank."""
        share = _piece(range(self.heads), rank, self.world)
        return share if part is None else _piece(share, part, self.parts)

    def kv(self, rank: int, part: int | None = None) -> range:
        """The KV heads that they attend to."""
        own, group = self.q(rank, part), self.heads // self.kv_heads
        stop = -(-own.stop // group)
        return range(own.start // group if own else stop, stop)

    def brought(self, rank: int, part: int) -> range:
        """Those of them that no part before has brought."""
        own = self.kv(rank, part)
        return range(max(own.start, self.kv(rank, part - 1).stop), own.stop) if part else own

    def kv_of_q(self, rank: int, part: int | None = None) -> list[int]:
        """For each query head of a rank, which of the rank's KV heads is its own."""
        group, first = self.heads // self.kv_heads, self.kv(rank, part).start
        return [head // group - first for head in self.q(rank, part)]

    def even(self, rank: int, part: int | None = None) -> bool:
        """Whether the rank's KV heads have equally many query heads, one group after another."""
        own, kv = self.q(rank, part), self.kv(rank, part)
        if not own or len(own) % len(kv):
            return not own
        group = len(own) // len(kv)
        return self.kv_of_q(rank, part) == [head // group for head in range(len(own))]

    def cuts(self, tokens: int, q_bytes: int, kv_bytes: int, rows: int = 1) -> list[int]:
        """Numbers of parts that may pay, ascending; a rank holds so many tokens of a document.

        What a token of one head weighs: ``q_bytes`` its query, ``kv_bytes`` its key and value.
        Parts are of whole KV heads, or each of an equal part of one; of ``rows`` queries at least,
        over all heads.
        """
        if self.world == 1:
            return [1]
        heads, kv_heads = len(self.q(0)), len(self.kv(0))
        ways = [
            parts
            for parts in range(1, heads + 1)
            if not heads % parts
            and not (kv_heads % parts and parts % kv_heads)
            and (parts == 1 or tokens * self.world * heads >= rows * parts)
        ]
        return paying_parts(ways, tokens * (heads * q_bytes + kv_heads * kv_bytes))


def _piece(whole: range, place: int, places: int) -> range:
    """One of so many nearly equal pieces."""
    for run in runs(len(whole), place, places, Order.CONTIGUOUS):
        return whole[run.start : run.start + run.count]
    return whole[len(whole) :]


@lru_cache(maxsize=256)
def gathered(
    length: int, ranks: range, world: int, order: Order, documents: tuple[int, ...]
) -> tuple[tuple[Run, ...], ...]:
    """For each of ``ranks`` its runs of tokens, ``start`` being where they lie among all of theirs.

    In ascending position; striped ones rank by rank.
    """
    found = [list(runs(length, rank, world, order, documents)) for rank in ranks]
    every = [(run, place) for place, own in enumerate(found) for run in own]
    if order is not Order.STRIPED:
        every.sort(key=lambda one: one[0].start)
    laid: list[list[Run]] = [[] for _ in ranks]
    start = 0
    for run, place in every:
        laid[place].append(Run(run.local, start, run.count, 1))
        start += run.count
    return tuple(map(tuple, laid))


def exchange_op(
    counts: Sequence[int], shares: Sequence[range], token_bytes: int, ranks: Sequence[int]
) -> Comm:
    """The all-to-all from tokens to heads: rank i's ``counts[i]`` tokens, j's heads ``shares[j]``.

    ``token_bytes``: what a token of one head weighs. The way back is its transpose.
    """
    sizes = tuple(count * len(share) * token_bytes for count in counts for share in shares)
    return Comm("all_to_all", tuple(ranks), sizes)


def trips(
    shares: HeadShares,
    counts: Sequence[int],
    q_bytes: int,
    kv_bytes: int,
    ranks: Sequence[int],
    backward: bool = False,
) -> list[tuple[Comm, Comm]]:
    """For each part, as they come, the all-to-all to heads and the one back.

    Queries, keys and values go as one, results come back; in backward the results' gradients go,
    and those of the others come. Bytes as of ``cuts``; ``counts``: each rank's tokens.
    """
    found = []
    for part in range(shares.parts):
        q, kv = (
            exchange_op(counts, [of(r, part) for r in range(shares.world)], size, ranks)
            for of, size in ((shares.q, q_bytes), (shares.brought, kv_bytes))
        )
        both = tuple(a + b for a, b in zip(q.sizes, kv.sizes, strict=True))
        there = replace(q, sizes=both)
        found.append((q, _back(there)) if backward else (there, _back(q)))
    return found[::-1] if backward else found


def _back(op: Comm) -> Comm:
    """The same all-to-all the other way."""
    world = len(op.ranks)
    return replace(
        op, sizes=tuple(op.sizes[j * world + i] for i in range(world) for j in range(world))
    )
