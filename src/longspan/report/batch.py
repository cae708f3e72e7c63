"""Batch: which rank holds which tokens of a packed sequence, and how much attention that costs it.

The arithmetic of longspan.layout on plain ranges, so that a report needs no torch.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from longspan.balance import balanced, piece

__all__ = ["Batch"]

_ORDERS = ("contiguous", "zigzag", "striped", "balanced")


@dataclass(frozen=True, slots=True)
class Batch:
    """A packed sequence: document i holds tokens ``cu_seqlens[i]`` to ``cu_seqlens[i+1]``."""

    cu_seqlens: tuple[int, ...]
    world: int
    order: str

    def __post_init__(self) -> None:
        if self.order not in _ORDERS:
            raise ValueError(f"unknown order {self.order!r}")
        if self.world < 1:
            raise ValueError(f"a batch can't be dealt to {self.world} ranks")
        bounds = self.cu_seqlens
        if len(bounds) < 2 or bounds[0] != 0 or any(b < a for a, b in pairwise(bounds)):
            raise ValueError("cu_seqlens must rise from 0")
        if not bounds[-1]:
            raise ValueError("a batch without tokens")

    @property
    def length(self) -> int:
        """Tokens in all."""
        return self.cu_seqlens[-1]

    @property
    def documents(self) -> int:
        """Documents that have a token."""
        return sum(1 for a, b in pairwise(self.cu_seqlens) if b > a)

    def held(self, rank: int) -> tuple[range, ...]:
        """The positions that ``rank`` holds, ascending; longspan.layout.runs says the same."""
        if self.order == "striped":
            found = [range(rank, self.length, self.world)]
        elif self.order == "contiguous":
            found = [_piece(self.length, rank, self.world)]
        elif self.order == "balanced":
            found = [range(*span) for span in balanced(self.cu_seqlens, self.world)[rank]]
        else:
            pieces = 2 * self.world
            found = [_piece(self.length, i, pieces) for i in (rank, pieces - 1 - rank)]
        return tuple(held for held in found if held)

    def tokens(self, rank: int) -> int:
        """How many tokens ``rank`` holds."""
        return sum(map(len, self.held(rank)))

    def work(self, rank: int) -> int:
        """Pairs of query and key that causal attention inside documents gives ``rank``."""
        bounds = np.asarray(self.cu_seqlens, dtype=np.int64)
        pairs = 0
        for held in self.held(rank):
            positions = np.arange(held.start, held.stop, held.step, dtype=np.int64)
            starts = bounds[np.searchsorted(bounds, positions, side="right") - 1]
            pairs += int((positions - starts + 1).sum())
        return pairs

    def bands(self, start: int, stop: int) -> Iterator[tuple[int, int, int]]:
        """The documents in [start, stop) as (from, to, parity); neighbours differ in parity."""
        parity = 0
        for a, b in pairwise(self.cu_seqlens):
            if b > a:
                if max(a, start) < min(b, stop):
                    yield max(a, start), min(b, stop), parity
                parity = 1 - parity


def _piece(length: int, index: int, pieces: int) -> range:
    start, count = piece(length, index, pieces)
    return range(start, start + count)
