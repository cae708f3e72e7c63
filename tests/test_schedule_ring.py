"""The ring's schedule, against masks written out and formulas."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from longspan.errors import LayoutError
from longspan.layout import Order, local_length, positions
from longspan.schedule.ops import Comm
from longspan.schedule.ring import Ring, Round, comms, rounds

rings = st.builds(
    lambda cuts, length, world, order, causal, window: Ring(
        length,
        world,
        order,
        causal,
        (0, *sorted(cut % (length + 1) for cut in cuts), length),
        kv_bytes=6,
        grad_bytes=10,
        window=window if causal else None,
    ),
    st.lists(st.integers(0, 60), max_size=5),
    st.integers(0, 60),
    st.integers(1, 5),
    st.sampled_from(list(Order)),
    st.booleans(),
    st.one_of(st.none(), st.integers(1, 60)),
)


def visible(ring: Ring) -> np.ndarray:
    """Who sees whom, token by token."""
    where = np.arange(ring.length)
    document = np.searchsorted(ring.documents[1:], where, side="right")
    seen = document[:, None] == document[None]
    back = where[:, None] - where[None]
    reach = ring.length if ring.window is None else ring.window
    return seen & (back >= 0) & (back < reach) if ring.causal else seen


def covered(ring: Ring, rank: int, turns: tuple[Round, ...]) -> np.ndarray:
    """How often the blocks of a rank's rounds compute each pair."""
    seen = np.zeros((ring.length, ring.length), int)
    own = positions(ring.length, rank, ring.world, ring.order).numpy()
    for turn in turns:
        theirs = positions(ring.length, turn.source, ring.world, ring.order).numpy()
        for block in turn.blocks:
            rows, columns = block.q_stop - block.q_start, block.kv_stop - block.kv_start
            assert rows and columns and (rows == columns or not block.causal)
            mask = np.tri(rows, dtype=int) if block.causal else np.ones((rows, columns), int)
            assert block.causal or not block.flipped
            mask = np.flip(mask) if block.flipped else mask
            q, kv = own[block.q_start : block.q_stop], theirs[block.kv_start : block.kv_stop]
            seen[np.ix_(q, kv)] += mask
            assert block.pairs == mask.sum()
    return seen


@given(rings)
def test_blocks_cover_what_is_visible_exactly_once(ring: Ring) -> None:
    turns = [rounds(ring, rank) for rank in range(ring.world)]
    total = sum(covered(ring, rank, turns[rank]) for rank in range(ring.world))
    assert (total == visible(ring)).all()


@given(rings, st.booleans())
def test_transfers_match_and_arrive_in_time(ring: Ring, backward: bool) -> None:
    turns = [rounds(ring, rank, backward) for rank in range(ring.world)]
    holds = {rank: rank for rank in range(ring.world)}
    for number in range(ring.world):
        now = [turn[number] for turn in turns]
        for rank, turn in enumerate(now):
            assert not turn.blocks or holds[rank] == turn.source
            assert turn.grads == () or backward
            for transfer in (*turn.kv, *turn.grads):
                other = transfer.receiver if transfer.sender == rank else transfer.sender
                assert transfer in (*now[other].kv, *now[other].grads)
                assert transfer.sender != transfer.receiver
            assert sum(t.sender == rank for t in turn.kv) <= 1
            assert sum(t.sender == rank for t in turn.grads) <= 1
        for transfer in {t for turn in now for t in turn.kv}:
            assert holds[transfer.sender] == transfer.source
            tokens = local_length(ring.length, transfer.source, ring.world, ring.order)
            assert transfer.bytes == tokens * ring.kv_bytes
        holds |= {t.receiver: t.source for turn in now for t in turn.kv}


@given(rings)
def test_every_gradient_reaches_home_with_every_share(ring: Ring) -> None:
    turns = [rounds(ring, rank, backward=True) for rank in range(ring.world)]
    carried: dict[tuple[int, int], set[int]] = {}
    home: dict[int, set[int]] = {rank: set() for rank in range(ring.world)}
    for number in range(ring.world):
        now = [turn[number] for turn in turns]
        for rank, turn in enumerate(now):
            if turn.blocks and turn.source != rank:
                carried.setdefault((rank, turn.source), set()).add(rank)
        arrived: dict[tuple[int, int], set[int]] = {}
        for transfer in {t for turn in now for t in turn.grads}:
            shares = carried.pop((transfer.sender, transfer.source))
            if transfer.receiver == transfer.source:
                home[transfer.source] |= shares
            else:
                arrived[transfer.receiver, transfer.source] = shares
        for key, shares in arrived.items():
            carried.setdefault(key, set()).update(shares)
    assert not carried
    for source in range(ring.world):
        expected = {
            rank
            for rank in range(ring.world)
            if rank != source and any(t.blocks for t in turns[rank] if t.source == source)
        }
        assert home[source] == expected


