"""The lab's own arithmetic and messages, without making a network."""

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from longspan.errors import LabError
from longspan.lab.commands import app
from longspan.lab.device import find_cgroups, make_devices
from longspan.lab.network import address, require_network
from longspan.lab.spec import LabSpec
from longspan.lab.units import parse_bytes, parse_rate, parse_seconds, show_rate


def test_units() -> None:
    assert parse_rate("200mbit") == parse_rate("0.2 Gbit") == parse_rate(2e8) == 2e8
    assert parse_seconds("20ms") == 0.02 and parse_seconds("1s") == 1
    assert parse_bytes("2GiB") == 2**31 and parse_bytes("2GB") == 2 * 10**9
    assert show_rate(2e8) == "200mbit" and show_rate(1.5e9) == "1.5gbit"
    assert show_rate(None) == "unshaped"


@given(st.integers(8000, 10**12))
def test_a_shown_rate_is_read_back(rate: int) -> None:
    assert parse_rate(show_rate(rate)) == pytest.approx(rate, rel=1e-5)


@pytest.mark.parametrize("text", ["", "fast", "200", "-1mbit", "1GiB", "nan", "1 mbit/s"])
def test_a_bad_rate_is_named(text: str) -> None:
    with pytest.raises(LabError, match=r"rate|slow"):
        parse_rate(text)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"nodes": 0}, "at least one"),
        ({"nodes": 3, "sites": 2}, "multiple of sites"),
        ({"bandwidth": ["1gbit"]}, "1 values for 2 nodes"),
        ({"device_memory": "2 gigs"}, "2GiB"),
        ({"device_share": 0}, "too small"),
        ({"latency": "20ms"}, "bandwidth too"),
        ({"site_bandwidth": "20mbit"}, "sites to 2"),
    ],
)
def test_an_impossible_lab_is_refused(wrong: dict[str, object], said: str) -> None:
    with pytest.raises(LabError, match=said):
        LabSpec(**wrong)  # type: ignore[arg-type]


def test_nodes_are_dealt_over_sites_and_may_differ() -> None:
    spec = LabSpec(nodes=4, ranks=2, sites=2, bandwidth=["1gbit", 1e9, "50mbit", 5e7])
    assert [spec.site_of(node) for node in range(4)] == [0, 0, 1, 1]
    assert [spec.bandwidth_of(node) for node in range(4)] == [1e9, 1e9, 5e7, 5e7]
    assert spec.world == 8
    assert len({address(node) for node in range(1000)}) == 1000


def test_devices_must_fit_the_cores() -> None:
    cores = len(os.sched_getaffinity(0))
    with pytest.raises(LabError, match=f"this machine's {cores}"):
        make_devices("none", LabSpec(nodes=2, ranks=cores, device_share=0.6))


def test_without_cgroups_one_line_says_so(tmp_path: Path) -> None:
    mounts = tmp_path / "mounts"
    mounts.write_text("proc /proc proc rw 0 0\ncgroup /sys/fs/cgroup/cpu cgroup rw,cpu 0 0\n")
    with pytest.raises(LabError, match="no cgroup hierarchy"):
        find_cgroups(mounts)


def test_version_1_hierarchies_are_found(tmp_path: Path) -> None:
    mounts = tmp_path / "mounts"
    mounts.write_text(
        "cgroup /c/cpu,cpuacct cgroup rw,cpu,cpuacct 0 0\ncgroup /c/memory cgroup rw,memory 0 0\n"
        "cgroup2 /nowhere cgroup2 rw 0 0\n"
    )
    found = find_cgroups(mounts)
    assert (found.version, found.cpu, found.memory) == (
        1,
        Path("/c/cpu,cpuacct"),
        Path("/c/memory"),
    )


def test_what_is_written_for_version_2(tmp_path: Path) -> None:
    """A folder stands in for the kernel's files here: it shows the words, not their effect."""
    mounts, root = tmp_path / "mounts", tmp_path / "cgroup"
    mounts.write_text(f"cgroup2 {root} cgroup2 rw 0 0\n")
    for folder in (root, root / "longspan-x"):
        folder.mkdir(exist_ok=True)
        (folder / "cgroup.subtree_control").write_text("")
    (root / "cgroup.controllers").write_text("cpuset cpu io memory\n")
    cgroups = find_cgroups(mounts)
    assert cgroups.version == 2 and cgroups.roots == (root,)
    spec = LabSpec(nodes=2, device_share=[0.45, 0.01], device_memory="1GiB")
    one, two = make_devices("x", spec, cgroups)
    assert (root / "cgroup.subtree_control").read_text() == "+cpu +memory"
    assert (root / one.folder / "cpu.max").read_text() == "4500 10000"
    assert (root / two.folder / "cpu.max").read_text() == "1000 100000"
    assert (root / one.folder / "memory.max").read_text() == str(2**30)
    assert one.entries == (root / "longspan-x/rank0/cgroup.procs",)
    (root / one.folder / "memory.events").write_text("oom 3\noom_kill 2\noom_group_kill 0\n")
    assert one.memory_kills() == 2


def test_without_root_one_line_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(LabError, match=r"needs root.*sudo"):
        require_network()


def test_without_iproute2_one_line_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setenv("PATH", "")
    with pytest.raises(LabError, match="install iproute2"):
        require_network()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("run --bandwidth slow -- true", "write it like 200mbit"),
        ("run --device-share half -- true", "like 0.45"),
        ("run --nodes 3 --bandwidth 1gbit,2gbit -- true", "2 values for 3 nodes"),
        ("run --name My_Lab -- true", "can't name a lab"),
    ],
)
def test_the_command_line_raises_one_line(words: str, said: str) -> None:
    error = CliRunner().invoke(app, words.split()).exception
    assert isinstance(error, LabError) and said in str(error)
    assert "\n" not in str(error)
