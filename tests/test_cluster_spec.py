"""The cluster's description: YAML in and out, presets, places of ranks, one-line errors."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from longspan.cluster.fabric import Link
from longspan.cluster.spec import Device, presets, read_cluster, uniform, write_cluster
from longspan.errors import ClusterError

LINK = {"latency_s": 1e-6, "bytes_per_s": 1e9}
KIND = {"memory_bytes": "2GiB", "bytes_per_s": 1e10, "peak": {"matmul": {"float32": 1e9}}}
UNEVEN: dict[str, Any] = {
    "devices": {"fast": KIND, "slow": KIND | {"measured": {"matmul": {"float32": 5e8}}}},
    "sites": [
        {
            "uplink": LINK,
            "nodes": [
                {"devices": {"fast": 2, "slow": 1}, "link": LINK, "network": LINK},
                {"devices": {"slow": 2}, "link": LINK, "network": LINK | {"in_bytes_per_s": 2e9}},
            ],
        },
        {"count": 2, "uplink": LINK, "nodes": [{"devices": {"fast": 1}}]},
    ],
}


def write(path: Path, values: object) -> Path:
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    return path


def test_ranks_go_site_by_site_and_node_by_node(tmp_path: Path) -> None:
    cluster = read_cluster(write(tmp_path / "c.yaml", UNEVEN))
    assert cluster.kinds == ("fast", "fast", "slow", "slow", "slow", "fast", "fast")
    assert cluster.fabric.node.tolist() == [0, 0, 0, 1, 1, 2, 3]
    assert cluster.fabric.site.tolist() == [0, 0, 0, 0, 0, 1, 2]
    assert cluster.ranks_of_node(1) == (3, 4) and cluster.ranks_of_site(0) == (0, 1, 2, 3, 4)
    assert cluster.device(2).memory_bytes == 2 * 2**30


def test_what_is_written_is_read_again(tmp_path: Path) -> None:
    cluster = read_cluster(write(tmp_path / "c.yaml", UNEVEN))
    write_cluster(cluster, tmp_path / "folder" / "again.yaml")
    assert read_cluster(tmp_path / "folder" / "again.yaml") == cluster


@pytest.mark.parametrize("name", presets())
def test_presets_are_whole_and_name_their_sources(name: str) -> None:
    cluster = read_cluster(name)
    assert cluster.name and all(device.source for device in cluster.devices.values())
    for site in cluster.sites:
        links = [site.uplink, *(x for node in site.nodes for x in (node.link, node.network))]
        assert all(link.source for link in links if link)


def test_narrow_heads_have_rates_on_a_line() -> None:
    """Of seconds: a pair costs something, and something more for each number of a head."""
    rates = {f"attention{name}": {"float32": heads / (1 + 0.1 * heads)}
             for name, heads in (("", 64), (" 16", 16))}  # fmt: skip
    device = Device(memory_bytes=1, bytes_per_s=1, measured=rates)
    for heads in (8, 16, 32, 64, 128):
        expected = pytest.approx(heads / (1 + 0.1 * heads))
        assert device.rate(f"attention {heads}", "float32") == expected
        assert (
            device.rate(f"attention backward {heads}", "float32") == rates["attention"]["float32"]
        )
    one = Device(memory_bytes=1, bytes_per_s=1, measured={"attention": {"float32": 3.0}})
    assert one.rate("attention backward 16", "float32") == 3.0


def test_measured_rates_are_believed_before_peak_ones() -> None:
    rates = {"peak": {"matmul": {"float32": 4.0, "bfloat16": 8.0}, "attention": {"float32": 3.0}}}
    device = Device(memory_bytes=1, bytes_per_s=1, measured={"matmul": {"float32": 2.0}}, **rates)
    assert device.rate("matmul", "float32") == 2.0
    assert device.rate("matmul", "bfloat16") == 8.0
    assert device.rate("attention", "float32") == 3.0
    assert device.rate("norm", "float32") == 2.0
    assert device.rate("matmul", "float16") is None


def without(path: str) -> dict[str, Any]:
    values: dict[str, Any] = yaml.safe_load(yaml.safe_dump(UNEVEN))
    inner: Any = values
    *way, last = path.split(".")
    for part in way:
        inner = inner[int(part) if part.isdigit() else part]
    del inner[last]
    return values


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (UNEVEN | {"colour": "red"}, "colour: Extra inputs"),
        (UNEVEN | {"sites": []}, "sites: Tuple should have at least 1"),
        (without("devices.slow"), r"sites.0.nodes.0: no device kind 'slow' \(known: fast\)"),
        (
            without("sites.0.nodes.0.link"),
            "sites.0.nodes.0: a node of several devices needs a link",
        ),
        (without("sites.0.nodes.1.network"), "sites.0.nodes.1: a node among several"),
        (without("sites.0.uplink"), "sites.0: a site among several needs an uplink"),
        ([], "valid dictionary"),
    ],
)
def test_errors_say_what_is_wrong_and_where(tmp_path: Path, values: object, message: str) -> None:
    with pytest.raises(ClusterError, match=message) as error:
        read_cluster(write(tmp_path / "c.yaml", values))
    assert "\n" not in str(error.value) and "c.yaml" in str(error.value)


def test_a_missing_or_broken_file_is_told(tmp_path: Path) -> None:
    with pytest.raises(ClusterError, match="give a YAML file or one of 8x1080ti"):
        read_cluster("no-such-cluster")
    (tmp_path / "c.yaml").write_text("sites: [")
    with pytest.raises(ClusterError, match="is not YAML"):
        read_cluster(tmp_path / "c.yaml")


def test_a_lone_node_needs_no_links() -> None:
    device = Device(memory_bytes=1, bytes_per_s=1)
    assert uniform(device).ranks == 1
    with pytest.raises(ClusterError, match="needs an uplink"):
        uniform(device, sites=2)
    with pytest.raises(ClusterError, match="no rank 1"):
        uniform(device).device(1)
    link = Link(latency_s=0, bytes_per_s=1, device_bytes_per_s=1)
    with pytest.raises(ClusterError, match="for a node's network"):
        uniform(device, devices=2, link=link)
