"""Exchanges, rings, words and stopwatches on real ranks."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ranks import Ranks
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from longspan.comm.agree import all_words, first_words
from longspan.comm.counting import CountBytes
from longspan.comm.exchange import exchange
from longspan.comm.measure import Stopwatch
from longspan.comm.rings import ring_all_gather, ring_reduce_scatter, use_rings
from longspan.schedule.ops import Comm


def exchanged(mesh: DeviceMesh, table: list[list[int]]) -> tuple[int, int]:
    """Rank i sends table[i][j] numbers, all 100·i+j, to rank j; returns bytes sent and promised."""
    group = mesh.get_group()
    here, world = group.rank(), group.size()
    sent = torch.cat([torch.full((table[here][j],), 100.0 * here + j) for j in range(world)])
    sizes = [table[i][here] for i in range(world)]
    received = torch.full((sum(sizes),), -1.0)
    with CountBytes() as count:
        exchange(received, sent, sizes, table[here][:world], group).wait()
    expected = torch.cat([torch.full((table[i][here],), 100.0 * i + here) for i in range(world)])
    assert torch.equal(received, expected)
    flat = tuple(4 * size for row in table[:world] for size in row[:world])
    op = Comm("all_to_all", tuple(range(world)), flat)
    return count.total_sent, op.sent_bytes(here)


@settings(max_examples=30)
@given(st.lists(st.lists(st.integers(0, 5), min_size=4, max_size=4), min_size=4, max_size=4),
       st.integers(1, 4))  # fmt: skip
def test_exchange(ranks: Ranks, table: list[list[int]], world: int) -> None:
    for sent, promised in ranks.run(exchanged, table, world=world):
        assert sent == promised


def ringed(mesh: DeviceMesh, sizes: list[int]) -> None:
    group = mesh.get_group()
    here, world = group.rank(), group.size()
    sizes = sizes[:world]
    parts = [torch.full((size,), float(i) if i == here else -1.0) for i, size in enumerate(sizes)]
    with CountBytes() as count:
        ring_all_gather(parts, group)
    for i, size in enumerate(sizes):
        assert torch.equal(parts[i], torch.full((size,), float(i)))
    assert count.total_sent == 4 * (sum(sizes) - sizes[(here + 1) % world])

    own = [torch.full((size,), 10.0**here) for size in sizes]
    with CountBytes() as count:
        total = ring_reduce_scatter(own, group)
    assert torch.equal(total, torch.full((sizes[here],), sum(10.0**i for i in range(world))))
    assert count.total_sent == 4 * (sum(sizes) - sizes[here])


@settings(max_examples=20)
@given(st.lists(st.integers(0, 6), min_size=4, max_size=4), st.integers(1, 4))
def test_rings(ranks: Ranks, sizes: list[int], world: int) -> None:
    ranks.run(ringed, sizes, world=world)


def sharded_step(mesh: DeviceMesh, rings: bool) -> list[torch.Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 3))
    for layer in model:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    for module in model.modules():
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)
    if rings:
        use_rings(model)
    torch.manual_seed(mesh.get_local_rank())
    model(torch.randn(4, 5)).square().sum().backward()
    grads = [p.grad for p in model.parameters()]
    return [g.full_tensor() if isinstance(g, DTensor) else g for g in grads]


def test_fsdp_on_rings(ranks: Ranks) -> None:
    for plain, ring in zip(
        ranks.run(sharded_step, False), ranks.run(sharded_step, True), strict=True
    ):
        for a, b in zip(plain, ring, strict=True):
            assert torch.allclose(a, b, rtol=1e-6, atol=1e-6)


def words(mesh: DeviceMesh, said: list[str]) -> tuple[str, list[str]]:
    own = said[mesh.get_local_rank()]
    return first_words(own), all_words(own)


def test_words(ranks: Ranks) -> None:
    said = ["", "", "the disk of rank 2 is full: 満杯", "x" * 5000]
    for first, everyone in ranks.run(words, said):
        assert first == said[2]
        assert everyone == [*said[:3], "x" * 1024]


def timed(mesh: DeviceMesh) -> list[float]:
    watch = Stopwatch(torch.device("cpu"))
    world = (0, 1, 2, 3)
    ops = [
        [Comm("send", (2, 1), (1000,)), Comm("send", (0, 3), (10,))],
        [Comm("broadcast", world, (1001,))],
        [Comm("all_reduce", (0, 2), (1000,)), Comm("all_reduce", (1, 3), (8,))],
        [Comm("all_gather", (1, 2, 3), (4, 8, 0))],
        [Comm("reduce_scatter", world, (4, 8, 12, 16))],
        [Comm("all_to_all", (0, 3), (1, 2, 3, 4))],
    ]
    seconds = [second for some in ops for second in watch.time(some, repeats=2, inner=2)]
    seconds += watch.ping(3, 1, repeats=2, inner=2)
    seconds += watch.compute(lambda: None, repeats=1, least_s=0.001)
    return seconds


def test_stopwatch_runs_every_kind(ranks: Ranks) -> None:
    for seconds in ranks.run(timed):
        assert len(seconds) == 15 and all(0 < second < 10 for second in seconds)
