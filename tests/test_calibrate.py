"""Calibration is simulation read backwards: what a known cluster would measure gives it back."""

from dataclasses import asdict
from itertools import permutations
from pathlib import Path

import pytest

from longspan.cluster.calibrate import calibrate
from longspan.cluster.cost import seconds
from longspan.cluster.simulate import concurrent_seconds
from longspan.cluster.spec import Cluster, cluster_from, read_cluster, write_cluster
from longspan.errors import DataError
from longspan.schedule.ops import Comm, Compute
from longspan.trace import Note, Row

FAST = {
    "memory_bytes": 1 << 30,
    "bytes_per_s": 1e10,
    "overhead_s": 1e-6,
    "message_s": 2e-5,
    "byte_s": 1e-10,
    "far_byte_s": 3e-10,
    "measured": {
        "matmul": {"float32": 1e11, "bfloat16": 2e11},
        "attention": {"float32": 5e10, "bfloat16": 9e10},
    },
}
INSIDE = {"latency_s": 3e-5, "bytes_per_s": 5e9}


def network(rate: float, **more: float) -> dict[str, float]:
    return {"latency_s": 2e-4, "bytes_per_s": rate} | more


def cluster(*sites: list[dict[str, float]], uplink: float | None = None) -> Cluster:
    """Sites of nodes of two devices, each with its network."""
    up = {"uplink": {"latency_s": 0.02, "bytes_per_s": uplink}} if uplink else {}
    made = [
        {
            "name": f"site{i}",
            "nodes": [
                {"devices": {"cpu": 2}, "link": INSIDE, "network": net, "name": f"node{i}{j}"}
                for j, net in enumerate(nodes)
            ],
        }
        | up
        for i, nodes in enumerate(sites)
    ]
    return cluster_from({"devices": {"cpu": FAST}, "sites": made}, "test")


def probed(real: Cluster, slow_rank: int | None = None) -> list[Row]:
    """The rows that a probe of this cluster would write, were it never disturbed."""
    fabric = real.fabric
    node, site = fabric.node.tolist(), fabric.site.tolist()
    rows: list[Row] = [
        Note(
            "place",
            {
                "node": node,
                "site": [f"site{s}" for s in site],
                "kind": ["cpu"] * real.ranks,
                "memory_bytes": [1 << 30] * real.ranks,
            },
        )
    ]
    nodes = [real.ranks_of_node(i) for i in range(len(real.nodes))]
    several = [n for n in nodes if len(n) > 1]
    pairs = [(n[0], n[1]) for n in several] + [(a[0], b[0]) for a, b in permutations(nodes, 2)]
    sends = [[Comm("send", pair, (10_000_000,))] for pair in pairs]
    sends += [[Comm("send", pair[::-1], (10_000_000,))] for pair in pairs[: len(nodes)]]
    both = [
        [Comm("send", ab, (10_000_000,)) for ab in zip(a, b, strict=True)]
        for a, b in permutations(nodes, 2)
    ]
    exchanges = [[Comm("all_to_all", n, (100_000_000,) * 4)] for n in several]
    for pair in pairs:
        latency = seconds(Comm("send", pair, (1,)), real)
        rows.append(Note("ping", {"ranks": list(pair), "seconds": [latency] * 3}))
    for ops in (*sends, *both, *exchanges):
        duration = max(concurrent_seconds(ops, real))
        about = {"ops": [asdict(op) for op in ops], "seconds": [duration, duration, 9.0]}
        rows.append(Note("timing", about))
    for kind in ("matmul", "attention"):
        for dtype in ("float32", "bfloat16"):
            rows += _computed(Compute(kind, 1e10, dtype=dtype), real, slow_rank)
    rows += _computed(Compute("copy", 0.0, bytes=1e9), real, None)
    rows += _computed(Compute("nothing", 0.0), real, None)
    device = real.device(0)
    sizes = [(False, 400, 1 << 10), (False, 48, 1 << 18), (True, 20, 1 << 10), (True, 8, 1 << 17)]
    for far, messages, size in sizes:
        took = messages * (device.message_s + size * (device.byte_s + far * device.far_byte_s))
        about = {"messages": messages, "bytes": messages * size, "far": far}
        about |= {"seconds": [took] * 2 + [9.0]}
        rows += [Note("handled", {"rank": rank} | about) for rank in range(real.ranks)]
    return rows


def _computed(op: Compute, real: Cluster, slow_rank: int | None) -> list[Row]:
    return [
        Note(
            "compute",
            {
                "rank": r,
                "op": asdict(op),
                "seconds": [seconds(op, real, [r]) * (1 + (r == slow_rank))],
            },
        )
        for r in range(real.ranks)
    ]