@pytest.mark.parametrize("order", [Order.ZIGZAG, Order.STRIPED])
@pytest.mark.parametrize("world", [2, 4, 8])
def test_bytes_are_the_formulas(world: int, order: Order) -> None:
    """K and V make 2(P-1)M in all; so do their gradients, the own share staying at home."""
    ring = Ring(64 * world, world, order, True, (0, 64 * world), kv_bytes=2, grad_bytes=2)
    m = 64 * world
    ops = [op for rank in range(world) for op in comms(ring, rank)]
    assert sum(op.sizes[0] for op in ops) == 2 * (world - 1) * m
    back = [op for rank in range(world) for op in comms(ring, rank, backward=True)]
    assert sum(op.sizes[0] for op in back) == 4 * (world - 1) * m


@pytest.mark.parametrize("order", [Order.ZIGZAG, Order.STRIPED])
def test_balanced_orders_are_balanced(order: Order) -> None:
    ring = Ring(4096, 8, order, True, (0, 4096), 1, 1)
    pairs = [sum(b.pairs for t in rounds(ring, rank) for b in t.blocks) for rank in range(8)]
    assert max(pairs) / min(pairs) < 1.01


def test_short_documents_send_next_to_nothing() -> None:
    ends = tuple(range(0, 1001, 50))
    ring = Ring(1000, 4, Order.CONTIGUOUS, True, ends, 1, 1)
    assert all(not comms(ring, rank, backward=True) for rank in range(4))


def test_a_window_in_contiguous_order_reaches_few_ranks() -> None:
    full = Ring(8192, 8, Order.CONTIGUOUS, True, (0, 8192), 1, 1)
    near = replace(full, window=1024)

    def total(ring: Ring) -> tuple[int, int, int]:
        turns = [turn for rank in range(8) for turn in rounds(ring, rank)]
        found = [block for turn in turns for block in turn.blocks]
        sent = [t for rank in range(8) for t in comms(ring, rank, backward=True)]
        return sum(b.pairs for b in found), len(found), sum(op.sizes[0] for op in sent)

    pairs, count, sent = total(near)
    assert pairs == 1024 * 8192 - 1024 * 1023 // 2
    assert pairs < total(full)[0] / 3
    assert count == 8 + 7  # a triangle for each rank, and one for its neighbour
    assert sent == 7 * 1024 * 2  # keys go one hop, and their gradients one hop home


def test_what_is_refused() -> None:
    with pytest.raises(LayoutError, match="window of 0"):
        Ring(8, 2, Order.ZIGZAG, True, (0, 8), 1, 1, window=0)
    with pytest.raises(LayoutError, match="causal"):
        Ring(8, 2, Order.ZIGZAG, False, (0, 8), 1, 1, window=4)
    for documents in ((), (1, 8), (0, 7)):
        with pytest.raises(LayoutError, match="start at 0 and end at"):
            Ring(8, 2, Order.ZIGZAG, True, documents, 1, 1)
    with pytest.raises(LayoutError, match="descend"):
        Ring(8, 2, Order.ZIGZAG, True, (0, 5, 3, 8), 1, 1)


def test_comm_sent_bytes() -> None:
    assert Comm("send", (3, 5), (7,)).sent_bytes(3) == 7
    assert Comm("send", (3, 5), (7,)).sent_bytes(5) == 0
    assert Comm("send", (3, 5), (7,)).sent_bytes(4) == 0
    assert Comm("all_gather", (0, 1, 2), (4, 5, 6)).sent_bytes(1) == 10
    assert Comm("reduce_scatter", (0, 1, 2), (4, 5, 6)).sent_bytes(1) == 10
    assert Comm("all_reduce", (0, 1, 2, 3), (8,)).sent_bytes(2) == 12
    assert Comm("all_to_all", (0, 1), (1, 2, 3, 4)).sent_bytes(1) == 3
    assert Comm("broadcast", (4, 1, 2), (9,)).sent_bytes(4) == 18
