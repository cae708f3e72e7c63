"""Layouts and orders."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.distributed.tensor import Shard

from longspan.errors import LayoutError
from longspan.layout import Layout, Order, local_length, positions, runs

orders = st.sampled_from(list(Order))


@given(st.integers(0, 200), st.integers(1, 9), orders)
def test_every_token_is_on_one_rank(length: int, world: int, order: Order) -> None:
    shards = [positions(length, rank, world, order) for rank in range(world)]
    assert torch.cat(shards).sort().values.tolist() == list(range(length))
    assert all(shard.dtype == torch.long for shard in shards)
    assert all(shard.tolist() == sorted(shard.tolist()) for shard in shards)
    counts = [len(shard) for shard in shards]
    assert max(counts) - min(counts) <= 1
    assert counts == [local_length(length, rank, world, order) for rank in range(world)]


@given(st.integers(0, 200), st.integers(1, 9), orders)
def test_runs_are_the_positions(length: int, world: int, order: Order) -> None:
    for rank in range(world):
        found = positions(length, rank, world, order).tolist()
        for run in runs(length, rank, world, order):
            there = found[run.local : run.local + run.count]
            assert there == list(range(run.start, run.start + run.count * run.stride, run.stride))


def test_the_three_orders() -> None:
    assert positions(8, 0, 2, "contiguous").tolist() == [0, 1, 2, 3]
    assert positions(8, 0, 2, "zigzag").tolist() == [0, 1, 6, 7]
    assert positions(8, 1, 2, Order.STRIPED).tolist() == [1, 3, 5, 7]
    assert positions(1, 3, 4, "zigzag").tolist() == []


def test_what_is_refused() -> None:
    with pytest.raises(LayoutError, match="unknown order 'spiral': use one of contiguous"):
        positions(8, 0, 2, "spiral")
    with pytest.raises(LayoutError, match="rank 2 is not one of 2 ranks"):
        positions(8, 2, 2, "zigzag")
    with pytest.raises(LayoutError, match="-1 tokens"):
        positions(-1, 0, 2, "zigzag")
    with pytest.raises(LayoutError, match="end at the sequence's 8 tokens"):
        positions(8, 0, 2, "balanced", (0, 3, 9))
    with pytest.raises(LayoutError, match="knows no documents"):
        Layout({"sp": Shard(1)}, Order.BALANCED)
    with pytest.raises(LayoutError, match="not a torch Placement"):
        Layout({"sp": 1})  # type: ignore[dict-item]


def test_a_layout_is_a_value() -> None:
    assert Layout({"sp": Shard(1)}, "zigzag") == Layout({"sp": Shard(1)}, Order.ZIGZAG)  # type: ignore[arg-type]