@pytest.mark.parametrize(
    "real",
    [
        cluster([network(2e7), network(2e7)]),
        cluster([network(1e8), network(1e8), network(1e8, in_bytes_per_s=5e7)]),
        cluster([network(1e8, device_bytes_per_s=6e7)] * 2),
        cluster([network(1e9)] * 2, [network(1e9)] * 2, uplink=2e6),
    ],
    ids=["even", "one way slower", "rails", "sites"],
)
def test_a_cluster_is_found_again(real: Cluster, tmp_path: Path) -> None:
    found, fit = calibrate(probed(real))
    assert found.ranks == real.ranks and len(found.sites) == len(real.sites)
    for mine, true in zip(found.nodes, real.nodes, strict=True):
        assert mine.network and true.network and mine.link
        for name in ("latency_s", "bytes_per_s", "into_bytes_per_s"):
            expected = pytest.approx(getattr(true.network, name), rel=0.02)
            assert getattr(mine.network, name) == expected
        assert mine.network.device_bytes_per_s == (
            true.network.device_bytes_per_s
            and pytest.approx(true.network.device_bytes_per_s, rel=0.02)
        )
        assert mine.link.bytes_per_s == pytest.approx(5e9, rel=0.05)
    for mine_site, true_site in zip(found.sites, real.sites, strict=True):
        assert (mine_site.uplink is None) == (true_site.uplink is None)
        if mine_site.uplink and true_site.uplink:
            assert mine_site.uplink.bytes_per_s == pytest.approx(2e6, rel=0.02)
    (device,) = found.devices.values()
    assert device.rate("matmul", "float32") == pytest.approx(1e11, rel=0.01)
    assert device.bytes_per_s == pytest.approx(1e10, rel=0.01)
    assert device.message_s == pytest.approx(2e-5) and device.byte_s == pytest.approx(1e-10)
    assert device.far_byte_s == pytest.approx(3e-10)
    assert all(max(errors) < 0.05 for errors in fit.errors.values())
    even = all(n.network and n.network.in_bytes_per_s is None for n in real.nodes)
    assert bool(fit.remarks) != even
    write_cluster(found, tmp_path / "cluster.yaml")
    assert read_cluster(tmp_path / "cluster.yaml") == found


def test_a_byte_takes_no_longer_than_where_all_went_into_sending() -> None:
    rows = probed(cluster([network(1e8)] * 2), slow_rank=1)
    for row in rows:
        if isinstance(row, Note) and row.kind == "handled":
            row.about["seconds"] = [float(row.about["bytes"])] * 3
    devices = calibrate(rows)[0].devices
    assert len(devices) == 2
    for device in devices.values():
        assert device.byte_s == pytest.approx(1 / 1e10, rel=0.01)


def test_what_messages_wait_for_ranks_that_compute() -> None:
    real = cluster([network(1e8)] * 2)
    rows = probed(real)
    idle, fit = calibrate(rows)
    ping = min(min(row.about["seconds"]) for row in rows if row.kind == "ping")  # type: ignore[union-attr]
    waits = [Note("wait", {"rank": rank, "seconds": [ping + 2e-3]}) for rank in range(real.ranks)]
    found, same_fit = calibrate([*rows, *waits])
    assert found.devices["cpu"].wait_s == pytest.approx(2e-3)
    assert found.idle == idle and same_fit == fit


def test_distance_is_no_wait() -> None:
    """Where nodes have one rank each, the ring of messages goes through all sites."""
    one = {"devices": {"cpu": 1}, "network": network(1e8), "count": 2}
    sites = [{"nodes": [one], "uplink": {"latency_s": 0.02, "bytes_per_s": 1e7}, "count": 2}]
    real = cluster_from({"devices": {"cpu": FAST}, "sites": sites}, "test")
    rows = probed(real)
    far = max(min(row.about["seconds"]) for row in rows if row.kind == "ping")  # type: ignore[union-attr]
    waits = [Note("wait", {"rank": rank, "seconds": [far + 2e-3]}) for rank in range(4)]
    assert calibrate([*rows, *waits])[0].devices["cpu"].wait_s == pytest.approx(2e-3)


def test_what_stands_out_is_named() -> None:
    real = cluster([network(1e8), network(1e8), network(1e8), network(1e8, in_bytes_per_s=3e7)])
    found, fit = calibrate(probed(real, slow_rank=5))
    assert "rank 5: 50% of its kind's usual speed" in fit.remarks
    assert any("node 0 to node 3: 30% of the usual rate" in remark for remark in fit.remarks)
    assert any(
        "node 0 to node 3: 30% of the rate the other way" in remark for remark in fit.remarks
    )
    assert found.kinds[5] == "cpu_2" and found.kinds[0] == "cpu"
    assert "between nodes" in str(fit) and "at worst" in str(fit)


def test_one_node_has_no_network() -> None:
    one = {"devices": {"cpu": 2}, "link": INSIDE, "name": "node0"}
    real = cluster_from({"devices": {"cpu": FAST}, "sites": [{"nodes": [one], "name": "a"}]}, "t")
    found, fit = calibrate(probed(real))
    assert found.nodes[0].network is None and list(fit.errors) == ["inside nodes"]


def test_another_trace_is_refused() -> None:
    with pytest.raises(DataError, match="not a probe's"):
        calibrate([Note("start")])
