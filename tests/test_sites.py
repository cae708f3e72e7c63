"""Plans for sites that are far apart, and whole runs of two sites."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from ranks import free_port
from test_train import command, documents, settings, train, write
from typer.testing import CliRunner

from longspan.cli import app
from longspan.cluster.fabric import Link
from longspan.cluster.spec import Cluster, Device, read_cluster, uniform
from longspan.errors import ClusterError, ConfigError
from longspan.plan import SitePlan, read_plan
from longspan.planner.sites import plan_sites
from longspan.trace import curve, read_trace
from longspan.train.config import load_config
from longspan.train.inspect import inspect

__all__ = ["documents"]

SITES = {"sites": 2, "sync_every": 4, "delay": 2, "fragment_layers": 1, "codec": "int4"}


def joined(gbit_per_s: float, latency_s: float = 0.0, sites: int = 2) -> Cluster:
    device = Device(memory_bytes=1, bytes_per_s=1)
    return uniform(
        device, sites=sites, uplink=Link(latency_s=latency_s, bytes_per_s=gbit_per_s * 1e9 / 8)
    )


def test_the_slower_the_link_the_rarer_and_coarser() -> None:
    told = [plan_sites(joined(g), params=1e9, layers=24, step_s=0.1) for g in (1000, 10, 1, 0.05)]
    fast, good, slow, hopeless = told
    assert fast.method == "data-parallel" and fast.data_parallel_utilisation >= 0.95
    assert all(plan.method == "streaming" for plan in told[1:])
    assert good.utilisation >= 0.95 and slow.utilisation >= 0.95 and hopeless.utilisation < 0.95
    assert good.sync_every <= slow.sync_every <= hopeless.sync_every == 500
    assert slow.codec == "e3m0" and good.fragments == 8 and good.outer_lr == 0.6
    # 95 % for data-parallel: the paper's Table 4 has 222 Gbit/s.
    assert fast.data_parallel_gbit_per_s == pytest.approx(222.3, rel=0.21)
    assert slow.mean_gbit_per_s == pytest.approx(1e9 * 4.125 / (slow.sync_every * 0.1) / 1e9)
    assert slow.peak_gbit_per_s <= slow.link_gbit_per_s * 1.3


def test_more_sites_and_latency_need_more() -> None:
    two, four = (plan_sites(joined(1, sites=n), params=1e9, layers=24, step_s=0.1) for n in (2, 4))
    assert four.sites == 4 and four.sync_every >= two.sync_every
    far = plan_sites(joined(1, latency_s=0.05), params=1e9, layers=24, step_s=0.1)
    assert (far.sync_every, far.delay) > (two.sync_every, two.delay)


def test_what_cannot_be_planned() -> None:
    with pytest.raises(ClusterError, match="one site"):
        plan_sites(read_cluster("8xa100-40gb"), params=1e9, layers=24, step_s=0.1)
    with pytest.raises(ConfigError, match="between 0 and 1"):
        plan_sites(joined(1), params=1e9, layers=24, step_s=0.1, wanted=1)


def test_the_command(tmp_path: Path) -> None:
    words = ["plan-sites", "--cluster", "sites-1gbit", "--params", "1e9", "--layers", "24"]
    words += ["--step", "0.5", "--out", str(tmp_path / "plan.json")]
    shown = CliRunner().invoke(app, [*words, "--picture", str(tmp_path / "sites.svg")])
    assert "fragments under way" in (tmp_path / "sites.svg").read_text()
    plan = read_plan(SitePlan, tmp_path / "plan.json")
    assert shown.exit_code == 0 and f"sync_every: {plan.sync_every}" in shown.output
    found = json.loads(CliRunner().invoke(app, [*words, "--json"]).output)
    assert found["sync_every"] == plan.sync_every and found["sites"] == 2


def test_sites_that_meet_are_counted(documents: Path, tmp_path: Path) -> None:
    for about in ({"sites": 1}, {"sites": 2, "site": 2}):
        wrong = settings(documents, tmp_path, outer={"rendezvous": "here:1", **about})
        with pytest.raises(ConfigError, match="the most there may be"):
            inspect(load_config(write(tmp_path, wrong)), 1, 1)


@pytest.mark.slow
def test_runs_meet_and_end_alike(documents: Path, tmp_path: Path) -> None:
    """Two sites, each a run of its own; the global parameters are one."""
    port = free_port()
    words = [sys.executable, "-m", "longspan", "rendezvous", "--port", str(port)]
    meeting = subprocess.Popen(words, stdout=subprocess.DEVNULL)
    started = []
    for site in (0, 1):
        about = SITES | {"site": site, "rendezvous": f"127.0.0.1:{port}", "timeout_s": 60}
        runs = tmp_path / str(site)
        config = write(runs, settings(documents, runs, outer=about))
        started.append(subprocess.Popen(command(config, nproc=1), stderr=subprocess.PIPE))
    try:
        for process in started:
            _, said = process.communicate(timeout=150)
            assert process.returncode == 0, said.decode()
    finally:
        for process in (meeting, *started):
            process.terminate()
            process.wait()
    rows = [list(read_trace(tmp_path / str(site) / "run" / "trace.jsonl")) for site in (0, 1)]
    assert [value for _, value in curve(rows[0], "outer_sites")] == [2.0]
    losses = [curve(trace, "validation_loss")[-1] for trace in rows]
    assert losses[0] == losses[1] and len(curve(rows[0], "outer_cosine")) > 1


@pytest.mark.slow
def test_two_sites_train_resume_and_report(documents: Path, tmp_path: Path) -> None:
    """A run that goes on from step 8, with fragments in flight, is the one that never stopped."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    for runs in (whole, parts):
        if runs is parts:
            shutil.copytree(whole, parts)
            for step in (10, 12):
                for site in (0, 1):
                    shutil.rmtree(parts / "run/checkpoints" / f"site{site}/step-{step:08d}")
        config = write(runs, settings(documents, runs, outer=SITES))
        train(config)
    rows, again = (list(read_trace(runs / "run" / "trace.jsonl")) for runs in (whole, parts))
    losses = curve(rows, "validation_loss")
    assert losses[-1] == curve(again, "validation_loss")[-1]
    assert curve(rows, "outer_cosine") and sum(v for _, v in curve(rows, "outer_bytes")) > 0
    kept = whole / "run" / "checkpoints"
    assert sorted(path.name for path in kept.iterdir()) == ["site0", "site1"]
    page = (whole / "run" / "report.html").read_text(encoding="utf-8")
    assert "Between sites" in page
