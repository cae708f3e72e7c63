"""Steps on groups that change with every micro-batch, against one process; meshes of any ranks."""

import json
import os
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import astuple
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import yaml
from family import descendants
from ranks import Ranks
from test_train import command, train
from torch.distributed.device_mesh import DeviceMesh

from longspan.cluster.memory import memory
from longspan.comm.groups import Groups
from longspan.comm.mesh import make_mesh
from longspan.errors import ConfigError, LayoutError
from longspan.plan import BatchPlan, Group, MicroBatch
from longspan.planner.prices import Sharding
from longspan.planner.workload import Rates
from longspan.trace import Note, curve, read_trace
from longspan.train.batches import Batches
from longspan.train.config import Config, load_config
from longspan.train.exactness import Exactness, exactness
from longspan.train.fit import transformer_sizes
from longspan.train.grouped import group_sequences, grouped
from longspan.train.inspect import inspect
from longspan.train.parallelize import build_model, model_config, parallelize
from longspan.train.planning import Planning
from longspan.train.rates import told_apart
from longspan.train.step import StepRunner

STEPS, KEPT = 9, 6
MODEL = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


@pytest.fixture(scope="module")
def documents(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("documents") / "texts.jsonl"
    draw = random.Random(5)
    lengths = [round(4 * 1.06**n) for n in range(80)]
    texts = ["".join(draw.choices("abcdefgh ", k=length)) for length in lengths]
    path.write_text("".join(json.dumps({"text": t}) + "\n" for t in texts), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def eight() -> Iterator[Ranks]:
    ranks = Ranks(8, preload=("test_flexible", "transformers.models.llama.modeling_llama"))
    yield ranks
    ranks.stop(kill=True)


def random_plan(
    lengths: list[int], world: int, draw: random.Random, sharding: Sharding = "world"
) -> BatchPlan:
    """Any groups side by side, some ranks in none; overlapping those of other micro-batches."""
    left = list(range(len(lengths)))
    draw.shuffle(left)
    micro_batches = []
    while left:
        ranks = list(range(world))
        draw.shuffle(ranks)
        groups = []
        while left and ranks and not (groups and draw.random() < 0.2):
            members = tuple(sorted(ranks.pop() for _ in range(draw.randint(1, len(ranks)))))
            chosen = tuple(left.pop() for _ in range(min(len(left), draw.randint(1, 4))))
            inside = draw.choice(["ring", "heads"])
            groups.append(Group(members, chosen, inside, 0.0, 0, 0))
        micro_batches.append(MicroBatch(tuple(groups), 0.0))
    once = draw.random() < 0.7
    return BatchPlan(tuple(lengths), tuple(micro_batches), sharding, 0.0, 0.0, once)


def exact(_: DeviceMesh, documents: Path, shards: int, seed: int, train: dict) -> Exactness | None:
    """A random plan's step on all ranks, as trained; raises unless it is one process's."""
    world = dist.get_world_size()
    config = Config.model_validate(
        {
            "runs": documents.parent,
            "data": {"path": documents, "max_length": 300},
            "model": {"type": "llama", "config": MODEL},
            "train": {"steps": 1} | train,
        }
    )
    batches = Batches(config)
    model = build_model(config, batches.tokenizer.vocab_size, "cpu")
    mesh = make_mesh(world, world, "cpu")
    parallelize(model, config, mesh, shards)
    runner = StepRunner(model, mesh, "zigzag")
    groups = Groups("cpu", most=3)
    pieces = batches.documents_of(seed * 24, 24)
    sharding: Sharding = "none" if shards == 1 else "world"
    plan = random_plan([p.length for p in pieces], world, random.Random(seed), sharding)
    own = grouped(plan, pieces, batches.store, groups, 0)
    sequences = group_sequences(plan, pieces, batches.store)
    found = exactness(runner, batches, config, own, sequences)
    groups.close()
    busy = [any(dist.get_rank() in g.ranks for g in m.groups) for m in plan.micro_batches]
    waits = sharding == "world" or not plan.reduce_once
    assert len(own.sequences) == (len(busy) if waits else sum(busy[:-1]) + 1)
    return found


@pytest.mark.parametrize(
    ("shards", "seed", "train"),
    [(4, 0, {}), (4, 1, {"checkpointing": "selective"}), (2, 2, {}), (1, 6, {}), (4, 4, {})],
)
def test_a_planned_step_is_one_process(
    ranks: Ranks, documents: Path, shards: int, seed: int, train: dict
) -> None:
    check(ranks.run(exact, documents, shards, seed, train)[0])


@pytest.mark.slow
@pytest.mark.parametrize(("shards", "seed"), [(8, 5), (4, 6)])
def test_on_eight_ranks(eight: Ranks, documents: Path, shards: int, seed: int) -> None:
    check(eight.run(exact, documents, shards, seed, {}, world=8)[0])


def check(found: Exactness | None) -> None:
    assert found is not None and found.documents == 24
    assert found.loss_difference < 1e-5 and found.gradient_difference < 1e-5


def regrouped(_: DeviceMesh) -> tuple[list[int], list[float]]:
    """How many sets are kept, and the sums that the groups made, in orders that overlap."""
    here, world = dist.get_rank(), dist.get_world_size()
    groups = Groups("cpu", most=2)
    kept, sums = [], []
    everyone = list(range(world))
    rings = [tuple(sorted((r, (r + 1) % world))) for r in everyone]
    asked = [rings, rings[::-1], [everyone, [0, 2], [1, 3]], [[0, 2]], [[1, 2, 3]], rings[1:3]]
    for sets in asked:
        meshes = groups.meshes(sets)
        kept.append(len(groups._kept))
        for ranks, mesh in zip(sets, meshes, strict=True):
            assert (mesh is not None) == (here in ranks)
            if mesh is not None:
                value = torch.tensor(float(here))
                dist.all_reduce(value, group=mesh.get_group())
                sums.append(value.item() - sum(ranks))
    with pytest.raises(LayoutError, match="ascending"):
        groups.meshes([[1, 0]])
    with pytest.raises(LayoutError, match="0 to 3"):
        groups.meshes([[3, 4]])
    assert groups.meshes([[0, 2]])[0] is groups.meshes([[0, 2]])[0]
    assert groups.alone.size() == 1
    groups.close()
    return kept, sums


def test_groups_overlap_in_any_order_and_are_bounded(ranks: Ranks) -> None:
    for kept, sums in ranks.run(regrouped):
        assert kept == [4, 4, 2, 2, 2, 2]
        assert sums == [0.0] * len(sums)


def write_config(documents: Path, folder: Path) -> Path:
    """Two devices in a node; memory for the longest document only if both share it."""
    device = {"memory_bytes": 2**30, "bytes_per_s": 1e10, "peak": {"matmul": {"float32": 2e10}}}
    link = {"bytes_per_s": 1e9, "latency_s": 2e-5}
    cluster = {
        "devices": {"cpu": device},
        "sites": [{"nodes": [{"devices": {"cpu": 2}, "link": link}]}],
    }
    (folder / "cluster.yaml").write_text(yaml.safe_dump(cluster), encoding="utf-8")
    config = {
        "runs": str(folder),
        "data": {"path": str(documents), "max_length": 400},
        "model": {"type": "llama", "config": MODEL},
        "parallel": {
            "mode": "flexible",
            "cluster": str(folder / "cluster.yaml"),
            "memory_bytes": 2_300_000,
        },
        "train": {"steps": STEPS, "global_batch": 24, "validate_every": KEPT},
        "checks": {"exactness": True},
        "checkpoint": {"every": KEPT},
    }
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(config), encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        (("parallel.mode=fixed",), "train.global_batch is for planned steps"),
        (("parallel.cluster=null",), "run longspan probe"),
        (("parallel.cluster=8xa100-40gb",), "devices, but there are 2 processes"),
        (("train.global_batch=null",), "needs train.global_batch"),
        (("train.accumulate=2",), "the plan's to choose"),
        (("parallel.sp=1",), "the plan's to choose"),
    ],
)
def test_settings_that_do_not_go_together(
    documents: Path, tmp_path: Path, changes: tuple[str, ...], told: str
) -> None:
    config = load_config(write_config(documents, tmp_path), changes)
    with pytest.raises(ConfigError, match=told):
        inspect(config, 2, 2)


