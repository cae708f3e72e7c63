"""The ring's schedule, against masks written out and formulas."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from longspan.errors import LayoutError
from longspan.layout import Order, positions
from longspan.schedule.ops import Comm
from longspan.schedule.ring import Ring
from longspan.schedule.rounds import Round, Travels, cheapest, comms, rounds, travelling

rings = st.builds(
    lambda cuts, length, world, node, order, causal, window: Ring(
        length,
        world,
        order,
        causal,
        (0, *sorted(cut % (length + 1) for cut in cuts), length),
        kv_bytes=6,
        grad_bytes=10,
        q_bytes=7,
        dq_bytes=4,
        node_ranks=node if world % node == 0 else 0,
        window=window if causal else None,
    ),
    st.lists(st.integers(0, 60), max_size=5),
    st.integers(0, 60),
    st.integers(1, 8),
    st.integers(1, 4),
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


def held(ring: Ring, rank: int, source: int, travels: Travels) -> np.ndarray:
    """The positions of a rank's tokens that another has: those that travel, or its own."""
    own = positions(ring.length, source, ring.world, ring.order, ring.documents).numpy()
    if rank == source:
        return own
    spans = travelling(ring, source, travels)
    return np.concatenate([own[:0], *(own[start:stop] for start, stop in spans)])


def covered(ring: Ring, rank: int, turn: Round, travels: Travels) -> np.ndarray:
    """How often a round's blocks compute each pair."""
    seen = np.zeros((ring.length, ring.length), int)
    own, theirs = held(ring, rank, rank, travels), held(ring, rank, turn.source, travels)
    queries, keys = (own, theirs) if travels == "kv" else (theirs, own)
    for block in turn.blocks:
        rows, columns = block.q_stop - block.q_start, block.kv_stop - block.kv_start
        assert rows and columns and (rows == columns or not block.causal)
        mask = np.tri(rows, dtype=int) if block.causal else np.ones((rows, columns), int)
        assert block.causal or not block.flipped
        mask = np.flip(mask) if block.flipped else mask
        q, kv = queries[block.q_start : block.q_stop], keys[block.kv_start : block.kv_stop]
        seen[np.ix_(q, kv)] += mask
        assert block.pairs == mask.sum()
    return seen


def travels_of(backward: str) -> tuple[bool, Travels]:
    """Forward, or backward with one side or the other on its way."""
    return backward != "forward", "q" if backward == "q" else "kv"


halves = st.sampled_from(["forward", "kv", "q"])


@given(rings, st.sampled_from(["kv", "q"]))
def test_blocks_cover_what_is_visible_exactly_once(ring: Ring, travels: Travels) -> None:
    total = np.zeros((ring.length, ring.length), int)
    for rank in range(ring.world):
        for turn in rounds(ring, rank, True, travels):
            total += covered(ring, rank, turn, travels)
    assert (total == visible(ring)).all()


@given(rings, halves)
def test_payloads_match_and_arrive_in_time(ring: Ring, half: str) -> None:
    backward, travels = travels_of(half)
    turns = [rounds(ring, rank, backward, travels) for rank in range(ring.world)]
    has = [{rank} for rank in range(ring.world)]
    weight = ring.kv_bytes if travels == "kv" else ring.q_bytes
    for number in range(ring.world):
        now = [turn[number] for turn in turns]
        for rank, turn in enumerate(now):
            assert not turn.blocks or turn.source in has[rank]
            assert turn.grads == () or backward
            for transfer in (*turn.payload, *turn.grads):
                other = transfer.receiver if transfer.sender == rank else transfer.sender
                assert transfer in (*now[other].payload, *now[other].grads)
                assert transfer.sender != transfer.receiver
            # A rank lets go of what it has computed with.
            for transfer in turn.payload:
                assert transfer.sender != rank or transfer.source in {turn.source, rank}
        for transfer in {t for turn in now for t in turn.payload}:
            assert transfer.source in has[transfer.sender]
            tokens = len(held(ring, transfer.receiver, transfer.source, travels))
            assert transfer.bytes == tokens * weight > 0
            has[transfer.receiver].add(transfer.source)


