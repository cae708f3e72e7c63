"""Ring attention as tasks: they send what the ring sends, and take what arithmetic says."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from longspan.cluster.fabric import Link
from longspan.cluster.ring import predict_ring
from longspan.cluster.spec import Cluster, Device, uniform
from longspan.errors import ClusterError, ConfigError, LayoutError
from longspan.layout import Order
from longspan.schedule.ops import Comm, Compute
from longspan.schedule.ring_tasks import AttentionKernels, ring_tasks
from longspan.schedule.rounds import comms, rounds

KERNELS = AttentionKernels(4, 2, 8)


def cluster(bytes_per_s: float, devices: int = 4, nodes: int = 2) -> Cluster:
    """Attention at 1 Gflop/s, passes over memory for nothing."""
    device = Device(memory_bytes=1, bytes_per_s=1e30, peak={"matmul": {"bfloat16": 1e9}})
    link = Link(latency_s=0, bytes_per_s=bytes_per_s)
    return uniform(device, devices=devices, nodes=nodes, link=link, network=link)


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 300), st.integers(1, 7), st.sampled_from(list(Order)), st.booleans())
def test_tasks_are_the_rings(length: int, world: int, order: Order, backward: bool) -> None:
    ring = KERNELS.ring(length, world, order)
    for rank in range(world):
        tasks = ring_tasks(ring, rank, KERNELS, backward=backward)
        sent = [task.op for task in tasks if isinstance(task.op, Comm) and task.op.ranks[0] == rank]
        both = (False, True) if backward else (False,)
        assert sent == [op for half in both for op in comms(ring, rank, half)]
        flops = sum(task.op.flops for task in tasks if isinstance(task.op, Compute))
        pairs = sum(block.pairs for turn in rounds(ring, rank) for block in turn.blocks)
        assert flops == pytest.approx((3.5 if backward else 1) * 4 * 4 * 8 * pairs)


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 300), st.integers(1, 8), st.sampled_from(list(Order)))
def test_over_fast_links_the_busiest_rank_sets_the_time(
    length: int, world: int, order: Order
) -> None:
    """As every round waits for keys only, and they are there at once."""
    one = predict_ring(cluster(1e30), KERNELS, length, order, world)
    pairs = length * (length + 1) / 2 / world * one.imbalance
    assert one.seconds == pytest.approx(3.5 * 4 * 4 * 8 * pairs / 1e9, rel=1e-6)
    assert max(one.utilisation) == pytest.approx(1)


def test_over_slow_links_the_bytes_do() -> None:
    one = predict_ring(cluster(1e3), KERNELS, 256, Order.ZIGZAG)
    name, share = one.busiest_pipe
    assert share > 0.9 and name.startswith(("device", "node"))
    # Keys and values visit 7 ranks twice, their float32 gradients 7 once; not the last piece's.
    assert one.sent_bytes == 7 * (256 - 16) * 2 * 2 * 8 * (2 + 2 + 4)
    assert 0 < one.between_nodes_bytes < one.sent_bytes
    inside = predict_ring(cluster(1e3), KERNELS, 256, Order.ZIGZAG, 4)
    assert inside.between_nodes_bytes == 0
    alone = predict_ring(cluster(1e3), KERNELS, 256, Order.ZIGZAG, 1)
    assert alone.sent_bytes == 0 and alone.busiest_pipe == ("", 0.0)


def test_impossible_sizes_are_refused() -> None:
    with pytest.raises(ClusterError, match="9 ranks on a cluster of 8"):
        predict_ring(cluster(1), KERNELS, 256, "zigzag", 9)
    with pytest.raises(ClusterError, match="0 ranks"):
        predict_ring(cluster(1), KERNELS, 256, "zigzag", 0)
    with pytest.raises(ConfigError, match="0 tokens"):
        predict_ring(cluster(1), KERNELS, 0, "zigzag")
    with pytest.raises(LayoutError, match="unknown order 'snake'"):
        predict_ring(cluster(1), KERNELS, 256, "snake")
    with pytest.raises(ConfigError, match="multiple of the KV heads"):
        AttentionKernels(4, 3, 8)
