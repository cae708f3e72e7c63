"""Sites that come and go: who takes part, and what becomes of the global parameters."""

import json
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from elastic_site import STEPS, TIMEOUT_S, train
from outer_reference import inner_step, tiny, together
from ranks import Ranks, free_port
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard

from longspan.elastic import reach as reaching
from longspan.elastic.group import gloo_group
from longspan.elastic.membership import Membership, serve_store
from longspan.elastic.reach import Reach, leaving, words_of
from longspan.errors import ConfigError, ExchangeError, LabError, UnreachableError
from longspan.lab.lab import Lab
from longspan.lab.network import require_network
from longspan.lab.spec import LabSpec
from longspan.outer import elastic
from longspan.outer.average import InProcess
from longspan.outer.elastic import ElasticAverage
from longspan.outer.fragments import split
from longspan.outer.sync import OuterSync
from longspan.schedule.outer import Send, fragments, sent_at

pytestmark = pytest.mark.alone

SITE = Path(__file__).with_name("elastic_site.py")
CUT_S, SLACK_S = 4.0, 1.0


def test_turns_are_sent_when_the_schedule_says() -> None:
    for count, every in ((1, 1), (3, 7), (5, 5), (4, 2)):
        turn = 0
        for step in range(1, 4 * every):
            for event in fragments(step, count, every):
                if isinstance(event, Send):
                    assert event.fragment == turn % count and sent_at(turn, count, every) == step
                    turn += 1


def until(said: Callable[[], Any], seconds: float = 5.0) -> None:
    deadline = time.monotonic() + seconds
    while not said():
        assert time.monotonic() < deadline, "it never happens"
        time.sleep(0.01)


def test_generations_follow_who_lives() -> None:
    store = serve_store(0)
    address, wait = f"127.0.0.1:{store.port}", 0.6

    def members(site: Membership) -> dict[int, str]:
        found = site.newest()
        return found.members if found else {}

    start = time.monotonic()
    first = Membership(address, 0, 3, wait)
    until(lambda: members(first))
    assert members(first) == {0: first.name} and time.monotonic() - start >= wait / 2
    second = Membership(address, 2, 3, wait)
    until(lambda: members(second) == {0: first.name, 2: second.name} == members(first))
    number = second.newest().number
    first.broken(number)  # all live: the same sites once more
    until(lambda: second.newest().number > number)
    assert members(second) == {0: first.name, 2: second.name}
    first.close()
    until(lambda: members(second) == {2: second.name})
    again = Membership(address, 0, 3, wait)
    until(lambda: members(again) == {0: again.name, 2: second.name} == members(second))
    again.close()
    second.close()


def test_impossible_rendezvous() -> None:
    with pytest.raises(ConfigError, match="site 3 of 3"):
        ElasticAverage(None, "127.0.0.1:1", 3, 3)
    with pytest.raises(ConfigError, match="write it as host:port"):
        ElasticAverage(None, "nowhere", 0, 2)
    with pytest.raises(ConfigError, match="can't meet at port"):
        store = serve_store(0)
        serve_store(store.port)


def test_who_stops_so_that_those_left_reach_each_other() -> None:
    def stopping(*told: tuple[int, tuple[int, ...]]) -> list[int]:
        return leaving({site: Reach(*one) for site, one in enumerate(told)})

    assert stopping((0, ()), (0, ())) == []
    assert stopping((0, (1,)), (0, (0,))) == [1]  # alike: the later number
    assert stopping((0, (1,)), (5, (0,))) == [0]  # who has exchanged stays
    assert stopping((5, (1, 2)), (5, (0,)), (5, (0,))) == [0]  # who misses the most goes
    assert stopping((5, ()), (5, (3,)), (5, ()), (0, (1,))) == [3]
    assert stopping((5, (1,)), (5, ())) == [1]  # one of them saying so is enough
    assert leaving({0: Reach(1, (1,))}) == []  # a site that is lost is another matter
    words = words_of({0: Reach(0, (1,)), 1: Reach(0, (0,)), 2: Reach(0, ())}, 3)
    assert "sites 0 and 1 reach" in words and "stopping: site 1." in words


def test_sites_that_meet_but_do_not_reach_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """Site 0 reaches both others, who don't reach each other: 2 stops, 0 and 1 go on."""

    def group(address: str, name: str, place: int, count: int, timeout_s: float) -> Any:
        if count == 3 or name.endswith("/1-2"):
            raise RuntimeError("timed out connecting")
        return gloo_group(address, name, place, count, timeout_s)

    for module in (elastic, reaching):
        monkeypatch.setattr(module, "gloo_group", group)
    store = serve_store(0)

    def site(number: int) -> str:
        average = ElasticAverage(None, f"127.0.0.1:{store.port}", number, 3, 1.0)
        lost: set[str] = set()
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline:
            try:
                if (peers := average.regrouped()) and peers.sites == 2:
                    (here,) = (line.item() for line in peers.all_gather(torch.ones(1))[:1])
                    average.close()
                    return f"{here:g} {sorted(lost)[-1]}"
            except ExchangeError as error:
                lost.add(str(error))
            except UnreachableError as error:
                return str(error)
            time.sleep(0.01)
        return f"never: {lost}"

    first, second, third = together(3, site)
    assert third.startswith("sites 1 and 2 reach the rendezvous but not each other, in 3 attempts")
    assert first == second and first.startswith("1 the sites didn't come together")