def kill_planner(run: subprocess.Popen[str]) -> None:
    """Kill the planner of a run as soon as there is one."""
    while run.poll() is None:
        for pid in descendants(run.pid):
            with suppress(OSError):
                if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes():
                    os.kill(pid, signal.SIGKILL)
                    return
        time.sleep(0.05)


@pytest.mark.slow
def test_a_flexible_run_and_what_it_goes_on_with(documents: Path, tmp_path: Path) -> None:
    config = write_config(documents, tmp_path)
    train(config)
    trace = tmp_path / "run" / "trace.jsonl"
    before = list(read_trace(trace))
    plans = [row.about for row in before if isinstance(row, Note) and row.kind == "plan"]
    assert [plan["step"] for plan in plans] == list(range(1, STEPS + 1))
    sizes = {len(g["ranks"]) for p in plans for m in p["micro_batches"] for g in m["groups"]}
    assert sizes <= {1, 2}
    rates = json.loads((tmp_path / "run" / "rates.json").read_text())["rates"]
    assert all(kind["micro_batch_s"] > 0 and kind["token_s"] > 0 for kind in rates.values())
    assert [step for step, _ in curve(before, "validation_loss")] == [KEPT, STEPS]
    losses = curve(before, "loss")
    assert losses[-1][1] < losses[0][1]

    shutil.rmtree(tmp_path / "run" / "checkpoints" / f"step-{STEPS:08d}")
    words = command(config)
    again = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    kill_planner(again)
    _, told = again.communicate(timeout=200)
    assert again.returncode == 0, told
    after = list(read_trace(trace))[len(before) :]
    assert curve(after, "loss") == losses[KEPT:]
    assert curve(after, "planner_restarts")[-1][1] == 1


