"""The planner's choice of attention: what it foretells is what is sent, and what is simulated."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ranks import Ranks
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

import longspan
from longspan.cluster.fabric import Link
from longspan.cluster.ring import predict_ring
from longspan.cluster.simulate import simulate
from longspan.cluster.spec import Cluster, Device, uniform
from longspan.comm.counting import CountBytes
from longspan.comm.mesh import flat_group
from longspan.errors import ClusterError, LayoutError
from longspan.layout import Order
from longspan.planner.attention import (
    AttentionChoice,
    best_attention,
    plan_attention,
)
from longspan.planner.attention_price import Pricer, Way
from longspan.schedule.heads import HeadShares, trips
from longspan.schedule.ops import Compute, Task
from longspan.schedule.ring_tasks import AttentionKernels
from longspan.schedule.rounds import rounds

DEVICE = Device(memory_bytes=1, bytes_per_s=1e11, peak={"matmul": {"bfloat16": 1e13}})


def cluster(
    inside: float, between: float, devices: int = 2, nodes: int = 2, latency: float = 0,
    device: Device = DEVICE,
) -> Cluster:  # fmt: skip
    links = (Link(latency_s=latency, bytes_per_s=rate) for rate in (inside, between))
    link, network = links
    return uniform(device, devices=devices, nodes=nodes, link=link, network=network)


def sent(mesh: DeviceMesh, choice: AttentionChoice, documents: tuple[int, ...], window: int | None,
         kernels: AttentionKernels) -> int:  # fmt: skip
    """Bytes that this rank sends when it does as it was told."""
    if len(choice.mesh) == 2:
        mesh = init_device_mesh("cpu", choice.mesh, mesh_dim_names=("inter", "intra"))
    own = len(longspan.positions(documents[-1], flat_group(mesh).rank(), 4, choice.order))
    q, k, v = (
        torch.randn(1, heads, own, kernels.head_dim, requires_grad=True)
        for heads in (kernels.heads, kernels.kv_heads, kernels.kv_heads)
    )
    with CountBytes() as count:
        out = longspan.attend(
            *(q, k, v),
            mesh=mesh,
            order=choice.order,
            inside=choice.inside,
            travels=choice.travels,
            parts=choice.parts,
            cu_seqlens=documents,
            window=window,
        )
        out.sum().backward()
    return count.total_sent


@settings(max_examples=5)
@given(
    st.lists(st.integers(1, 40), min_size=1, max_size=3),
    st.sampled_from([None, 1, 9]),
    st.sampled_from([1, 2, 3]),
    st.sampled_from([1, 2, 4]),
    st.sampled_from(list(Order)),
)
def test_what_is_foretold_is_sent(ranks: Ranks, lengths: list[int], window: int | None, kv: int,
                                  group: int, order: Order) -> None:  # fmt: skip
    kernels = AttentionKernels(kv * group, kv, 8, "float32", 4)
    documents = tuple(sum(lengths[:i]) for i in range(len(lengths) + 1))
    plan = plan_attention(
        uniform(
            Device(memory_bytes=1, bytes_per_s=1e11, peak={"matmul": {"float32": 1e13}}),
            devices=2,
            nodes=2,
            link=Link(latency_s=0, bytes_per_s=1e9),
            network=Link(latency_s=0, bytes_per_s=1e8),
        ),
        *(kernels, documents),
        orders=[order],
        window=window,
    )
    assert {choice.name for choice in plan} == {"flat ring", "double ring", "heads", "hybrid"}
    for choice in plan:
        counts = ranks.run(sent, choice, documents, window, kernels)
        assert max(counts) == choice.sent_bytes
        assert choice.between_nodes_bytes <= 2 * choice.sent_bytes


@settings(deadline=None, max_examples=20)
@given(
    st.integers(64, 4096),
    st.sampled_from([(1, 2), (2, 2), (4, 1), (2, 4)]),
    st.sampled_from(["zigzag", "striped"]),
    st.sampled_from([1e7, 1e9, 1e12]),
    st.sampled_from([1e7, 1e8, 1e12]),
    st.sampled_from([{}, {"message_s": 1e-4, "byte_s": 1e-11}]),
)
def test_a_ring_takes_what_the_simulator_says(
    length: int,
    shape: tuple[int, int],
    order: str,
    inside: float,
    between: float,
    taken: dict[str, float],
) -> None:
    """But for moments in which ranks run apart; keys and values travel in backward, too."""
    nodes, devices = shape
    where = cluster(inside, between, devices, nodes, device=DEVICE.model_copy(update=taken))
    kernels = AttentionKernels(8, 2, 64)
    plan = plan_attention(where, kernels, (0, length), orders=[order])
    flat = next(choice for choice in plan if choice.name == "flat ring")
    assert flat.travels == "kv"
    played = predict_ring(where, kernels, length, order, parts=flat.parts).seconds
    assert flat.seconds == pytest.approx(played, rel=0.3)


def test_the_link_and_the_heads_decide() -> None:
    many, few = AttentionKernels(32, 32, 128), AttentionKernels(32, 4, 128)
    # Where sending is all that counts: a head exchange sends each thing once, but queries, too.
    slow = cluster(1e11, 1e8, 4, 2)
    assert plan_attention(slow, many, (0, 4096))[0].name == "heads"
    assert plan_attention(slow, few, (0, 4096))[0].name in ("double ring", "hybrid")
    # Where computing is: what is sent in a ring costs nothing, and fewer bytes are better still.
    fast = cluster(1e13, 1e13, 4, 2)
    plan = plan_attention(fast, few, (0, 65536))
    alike = [choice for choice in plan if choice.seconds <= 1.05 * min(c.seconds for c in plan)]
    assert plan[: len(alike)] == sorted(alike, key=lambda c: (c.between_nodes_bytes, c.seconds))
    # Every message has its price: an exchange has four for each of the others, a ring more.
    far = cluster(1e13, 1e13, 4, 2, latency=1e-2)
    assert plan_attention(far, many, (0, 512))[0].name == "heads"


def test_hidden_sends_are_not_free() -> None:
    """Where they take from computing, a ring takes what its messages and bytes do, too."""
    kernels, choices = AttentionKernels(8, 8, 64), []
    for taken in ({}, {"message_s": 1e-3}, {"byte_s": 1e-9}):
        where = cluster(1e12, 1e12, device=DEVICE.model_copy(update=taken))
        plan = plan_attention(where, kernels, (0, 4096))
        choices.append({choice.name: choice for choice in plan})
    free, by_message, by_byte = (one["flat ring"] for one in choices)
    # 3 hops, in one part: keys and values both ways, then queries and gradients, in and out.
    assert by_message.seconds - free.seconds == pytest.approx(3 * 6e-3, rel=0.1)
    assert by_byte.seconds - free.seconds == pytest.approx(2e-9 * free.sent_bytes, rel=0.2)
    heads = [one["heads"].seconds for one in choices]
    assert heads[1] - heads[0] == pytest.approx(4 * 6e-3, rel=0.01)


def test_a_window_goes_with_contiguous_order() -> None:
    where = cluster(1e9, 1e8, 4, 2)
    kernels = AttentionKernels(8, 8, 64)
    plan = plan_attention(where, kernels, (0, 8192), orders=list(Order), window=512)
    ring = next(choice for choice in plan if choice.name in ("flat ring", "double ring"))
    assert ring.order is Order.CONTIGUOUS
    full = plan_attention(where, kernels, (0, 8192), orders=list(Order))
    assert full[0].order is not Order.CONTIGUOUS or full[0].name == "heads"


@pytest.mark.parametrize("kernels", [AttentionKernels(32, 32, 64), AttentionKernels(32, 4, 64)])
@pytest.mark.parametrize("order", ["zigzag", "striped"])
def test_alike_rounds_are_the_rounds(kernels: AttentionKernels, order: str) -> None:
    """What many ranks are priced by, on few."""
    where = cluster(1e10, 1e9, 4, 2)
    pricer = Pricer(where, tuple(range(8)), kernels, (0, 8192), Order(order), True, None)
    for way in (Way("flat ring", 8, 1), Way("double ring", 8, 1, 4), Way("hybrid", 4, 2)):
        for backward in (False, True):
            which = (way, backward, pricer.travels(way) if backward else "kv")
            exact, alike = pricer.by_round(*which), pricer.alike_rounds(*which)
            # Striped rounds are of triangles, whose kernels are dearer than squares.
            computed = [sum(step.computed for step in steps) for steps in (exact, alike)]
            assert computed[1] == pytest.approx(computed[0], rel=0.3)
            for one, other in zip(exact, alike, strict=True):
                assert one.needs == other.needs
                # The end of a sequence is no other rank's need; alike rounds send it all the same.
                for kind, sends in one.sends.items():
                    found = [sum(s.bytes for s in some) for some in (sends, other.sends[kind])]
                    assert found[0] == pytest.approx(found[1], rel=0.15)


def test_a_group_of_any_ranks() -> None:
    where = cluster(1e10, 1e9, 4, 2)
    kernels = AttentionKernels(16, 4, 64)
    alone = best_attention(where, kernels, 4096, [5])
    assert (alone.name, alone.mesh, alone.sent_bytes) == ("flat ring", (1,), 0)
    names = {c.name for c in plan_attention(where, kernels, (0, 4096), ranks=[0, 1, 2, 4])}
    assert names == {"flat ring", "heads"}  # a node with three of them and one with one
    four = plan_attention(where, kernels, (0, 4096), ranks=[2, 3, 6, 7])
    assert {c.mesh for c in four} == {(4,), (2, 2)}
    inside = best_attention(where, kernels, 4096, [4, 5, 6, 7])
    assert inside.between_nodes_bytes == 0
    assert inside.seconds < min(c.seconds for c in four)
    for wrong in ([], [0, 8], [1, 1]):
        with pytest.raises(ClusterError, match="ranks"):
            plan_attention(where, kernels, (0, 4096), ranks=wrong)
    with pytest.raises(LayoutError, match="unknown order"):
        plan_attention(where, kernels, (0, 4096), orders=["snake"])


def test_many_ranks_are_priced_too() -> None:
    where = cluster(1e11, 1e10, 8, 8)
    plan = plan_attention(where, AttentionKernels(32, 8, 128), (0, 32768))
    assert {c.mesh for c in plan} == {(64,), (8, 8), (16, 4), (32, 2)}
    ring = next(c for c in plan if c.name == "flat ring")
    # Keys and values twice and their float32 gradients once visit 63 others.
    assert ring.sent_bytes == 63 * 512 * 2 * 8 * 128 * (2 + 2 + 4)


def test_parts_hide_what_is_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where computing takes as long as sending, a step takes little more than either."""
    kernels = AttentionKernels(8, 8, 64)
    quick = Device(memory_bytes=1, bytes_per_s=1e18, peak={"matmul": {"bfloat16": 1e20}})

    def seconds(between: float, device: Device = DEVICE) -> float:
        link, network = (Link(latency_s=0, bytes_per_s=rate) for rate in (1e12, between))
        where = uniform(device, devices=2, nodes=2, link=link, network=network)
        plan = plan_attention(where, kernels, (0, 32768))
        return next(choice.seconds for choice in plan if choice.name == "double ring")

    alone = seconds(1e15)
    between = 1e9 * seconds(1e9, quick) / alone
    assert seconds(between, quick) == pytest.approx(alone, rel=0.01)
    assert alone < seconds(between) < 1.2 * alone
    monkeypatch.setattr("longspan.schedule.ring._TURNS", 1)
    assert seconds(between) > 1.4 * alone


