"""The table of layout changes: its bytes, its chains over two axes, its gradients, its heads."""

from itertools import pairwise, product
from math import prod

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from layouts import layouts
from torch.distributed.tensor import Partial, Replicate, Shard

from longspan.errors import LayoutError
from longspan.layout import Layout, positions
from longspan.schedule.ops import Comm
from longspan.schedule.step import Slices
from longspan.schedule.switch import backward, head_placements, local_shape, steps, transition

R, P = Replicate(), Partial()
SHAPE = (8, 12, 4)
M = prod(SHAPE) * 4


def on(*placements: object, order: str = "contiguous") -> Layout:
    return Layout(dict(zip("ab", placements, strict=False)), order)  # type: ignore[arg-type]


def bytes_of(src: Layout, dst: Layout, *sizes: int, shape: tuple[int, ...] = SHAPE) -> int:
    """Bytes that all ranks send."""
    axes = dict(zip("ab", sizes, strict=False))
    comms = transition(src, dst, shape, torch.float32, axes)
    return sum(comm.sent_bytes(rank) for comm in comms for rank in comm.ranks)


@pytest.mark.parametrize(
    ("before", "after", "kinds", "rank_bytes"),
    [
        (R, R, [], 0),
        (P, P, [], 0),
        (R, Shard(1), [], 0),
        (R, P, [], 0),
        (Shard(0), P, [], 0),
        (Shard(0), Shard(1), ["all_to_all"], M * 3 // 16),
        (Shard(0), Shard(0), [], 0),
        (Shard(1), R, ["all_gather"], M * 3 // 4),
        (P, Shard(2), ["reduce_scatter"], M * 3 // 4),
        (P, R, ["reduce_scatter", "all_gather"], M * 3 // 2),
    ],
)
def test_each_row_of_even_shards(
    before: object, after: object, kinds: list[str], rank_bytes: int
) -> None:
    comms = transition(on(before), on(after), SHAPE, torch.float32, {"a": 4}, (3, 5, 7, 9))
    assert [comm.kind for comm in comms] == kinds
    assert all(comm.ranks == (3, 5, 7, 9) for comm in comms)
    for rank in (3, 5, 7, 9):
        assert sum(comm.sent_bytes(rank) for comm in comms) == rank_bytes


def test_seven_frames_on_four_ranks() -> None:
    (comm,) = transition(on(Shard(0)), on(Shard(1)), (7, 3, 5), torch.bfloat16, {"a": 4})
    # 2, 2, 2 and 1 frames; 1, 1, 1 and 0 rows of 5 numbers of 2 bytes.
    assert comm == Comm("all_to_all", (0, 1, 2, 3), (20, 20, 20, 0) * 3 + (10, 10, 10, 0))


def test_reordering_sends_only_what_changes_its_rank() -> None:
    before, after = on(Shard(0)), on(Shard(0), order="zigzag")
    (comm,) = transition(before, after, (13, 2), torch.int8, {"a": 3})
    held = [
        [set(positions(13, r, 3, side.order).tolist()) for r in range(3)]
        for side in (before, after)
    ]
    expected = [2 * len(a & b) for a, b in product(*held)]
    assert comm == Comm("all_to_all", (0, 1, 2), tuple(expected))


def test_a_space_time_pair_against_ulysses_and_megatron() -> None:
    space, time = on(Shard(0)), on(Shard(1))
    pair = bytes_of(space, time, 4) + bytes_of(time, space, 4)
    assert pair == 2 * M * 3 // 4
    assert pair <= 0.5 * 4 * bytes_of(space, on(Shard(2)), 4)  # q, k, v and out by heads
    # Megatron: a gather and a reduce-scatter round each attention and each MLP of a block.
    assert pair <= 0.1 * 4 * (bytes_of(space, on(R), 4) + bytes_of(on(P), space, 4))


def test_chains_over_two_axes() -> None:
    # Axes that trade dims go over a third one: cheaper than a gather.
    assert bytes_of(on(Shard(0), Shard(1)), on(Shard(1), Shard(0)), 2, 2) == 3 * M // 2
    no_third = bytes_of(on(Shard(0), Shard(1)), on(Shard(1), Shard(0)), 2, 2, shape=(8, 48))
    assert no_third == 2 * M  # one axis gathers, the other switches
    # An inner axis can't stay where it is while the outer one leaves its dim.
    axes = {"a": 2, "b": 2}
    chain = steps(on(Shard(0), Shard(0)), on(R, Shard(0)), SHAPE, axes, (0, 0))
    assert [step.axis for step in chain] == ["b", "a", "b"]
    # An all-reduce over one axis costs less if the other one, where all hold the same, shares it.
    whole = 16 * 24 * 4
    shared = bytes_of(on(P, R), on(R, R), 4, 4, shape=(16, 24))
    assert shared == 16 * (2 * whole // 4 + whole) * 3 // 4  # of a quarter, then gathered
    assert shared < 16 * 2 * whole * 3 // 4


@settings(max_examples=100)
@given(st.data(), st.lists(st.integers(0, 9), min_size=1, max_size=3))
def test_a_chain_is_never_dearer_than_going_through_the_whole(
    data: st.DataObject, shape: list[int]
) -> None:
    src, dst = (data.draw(layouts(len(shape), "ab")) for _ in range(2))
    axes = {"a": data.draw(st.integers(1, 3)), "b": data.draw(st.integers(1, 3))}

    def load(*way: Layout) -> int:
        """Bytes that the most loaded rank sends, step by step, of which the chain is least."""
        total = 0
        for before, after in pairwise(way):
            each: dict[tuple[str, int], int] = {}
            for at in product(*map(range, axes.values())):
                for place, step in enumerate(steps(before, after, shape, axes, at)):
                    comms = step.comms(tuple(range(step.world)), 1)
                    most = sum(max(map(c.sent_bytes, c.ranks)) for c in comms)
                    each[step.axis, place] = max(each.get((step.axis, place), 0), most)
            total += sum(each.values())
        return total

    assert load(src, dst) <= load(src, Layout(), dst)
    chain = {at: steps(src, dst, shape, axes, at) for at in product(*map(range, axes.values()))}
    for at, found in chain.items():
        held = local_shape(src, shape, axes, at)
        for step in found:
            rank = at[list(axes).index(step.axis)]
            assert held == step.shape(step.before, rank)
            held = step.shape(step.after, rank)
        assert held == local_shape(dst, shape, axes, at)


@pytest.mark.parametrize(
    ("src", "dst", "grad", "comes", "leaves"),
    [
        (R, Shard(1), R, Shard(1), R),
        (R, Shard(1), P, Shard(1), P),
        (Shard(1), R, R, R, Shard(1)),
        (Shard(1), R, P, P, Shard(1)),
        (Shard(0), Shard(1), R, Shard(1), Shard(0)),
        (P, R, R, R, R),
        (P, R, P, P, R),
        (P, Shard(0), R, Shard(0), R),
        (R, P, R, R, R),
        (R, P, P, R, P),
        (Shard(0), P, R, R, Shard(0)),
        (R, R, P, P, R),
    ],
)
def test_the_gradients_way(
    src: object, dst: object, grad: object, comes: object, leaves: object
) -> None:
    way = backward(on(src), on(dst), {"a": grad})  # type: ignore[dict-item]
    assert [side.placements.get("a", R) for side in way] == [comes, leaves]


def test_a_gradient_that_nothing_sums_stays_a_part_of_the_sum() -> None:
    comes, leaves = backward(on(Shard(0), R), on(Shard(1), R), {"a": P, "b": P}, sums=False)
    assert [side.placements["b"] for side in (comes, leaves)] == [P, P]
    assert [side.placements["a"] for side in (comes, leaves)] == [Shard(1), Shard(0)]


@given(st.integers(1, 16), st.integers(1, 6), st.integers(1, 8))
def test_heads(kv_heads: int, group: int, world: int) -> None:
    heads = kv_heads * group
    q, kv = head_placements(1, heads, kv_heads, world)
    assert q == Shard(1)
    for rank in range(world):
        own = positions(heads, rank, world, "contiguous").tolist()
        needed = sorted({head // group for head in own})
        if isinstance(kv, Slices):
            assert list(range(*kv.ranges[rank])) == needed
        else:
            assert positions(kv_heads, rank, world, "contiguous").tolist() == needed
    if kv_heads % world == 0:
        assert kv == Shard(1)


def test_what_is_refused() -> None:
    for src, dst, shape, match in (
        (on(Shard(3)), on(R), SHAPE, "a tensor with 3 dims"),
        (on(Partial("avg")), on(R), SHAPE, "only Partial"),
        (Layout({"x": Shard(0)}), on(R), SHAPE, "axis 'x' changes"),
        (on(Slices(0, ((0, 1), (0, 1)))), on(R), SHAPE, "no way from"),
        (on(Slices(0, ((0, 1),))), on(Shard(1)), SHAPE, "2 ranks, Slices 1"),
        (on(Slices(0, ((0, 1), (0, 9)))), on(Shard(1)), SHAPE, "which has 8"),
    ):
        with pytest.raises(LayoutError, match=match):
            transition(src, dst, shape, torch.float32, {"a": 2})
    with pytest.raises(LayoutError, match="2 ranks given for a mesh of 4"):
        transition(on(R), on(R), SHAPE, torch.float32, {"a": 4}, (0, 1))
    with pytest.raises(LayoutError, match="can't share"):
        head_placements(1, 6, 4, 2)
    with pytest.raises(LayoutError, match="grad must be"):
        backward(on(R), on(R), {"a": Shard(0)})