def test_parameters_are_sharded_where_memory_asks_for_it(documents: Path, tmp_path: Path) -> None:
    config = load_config(write_config(documents, tmp_path))
    batches = Batches(config)
    model = model_config(config, batches.tokenizer.vocab_size)
    # With the whole model on each rank, memory for a little less than half of it, and for more.
    share, found = batches.longest_piece // 2, []
    for tokens in (share - 4, share + 1):
        sizes = transformer_sizes(config, model)
        least = memory(sizes, tokens, exchanged=True).total
        own = load_config(write_config(documents, tmp_path), (f"parallel.memory_bytes={least}",))
        found.append(Planning(own, batches, model).best_sharding(batches.lengths_of(0, 24)))
    assert found == ["world", "none"]


@pytest.mark.parametrize("tile", [1, 64, 512])
def test_four_times_tell_the_rates_apart(tile: int) -> None:
    rates = Rates(0.12, 3e-4, 5e-7, document_s=8e-3)

    def takes(lengths: list[int]) -> float:
        pairs = sum(sum(min(n, -(-row // tile) * tile) for row in range(1, n + 1)) for n in lengths)
        own = rates.micro_batch_s + rates.document_s * len(lengths)
        return own + rates.token_s * sum(lengths) + rates.pair_s * pairs

    shapes = [[1], [100] * 8, [25] * 32, [800]]
    found = told_apart(shapes, [takes(shape) for shape in shapes], tile)
    assert astuple(found) == pytest.approx(astuple(rates))


def test_no_rate_is_told_to_be_less_than_nothing() -> None:
    # One document that takes less than many of as many tokens: its pairs can't take less than 0.
    found = told_apart([[1], [100] * 8, [25] * 32, [800]], [0.1, 0.5, 0.9, 0.4], 1)
    assert min(astuple(found)) >= 0
    assert found.token_s > 0 and found.document_s > 0