def played(pricer: Pricer, way: Way, backward: bool) -> float:
    """Seconds of the same parts in the simulator."""
    world, kernels = way.width, pricer.kernels
    size = kernels.head_dim * kernels.dtype_bytes
    shares = HeadShares(kernels.heads, kernels.kv_heads, world, way.parts)
    counts = [pricer.documents[-1] // world] * world
    every = trips(shares, counts, size, 2 * size, range(world), backward)
    own = replace(kernels, heads=kernels.heads // world, kv_heads=max(1, kernels.kv_heads // world))
    (turn,) = rounds(own.ring(pricer.documents[-1], 1, pricer.order), 0, backward)
    work = [op for _, op in own.attend(turn, True, backward)]
    schedules = []
    for _ in range(world):
        tasks = [Task(there, "wire") for there, _ in every]
        for part, (there, home) in enumerate(every):
            moved = 4 * (sum(there.sizes) + sum(home.sizes)) / world
            ops = [
                replace(op, flops=op.flops / way.parts, bytes=op.bytes / way.parts) for op in work
            ]
            for op in [*ops, Compute("elementwise", 0, moved, kernels.dtype)]:
                tasks.append(Task(op, after=(part,)))
            tasks.append(Task(home, "wire", after=(len(tasks) - 1,)))
        schedules.append(tasks)
    return simulate(schedules, pricer.cluster).seconds


@settings(deadline=None, max_examples=30)
@given(
    st.sampled_from([(16, 16), (16, 4), (16, 2), (32, 8)]),
    st.sampled_from([1e6, 1e8, 1e10]),
    st.sampled_from([0.0, 1e-4]),
    st.sampled_from([1024, 8192]),
    st.booleans(),
)
def test_heads_in_parts_take_what_the_simulator_says(
    heads: tuple[int, int], rate: float, latency: float, length: int, handles: bool
) -> None:
    taken = {"message_s": 1e-5, "byte_s": 0.2 / rate} if handles else {}
    device = DEVICE.model_copy(update=taken)
    where = cluster(rate, rate, latency=latency, device=device)
    kernels = AttentionKernels(*heads, 64)
    pricer = Pricer(where, (0, 1, 2, 3), kernels, (0, length), Order.ZIGZAG, True, None)
    for parts in pricer.cuts(Way("heads", 1, 4)):
        way = Way("heads", 1, 4, parts=parts)
        for backward in (False, True):
            priced = pricer.seconds(way, backward, pricer.ring(way, backward, "kv"))
            # What is sent may take from another part's computing than was thought.
            close = 0.2 if handles and parts > 1 else 1e-6
            assert priced.seconds == pytest.approx(played(pricer, way, backward), rel=close)


def test_heads_go_in_parts_where_that_pays() -> None:
    """While one is computed another crosses; where latency is all there is, they go as one."""
    kernels = AttentionKernels(32, 32, 64)

    def heads(rate: float, latency: float) -> AttentionChoice:
        plan = plan_attention(cluster(rate, rate, latency=latency), kernels, (0, 32768))
        return next(choice for choice in plan if choice.name == "heads")

    computed = heads(1e15, 0).seconds
    balanced = 1e8 * heads(1e8, 0).seconds / computed  # sending takes as long, about
    both = heads(balanced, 0)
    assert both.parts > 1
    assert computed < both.seconds < 1.45 * computed
    assert heads(balanced, 1.0).parts == 1


def test_rings_go_in_parts_where_that_pays() -> None:
    """A slow link's messages pass while another part is computed; dear ones go as one."""
    kernels = AttentionKernels(8, 8, 64)

    def parts(message_s: float) -> set[int]:
        where = cluster(1e11, 2e9, device=DEVICE.model_copy(update={"message_s": message_s}))
        plan = plan_attention(where, kernels, (0, 8192))
        return {choice.parts for choice in plan if choice.name in ("flat ring", "double ring")}

    assert max(parts(0.0)) > 1
    assert parts(0.05) == {1}
