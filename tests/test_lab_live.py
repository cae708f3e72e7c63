"""The lab at work: real namespaces, links, cgroups and processes. Needs root and iproute2."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from longspan.errors import LabError
from longspan.lab.commands import app
from longspan.lab.device import find_cgroups
from longspan.lab.lab import Lab
from longspan.lab.network import require_network
from longspan.lab.spec import LabSpec
from longspan.lab.state import FOLDER, running_labs

pytestmark = pytest.mark.alone

try:
    require_network()
except LabError as error:
    pytest.skip(str(error), allow_module_level=True)

# One rank sends SIZE bytes to another, and tells the goodput in bits/s once they have come.
TRANSFER = """
import os, socket, sys, time
to, source, size = (int(word) for word in sys.argv[1:4])
rank, ranks = int(os.environ["RANK"]), int(os.environ["LOCAL_WORLD_SIZE"])
if rank == to:
    with socket.create_server(("", 5000)) as server:
        connection, _ = server.accept()
    with connection:
        got = 0
        while got < size:
            got += len(connection.recv(1 << 20))
        connection.sendall(b"x")
elif rank == source:
    while True:
        try:
            connection = socket.create_connection((f"node{to // ranks}", 5000))
            break
        except OSError:
            time.sleep(0.02)
    with connection:
        data = bytes(size)
        start = time.perf_counter()
        connection.sendall(data)
        connection.recv(1)
        print(size * 8 / (time.perf_counter() - start))
