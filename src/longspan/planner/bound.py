"""What no plan can be quicker than, so that a plan says how far from the best it may be.

All ranks are busy for at most as long as the micro-batches take, N·ΣT. A group takes its ranks for
its fixed time and its sequences' times; a sequence takes at least its least rank-seconds among the
groups that can hold it and end in time, by head exchange or by ring. What is in time depends on ΣT
itself, so that the bound is the smallest ΣT that agrees with itself. There are at least as many
micro-batches as the tokens fill the memory of all ranks, and the one with the longest sequence
takes at least that.
"""

from collections.abc import Iterator

import numpy as np

from longspan.planner.alone import LONGEST, Batch
from longspan.planner.prices import Floats, Pool

__all__ = ["lower_bound"]

_STEPS = 20
_SAME = 1 - 1e-9


def lower_bound(batch: Batch) -> float:
    """Seconds that every plan of this batch takes at least, with what is done once a batch."""
    prices = batch.prices
    least = -(-int(batch.tokens.sum()) // prices.capacity)
    each = float(prices.whole_s(batch.fixed_s))
    low = (least - 1) * each + float(prices.whole_s(batch.quickest[0]))
    ways = [way for pool in prices.pools for way in _ways(batch, pool)]
    fewest = np.min([area.min(axis=1) for _, area in ways], axis=0)
    others = _others(batch)
    high = low + (float(fewest.sum()) + others) / batch.speed + least * each

    def agrees(total: float) -> bool:
        longest = total - (least - 1) * each
        if not prices.overlap:
            longest -= prices.gather_s
        inside = np.min(
            [np.where(ends <= longest, area, np.inf).min(axis=1) for ends, area in ways], axis=0
        )
        gathered = 0.0 if prices.overlap else least * prices.gather_s
        needed = (inside.sum() + others) / batch.speed + least * batch.fixed_s + gathered
        return bool(needed <= total)

    if agrees(low):
        return low + prices.batch_s
    while not agrees(high):  # the few groups that end in time may be dear ones
        low, high = high, 2 * high
    for _ in range(_STEPS):
        middle = (low + high) / 2
        low, high = (low, middle) if agrees(middle) else (middle, high)
    return low + prices.batch_s


def _ways(batch: Batch, pool: Pool) -> Iterator[tuple[Floats, Floats]]:
    """When each of the longest sequences ends, and what it adds in rank-seconds: by size.

    First by head exchange, then by ring. What a group takes anyway is left out. A ring hides what
    it sends behind what it computes, if need be for other sequences, so that only the latter
    counts; but it must have sent all in time.
    """
    c = pool.columns
    tokens = batch.tokens[:LONGEST, None].astype(np.float64)
    ranks = c.ranks * pool.weight
    heads, ring = pool.added_s(batch.tokens[:LONGEST], batch.pairs[:LONGEST])
    yield c.fixed_s + c.heads_fixed_s + heads, heads * ranks
    if np.isfinite(ring).any():
        sends = np.maximum(ring, (c.token_s + c.ring_token_s) * tokens)
        yield c.fixed_s + c.ring_fixed_s + sends, ring * ranks


def _others(batch: Batch) -> float:
    """The fewest rank-seconds that all but the longest add, whenever they end."""
    tokens, pairs = batch.tokens[LONGEST:], batch.pairs[LONGEST:]
    if not len(tokens):
        return 0.0
    ways: list[tuple[Floats, Floats, Floats]] = []  # a token, a pair, and the most tokens, by size
    for pool in batch.prices.pools:
        c, weight = pool.columns, pool.columns.ranks * pool.weight
        ring_pair_s = np.where(np.isfinite(c.ring_fixed_s), c.ring_pair_s, np.inf)
        ways.append(
            (weight * (c.token_s + c.heads_token_s), weight * c.heads_pair_s, c.most_tokens)
        )
        ring_token_s = c.token_s + c.ring_busy_s
        ways.append((weight * ring_token_s, weight * ring_pair_s, c.most_tokens))
    per_token = np.concatenate([way[0] for way in ways])
    per_pair = np.concatenate([way[1] for way in ways])
    room = np.concatenate([way[2] for way in ways])
    # Few ways are better for any sequence than the one that takes least for a token.
    first = np.where(room >= tokens[0], per_token, np.inf).argmin()
    kept = (per_token < per_token[first] * _SAME) | (per_pair < per_pair[first] * _SAME)
    kept[first] = True
    added = per_token[kept] * tokens[:, None] + per_pair[kept] * pairs[:, None]
    return float(np.where(tokens[:, None] <= room[kept], added, np.inf).min(axis=1).sum()) * _SAME
