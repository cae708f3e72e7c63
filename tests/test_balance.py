"""Balanced order: whole short documents, cut long ones, and as much to do for every rank."""

from collections.abc import Iterator
from itertools import accumulate, pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from longspan.balance import EVEN, balanced
from longspan.data.packing import Packer
from longspan.layout import Order, positions, runs
from longspan.schedule.ring import Ring, imbalance, pairs, tokens
from longspan.schedule.rounds import comms

documents = st.lists(st.integers(0, 60), max_size=12).map(lambda lengths: (0, *accumulate(lengths)))


def ring(ends: tuple[int, ...], world: int, order: Order) -> Ring:
    return Ring(ends[-1], world, order, True, ends, 1, 1)


def sent(one: Ring) -> int:
    """Tokens that travel in forward."""
    return sum(op.sizes[0] for rank in range(one.world) for op in comms(one, rank))


@given(documents, st.integers(1, 8))
def test_every_token_is_on_one_rank(ends: tuple[int, ...], world: int) -> None:
    held = balanced(ends, world)
    assert sorted(t for part in held for span in part for t in range(*span)) == list(
        range(ends[-1])
    )
    for rank, part in enumerate(held):
        found = positions(ends[-1], rank, world, "balanced", ends).tolist()
        assert found == sorted(found) == [t for span in part for t in range(*span)]
        # Spans don't touch, so that blocks are as large as can be.
        assert all(a[1] < b[0] for a, b in pairwise(part))


@given(st.integers(0, 200), st.integers(1, 9))
def test_one_document_is_in_zigzag_order(length: int, world: int) -> None:
    """Which rank has which share is another matter."""
    found, zigzag = (
        sorted(positions(length, rank, world, order).tolist() for rank in range(world))
        for order in ("balanced", "zigzag")
    )
    assert found == zigzag
    assert len(runs(length, 0, world, "balanced")) <= 2


@given(st.lists(st.integers(200, 20000), min_size=1, max_size=12), st.integers(1, 8))
def test_tokens_and_pairs_are_even(lengths: list[int], world: int) -> None:
    one = ring((0, *accumulate(lengths)), world, Order.BALANCED)
    assert imbalance([pairs(one, rank) for rank in range(world)]) <= EVEN
    assert imbalance([tokens(one, rank) for rank in range(world)]) <= EVEN


def test_documents_that_fill_ranks_are_not_cut() -> None:
    ends = (0, 500, 1000, 1500, 2000)
    one = ring(ends, 4, Order.BALANCED)
    assert all(len(part) == 1 and part[0][0] % 500 == 0 for part in balanced(ends, 4))
    assert sent(one) == 0
    # Of three that can't fill four ranks, none is left whole.
    assert sent(ring((0, 500, 1000, 1500), 4, Order.BALANCED)) > 0


def packs(max_length: int, count: int) -> Iterator[tuple[int, ...]]:
    """Documents as in Wikipedia: median 345 tokens, one of a hundred over 10,000; best-fit packed.

    A log-normal's percentiles follow that corpus' up to the 99.9th.
    """
    random = np.random.default_rng(0)
    lengths = np.maximum(1, random.lognormal(np.log(345), 1.45, 40_000)).astype(np.int64)
    packer = Packer(lengths, np.arange(len(lengths)), max_length, seed=0)
    for number in random.choice(packer.epoch_packs(0), count, replace=False):
        yield (0, *accumulate(piece.length for piece in packer.pack(int(number))))


@pytest.mark.parametrize("max_length", [8192, 32768, 131072])
@pytest.mark.parametrize("world", [2, 4, 8])
def test_realistic_packs_are_even(max_length: int, world: int) -> None:
    uneven, travel, whole = [], 0, 0
    for ends in packs(max_length, 12):
        one, zigzag = (ring(ends, world, order) for order in (Order.BALANCED, Order.ZIGZAG))
        assert imbalance([pairs(one, rank) for rank in range(world)]) <= EVEN
        assert imbalance([tokens(one, rank) for rank in range(world)]) <= EVEN
        uneven.append(imbalance([pairs(zigzag, rank) for rank in range(world)]))
        travel, whole = travel + sent(one), whole + ends[-1] * (world - 1)
    assert max(uneven) > EVEN
    assert travel < 0.9 * whole
