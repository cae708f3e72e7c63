"""What ops cost: closed forms on even clusters, slow shares on uneven ones, order of things."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from longspan.cluster.cost import demand, seconds, traffic
from longspan.cluster.fabric import Link
from longspan.cluster.spec import Cluster, Device, Node, Site, uniform
from longspan.errors import ClusterError
from longspan.schedule.ops import Comm, Compute

LAT, NET_LAT, FAR_LAT = 1e-5, 1e-3, 5e-2
RATE, NET, FAR = 1e9, 1e8, 1e7
DEVICE = Device(
    memory_bytes=1, bytes_per_s=1e10, overhead_s=1e-6, peak={"matmul": {"float32": 1e12}}
)


def cluster(devices: int = 2, nodes: int = 2, sites: int = 2, scale: float = 1.0) -> Cluster:
    return uniform(
        DEVICE,
        devices=devices,
        nodes=nodes,
        sites=sites,
        link=Link(latency_s=LAT, bytes_per_s=RATE * scale),
        network=Link(latency_s=NET_LAT, bytes_per_s=NET * scale),
        uplink=Link(latency_s=FAR_LAT, bytes_per_s=FAR * scale),
    )


S = 1_000_000


def test_inside_a_node_the_closed_forms_hold() -> None:
    one, n = cluster(devices=4), 4
    ranks = (0, 1, 2, 3)
    assert seconds(Comm("send", (0, 1), (S,)), one) == pytest.approx(LAT + S / RATE)
    assert seconds(Comm("all_reduce", ranks, (S,)), one) == pytest.approx(
        2 * (n - 1) * (LAT + S / n / RATE)
    )
    for kind in ("all_gather", "reduce_scatter"):
        assert seconds(Comm(kind, ranks, (S,) * n), one) == pytest.approx(
            (n - 1) * (LAT + S / RATE)
        )
    assert seconds(Comm("broadcast", ranks, (S,)), one) == pytest.approx((n - 1) * LAT + S / RATE)
    assert seconds(Comm("all_to_all", ranks, (S,) * n * n), one) == pytest.approx(
        LAT + (n - 1) * S / RATE
    )
    assert seconds(Comm("all_gather", (2,), (S,)), one) == 0


def test_a_message_waits_for_a_rank_that_computes() -> None:
    busy = Cluster(
        devices={"device": DEVICE.model_copy(update={"wait_s": 2e-3})}, sites=cluster().sites
    )
    for ranks, latency, rate in (
        ((0, 1), LAT, RATE),
        ((0, 2), NET_LAT, NET),
        ((0, 4), FAR_LAT, FAR),
    ):
        for size in (S, S / 100, 2 * 2e-3 * rate):
            op = Comm("send", ranks, (int(size),))
            assert seconds(op, busy) == pytest.approx(latency + max(2e-3, size / rate), rel=1e-3)
            assert seconds(op, busy.idle) == seconds(op, cluster())
    for size in (8, S // 100):
        ring = Comm("all_gather", (0, 1, 2, 3), (size,) * 4)
        idle = seconds(ring, cluster())
        wires = 3 * size / NET
        assert seconds(ring, busy) - idle == pytest.approx(3 * 2e-3 - wires)


def test_the_slowest_level_that_is_crossed_counts() -> None:
    here = cluster()
    assert seconds(Comm("send", (0, 2), (S,)), here) == pytest.approx(NET_LAT + S / NET)
    assert seconds(Comm("send", (0, 4), (S,)), here) == pytest.approx(FAR_LAT + S / FAR)
    # A ring over two nodes of two crosses the network twice, once each way.
    ring = Comm("all_gather", (0, 1, 2, 3), (S,) * 4)
    assert seconds(ring, here) == pytest.approx(2 * NET_LAT + LAT + 3 * S / NET)
    # Every rank sends half of its data to the other node, through one network.
    switch = Comm("all_to_all", (0, 1, 2, 3), (S,) * 16)
    assert seconds(switch, here) == pytest.approx(NET_LAT + 4 * S / NET)
    assert traffic([switch], here)["node 0 out"] == 4 * S
    # Ranks of two sites in turn make every hop a far one.
    bad, good = (0, 4, 1, 5), (0, 1, 4, 5)
    assert demand(Comm("all_reduce", bad, (S,)), here).transfer_s == pytest.approx(
        2 * demand(Comm("all_reduce", good, (S,)), here).transfer_s
    )


def test_directions_and_uneven_nodes() -> None:
    fast, slow = Link(latency_s=0, bytes_per_s=100), Link(latency_s=1, bytes_per_s=10)
    lopsided = Link(latency_s=0, bytes_per_s=20, in_bytes_per_s=50)
    nodes = tuple(Node(devices={"d": 1}, network=link) for link in (fast, slow, lopsided, fast))
    here = Cluster(devices={"d": DEVICE}, sites=(Site(nodes=nodes),))
    assert seconds(Comm("send", (0, 3), (100,)), here) == 1
    assert seconds(Comm("send", (0, 1), (100,)), here) == 11
    assert seconds(Comm("send", (2, 0), (100,)), here) == 5
    assert seconds(Comm("send", (0, 2), (100,)), here) == 2
    assert seconds(Comm("send", (0, 1), (100,)), here, (0, 2)) == 2


def test_one_device_fills_only_its_share_of_the_network() -> None:
    rails = Link(latency_s=0, bytes_per_s=400, device_bytes_per_s=50)
    link = Link(latency_s=0, bytes_per_s=1e6)
    here = uniform(DEVICE, devices=8, nodes=2, link=link, network=rails)
    assert seconds(Comm("send", (0, 8), (400,)), here) == 8
    everyone = tuple(range(16))
    assert seconds(Comm("all_gather", everyone, (16,) * 16), here) == pytest.approx(240 / 400)
    assert seconds(Comm("all_gather", (0, 8), (16, 16)), here) == pytest.approx(16 / 50)


def test_compute_is_bound_by_flops_or_by_memory() -> None:
    one = cluster()
    assert seconds(Compute("matmul", 1e12), one) == pytest.approx(1 + 1e-6)
    assert seconds(Compute("matmul", 1e9, bytes=1e10), one) == pytest.approx(1 + 1e-6)
    slow = DEVICE.model_copy(update={"peak": {"matmul": {"float32": 5e11}}})
    node = Node(devices={"a": 1, "b": 1}, link=Link(latency_s=0, bytes_per_s=1))
    two = Cluster(devices={"a": DEVICE, "b": slow}, sites=(Site(nodes=(node,)),))
    work = Compute("matmul", 1e12)
    assert seconds(work, two) == pytest.approx(2, rel=1e-5)
    assert seconds(work, two, (0,)) == pytest.approx(1, rel=1e-5)
    with pytest.raises(ClusterError, match="'a' has no rate for attention in int8"):
        seconds(Compute("attention", 1, dtype="int8"), two)


@pytest.mark.parametrize(
    ("op", "message"),
    [
        (Comm("send", (0, 99), (1,)), "the cluster has ranks 0 to 7"),
        (Comm("send", (0, 1, 2), (1,)), "a send has two ranks"),
        (Comm("all_gather", (0, 1), (1,)), "needs 2 sizes, none below zero; has 1"),
        (Comm("all_to_all", (0, 1), (1, 1)), "needs 4 sizes"),
        (Comm("all_reduce", (0, 0), (1,)), "named twice"),
        (Comm("all_reduce", (0, 1), (-1,)), "none below zero"),
    ],
)
def test_ops_that_do_not_fit_are_refused(op: Comm, message: str) -> None:
    with pytest.raises(ClusterError, match=message):
        seconds(op, cluster())


@st.composite
def comms(draw: st.DrawFn) -> Comm:
    ranks = draw(st.permutations(range(8)))[: draw(st.integers(2, 8))]
    kind = draw(st.sampled_from(["all_to_all", "all_gather", "reduce_scatter", "all_reduce"]))
    count = {"all_to_all": len(ranks) ** 2, "all_reduce": 1}.get(kind, len(ranks))
    sizes = draw(st.lists(st.integers(0, 10**7), min_size=count, max_size=count))
    return Comm(kind, tuple(ranks), tuple(sizes))


@settings(max_examples=60, deadline=None)
@given(comms(), st.floats(1.01, 100))
def test_more_bandwidth_is_never_slower_and_bytes_are_kept(op: Comm, scale: float) -> None:
    plain, fast = cluster(), cluster(scale=scale)
    assert seconds(op, fast) <= seconds(op, plain)
    assert demand(op, fast).transfer_s == pytest.approx(demand(op, plain).transfer_s / scale)
    # What leaves devices, nodes and sites arrives at others.
    bytes_on = traffic([op], plain)
    for level in ("device", "node", "site"):
        ways = [
            sum(v for k, v in bytes_on.items() if k.startswith(level) and k.endswith(way))
            for way in ("in", "out")
        ]
        assert ways[0] == pytest.approx(ways[1])
    # Whoever sends all its bytes over the slowest link needs at least that long.
    if op.kind == "all_to_all":
        sent = {rank: op.sent_bytes(rank) for rank in op.ranks}
        inside = sum(v for k, v in bytes_on.items() if k.startswith("device") and k.endswith("out"))
        between = sum(v for k, v in bytes_on.items() if k.startswith("node") and k.endswith("out"))
        assert inside + between == pytest.approx(sum(sent.values()))
