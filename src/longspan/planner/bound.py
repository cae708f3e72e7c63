"""What no plan can be quicker than, so that a plan says how far from the best it may be.

All ranks are busy for at most as long as the micro-batches take, N·ΣT. A group takes its ranks for
its fixed time and its sequences' times; a sequence takes at least its least rank-seconds among the
groups that can hold it and end in time. What is in time depends on ΣT itself, so that the bound is
the smallest ΣT that agrees with itself. There are at least as many micro-batches as the tokens fill
the memory of all ranks, and the one with the longest sequence takes at least that.
"""

import numpy as np

from longspan.planner.pack import Batch
from longspan.planner.prices import Floats

__all__ = ["lower_bound"]

_STEPS = 40


def lower_bound(batch: Batch) -> float:
    """Seconds that every plan of this batch takes at least, with what is done once a batch."""
    prices = batch.prices
    least = -(-int(batch.tokens.sum()) // prices.capacity)
    each = float(prices.whole_s(batch.fixed_s))
    low = (least - 1) * each + float(prices.whole_s(batch.quickest[0]))
    areas = _areas(batch)
    high = low + float(areas[-1].min(axis=1).sum()) / batch.speed + least * each

    def agrees(total: float) -> bool:
        longest = total - (least - 1) * each
        if not prices.overlap:
            longest -= prices.gather_s
        inside = np.full(len(batch.tokens), np.inf)
        for times, area in zip(batch.times, areas, strict=True):
            inside = np.minimum(inside, np.where(times <= longest, area, np.inf).min(axis=1))
        gathered = 0.0 if prices.overlap else least * prices.gather_s
        needed = inside.sum() / batch.speed + least * batch.fixed_s + gathered
        return bool(needed <= total)

    if agrees(low):
        return low + prices.batch_s
    for _ in range(_STEPS):
        middle = (low + high) / 2
        low, high = (low, middle) if agrees(middle) else (middle, high)
    return low + prices.batch_s


def _areas(batch: Batch) -> list[Floats]:
    """By pool, the rank-seconds of each sequence in each size, what a group takes anyway left out.

    A ring can hide what it sends, so that only what it computes counts.
    """
    found = []
    tokens, pairs = batch.tokens[:, None].astype(np.float64), batch.pairs[:, None]
    for pool in batch.prices.pools:
        c = pool.columns
        heads = c.heads_pair_s * pairs + c.heads_token_s * tokens
        ring = np.where(np.isfinite(c.ring_fixed_s), c.ring_pair_s * pairs, np.inf)
        found.append((c.token_s * tokens + np.minimum(heads, ring)) * c.ranks * pool.weight)
    return found
