"""The simulator: alone as ``cost`` says, together by fair shares, in order, or deadlocked."""

import random
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from longspan.cluster.cost import demand, seconds, traffic
from longspan.cluster.fabric import Link
from longspan.cluster.share import fair_rates
from longspan.cluster.simulate import Timeline, concurrent_seconds, simulate
from longspan.cluster.spec import Cluster, Device, Node, Site, uniform
from longspan.errors import ClusterError, ScheduleError
from longspan.schedule.ops import Comm, Compute, Op, Schedule, Task
from longspan.trace import chrome_trace

DEVICE = Device(memory_bytes=1, bytes_per_s=1e10, peak={"matmul": {"float32": 1.0}})
FLAT = uniform(
    DEVICE,
    devices=4,
    nodes=2,
    link=Link(latency_s=0, bytes_per_s=1000),
    network=Link(latency_s=0, bytes_per_s=100),
)


def uneven() -> Cluster:
    slow = DEVICE.model_copy(update={"peak": {"matmul": {"float32": 0.5}}})
    sites = tuple(
        Site(
            uplink=Link(latency_s=0.05, bytes_per_s=2e6 * (i + 1), in_bytes_per_s=5e6),
            nodes=tuple(
                Node(
                    devices={"fast": 1, "slow": j + 1},
                    link=Link(latency_s=1e-5, bytes_per_s=1e9 / (j + 1)),
                    network=Link(latency_s=1e-3, bytes_per_s=1e8 * (j + 1)),
                )
                for j in range(2)
            ),
        )
        for i in range(2)
    )
    return Cluster(devices={"fast": DEVICE, "slow": slow}, sites=sites)


@st.composite
def ops(draw: st.DrawFn, ranks: int = 10) -> Op:
    if draw(st.booleans()):
        return Compute("matmul", draw(st.floats(0, 10)), draw(st.floats(0, 1e11)))
    kinds = ["send", "all_to_all", "all_gather", "reduce_scatter", "all_reduce", "broadcast"]
    kind = draw(st.sampled_from(kinds))
    n = 2 if kind == "send" else draw(st.integers(1, ranks))
    group = draw(st.permutations(range(ranks)))[:n]
    count = {"all_to_all": n * n, "all_gather": n, "reduce_scatter": n}.get(kind, 1)
    sizes = draw(st.lists(st.integers(0, 10**8), min_size=count, max_size=count))
    return Comm(kind, tuple(group), tuple(sizes))


def busied(cluster: Cluster, byte_s: float, message_s: float = 0) -> Cluster:
    """Devices that compute for what they send."""
    kinds = {
        name: one.model_copy(update={"byte_s": byte_s, "message_s": message_s})
        for name, one in cluster.devices.items()
    }
    return Cluster(devices=kinds, sites=cluster.sites)


@settings(max_examples=150, deadline=None)
@given(ops(), st.sampled_from([0.0, 1e-10, 1e-7]), st.sampled_from([0.0, 1e-3]))
def test_one_op_alone_takes_exactly_what_cost_says(op: Op, byte_s: float, message_s: float) -> None:
    cluster = busied(uneven(), byte_s, message_s)
    where = None if isinstance(op, Comm) else (0,)
    assert concurrent_seconds([op], cluster) == [seconds(op, cluster, where)]


def test_contention_halves_the_rate() -> None:
    one, two = Comm("send", (0, 4), (100,)), Comm("send", (1, 5), (100,))
    assert concurrent_seconds([one], FLAT) == [1]
    assert concurrent_seconds([one, two], FLAT) == pytest.approx([2, 2])
    back = Comm("send", (5, 1), (100,))  # the other way is another pipe
    assert concurrent_seconds([one, back], FLAT) == [1, 1]
    inside = Comm("send", (1, 2), (1000,))
    assert concurrent_seconds([one, inside], FLAT) == [1, 1]
    rings = [Comm("all_reduce", (i, i + 4), (100,)) for i in range(4)]
    assert concurrent_seconds(rings, FLAT) == pytest.approx([4 * seconds(rings[0], FLAT)] * 4)


