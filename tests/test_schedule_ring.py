"""The ring's schedule, against masks written out and formulas."""

from collections import Counter
from dataclasses import replace
from itertools import accumulate

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from longspan.errors import LayoutError
from longspan.layout import Order, positions
from longspan.schedule.ops import Comm
from longspan.schedule.ring import Ring, imbalance
from longspan.schedule.rounds import Round, Travels, cheapest, comms, rounds, travelling

rings = st.builds(
    lambda cuts, length, world, node, order, causal, window, kv, parts: Ring(
        length,
        world,
        order,
        causal,
        (0, *sorted(cut % (length + 1) for cut in cuts), length),
        kv_bytes=6 * parts,
        grad_bytes=10 * parts,
        q_bytes=7 * parts,
        dq_bytes=4 * parts,
        node_ranks=node if world % node == 0 else 0,
        window=window if causal else None,
        kv_documents=None if causal or kv is None else (0, *accumulate(kv[: len(cuts) + 1])),
        parts=parts,
    ),
    st.lists(st.integers(0, 60), max_size=5),
    st.integers(0, 60),
    st.integers(1, 8),
    st.integers(1, 4),
    st.sampled_from(list(Order)),
    st.booleans(),
    st.one_of(st.none(), st.integers(1, 60)),
    st.one_of(st.none(), st.lists(st.integers(0, 20), min_size=6, max_size=6)),
    st.integers(1, 4),
)


def key_documents(ring: Ring) -> tuple[int, ...]:
    return ring.documents if ring.kv_documents is None else ring.kv_documents


def visible(ring: Ring) -> np.ndarray:
    """Who sees whom, token by token."""
    both = (ring.documents, key_documents(ring))
    rows, columns = (np.arange(ends[-1]) for ends in both)
    of_row, of_column = (
        np.searchsorted(ends[1:], where, side="right")
        for ends, where in zip(both, (rows, columns), strict=True)
    )
    seen = of_row[:, None] == of_column[None]
    back = rows[:, None] - columns[None]
    reach = ring.length if ring.window is None else ring.window
    return seen & (back >= 0) & (back < reach) if ring.causal else seen


def held(ring: Ring, rank: int, source: int, travels: Travels, keys: bool) -> np.ndarray:
    """The positions of a rank's tokens that another has: those that travel, or its own."""
    ends = key_documents(ring) if keys else ring.documents
    own = positions(ends[-1], source, ring.world, ring.order, ends).numpy()
    if rank == source:
        return own
    spans = travelling(ring, source, travels)
    return np.concatenate([own[:0], *(own[start:stop] for start, stop in spans)])


def covered(ring: Ring, rank: int, turn: Round, travels: Travels) -> np.ndarray:
    """How often a round's blocks compute each pair."""
    seen = np.zeros((ring.length, key_documents(ring)[-1]), int)
    sources = (rank, turn.source) if travels == "kv" else (turn.source, rank)
    queries, keys = (
        held(ring, rank, source, travels, keys)
        for source, keys in zip(sources, (False, True), strict=True)
    )
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
    total = np.zeros((ring.parts, ring.length, key_documents(ring)[-1]), int)
    for rank in range(ring.world):
        for turn in rounds(ring, rank, True, travels):
            assert turn.parts == ring.parts
            total[turn.part] += covered(ring, rank, turn, travels)
    assert (total == visible(ring)).all()


@given(rings, halves)
def test_payloads_match_and_arrive_in_time(ring: Ring, half: str) -> None:
    backward, travels = travels_of(half)
    turns = [rounds(ring, rank, backward, travels) for rank in range(ring.world)]
    has = [{(rank, part) for part in range(ring.parts)} for rank in range(ring.world)]
    weight = (ring.kv_bytes if travels == "kv" else ring.q_bytes) // ring.parts
    for number in range(ring.world * ring.parts):
        now = [turn[number] for turn in turns]
        for rank, turn in enumerate(now):
            assert not turn.blocks or (turn.source, turn.part) in has[rank]
            assert turn.grads == () or backward
            for transfer in (*turn.payload, *turn.grads):
                other = transfer.receiver if transfer.sender == rank else transfer.sender
                assert transfer in (*now[other].payload, *now[other].grads)
                assert transfer.sender != transfer.receiver
            # A rank lets go of what it has computed with.
            for transfer in turn.payload:
                here = (transfer.source, transfer.part) == (turn.source, turn.part)
                assert transfer.sender != rank or here or transfer.source == rank
        for transfer in {t for turn in now for t in turn.payload}:
            assert (transfer.source, transfer.part) in has[transfer.sender]
            tokens = len(held(ring, transfer.receiver, transfer.source, travels, travels == "kv"))
            assert transfer.bytes == tokens * weight > 0
            assert (transfer.source, transfer.part) not in has[transfer.receiver]
            has[transfer.receiver].add((transfer.source, transfer.part))