@given(rings, st.sampled_from(["kv", "q"]))
def test_every_gradient_reaches_home_with_every_share(ring: Ring, travels: Travels) -> None:
    turns = [rounds(ring, rank, True, travels) for rank in range(ring.world)]
    sums: dict[tuple[int, int], set[int]] = {}
    came: dict[tuple[int, int], set[int]] = {}
    shares: dict[int, set[int]] = {rank: set() for rank in range(ring.world)}
    for number in range(ring.world):
        now = [turn[number] for turn in turns]
        for rank, turn in enumerate(now):
            if turn.blocks and turn.source != rank:
                sums[rank, turn.source] = {rank}
                shares[turn.source].add(rank)
            # It adds what has come of this source before it sends the sum on.
            sums.setdefault((rank, turn.source), set()).update(came.pop((rank, turn.source), ()))
        for transfer in sorted({t for turn in now for t in turn.grads}, key=str):
            moved = sums.pop((transfer.sender, transfer.source))
            there = came.setdefault((transfer.receiver, transfer.source), set())
            assert moved and not moved & there, "no share is counted twice"
            there |= moved
    for source in range(ring.world):
        assert came.pop((source, source), set()) == shares[source]
    assert not came


@pytest.mark.parametrize("order", [Order.ZIGZAG, Order.STRIPED])
@pytest.mark.parametrize("world", [2, 4, 8])
@pytest.mark.parametrize("group", [1, 2, 4, 8])
@pytest.mark.parametrize("causal", [False, True])
def test_bytes_are_the_formulas(world: int, order: Order, group: int, causal: bool) -> None:
    """In units of M, all queries; keys and values are M/group each; equal dtypes.

    Forward 2(P-1)/group. Backward with keys and values on their way 4(P-1)/group, with queries
    3(P-1) and two statistics a row: each a hop less than the literature's, as own shares stay.
    Of a causal sequence the last piece's keys (in stripes, the last token's) and the first one's
    queries are of use to their own rank alone.
    """
    m, heads, dim = 64 * world, 8, 16
    row, kv = heads * dim, heads // group * dim
    ring = Ring(m, world, order, causal, (0, m), 2 * kv, 2 * kv, 2 * row + 2 * heads, row)
    sent = {
        half: sum(
            op.sizes[0] for rank in range(world) for op in comms(ring, rank, *travels_of(half))
        )
        for half in ("forward", "kv", "q")
    }
    stay = (m // (2 * world) if order is Order.ZIGZAG else 1) * causal
    hops = (world - 1) * (m - stay)
    assert sent["forward"] == 2 * hops * kv
    assert sent["kv"] == 4 * hops * kv
    assert sent["q"] == hops * (3 * row + 2 * heads)
    assert sent[cheapest(ring)] == min(sent["kv"], sent["q"])
    assert cheapest(ring) == ("q" if group == 1 else "kv")
    if group == 1:
        assert sent["q"] < 0.8 * sent["kv"]


@pytest.mark.parametrize(("nodes", "node"), [(2, 2), (2, 4), (4, 2), (3, 3)])
@pytest.mark.parametrize("half", ["forward", "kv", "q"])
def test_the_double_ring_crosses_nodes_once(nodes: int, node: int, half: str) -> None:
    world = nodes * node
    m = 64 * world

    def crossing(node_ranks: int) -> tuple[int, int]:
        ring = Ring(m, world, Order.ZIGZAG, False, (0, m), 1, 1, 1, 1, node_ranks)
        ops = [op for rank in range(world) for op in comms(ring, rank, *travels_of(half))]
        across = [op for op in ops if op.ranks[0] // node != op.ranks[1] // node]
        return sum(op.sizes[0] for op in across), sum(op.sizes[0] for op in ops)

    double, flat = crossing(node), crossing(0)
    assert double[0] * (world - 1) == flat[0] * node * (nodes - 1)
    assert half != "forward" or double[1] == flat[1]


def test_nodes_must_be_whole() -> None:
    with pytest.raises(LayoutError, match="no whole nodes of 3"):
        Ring(8, 4, Order.ZIGZAG, True, (0, 8), 1, 1, node_ranks=3)


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
    # The last 1023 tokens' keys go one hop, and their gradients one hop home.
    assert sent == 7 * 1023 * 2


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