def test_what_is_left_goes_faster_once_another_is_done() -> None:
    short, long = Comm("send", (0, 4), (50,)), Comm("send", (1, 5), (150,))
    assert concurrent_seconds([short, long], FLAT) == pytest.approx([1, 2])
    long, short = Comm("send", (0, 4), (100,)), Comm("send", (1, 5), (50,))
    late = {
        0: [Task(long, "comm")],
        1: [Task(Compute("matmul", 0.5)), Task(short, "comm", (0,))],
        4: [Task(long, "comm")],
        5: [Task(short, "comm")],
    }
    timeline = simulate(late, FLAT)
    assert timeline.ends_s[0][0] == pytest.approx(1.5)
    assert timeline.ends_s[1] == pytest.approx([0.5, 1.5])


def test_what_is_sent_takes_from_computing() -> None:
    # Half of what a rank can compute goes into 100 bytes a second, sent or received.
    cluster = busied(FLAT, 0.005)
    send, work = Comm("send", (0, 4), (100,)), Compute("matmul", 2.0)
    assert concurrent_seconds([send, work], FLAT) == [1, 2]
    assert concurrent_seconds([send, work], cluster) == pytest.approx([1, 2.5])
    assert concurrent_seconds([send, Compute("matmul", 0.2)], cluster) == pytest.approx([1, 0.4])
    # What more than fills it lasts as long alone, and gets its half beside a computation.
    slow = busied(FLAT, 0.02)
    assert concurrent_seconds([send], slow) == pytest.approx([2])
    assert concurrent_seconds([send, work], slow) == pytest.approx([4, 4])
    # Of many messages, each has its price as well; so has each hop of a ring.
    often = busied(FLAT, 0, message_s=0.5)
    assert concurrent_seconds([send, work], often) == pytest.approx([1, 2.5])
    assert seconds(Comm("all_gather", (0, 1, 2, 3), (1,) * 4), often) == pytest.approx(6 * 0.5)
    wires = traffic([send], slow)
    assert wires == traffic([send], FLAT) and set(wires) == {"node 0 out", "node 1 in"}


def test_a_wide_pipe_gives_what_a_narrow_one_leaves() -> None:
    # Two into the slow node share its network; the third has the rest of the fast one's.
    network = (100.0, 20.0, 100.0)
    nodes = tuple(
        Node(
            devices={"d": 3},
            link=Link(latency_s=0, bytes_per_s=1e9),
            network=Link(latency_s=0, bytes_per_s=rate),
        )
        for rate in network
    )
    cluster = Cluster(devices={"d": DEVICE}, sites=(Site(nodes=nodes),))
    sends = [Comm("send", pair, (100,)) for pair in ((0, 3), (1, 4), (2, 6))]
    rates = fair_rates([demand(op, cluster) for op in sends], cluster.fabric.capacity)
    assert rates.tolist() == pytest.approx([0.1, 0.1, 0.8])


@settings(max_examples=100, deadline=None)
@given(st.lists(ops().filter(lambda op: isinstance(op, Comm)), min_size=1, max_size=8))
def test_shares_are_max_min_fair(comms: list[Comm]) -> None:
    cluster = uneven()
    demands = [d for d in (demand(op, cluster) for op in comms) if d.transfer_s > 0]
    if not demands:
        return
    capacity = cluster.fabric.capacity
    rates = fair_rates(demands, capacity)
    used = np.zeros(len(capacity))
    for asked, rate in zip(demands, rates, strict=True):
        used[asked.pipes] += asked.bytes * rate
    assert (used <= capacity * (1 + 1e-9)).all()
    level = rates * [d.message_bytes for d in demands]
    for mine, asked in zip(level, demands, strict=True):
        # Each is held by a full pipe in which nobody's messages go faster.
        assert any(
            used[pipe] >= capacity[pipe] * (1 - 1e-9)
            and all(
                mine >= x * (1 - 1e-9)
                for x, d in zip(level, demands, strict=True)
                if pipe in d.pipes
            )
            for pipe in asked.pipes
        )


