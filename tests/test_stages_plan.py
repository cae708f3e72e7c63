"""Planned stages: the true minimum, what it says of itself, known ways beside it."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise, product
from math import inf, prod
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from longspan.cluster.fabric import Link
from longspan.cluster.simulate import simulate
from longspan.cluster.spec import Cluster, Device, read_cluster, uniform
from longspan.errors import ClusterError, ConfigError
from longspan.layout import Layout
from longspan.plan import StagePlan, read_plan, write_plan
from longspan.planner.stage import Stage, transformer_block
from longspan.planner.stage_price import Pricer
from longspan.planner.stages import plan_stages
from longspan.schedule.ops import Comm, Compute, Task
from longspan.schedule.switch import transition

DIMS = ("time", "space")


def cluster(
    nodes: int, devices: int, rate: float = 1e9, network: float = 1e8, flops: float = 1e10
) -> Cluster:
    device = Device(memory_bytes=1, bytes_per_s=1e10, peak={"matmul": {"float32": flops}})
    return uniform(
        device,
        nodes=nodes,
        devices=devices,
        link=Link(latency_s=1e-5, bytes_per_s=rate),
        network=Link(latency_s=1e-4, bytes_per_s=network),
    )


def video(pairs: int, time: int, space: int, channel: int = 32, heads: int = 4) -> list[Stage]:
    sizes = {"batch": 1, "time": time, "space": space, "channel": channel}
    return [
        transformer_block(f"{dim}.{i}", sizes, dim, heads, dtype="float32")
        for i in range(pairs)
        for dim in ("space", "time")
    ]


def options(stage: Stage, axes: int) -> list[tuple[tuple[str | None, ...], str]]:
    """Every layout of a stage that can be run, told anew."""
    found = []
    for sharded in product((*DIMS, None), repeat=axes):
        if not all(dim is None or dim in stage.sizes for dim in sharded):
            continue
        count = sum(dim in stage.mixes for dim in sharded)
        if count == 0:
            found.append((sharded, "nothing"))
        if count == 1 and len(stage.mixes) == 1 and stage.heads:
            found += [(sharded, "heads"), (sharded, "ring")]
    return found


def least(stages: Sequence[Stage], where: Cluster, mesh: dict[str, int]) -> float:
    """Every way through the stages, all of them at once: a dim for each stage's choices."""
    pricer, best = Pricer(where, mesh), inf
    names = [stage.name for stage in stages]
    taken = [
        (i - 1,) if s.after is None else tuple(map(names.index, s.after)) or (-1,)
        for i, s in enumerate(stages)
    ]
    ways = [options(stage, len(mesh)) for stage in stages]

    def spread(table: NDArray[np.float64], *dims: int) -> NDArray[np.float64]:
        return table.reshape([len(way) if i in dims else 1 for i, way in enumerate(ways)])

    seconds = np.zeros([len(way) for way in ways])
    for i, stage in enumerate(stages):
        own = [
            pricer.compute_s(stage, *way) + pricer.inside(stage, *way).seconds for way in ways[i]
        ]
        seconds = seconds + spread(np.array(own), i)
        for j in taken[i]:
            if j >= 0:
                moves = [[pricer.move(stage, a, b).seconds for b, _ in ways[i]] for a, _ in ways[j]]
                seconds = seconds + spread(np.array(moves), j, i)
    for home in product((*DIMS, None), repeat=len(mesh)):
        ends = [i for i in range(len(stages)) if -1 in taken[i] or not any(i in t for t in taken)]
        if any(d and d not in stages[i].sizes for d in home for i in ends):
            continue
        total = seconds
        for i, stage in enumerate(stages):
            if -1 in taken[i]:
                into = [pricer.move(stage, home, way).seconds for way, _ in ways[i]]
                total = total + spread(np.array(into), i)
            if not any(i in t for t in taken):
                back = [pricer.move(stage, way, home).seconds for way, _ in ways[i]]
                total = total + spread(np.array(back), i)
        best = min(best, float(total.min(initial=inf)))
    return best


