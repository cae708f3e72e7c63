"""Which parts of packed documents each rank holds, so that every rank has as much to do.

Attention's work in a document grows with its square, all other work and memory with its tokens, so
both are made even, and as little as may be is cut: what is whole on one rank doesn't travel. A
short document goes whole to one rank. Where that isn't even, the busiest ranks cut a document's
beginning or end off for those that have least. Where even that isn't, long documents are cut
into shares for several ranks, one as dear as another: pieces i and 2n-1-i of 2n, as in zigzag
order.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

__all__ = ["EVEN", "balanced", "piece"]

# What the busiest rank may have of the mean, both in tokens and in attention's work.
EVEN = 1.05

_Span = tuple[int, int]


def piece(length: int, index: int, pieces: int) -> _Span:
    """Start and count of one of ``pieces`` nearly equal pieces; the longer ones come first."""
    share, longer = divmod(length, pieces)
    return index * share + min(index, longer), share + (index < longer)


@lru_cache(maxsize=256)
def balanced(documents: tuple[int, ...], world: int) -> tuple[tuple[_Span, ...], ...]:
    """For each of ``world`` ranks the spans [start, stop) of tokens that it holds, ascending.

    ``documents``: where each starts, and the end of the last. While it isn't even within ``EVEN``,
    the document of the dearest shares is cut for one more rank; at last all are cut for all ranks,
    as one document alone always is. The same on every rank.
    """
    spans = [span for span in pairwise(documents) if span[0] < span[1]]
    whole = [_Part(start, 0, stop - start) for start, stop in spans]
    all_tokens, all_pairs = (
        sum(of) for of in ([p.tokens for p in whole], [p.pairs for p in whole])
    )
    cuts = [1] * len(whole) if len(whole) > 1 else [world] * len(whole)
    while True:
        deal = _Deal(all_tokens, all_pairs, world)
        dearest = sorted(range(len(whole)), key=lambda i: -deal.weight(whole[i]) / cuts[i])
        for i in dearest:
            deal.out(whole[i], cuts[i])
        if len(whole) > 1:
            deal.trim()
        more = [i for i in dearest if cuts[i] < min(world, whole[i].tokens)]
        if deal.even or not more:
            return tuple(_joined(rank.parts) for rank in deal.ranks)
        cuts[more[0]] += 1


@dataclass(frozen=True, slots=True, order=True)
class _Part:
    """Tokens [first, last) of the document that starts at ``start``."""

    start: int
    first: int
    last: int

    @property
    def tokens(self) -> int:
        return self.last - self.first

    @property
    def pairs(self) -> int:
        """What these tokens see of the document, each itself and those before it."""
        return (self.last * (self.last + 1) - self.first * (self.first + 1)) // 2

    def cut(self, at: int) -> tuple["_Part", "_Part"]:
        return _Part(self.start, self.first, at), _Part(self.start, at, self.last)


class _Rank:
    """What a rank has been given so far."""

    def __init__(self) -> None:
        self.parts: list[_Part] = []
        self.tokens = self.pairs = 0

    def take(self, part: _Part) -> None:
        self.parts.append(part)
        self.tokens, self.pairs = self.tokens + part.tokens, self.pairs + part.pairs

    def lose(self, part: _Part) -> None:
        self.parts.remove(part)
        self.tokens, self.pairs = self.tokens - part.tokens, self.pairs - part.pairs


class _Deal:
    """Parts on their way to ranks.

    A weight is a share of all tokens and a share of all pairs, added; in integers, so exactly.
    """

    def __init__(self, tokens: int, pairs: int, world: int) -> None:
        self.all_tokens, self.all_pairs = tokens, pairs
        self.ranks = [_Rank() for _ in range(world)]
        self.mean = 2 * tokens * pairs / world
        self.limit = EVEN * tokens * pairs / world

    def weight(self, of: "_Part | _Rank") -> int:
        return of.tokens * self.all_pairs + of.pairs * self.all_tokens

    def most(self, tokens: int, pairs: int) -> int:
        """The greater of the two shares, to be compared with ``limit``."""
        return max(tokens * self.all_pairs, pairs * self.all_tokens)

    @property
    def even(self) -> bool:
        return all(self.most(rank.tokens, rank.pairs) <= self.limit for rank in self.ranks)

    def out(self, document: _Part, cuts: int) -> None:
        """Give a document's shares to the ranks that have least."""
        least = sorted(self.ranks, key=self.weight)
        for nth, rank in enumerate(least[:cuts]):
            for index in (nth, 2 * cuts - 1 - nth):
                first, count = piece(document.tokens, index, 2 * cuts)
                rank.take(_Part(document.start, first, first + count))

    def trim(self) -> None:
        """Cut ends off what the busiest ranks have, for those that have least, while it helps."""
        for _ in range(2 * len(self.ranks)):
            over = max(self.ranks, key=lambda rank: self.most(rank.tokens, rank.pairs))
            under = min(self.ranks, key=self.weight)
            busiest = self.most(over.tokens, over.pairs)
            if busiest <= self.limit:
                return
            wanted = min(self.weight(over) - self.mean, self.mean - self.weight(under))
            ways = []
            for part in over.parts:
                for gone, kept in self._ends(part, wanted):
                    less = self.most(over.tokens - gone.tokens, over.pairs - gone.pairs)
                    grown = self.most(under.tokens + gone.tokens, under.pairs + gone.pairs)
                    travel = min(gone, kept).tokens  # what comes first is needed by the other
                    ways.append((max(less, grown, self.limit), travel, part, gone, kept))
            if not ways:
                return
            after, _, part, gone, kept = min(ways)
            if after >= busiest:
                return
            over.lose(part)
            over.take(kept)
            under.take(gone)

    def _ends(self, part: _Part, weight: float) -> Iterator[tuple[_Part, _Part]]:
        """The longest beginning and end of at most that weight, each with what it leaves."""
        if self.weight(part) <= weight:
            return
        for at_end in (False, True):
            low, high = 0, part.tokens
            while high - low > 1:
                middle = (low + high) // 2
                ends = part.cut(part.last - middle if at_end else part.first + middle)
                if self.weight(ends[at_end]) <= weight:
                    low = middle
                else:
                    high = middle
            if low:
                ends = part.cut(part.last - low if at_end else part.first + low)
                yield ends[at_end], ends[not at_end]


def _joined(parts: list[_Part]) -> tuple[_Span, ...]:
    """The parts' spans, ascending, without empty ones; those that touch are one."""
    found: list[_Span] = []
    for part in sorted(parts):
        start, stop = part.start + part.first, part.start + part.last
        if found and found[-1][1] == start:
            found[-1] = (found[-1][0], stop)
        elif start < stop:
            found.append((start, stop))
    return tuple(found)