"""
MB = 10**6


def python(code: str, *words: object) -> list[str]:
    return [sys.executable, "-c", textwrap.dedent(code), *map(str, words)]


def wait_for(what: Callable[[], bool], seconds: float = 20.0) -> None:
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end, "it never came"
        time.sleep(0.02)


def needs_cgroups() -> None:
    try:
        find_cgroups()
    except LabError as error:
        pytest.skip(str(error))


def traces(name: str) -> list[str]:
    """Whatever there is of a lab."""
    listed = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True)
    found = [line for line in listed.stdout.splitlines() if f"longspan-{name}-" in line]
    found += [str(path) for path in FOLDER.glob(f"*{name}*")]
    found += [str(path) for path in Path("/etc/netns").glob(f"longspan-{name}-*")]
    found += [str(path) for path in Path("/sys/fs/cgroup").rglob(f"longspan-{name}")]
    return found


def interfaces() -> set[str]:
    """Those of the host, where a lab never has any."""
    shown = subprocess.run(["ip", "-j", "link"], capture_output=True, text=True, check=True)
    return {link["ifname"] for link in json.loads(shown.stdout)}


def lives(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def test_ranks_are_started_as_torchrun_does() -> None:
    names = "RANK WORLD_SIZE LOCAL_RANK LOCAL_WORLD_SIZE GROUP_RANK MASTER_PORT GIVEN"
    say = " ".join(f"${name}" for name in names.split())
    with Lab(LabSpec(nodes=2, ranks=2)) as lab:
        outcome = lab.run(["sh", "-c", f"echo {say}; echo oh >&2"], env={"GIVEN": "yes"}).check()
    assert [rank.stdout for rank in outcome.ranks] == [
        "0 4 0 2 0 29500 yes\n",
        "1 4 1 2 0 29500 yes\n",
        "2 4 0 2 1 29500 yes\n",
        "3 4 1 2 1 29500 yes\n",
    ]
    assert all(rank.stderr == "oh\n" for rank in outcome.ranks)
    assert not traces(lab.name)


def test_a_link_has_its_rate_and_a_node_inside_is_free() -> None:
    with Lab(LabSpec(nodes=2, ranks=2, bandwidth=["200mbit", "50mbit"])) as lab:
        across = lab.run(python(TRANSFER, 0, 2, 2 * MB), timeout_s=20).check()
        inside = lab.run(python(TRANSFER, 0, 1, 20 * MB), timeout_s=20).check()
        back = lab.run(python(TRANSFER, 2, 0, 2 * MB), timeout_s=20).check()
        lab.rate(1, "10mbit")
        slower = lab.run(python(TRANSFER, 0, 2, MB), timeout_s=20).check()
    # The slower link decides, each way; a busy machine may be slower still, never faster.
    assert 10e6 < float(across.ranks[2].stdout) < 52e6
    assert 10e6 < float(back.ranks[0].stdout) < 52e6
    assert 2e6 < float(slower.ranks[2].stdout) < 10.4e6
    assert float(inside.ranks[1].stdout) > 60e6
    assert 2 * MB < across.links["node1"].sent < 2.06 * MB
    assert 2 * MB < across.links["node0"].received < 2.06 * MB
    assert 2 * MB < back.links["node0"].sent < 2.06 * MB
    assert inside.links["node0"].sent + inside.links["node0"].received < 0.01 * MB


def test_a_site_counts_only_what_leaves_it() -> None:
    with Lab(LabSpec(nodes=4, sites=2, bandwidth="1gbit", site_bandwidth="100mbit")) as lab:
        inside = lab.run(python(TRANSFER, 0, 1, MB), timeout_s=20).check()
        across = lab.run(python(TRANSFER, 1, 2, MB), timeout_s=20).check()
    assert inside.links["node1"].sent > MB
    assert inside.links["site0"].sent + inside.links["site1"].sent < 0.01 * MB
    assert MB < across.links["site1"].sent < 1.03 * MB
    assert MB < across.links["site0"].received < 1.03 * MB
    assert float(across.ranks[2].stdout) < 105e6


def test_counters_agree_with_what_gloo_sends() -> None:
    code = """
    import torch, torch.distributed as dist
    dist.init_process_group("gloo")
    x = torch.zeros(MB)
    dist.send(x, 1) if dist.get_rank() == 0 else dist.recv(x, 0)
    dist.barrier()
    dist.destroy_process_group()
    """.replace("MB", str(MB))
    with Lab(LabSpec(nodes=2, bandwidth="200mbit")) as lab:
        outcome = lab.run(python(code), timeout_s=120).check()
    assert 4 * MB < outcome.links["node0"].sent < 1.03 * 4 * MB
    assert 4 * MB < outcome.links["node1"].received < 1.03 * 4 * MB
    assert outcome.links["node1"].sent < 0.03 * 4 * MB


def test_latency_is_added_or_refused_in_one_line() -> None:
    spec = LabSpec(nodes=2, bandwidth="100mbit", latency="20ms")
    try:
        require_network(latency=True)
    except LabError:
        with pytest.raises(LabError, match="no `netem`"), Lab(spec):
            pass
        return
    code = """
    import os, socket, time
    if os.environ["RANK"] == "0":
        socket.create_server(("", 5000)).accept()[0].recv(1)
    else:
        time.sleep(0.5)
        start = time.perf_counter()
        connection = socket.create_connection(("node0", 5000))
        print(time.perf_counter() - start)
        connection.sendall(b"x")
    """
    with Lab(spec) as lab:
        outcome = lab.run(python(code), timeout_s=20).check()
    assert float(outcome.ranks[1].stdout) > 0.039


def test_a_device_has_its_speed() -> None:
    needs_cgroups()
    code = """
    import time
    end = time.perf_counter() + 1.5
    while time.perf_counter() < end: pass
    print(time.process_time())
    """
    with Lab(LabSpec(nodes=2, device_share=[0.4, 0.1])) as lab:
        outcome = lab.run(python(code), timeout_s=30).check()
    fast, slow = (float(rank.stdout) for rank in outcome.ranks)
    assert 2 < fast / slow < 8
    assert fast < 0.9


def test_a_device_has_its_memory() -> None:
    needs_cgroups()
    code = "import os; x = b'1' * (200 << 20) if os.environ['RANK'] == '1' else b''"
    with Lab(LabSpec(nodes=2, device_memory=["1GiB", "64MiB"])) as lab:
        outcome = lab.run(python(code), timeout_s=30)
    assert [rank.exit_code for rank in outcome.ranks] == [0, 128 + signal.SIGKILL]
    assert [rank.out_of_memory for rank in outcome.ranks] == [False, True]
    assert outcome.exit_code == 128 + signal.SIGKILL
    with pytest.raises(LabError, match="rank 1 ran out of its device's memory"):
        outcome.check()


def test_one_rank_s_failure_ends_the_others() -> None:
    fail = ["sh", "-c", "[ $RANK = 1 ] && echo why >&2 && exit 7; exec sleep 100"]
    with Lab(LabSpec(nodes=2)) as lab:
        outcome = lab.run(fail, grace_s=0.2, timeout_s=50)
        assert (outcome.exit_code, outcome.first_failed) == (7, 1)
        assert outcome.ranks[0].exit_code == 128 + signal.SIGTERM
        with pytest.raises(LabError, match="rank 1 failed, exit code 7: why"):
            outcome.check()
        late = lab.run(["sleep", "100"], timeout_s=0.3)
        assert late.exit_code == 124
        with pytest.raises(LabError, match="time was up"):
            late.check()
        job = lab.start(["sleep", "1"], stop_on_failure=False)
        job.signal(0)
        assert [rank.exit_code for rank in job.wait().ranks] == [128 + signal.SIGKILL, 0]
        with pytest.raises(LabError, match="not a command"):
            lab.run("sleep 1")


def test_two_labs_side_by_side() -> None:
    with Lab(LabSpec(bandwidth="1gbit")) as one, Lab(LabSpec(bandwidth="1gbit")) as two:
        with pytest.raises(LabError, match="runs already"), Lab(LabSpec(), name=one.name):
            pass
        assert {one.name, two.name} <= {state.name for state in running_labs()}
        first = one.start(python(TRANSFER, 0, 1, 2 * MB))
        second = two.start(python(TRANSFER, 1, 0, MB))
        assert 2 * MB < first.wait(20).check().links["node1"].sent < 2.06 * MB
        assert MB < second.wait(20).check().links["node0"].sent < 1.03 * MB
        with pytest.raises(LabError, match="no lab called nosuch"):
            raise (
                CliRunner().invoke(app, ["cut", "0", "--lab", "nosuch"]).exception or AssertionError
            )
    assert not traces(one.name) and not traces(two.name)


@pytest.mark.parametrize(
    ("bandwidth", "mtu"),
    [("1gbit", 9000), ("50mbit", 2500), (("1gbit", "50mbit"), 2500), ("1mbit", 1500)],
)
def test_frames_are_what_the_slowest_link_carries_in_a_moment(
    bandwidth: str | tuple[str, str], mtu: int
) -> None:
    code = "print(open('/sys/class/net/eth0/mtu').read())"
    with Lab(LabSpec(nodes=2, bandwidth=bandwidth)) as lab:
        for rank in lab.run(python(code), timeout_s=20).check().ranks:
            assert int(rank.stdout) == mtu


def test_links_are_cut_and_healed_from_the_command_line() -> None:
    """Node 1 sends all the time; what node 0 receives tells whether the link is there."""
    code = """
    import os, socket, time
    talker = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    while True:
        time.sleep(0.005)
        try:
            if os.environ["RANK"] == "1": talker.sendto(bytes(1000), ("10.77.0.1", 9))
        except OSError: pass
    """

    def order(*words: str) -> None:
        result = CliRunner().invoke(app, [*words, "--lab", lab.name])
        assert result.exit_code == 0, result

    def arrives() -> bool:
        before = lab.counters()["node0"].received
        time.sleep(0.2)
        return lab.counters()["node0"].received - before >= 5000

    with Lab(LabSpec(nodes=2, bandwidth="100mbit")) as lab:
        job = lab.start(python(code))
        wait_for(arrives)
        order("cut", "1")
        assert not arrives()
        order("heal", "1")
        wait_for(arrives)
        order("rate", "1", "8kbit")
        wait_for(lambda: not arrives())
        order("rate", "1", "100mbit")
        wait_for(arrives)
        with pytest.raises(LabError, match="has no node 2"):
            lab.cut(2)
        job.stop()


def test_the_command_line_runs_and_tells() -> None:
    runner = CliRunner()
    words = "run --nodes 2 --ranks 2 --bandwidth 200mbit,1gbit -- sh -c"
    result = runner.invoke(app, [*words.split(), "echo hello; exit $(($RANK / 3 * 5))"])
    assert result.exit_code == 5
    assert sorted(result.stdout.splitlines()) == [
        "[0.1] hello",
        "[1.0] hello",
        "[1.1] hello",
        "hello",
    ]
    assert "node 1" in result.stderr and "1gbit" in result.stderr
    with Lab(LabSpec(nodes=2, bandwidth="20mbit")) as lab:
        listed = runner.invoke(app, ["list"]).stdout
    assert f"{lab.name}: 2 nodes of 1 ranks, 1 sites, 20mbit, process {os.getpid()}" in listed


# A lab with limited devices, and a process that leaves its group, session and parent. What runs in
# the background ignores SIGINT, and under nohup SIGHUP: they are taken up again.
OWNER = """
import signal
import sys
from longspan.lab.lab import Lab
from longspan.lab.spec import LabSpec

signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)
spec = LabSpec(nodes=2, sites=2, bandwidth="1gbit", device_share=0.1, device_memory="1GiB")
spec = LabSpec(nodes=2, sites=2, bandwidth="1gbit") if sys.argv[2] == "plain" else spec
with Lab(spec, name=sys.argv[1]) as lab:
    lab.run(["sh", "-c", "setsid sleep 1000 & echo $! ; wait"], echo=True)
"""


def start_owner(name: str) -> tuple[subprocess.Popen[str], list[int]]:
    try:
        find_cgroups()
        kind = "limited"
    except LabError:
        kind = "plain"
    owner = subprocess.Popen(
        python(OWNER, name, kind),
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert owner.stdout
    pids = [int(owner.stdout.readline().split()[-1]) for _ in range(2)]
    assert all(lives(pid) for pid in pids) and traces(name)
    return owner, pids


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_the_lab_and_leaves_nothing(number: signal.Signals) -> None:
    owner, pids = start_owner(f"sig{number.value}x{os.getpid()}")
    with owner:
        owner.send_signal(number)
        owner.wait(20)
        assert owner.returncode != 0
    assert not traces(f"sig{number.value}x{os.getpid()}")
    wait_for(lambda: not any(lives(pid) for pid in pids), 2)


def test_what_a_killed_lab_left_the_next_command_removes() -> None:
    before, name = interfaces(), f"dead{os.getpid()}"
    owner, pids = start_owner(name)
    with owner:
        owner.kill()
        owner.wait(20)
        assert traces(name) and any(lives(pid) for pid in pids), "there is something to remove"
        assert name not in {state.name for state in running_labs()}
        result = CliRunner().invoke(app, ["clean"])
        assert result.exit_code == 0 and name in result.stdout
    assert not traces(name)
    wait_for(lambda: not any(lives(pid) for pid in pids), 2)
    assert interfaces() == before