@given(rings, st.sampled_from(["kv", "q"]))
def test_every_gradient_reaches_home_with_every_share(ring: Ring, travels: Travels) -> None:
    turns = [rounds(ring, rank, True, travels) for rank in range(ring.world)]
    sums: dict[tuple[int, int, int], set[int]] = {}
    came: dict[tuple[int, int, int], set[int]] = {}
    shares = {(rank, part): set[int]() for rank in range(ring.world) for part in range(ring.parts)}
    for number in range(ring.world * ring.parts):
        now = [turn[number] for turn in turns]
        for rank, turn in enumerate(now):
            key = (rank, turn.source, turn.part)
            if turn.blocks and turn.source != rank:
                sums[key] = {rank}
                shares[turn.source, turn.part].add(rank)
            # It adds what has come of this source before it sends the sum on.
            if turn.source != rank:
                sums.setdefault(key, set()).update(came.pop(key, ()))
            sent = [(t.source, t.part) for t in turn.grads if t.sender == rank]
            assert set(sent) <= {(turn.source, turn.part)}
        for transfer in sorted({t for turn in now for t in turn.grads}, key=str):
            moved = sums.pop((transfer.sender, transfer.source, transfer.part))
            there = came.setdefault((transfer.receiver, transfer.source, transfer.part), set())
            assert moved and not moved & there, "no share is counted twice"
            there |= moved
    for (source, part), added in shares.items():
        assert came.pop((source, source, part), set()) == added
    assert not came


@given(rings, halves)
def test_parts_send_the_same(ring: Ring, half: str) -> None:
    """From whom to whom, in all: only when is another matter."""

    def sent(ring: Ring) -> Counter[tuple[int, ...]]:
        found: Counter[tuple[int, ...]] = Counter()
        for rank in range(ring.world):
            for op in comms(ring, rank, *travels_of(half)):
                found[op.ranks] += op.sizes[0]
        return found

    assert sent(ring) == sent(replace(ring, parts=1))
    assert cheapest(ring) == cheapest(replace(ring, parts=1))


def test_as_many_parts_as_pay() -> None:
    def parts(kv_heads: int, world: int, token: int = 1 << 12, node: int = 1) -> int:
        ring = Ring(world << 9, world, Order.ZIGZAG, True, (0, world << 9), kv_heads * token, 0)
        return replace(ring, node_ranks=node).in_parts(kv_heads).parts

    # Two nodes' turns are two, so the heads are cut in four if they can be.
    assert [parts(kv_heads, 2) for kv_heads in (1, 2, 3, 4, 5, 6, 8)] == [1, 2, 3, 4, 1, 3, 4]
    assert [parts(8, world) for world in (1, 2, 3, 4, 7, 8, 9)] == [1, 4, 2, 2, 2, 1, 1]
    assert parts(8, 4, node=2) == 4 and parts(8, 4, node=4) == 1
    # As many as are asked for, if they are equal; but in one where nothing leaves a node.
    flat = Ring(1 << 10, 2, Order.ZIGZAG, True, (0, 1 << 10), 6, 6)
    assert [flat.in_parts(6, parts).parts for parts in (1, 3, 4, 9)] == [1, 3, 3, 6]
    assert replace(flat, world=1).in_parts(6, 3).parts == 1
    # What goes around in parts is worth kernels for every document in each.
    packed = replace(flat, length=1 << 14, documents=(0, 1 << 14), kv_bytes=6 << 7)
    assert packed.in_parts(6).parts == 3
    assert replace(packed, documents=tuple(range(0, 1 + (1 << 14), 1 << 8))).in_parts(6).parts == 1
    # No message is smaller than 128 KiB.
    assert [parts(8, 2, token) for token in (128, 63, 64)] == [4, 1, 2]
    with pytest.raises(LayoutError, match="3 equal parts"):
        Ring(8, 2, Order.ZIGZAG, True, (0, 8), 4, 4, parts=3)


def test_fewer_bytes_are_no_reason_for_uneven_work() -> None:
    # The first rank has the start of the long document, the second its end and all others.
    lengths = (2048, 188, 175, 171, 102, 78, 70, 51, 47, 40, 40)
    ends = (0, *accumulate(lengths))
    ring = Ring(ends[-1], 2, Order.BALANCED, True, ends, 32, 32, q_bytes=34, dq_bytes=16)
    assert cheapest(replace(ring, order=Order.ZIGZAG, documents=(0, ends[-1]))) == "q"
    assert cheapest(ring) == "kv"
    work = [sum(b.pairs for turn in rounds(ring, r, True) for b in turn.blocks) for r in range(2)]
    assert imbalance(work) <= 1.05


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
    with pytest.raises(LayoutError, match="not at all"):
        Ring(8, 2, Order.ZIGZAG, False, (0, 8), 1, 1, kv_documents=(0, 9), stop=3)


def test_comm_sent_bytes() -> None:
    assert Comm("send", (3, 5), (7,)).sent_bytes(3) == 7
    assert Comm("send", (3, 5), (7,)).sent_bytes(5) == 0
    assert Comm("send", (3, 5), (7,)).sent_bytes(4) == 0
    assert Comm("all_gather", (0, 1, 2), (4, 5, 6)).sent_bytes(1) == 9
    assert Comm("reduce_scatter", (0, 1, 2), (4, 5, 6)).sent_bytes(1) == 10
    assert Comm("all_reduce", (0, 1, 2, 3), (8,)).sent_bytes(2) == 12
    assert Comm("all_to_all", (0, 1), (1, 2, 3, 4)).sent_bytes(1) == 3
    assert Comm("broadcast", (4, 1, 2), (9,)).sent_bytes(4) == 18