def programs(seed: int, cluster: Cluster) -> list[list[Task]]:
    """Schedules that can't deadlock: all ranks take part in one order of random ops."""
    draw = random.Random(seed)
    schedules: list[list[Task]] = [[] for _ in range(cluster.ranks)]
    for _ in range(25):
        if draw.random() < 0.4:
            op: Op = Compute("matmul", draw.random())
            ranks: Sequence[int] = [draw.randrange(cluster.ranks)]
        else:
            ranks = draw.sample(range(cluster.ranks), draw.randint(2, 5))
            op = Comm("all_reduce", tuple(ranks), (draw.randrange(10**7),))
        for rank in ranks:
            mine = schedules[rank]
            after = (draw.randrange(len(mine)),) if mine and draw.random() < 0.5 else ()
            lane = "compute" if isinstance(op, Compute) else draw.choice(["comm", "comm-2"])
            mine.append(Task(op, lane, after))
    return schedules


def check(timeline: Timeline, schedules: Sequence[Schedule], cluster: Cluster) -> None:
    for rank, schedule in enumerate(schedules):
        free: dict[str, float] = {}
        for place, task in enumerate(schedule):
            start, end = timeline.starts_s[rank][place], timeline.ends_s[rank][place]
            assert start >= free.get(task.lane, 0.0)
            assert all(start >= timeline.ends_s[rank][other] for other in task.after)
            where = None if isinstance(task.op, Comm) else (rank,)
            assert end - start >= seconds(task.op, cluster, where) * (1 - 1e-9)
            free[task.lane] = end


@pytest.mark.parametrize("seed", range(20))
def test_order_is_kept_and_nothing_is_faster_than_alone(seed: int) -> None:
    cluster = uneven()
    schedules = programs(seed, cluster)
    timeline = simulate(schedules, cluster)
    check(timeline, schedules, cluster)
    again = simulate(schedules, cluster)
    assert again.ends_s == timeline.ends_s


@pytest.mark.parametrize("seed", range(5))
def test_a_pipe_never_carries_more_than_it_can(seed: int) -> None:
    draw = random.Random(seed)
    sends = [Comm("send", (draw.randrange(4), 4 + draw.randrange(4)), (100,)) for _ in range(12)]
    ends = concurrent_seconds(sends, FLAT)
    for moment in ends:
        assert sum(100 for end in ends if end <= moment) <= moment * 100 * (1 + 1e-9)
    assert max(ends) == pytest.approx(12)


def test_lanes_overlap_and_wait_for_each_other() -> None:
    send = Comm("send", (0, 1), (3000,))
    first = [
        Task(Compute("matmul", 1)),
        Task(send, "comm", (0,), "kv"),
        Task(Compute("matmul", 1)),
        Task(Compute("matmul", 1), after=(1,)),
    ]
    timeline = simulate([first, [Task(send, "comm")]], FLAT)
    assert timeline.ends_s == [[1, 4, 2, 5], [4]]
    assert timeline.seconds == 5 and timeline.busy_s(0) == 3 and timeline.busy_s(1, "comm") == 3
    rows = timeline.spans()
    assert [(row.name, row.lane, row.bytes) for row in rows] == [
        ("matmul", "compute", 0),
        ("kv", "comm", 3000),
        ("matmul", "compute", 0),
        ("matmul", "compute", 0),
        ("send", "comm", 0),
    ]
    assert len(chrome_trace(rows)["traceEvents"]) == 5 + 3


