"""What groups of ranks take for the sequences they are given: all that the search needs to know.

A group's time and memory depend on two sums over its sequences only, tokens and query-key pairs,
so that a search can try a sequence in a group at the cost of a few multiplications.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

__all__ = ["Floats", "Ints", "Pool", "Price", "Prices", "Sharding"]

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Sharding = Literal["world", "node", "none"]


class Price(NamedTuple):
    """What a group of ``ranks`` ranks takes; the fields of a ``Pool`` at one size.

    ``fixed_s`` once a micro-batch, ``token_s`` a token. Attention is the quicker one of a head
    exchange, ``heads_pair_s`` a pair and ``heads_token_s`` a token, and a ring, whose transfers of
    ``ring_token_s`` a token run while it computes ``ring_pair_s`` a pair, and ``ring_busy_s`` a
    token for what it sends and receives; ``heads_fixed_s`` and ``ring_fixed_s`` are what messages
    and rounds take, however small. ``heads_sent`` and ``ring_sent`` are bytes that the
    busiest rank sends for a token.
    """

    ranks: int
    most_tokens: int
    fixed_s: float
    token_s: float
    heads_fixed_s: float
    heads_pair_s: float
    heads_token_s: float
    ring_fixed_s: float
    ring_pair_s: float
    ring_token_s: float
    ring_busy_s: float
    heads_sent: float
    ring_sent: float

    def seconds(self, tokens: float, pairs: float, share: int = 1) -> float:
        """Seconds of a group that holds so much; ``share`` groups use the network between nodes."""
        return self.fixed_s + self.token_s * tokens + min(self._ways(tokens, pairs, share))

    def _ways(self, tokens: float, pairs: float, share: int) -> tuple[float, float]:
        heads = self.heads_fixed_s + self.heads_pair_s * pairs
        heads += self.heads_token_s * tokens * share
        busy = self.ring_pair_s * pairs + self.ring_busy_s * tokens
        behind = max(busy, self.ring_token_s * tokens * share)
        return heads, self.ring_fixed_s + behind

    def inside(
        self, tokens: float, pairs: float, share: int = 1
    ) -> tuple[Literal["ring", "heads"], int, float]:
        """How attention is spread, bytes that the busiest rank sends, and seconds it waits."""
        heads, ring = self._ways(tokens, pairs, share)
        if heads <= ring:
            waits = self.heads_fixed_s + self.heads_token_s * tokens * share
            return "heads", round(self.heads_sent * tokens), waits
        return "ring", round(self.ring_sent * tokens), ring - self.ring_pair_s * pairs


@dataclass(frozen=True, eq=False)
class Pool:
    """Alike ranks, and the prices of groups of them, by the size of the group, ascending.

    ``nodes``: their places among the cluster's nodes; a group that fits into a node is inside one,
    a larger one takes whole nodes and a part of another. ``weight``: how fast a rank is, where the
    fastest is 1.
    """

    nodes: tuple[int, ...]
    weight: float
    prices: tuple[Price, ...]

    @cached_property
    def columns(self) -> Any:
        """A Price whose fields are arrays of shape (sizes,)."""
        arrays: list[Any] = [np.array(column) for column in zip(*self.prices, strict=True)]
        return Price(*arrays)

    def added_s(self, tokens: Ints, pairs: Floats) -> tuple[Floats, Floats]:
        """The least that each sequence adds to a group by head exchange, and by ring, by size.

        Both have the shape (sequences, sizes). A ring hides what it sends behind what it computes,
        if need be for other sequences, so that only the latter counts. Infinite where a sequence
        doesn't fit the memory, and where there is no ring.
        """
        c = self.columns
        held, seen = tokens[:, None].astype(np.float64), pairs[:, None]
        heads = (c.token_s + c.heads_token_s) * held + c.heads_pair_s * seen
        ring = (c.token_s + c.ring_busy_s) * held + c.ring_pair_s * seen
        fits = held <= c.most_tokens
        rings = fits & np.isfinite(c.ring_fixed_s)
        return np.where(fits, heads, np.inf), np.where(rings, ring, np.inf)

    def seconds(self, tokens: Ints, pairs: Floats, share: Any = 1) -> Floats:
        """Seconds that each of these sequences takes alone by size: (sequences, sizes).

        ``share``: by size, how many groups use the network between nodes. Infinite where a
        sequence doesn't fit the memory.
        """
        c = self.columns
        held, seen = tokens[:, None].astype(np.float64), pairs[:, None]
        heads = c.heads_fixed_s + c.heads_pair_s * seen + c.heads_token_s * share * held
        busy = c.ring_pair_s * seen + c.ring_busy_s * held
        behind = np.maximum(busy, c.ring_token_s * share * held)
        ring = c.ring_fixed_s + behind
        found: Floats = c.fixed_s + c.token_s * held + np.minimum(heads, ring)
        return np.where(held > c.most_tokens, np.inf, found)


@dataclass(frozen=True, eq=False)
class Prices:
    """A model on a cluster: ``nodes`` are its ranks node by node, pools the fastest first.

    The last pool of several is of all nodes, at the pace of the slowest. ``gather_s`` and
    ``batch_s`` are what all ranks take together, once a micro-batch and once a batch; with
    ``overlap`` the former runs while they compute. ``pairs_of`` counts the query-key pairs of
    sequences of so many tokens, ``bytes_of`` what a rank holds that has so many tokens, and whether
    it exchanges heads.
    """

    nodes: tuple[tuple[int, ...], ...]
    pools: tuple[Pool, ...]
    pairs_of: Callable[[Ints], Floats]
    bytes_of: Callable[[int, bool], int]
    gather_s: float = 0.0
    batch_s: float = 0.0
    overlap: bool = False
    sharding: Sharding = "world"
    reduce_once: bool = True

    def whole_s(self, groups_s: Any) -> Any:
        """Seconds of a micro-batch whose last group ends after so many; or of several."""
        if self.overlap:
            return np.maximum(groups_s, self.gather_s)
        return groups_s + self.gather_s

    @cached_property
    def world(self) -> int:
        """How many ranks there are."""
        return sum(map(len, self.nodes))

    @cached_property
    def capacity(self) -> int:
        """The most tokens that all ranks hold together."""
        own = self.pools if len(self.pools) == 1 else self.pools[:-1]
        return sum(
            pool.prices[0].most_tokens * sum(len(self.nodes[node]) for node in pool.nodes)
            for pool in own
        )

    @cached_property
    def pool_of_node(self) -> tuple[int, ...]:
        """The pool that each node's single ranks are of."""
        found = [0] * len(self.nodes)
        for index, pool in reversed(list(enumerate(self.pools))):
            for node in pool.nodes:
                found[node] = index
        return tuple(found)
