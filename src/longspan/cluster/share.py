"""How transfers that are under way at once share the pipes: max-min fairly.

No transfer can be made faster but at the cost of one that is no faster. Each transfer fills its
pipes in fixed proportions (all messages of a collective keep step), and between transfers it is
their messages that get equal shares, as connections of TCP do.
"""

import numpy as np

from longspan.cluster.cost import Demand
from longspan.cluster.fabric import Floats

__all__ = ["fair_rates"]


def fair_rates(demands: list[Demand], capacity: Floats) -> Floats:
    """Fraction of each transfer done in a second, while exactly these are under way.

    ``capacity`` is each pipe's bytes a second. Every demand must have bytes to move.
    """
    count = len(demands)
    lengths = [len(demand.pipes) for demand in demands]
    of = np.repeat(np.arange(count), lengths)
    starts = np.concatenate([[0], np.cumsum(lengths)[:-1]])
    pipes, pipe = np.unique(
        np.concatenate([demand.pipes for demand in demands]), return_inverse=True
    )
    # Filling all transfers so that their messages have the same rate, `level`, a transfer moves
    # level / message_bytes of itself a second.
    pace = 1 / np.array([demand.message_bytes for demand in demands])
    load = np.concatenate([demand.bytes for demand in demands]) * pace[of]
    left = capacity[pipes]
    level = np.zeros(count)
    rising = np.ones(count, dtype=bool)
    while rising.any():
        live = rising[of]
        asked = np.bincount(pipe, load * live, minlength=len(pipes))
        fair = np.divide(left, asked, out=np.full(len(pipes), np.inf), where=asked > 0)
        reach = np.minimum.reduceat(fair[pipe], starts)
        # A pipe binds where each transfer in it can rise no further elsewhere either.
        least = np.full(len(pipes), np.inf)
        np.minimum.at(least, pipe[live], reach[of[live]])
        binds = (fair <= least * (1 + 1e-12)) & (asked > 0)
        done = rising & np.logical_or.reduceat(binds[pipe], starts)
        level[done] = reach[done]
        left = np.maximum(
            left - np.bincount(pipe, load * (level * done)[of], minlength=len(pipes)), 0
        )
        rising &= ~done
    return level * pace
