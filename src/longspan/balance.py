"""Which parts of packed documents each rank holds, so that every rank has as much to do.

Attention's work in a document grows with its square, all other work and memory with its tokens, so
both are made even. A short document goes whole to one rank, and nothing of it travels. A longer
one is cut into shares for as few ranks as will do, one as dear as another: pieces i and 2n-1-i of
2n, as in zigzag order.
"""

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

    ``documents``: where each starts, and the end of the last. The dearest shares are dealt first,
    to the ranks that have least. While that isn't even within ``EVEN``, the document of the
    dearest share is cut for one more rank; at last all are cut for all. The same on every rank.
    """
    spans = [span for span in pairwise(documents) if span[0] < span[1]]
    all_tokens = sum(stop - start for start, stop in spans)
    all_pairs = sum(_pairs(0, stop - start) for start, stop in spans)
    # Tokens and pairs count alike, each as its share of the whole; in integers, so exactly.
    weights = [
        (stop - start) * all_pairs + _pairs(0, stop - start) * all_tokens for start, stop in spans
    ]
    cuts = [1] * len(spans)
    while True:
        held: list[list[_Span]] = [[] for _ in range(world)]
        tokens, pairs = [0] * world, [0] * world
        dearest = sorted(range(len(spans)), key=lambda i: -weights[i] / cuts[i])
        for i in dearest:
            least = sorted(
                range(world), key=lambda r: tokens[r] * all_pairs + pairs[r] * all_tokens
            )
            start, stop = spans[i]
            for nth, rank in enumerate(least[: cuts[i]]):
                for index in (nth, 2 * cuts[i] - 1 - nth):
                    first, count = piece(stop - start, index, 2 * cuts[i])
                    held[rank].append((start + first, start + first + count))
                    tokens[rank] += count
                    pairs[rank] += _pairs(first, first + count)
        most = max(max(tokens) * all_pairs, max(pairs) * all_tokens) * world
        more = [i for i in dearest if cuts[i] < min(world, spans[i][1] - spans[i][0])]
        if most <= EVEN * all_tokens * all_pairs or not more:
            return tuple(_joined(sorted(part)) for part in held)
        cuts[more[0]] += 1


def _pairs(start: int, stop: int) -> int:
    """What the tokens [start, stop) of a document see of it, each itself and those before."""
    return (stop * (stop + 1) - start * (start + 1)) // 2


def _joined(spans: list[_Span]) -> tuple[_Span, ...]:
    """Ascending spans without empty ones, those that touch as one."""
    found: list[_Span] = []
    for start, stop in spans:
        if found and found[-1][1] == start:
            found[-1] = (found[-1][0], stop)
        elif start < stop:
            found.append((start, stop))
    return tuple(found)