@st.composite
def chains(draw: st.DrawFn) -> list[Stage]:
    found: list[Stage] = []
    for index in range(draw(st.integers(1, 4))):
        sizes = {"time": draw(st.integers(1, 9)), "space": draw(st.integers(1, 40))}
        if draw(st.integers(0, 5)) == 0:
            del sizes[draw(st.sampled_from(DIMS))]
        mixes = [dim for dim in sizes if draw(st.booleans())]
        heads = draw(st.sampled_from([0, 2, 4, 6]))
        kv_heads = draw(
            st.sampled_from([n for n in (1, 2, 3, heads) if n and heads % n == 0] or [0])
        )
        earlier = [stage.name for stage in found]
        after = None
        if earlier and draw(st.booleans()):
            after = tuple(draw(st.lists(st.sampled_from(earlier), unique=True, max_size=2)))
        found.append(
            Stage(
                *(str(index), {**sizes, "channel": 24}, tuple(mixes)),
                flops=draw(st.floats(0, 1e7)),
                attention_flops=draw(st.floats(0, 1e7)) if heads else 0.0,
                heads=heads,
                kv_heads=kv_heads,
                head_dim=24 // heads if heads else 0,
                causal=draw(st.booleans()),
                dtype="float32",
                after=after,
            )
        )
    return found