def test_a_ring_of_uneven_work_goes_at_the_pace_of_its_slowest_round() -> None:
    """Ring attention: in each round a rank computes while its keys and values move on."""
    ranks, hop = range(4), 500
    for work, expected in (
        ([[0.5 * (step <= rank) for step in ranks] for rank in ranks], 0.5 * 4),
        ([[0.5 * (1 if step else 0.5) for step in ranks] for rank in ranks], 3 * 0.5 + 0.5),
    ):
        schedules: list[list[Task]] = []
        for rank in ranks:
            tasks: list[Task] = []
            for step in ranks:
                after = (len(tasks) - 1, len(tasks) - 2) if step else ()
                block = Task(Compute("matmul", work[rank][step]), "compute", after)
                if step < len(ranks) - 1:
                    out = Task(Comm("send", (rank, (rank + 1) % 4), (hop,)), "comm-out", after[:2])
                    into = Task(Comm("send", ((rank - 1) % 4, rank), (hop,)), "comm-in", after[:2])
                    tasks += [block, out, into]
                else:
                    tasks.append(block)
            schedules.append(tasks)
        assert simulate(schedules, FLAT).seconds == pytest.approx(expected)


def test_ranks_without_a_schedule_and_groups_of_one() -> None:
    alone = Comm("all_reduce", (3,), (10,))
    timeline = simulate({3: [Task(alone, "comm"), Task(Compute("matmul", 2), after=(0,))]}, FLAT)
    assert timeline.seconds == 2 and timeline.ends_s[:3] == [[], [], []]
    assert simulate([], FLAT).seconds == 0


REDUCE, GATHER = Comm("all_reduce", (0, 1), (8,)), Comm("all_gather", (0, 1), (8, 8))
WORK = Compute("matmul", 1)


@pytest.mark.parametrize(
    ("schedules", "message"),
    [
        (
            [[Task(op, "comm") for op in order] for order in ((REDUCE, GATHER), (GATHER, REDUCE))],
            r"rank 0 waits in all_reduce among 0, 1 \(task 0\) for rank 1, which waits in "
            r"all_gather among 0, 1 \(task 0\) for rank 0|rank 1 waits in all_gather among 0, 1 "
            r"\(task 0\) for rank 0, which waits in all_reduce among 0, 1 \(task 0\) for rank 1",
        ),
        ([[Task(REDUCE, "comm")], []], "rank 0 waits in all_reduce .* for rank 1, whose schedule"),
        ([[Task(REDUCE, "comm")]], "rank 0 waits in all_reduce .* for rank 1, whose schedule"),
        (
            [[Task(REDUCE, "comm")], [Task(REDUCE, "comm", (1,)), Task(WORK, after=(0,))]],
            "rank 0 waits in all_reduce .* for rank 1, whose task 0 waits for itself",
        ),
        (
            [
                [Task(REDUCE, "a"), Task(WORK, "b", (2,)), Task(GATHER, "b")],
                [Task(GATHER, "a", (1,)), Task(REDUCE, "b", (0,))],
            ],
            "deadlock: rank",
        ),
        ([[Task(WORK, "a", (1,)), Task(WORK, "b", (0,))]], "itself"),
        ([[Task(REDUCE, "comm", (7,))]], "rank 0, task 0: it can't come after task 7"),
        ([[], [], [Task(REDUCE, "comm")]], "rank 2, task 0: all_reduce among 0, 1 is not its own"),
        (
            [[Task(REDUCE, "comm")], [Task(Comm("all_reduce", (0, 1), (9,)), "comm")]],
            "rank 1, task 0: all_reduce among 0, 1 has other sizes than on rank 0",
        ),
        ([[]] * 9, "9 schedules for a cluster of 8 ranks"),
    ],
)
def test_what_can_not_be_played_is_told(schedules: list[Schedule], message: str) -> None:
    with pytest.raises(ScheduleError, match=message) as error:
        simulate(schedules, FLAT)
    assert "\n" not in str(error.value)


def test_a_rank_beyond_the_cluster_is_refused() -> None:
    with pytest.raises(ClusterError, match="the cluster has ranks 0 to 7"):
        simulate([[Task(Comm("send", (0, 8), (1,)), "comm")]], FLAT)
