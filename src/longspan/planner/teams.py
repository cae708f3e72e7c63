"""Groups in the making, and where they are: which nodes give how many ranks."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

from longspan.planner.prices import Price, Prices

__all__ = ["Shelf", "Team", "place", "share"]


@dataclass(slots=True)
class Team:
    """A group that is being made: places of its sequences, ranks it takes of each node."""

    price: Price
    ranks: dict[int, int]
    items: list[int] = field(default_factory=list)
    tokens: int = 0
    pairs: float = 0.0
    share: int = 1

    def add(self, item: int, tokens: int, pairs: float) -> None:
        """Take a sequence."""
        self.items.append(item)
        self.tokens += tokens
        self.pairs += pairs

    @property
    def seconds(self) -> float:
        """What it takes; nothing without sequences."""
        if not self.items:
            return 0.0
        return self.price.seconds(self.tokens, self.pairs, self.share)


@dataclass(frozen=True, eq=False)
class Shelf:
    """The groups of one micro-batch, which don't change any more."""

    teams: list[Team]

    @cached_property
    def seconds(self) -> float:
        """When the last group ends."""
        return max((team.seconds for team in self.teams), default=0.0)

    @property
    def items(self) -> list[int]:
        """Its sequences, longest first."""
        return sorted(item for team in self.teams for item in team.items)


def share(teams: list[Team]) -> None:
    """Groups that are in several nodes share the networks of those."""
    apart = [team for team in teams if len(team.ranks) > 1]
    uses = Counter(node for team in apart for node in team.ranks)
    for team in apart:
        team.share = max(uses[node] for node in team.ranks)


def place(
    size: int, nodes: Sequence[int], free: Sequence[int], prices: Prices
) -> dict[int, int] | None:
    """How many ranks of which nodes: of one that is just large enough, else whole ones and a rest.

    None if there is no such room.
    """
    node = _least(size, nodes, free)
    if node is not None:
        return {node: size}
    taken: dict[int, int] = {}
    if size < min(len(prices.nodes[node]) for node in nodes):
        return None
    for node in nodes:
        whole = len(prices.nodes[node])
        if free[node] == whole and whole <= size:
            taken[node] = whole
            size -= whole
            if not size:
                return taken
    rest = _least(size, [node for node in nodes if node not in taken], free) if taken else None
    return None if rest is None else taken | {rest: size}


def _least(size: int, nodes: Sequence[int], free: Sequence[int]) -> int | None:
    """The first node of the fewest free ranks that are enough."""
    enough = [free[node] for node in nodes if free[node] >= size]
    if not enough:
        return None
    least = min(enough)
    return next(node for node in nodes if free[node] == least)