def rows_of(path: Path) -> list[dict[str, Any]]:
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]


@pytest.mark.slow
def test_sites_are_killed_cut_off_and_join(tmp_path: Path) -> None:
    """Sites 0 to 2 start; 1 is killed, 2 is cut off and healed, 3 joins: 0, 2 and 3 end alike."""
    try:
        require_network()
    except LabError as error:
        pytest.skip(str(error))

    def at(site: int, wanted: Callable[[dict[str, Any]], bool], after: int = 0) -> int:
        """Where a site's row is as wanted, once there is one."""
        deadline = time.monotonic() + 40
        while True:
            rows = rows_of(tmp_path / f"site{site}.jsonl")
            for place, row in enumerate(rows[after:], after):
                if wanted(row):
                    return place
            assert time.monotonic() < deadline, f"site {site}: {rows[-3:]}"
            time.sleep(0.02)

    for site in (0, 1, 2):
        (tmp_path / f"start{site}").touch()
    with Lab(LabSpec(nodes=5, ranks=1, bandwidth="100mbit")) as lab:
        job = lab.start([sys.executable, str(SITE), str(tmp_path)], stop_on_failure=False)
        at(0, lambda row: row["sites"] == 3)
        killed = at(0, lambda row: row["step"] >= 60)
        job.signal(2, signal.SIGKILL)
        killed = at(0, lambda row: row["sites"] == 2, killed)
        lab.cut(3)
        began = time.monotonic()
        alone = at(0, lambda row: row["sites"] == 1, killed)
        (tmp_path / "start3").touch()
        joined = at(0, lambda row: row["sites"] == 2, alone)
        time.sleep(max(0.0, CUT_S - (time.monotonic() - began)))
        lab.heal(3)
        at(0, lambda row: row["sites"] == 3, joined)
        for site in (0, 2, 3):
            at(site, lambda row: row["step"] >= STEPS)
        done = [tmp_path / f"done{site}.json" for site in (0, 2, 3)]
        until(lambda: all(path.exists() for path in done))
        (tmp_path / "end").touch()
        job.wait(10)
    results = [json.loads(path.read_text(encoding="utf-8")) for path in done]
    assert all(result["sums"] == results[0]["sums"] for result in results)
    joined_in = InProcess(3)
    plain = together(3, lambda s: train(s, joined_in.site(s), STEPS, lambda row: None, 0.0))
    for result in results:
        assert result["loss"] <= 1.01 * plain[0]["loss"]
    for site in (0, 2, 3):
        rows = rows_of(tmp_path / f"site{site}.jsonl")
        assert max(row["took_s"] for row in rows) <= TIMEOUT_S + SLACK_S
        assert rows[-1]["step"] == STEPS and sum(row["merged"] for row in rows[-30:]) > 0


def train_apart(mesh: DeviceMesh, port: int) -> tuple[list[int], dict[str, Tensor], int]:
    """Two sites of two ranks, FSDP2 inside; site 1's processes are lost and start anew."""
    rank = dist.get_rank()
    store = serve_store(port) if rank == 0 else None
    # Names of its own: DTensor caches by what a mesh looks like, and a test's groups are destroyed.
    grid = init_device_mesh("cpu", (2, 2), mesh_dim_names=("site", "inside"))
    site, inside = rank // 2, grid["inside"].get_group()

    def build() -> tuple[nn.Module, torch.optim.Optimizer, OuterSync, ElasticAverage]:
        model = tiny(width=7, dtype=torch.float32)  # dims that 2 doesn't divide
        for layer in model.layers:
            fully_shard(layer, mesh=grid["inside"])
        fully_shard(model, mesh=grid["inside"])
        average = ElasticAverage(inside, f"127.0.0.1:{port}", site, 2, 3.0)
        outer = OuterSync(
            model, average=average, fragments=split(model, layers=2), sync_every=6, delay=1
        )
        return model, torch.optim.AdamW(model.parameters(), lr=0.01), outer, average

    model, optimizer, outer, average = build()
    sites: list[int] = []
    step, lost = 0, False
    while step < 120:
        inner_step(model, optimizer, site, step)
        found = outer.step()
        step += 1 + found.ahead
        sites += [found.sites] if found.sites else []
        if found.sites == 2 and site == 1 and not lost:
            lost = True
            for _ in range(20):
                inner_step(model, optimizer, site, step)
                step += 1 + outer.step().ahead
            average.close()
            model, optimizer, outer, average = build()
            step = 0
        time.sleep(0.01)
    with outer.global_parameters():
        agreed = {n: p.full_tensor().detach().clone() for n, p in model.named_parameters()}
    dist.barrier()
    average.close()
    del store
    return sites, agreed, outer._rounds[0]


def test_sharded_sites_come_back(ranks: Ranks) -> None:
    results = ranks.run(train_apart, free_port())
    whole, rounds = results[0][1:]
    for sites, agreed, merged in results:
        assert sites[0] == sites[-1] == 2 and len(sites) > 1
        assert merged == rounds and all(torch.equal(agreed[n], p) for n, p in whole.items())