@settings(max_examples=30)
@given(
    chains(),
    st.sampled_from([(1, 2), (1, 3), (2, 1), (2, 2), (1, 4)]),
    st.floats(1e6, 1e10),
    st.floats(1e5, 1e9),
)
def test_the_choice_is_the_minimum_of_all(
    stages: list[Stage], shape: tuple[int, int], rate: float, network: float
) -> None:
    where = cluster(*shape, rate, network)
    plan = plan_stages(
        stages, sequence=[d for d in DIMS if any(d in s.sizes for s in stages)], cluster=where
    )
    world, meshes = where.ranks, [{"sp": where.ranks}]
    if any(s.sizes.get(dim, world) < world for s in stages for dim in DIMS):
        factors = [n for n in range(2, world) if world % n == 0]
        meshes += [{"sp_inter": n, "sp_intra": world // n} for n in factors]
    best = min(least(stages, where, mesh) for mesh in meshes)
    assert plan.seconds == pytest.approx(best, rel=1e-9)


def test_a_video_model_switches_twice_a_pair() -> None:
    stages, where = video(3, 16, 64), cluster(2, 2)
    plan = plan_stages(stages, sequence=DIMS, cluster=where)
    assert [row.sharded for row in plan.stages] == [("time",), ("space",)] * 3
    assert {row.inside for row in plan.stages} == {"nothing"}
    moves = [way for row in plan.stages for way in row.arrives] + list(plan.leaves)
    assert len(moves) == 2 * 3 and all("switch" in way for way in moves)
    share = prod(stages[0].shape) * 4 // 4
    assert plan.sent_bytes == 2 * 2 * 3 * share * 3 // 4  # forward and backward
    rival = {one.name: one for one in plan.rivals}
    assert set(rival) == {"ulysses", "ring", "gather", "megatron"}
    assert plan.sent_bytes <= 0.5 * rival["ulysses"].sent_bytes
    assert plan.sent_bytes <= 0.1 * rival["megatron"].sent_bytes
    assert all(plan.seconds < one.seconds for one in plan.rivals)


def test_the_simulator_plays_a_plan_in_the_time_it_says() -> None:
    stages, where = video(2, 16, 64), cluster(2, 2)
    plan = plan_stages(stages, sequence=DIMS, cluster=where, outside=["time"])
    ways = [plan.outside, *(row.sharded for row in plan.stages), plan.outside]
    there = [Layout(stages[0].layout(plan.axes, sharded).placements) for sharded in ways]
    shape, tasks = stages[0].shape, [[] for _ in range(4)]  # type: ignore[var-annotated]
    for sides, times in ((there, (1.0, 1.0)), (there[::-1], (2.0, 2.5))):
        for at, (src, dst) in enumerate(pairwise(sides)):
            for op in transition(src, dst, shape, stages[0].torch_dtype, plan.axes):
                assert isinstance(op, Comm)
                for rank in op.ranks:
                    tasks[rank].append(Task(op))
            if at < len(stages):
                work = (stages[0].flops, stages[at].attention_flops)
                if sides is not there:
                    work = (stages[0].flops, stages[-1 - at].attention_flops)
                for flops, more in zip(work, times, strict=True):
                    for schedule in tasks:
                        schedule.append(Task(Compute("matmul", flops * more / 4)))
    assert simulate(tasks, where).seconds == pytest.approx(plan.seconds)


def test_one_dim_falls_back_to_heads_or_ring() -> None:
    sizes = {"batch": 1, "tokens": 1024, "channel": 512}
    where = cluster(1, 4, flops=1e12)
    for heads, kv_heads, inside in ((8, 8, "heads"), (8, 1, "ring"), (1, 1, "ring")):
        block = transformer_block(
            "block", sizes, "tokens", heads, kv_heads=kv_heads, dtype="float32"
        )
        plan = plan_stages([block, replace(block, name="next")], sequence=["tokens"], cluster=where)
        assert [(row.sharded, row.inside) for row in plan.stages] == [(("tokens",), inside)] * 2
        assert plan.leaves == ()


def test_a_short_dim_takes_a_mesh_of_two_axes() -> None:
    # Two frames on four ranks: one axis would leave two ranks idle in every other block.
    stages, where = video(2, 2, 4096, channel=256), cluster(2, 2, flops=1e11)
    plan = plan_stages(stages, sequence=DIMS, cluster=where)
    assert plan.axes == {"sp_inter": 2, "sp_intra": 2}
    assert set(plan.stages[0].sharded) == {"time", "space"}
    assert plan.stages[0].inside in ("heads", "ring")
    line = plan_stages(stages, sequence=DIMS, cluster=where, axes={"sp": 4})
    assert plan.seconds < line.seconds


def test_a_skip_is_paid_for_as_well() -> None:
    # A stage that mixes both dims, and takes the first one's result too.
    sizes = {"time": 8, "space": 8, "channel": 4}
    stages = [
        Stage("first", sizes, ("space",), dtype="float32"),
        Stage("second", sizes, ("time",), dtype="float32"),
        Stage("third", sizes, ("space",), dtype="float32", after=("first", "second")),
    ]
    plan = plan_stages(stages, sequence=DIMS, cluster=cluster(1, 4))
    assert plan.seconds == pytest.approx(least(stages, cluster(1, 4), {"sp": 4}))


def test_what_is_refused() -> None:
    where = cluster(1, 4)
    both = Stage("both", {"time": 8, "space": 8}, DIMS)
    short = Stage("short", {"time": 2, "space": 8}, ("space",))
    for stages, told, match in (
        ([both], {"sequence": ["depth"]}, "'depth' is no dim"),
        ([both, both], {"sequence": DIMS}, "names of their own"),
        ([replace(both, after=("x",))], {"sequence": DIMS}, "which isn't before it"),
        ([], {"sequence": DIMS}, "one at least"),
    ):
        with pytest.raises(ConfigError, match=match):
            plan_stages(stages, cluster=where, **told)  # type: ignore[arg-type]
    with pytest.raises(ClusterError, match="5 ranks on a cluster of 4"):
        plan_stages([short], sequence=DIMS, cluster=where, ranks=5)
    for told, match in (
        ({"mixes": ("depth",)}, "mixes 'depth'"),
        ({"heads": 4, "kv_heads": 3, "head_dim": 8}, "no dim 'channel'"),
        ({"dtype": "float7"}, "no dtype"),
    ):
        with pytest.raises(ConfigError, match=match):
            Stage(**{"name": "a", "sizes": {"time": 2}, "mixes": ()} | told)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="no multiple of 3 heads"):
        transformer_block("a", {"time": 2, "channel": 8}, "time", 3)


def test_a_plan_is_kept(tmp_path: Path) -> None:
    plan = plan_stages(video(1, 8, 8), sequence=DIMS, cluster=read_cluster("8xh100-80gb"), ranks=4)
    write_plan(plan, tmp_path / "plan.json")
    assert read_plan(StagePlan, tmp_path / "plan.json") == plan
