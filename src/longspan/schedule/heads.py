"""Head exchange: ranks swap a share of the tokens for a share of the heads, and back.

Attention over all tokens of a few heads needs no other rank (DeepSpeed-Ulysses, arXiv 2309.14509).
Head counts need not divide: query heads are dealt as evenly as can be, and each rank gets the KV
heads that its query heads attend to, a KV head that several ranks need being sent to each.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from longspan.layout import Order, runs
from longspan.schedule.ops import Comm

__all__ = ["HeadShares", "exchange_op"]


@dataclass(frozen=True)
class HeadShares:
    """Which heads each of ``world`` ranks attends with; a rank may have none."""

    heads: int
    kv_heads: int
    world: int

    def q(self, rank: int) -> range:
        """The query heads of a rank."""
        dealt = runs(self.heads, rank, self.world, Order.CONTIGUOUS)
        if not dealt:
            return range(self.heads, self.heads)
        return range(dealt[0].start, dealt[0].start + dealt[0].count)

    def kv(self, rank: int) -> range:
        """The KV heads that they attend to."""
        own, group = self.q(rank), self.heads // self.kv_heads
        return range(own.start // group, -(-own.stop // group))

    def kv_of_q(self, rank: int) -> list[int]:
        """For each query head of a rank, which of the rank's KV heads is its own."""
        group, first = self.heads // self.kv_heads, self.kv(rank).start
        return [head // group - first for head in self.q(rank)]

    def even(self, rank: int) -> bool:
        """Whether the rank's KV heads have equally many query heads, one group after another."""
        own, kv = self.q(rank), self.kv(rank)
        if not own or len(own) % len(kv):
            return not own
        group = len(own) // len(kv)
        return self.kv_of_q(rank) == [head // group for head in range(len(own))]


def exchange_op(
    counts: Sequence[int], shares: Sequence[range], token_bytes: int, ranks: Sequence[int]
) -> Comm:
    """The all-to-all from tokens to heads: rank i's ``counts[i]`` tokens, j's heads ``shares[j]``.

    ``token_bytes``: what a token of one head weighs. The way back is its transpose.
    """
    sizes = tuple(count * len(share) * token_bytes for count in counts for share in shares)
    return Comm("all_to_all", tuple(ranks), sizes)
