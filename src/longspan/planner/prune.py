"""Choices that can't be in a cheapest assignment, as another of the same layer never costs more."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from longspan.planner.eliminate import Floats

__all__ = ["dearer_by", "undominated"]


def dearer_by(table: Floats) -> Floats:
    """(s, t): how much more an edge can cost at most with choice t in place of s.

    ``table`` is (choices, the neighbour's choices).
    """
    return np.array([(table - row).max(axis=1) for row in table])


def undominated(
    costs: Floats, dearer: Sequence[Floats], memory: Floats | None
) -> NDArray[np.int64]:
    """The choices of ``costs`` (choices, options) that are left, in order.

    One goes if another, whatever the neighbours choose (``dearer``, of each edge), costs no more
    with an option that holds no more (``memory``, shaped as ``costs``), for each of its options.
    """
    more = np.sum(dearer, axis=0) if dearer else np.zeros((len(costs), len(costs)))
    count = len(costs)
    if memory is None:
        costs = costs.min(axis=1, keepdims=True)
        memory = np.zeros_like(costs)
    beaten = np.ones((count, count), dtype=bool)
    for mine in range(costs.shape[1]):
        answered = ~np.isfinite(costs[:, mine])[:, None] & np.ones((1, count), dtype=bool)
        for its in range(costs.shape[1]):
            with np.errstate(invalid="ignore"):
                gain = costs[:, mine, None] - costs[None, :, its] - more
            no_heavier = memory[None, :, its] <= memory[:, mine, None]
            answered |= (gain >= 0) & no_heavier
        beaten &= answered
    # Of those that beat each other the first stays.
    earlier = np.tri(count, k=-1, dtype=bool)
    mutual = beaten & beaten.T
    gone = (beaten & ~mutual) | (mutual & earlier)
    np.fill_diagonal(gone, False)
    return np.flatnonzero(~gone.any(axis=1))
