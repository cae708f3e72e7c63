"""Per-layer plans: prices from the one table, the best of all strategies, within memory, told."""

import json
from itertools import product
from math import prod
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.distributed.tensor import Partial, Replicate, Shard
from torch.nn import functional as F

from longspan.cli import main
from longspan.cluster.cost import demand
from longspan.cluster.fabric import Link
from longspan.cluster.spec import Cluster, Device, uniform
from longspan.errors import ConfigError, MemoryLimitError
from longspan.layout import Layout, layout_of
from longspan.plan import LayerPlan, read_plan, write_plan
from longspan.planner.capture import capture
from longspan.planner.choices import mesh_of
from longspan.planner.crossing import crossing_bits_per_s
from longspan.planner.graph import Graph
from longspan.planner.layer_search import Planner
from longspan.planner.layer_wires import PARTIAL, REPLICATE, ClusterWires, Moves
from longspan.planner.layers import plan_layers
from longspan.planner.price import Pricing
from longspan.report.layers import draw_layers
from longspan.schedule.splits import SPLITS
from longspan.schedule.switch import transition


def cluster(
    nodes: int,
    devices: int,
    gbit: float = 10.0,
    latency_s: float = 5e-5,
    memory_bytes_per_s: float = 1e11,
    **taken: float,
) -> Cluster:
    device = Device(
        memory_bytes="1GB",
        bytes_per_s=memory_bytes_per_s,
        peak={"matmul": {"float32": 1e12}},
        overhead_s=1e-6,
        **taken,
    )
    return uniform(
        device,
        nodes=nodes,
        devices=devices,
        link=Link(latency_s=5e-6, bytes_per_s=1e10),
        network=Link(latency_s=latency_s, bytes_per_s=gbit / 8 * 1e9),
    )


class Net(nn.Module):
    """A little of everything: an embedding, a norm, products, a residual, a loss."""

    def __init__(self, width: int = 48, vocab: int = 96) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocab, width)
        self.norm, self.up = nn.LayerNorm(width), nn.Linear(width, 4 * width)
        self.down, self.head = nn.Linear(4 * width, width), nn.Linear(width, vocab)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        h = self.embed(x)
        h = h + self.down(self.up(self.norm(h)).relu())
        return F.cross_entropy(self.head(h).flatten(0, 1), y.flatten())


def net(width: int = 48, vocab: int = 96, batch: int = 24) -> tuple[nn.Module, tuple[object, ...]]:
    with torch.device("meta"):
        tokens = [torch.empty(batch, 12, dtype=torch.long) for _ in range(2)]
        return Net(width, vocab), tuple(tokens)


def captured(**sizes: int) -> Graph:
    model, inputs = net(**sizes)
    return capture(model, inputs)


def test_a_change_on_one_axis_costs_what_the_schedule_sends() -> None:
    place = cluster(2, 4)
    moves = Moves(ClusterWires(place, (2, 2, 2)))
    capacity = place.fabric.capacity
    axes = {"a": 2, "b": 2, "c": 2}
    shape = (16, 24)
    known = {REPLICATE: Replicate(), PARTIAL: Partial(), 0: Shard(0), 1: Shard(1)}
    for axis, before, after in product(range(3), known, known):
        if before == after or after == PARTIAL:
            continue
        src, dst = ([REPLICATE] * 3 for _ in range(2))
        src[axis], dst[axis] = before, after
        layouts = [
            Layout({name: known[code] for name, code in zip(axes, codes, strict=True)})
            for codes in (src, dst)
        ]
        ops = transition(*layouts, shape, torch.float32, axes)
        took = 0.0
        for kind in dict.fromkeys(op.kind for op in ops):
            asked = [demand(op, place) for op in ops if op.kind == kind]
            load = np.zeros(len(capacity))
            for one in asked:
                load[one.pipes] += one.bytes
            took += max(one.latency_s for one in asked) + float((load / capacity).max())
        once, each = moves.price(tuple(src), tuple(dst))
        assert once + each * 4 * prod(shape) == pytest.approx(took, rel=1e-6, abs=1e-12)


def test_every_change_on_several_axes_comes_to_an_end() -> None:
    moves = Moves(ClusterWires(cluster(2, 4), (2, 2, 2)))
    layouts = list(product((REPLICATE, 0, 1), repeat=3))
    for src, dst in product(layouts, layouts):
        once, each = moves.price(src, dst)
        assert once >= 0 and each >= 0
        assert (each == 0) or src != dst
        # Gathering all and cutting it again is a way, too.
        whole = (REPLICATE,) * 3
        assert each <= moves.price(src, whole)[1] + 1e-15
    for src in product((REPLICATE, PARTIAL), (REPLICATE, PARTIAL, 0), (REPLICATE, PARTIAL, 0, 1)):
        summed = tuple(REPLICATE if code == PARTIAL else code for code in src)
        assert (moves.price(src, summed)[1] > 0) == (PARTIAL in src)


def test_the_best_is_the_best_of_all() -> None:
    class Tiny(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(64, 256), nn.Linear(256, 64)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.down(self.up(x).relu()).square().mean()

    with torch.device("meta"):
        graph = capture(Tiny(), (torch.empty(16, 64),))
    for gbit, overlap in ((0.01, 1.0), (1, 1.0), (100, 1.0), (1, 0.0)):
        planner = Planner(graph, cluster(2, 1, gbit), Pricing(overlap=overlap, recompute=False))
        found = planner.best()
        every = [np.flatnonzero(np.isfinite(node.costs.now)) for node in planner.nodes]
        least = min(planner.measure(tuple(map(int, at))) for at in product(*every))
        assert found.bound <= found.seconds <= least * (1 + 1e-9)
        assert found.seconds <= found.bound * 1.05
        assert planner.measure(found.assignment) == found.seconds
        for other in (planner.data_parallel(), planner.tensor_parallel()):
            assert found.seconds <= other.seconds * (1 + 1e-9)


def test_data_parallel_costs_its_reductions() -> None:
    graph = captured()
    place = cluster(4, 1)
    planner = Planner(graph, place, Pricing(overlap=0.0, zero=False, bucket_bytes=1e-9))
    none = Planner(graph, cluster(1, 1), Pricing(overlap=0.0, zero=False))
    weights = sum(w.numel for layer in graph.layers for w in layer.weights) * 4
    reduced = 2 * weights * 3 / 4 / (10 / 8 * 1e9)
    tensors = sum(len(layer.weights) for layer in graph.layers)
    latency = (tensors + 1) * 4 * 5e-5  # two axes, each there and back; the loss is summed, too
    alone = none.best().seconds
    assert planner.data_parallel().seconds == pytest.approx(alone / 4 + reduced + latency, rel=0.15)


def test_hidden_sums_take_from_backward() -> None:
    """Where devices compute for what they send; sums that are not hidden take what they took.

    With a bucket for each layer, only the first one's sum is not hidden.
    """
    graph = captured()
    weights = [sum(w.numel for w in layer.weights) for layer in graph.layers]
    hidden = sum(weights) - next(filter(None, weights))
    sent = 2 * 4 * hidden * 3 / 4  # and as much is received
    seconds = {}
    for gbit, byte_s, overlap in product((0.01, 1000), (0.0, 4e-12), (0.0, 1.0)):
        place = cluster(4, 1, gbit, latency_s=0.0, byte_s=byte_s)
        pricing = Pricing(overlap=overlap, zero=False, bucket_bytes=1.0)
        planner = Planner(graph, place, pricing)
        seconds[gbit, byte_s > 0, overlap] = planner.data_parallel().seconds
    slow, quick = 0.01, 1000
    for overlap in (0.0, 1.0):
        assert seconds[slow, True, overlap] == pytest.approx(seconds[slow, False, overlap])
    assert seconds[quick, True, 0.0] == pytest.approx(seconds[quick, False, 0.0])
    taken = 2 * sent * 4e-12
    assert seconds[quick, True, 1.0] - seconds[quick, False, 1.0] == pytest.approx(taken, rel=0.05)


def test_messages_have_their_price() -> None:
    """Each that a rank sends or receives, whatever its size, in every row of the table."""
    free, taken = (
        ClusterWires(cluster(2, 4, latency_s=0.0, message_s=message_s), (2, 4))
        for message_s in (0.0, 1e-3)
    )
    for kind, messages in (("gather", 3), ("scatter", 3), ("switch", 3), ("reduce", 6)):
        once, each = taken.row(kind, 1, 2)  # in a node
        assert once - free.row(kind, 1, 2)[0] == pytest.approx(2e-3 * messages, rel=1e-3)
        assert each == pytest.approx(free.row(kind, 1, 2)[1], rel=1e-2)
        handled = ClusterWires(taken.cluster, (2, 4), handling=True).row(kind, 1, 2)
        assert handled[0] == pytest.approx(2e-3 * messages, rel=1e-3) and handled[1] < 1e-2 * each


@pytest.mark.parametrize("world", [1, 2, 3, 6, 12, 24])
def test_any_number_of_devices(world: int) -> None:
    model, inputs = net()
    plan = plan_layers(model, inputs, cluster=cluster(3, 8), ranks=world)
    assert prod(plan.axes.values()) == world
    for layer in plan.layers:
        assert set(layer.splits) <= set(SPLITS[layer.kind])
        used = [axis for axes in layer.splits.values() for axis in axes]
        assert len(used) == len(set(used)) and set(used) <= set(plan.axes)
        for placements in (layer.output, *layer.weights.values(), *(p for _, p in layer.inputs)):
            layout_of(placements)
        assert "P" not in layer.output.values()
    assert plan.lower_bound_s <= plan.seconds <= min(plan.alternatives.values()) * (1 + 1e-9)


def test_meshes_follow_the_cluster() -> None:
    assert mesh_of(24, [1, 3, 8]) == (3, 2, 2, 2)
    assert mesh_of(12, [1, 3, 8]) == (3, 2, 2)
    assert mesh_of(1, [1, 1, 1]) == (1,)


def test_slow_links_keep_large_weights_in_place() -> None:
    model, inputs = net(width=512, vocab=4096, batch=64)
    plan = plan_layers(model, inputs, cluster=cluster(4, 1, 20))
    layers = {layer.name: layer for layer in plan.layers}
    assert {"out", "in"} & set(layers["head"].splits)
    assert plan.alternatives["data_parallel"] > 1.2 * plan.seconds
    assert "gradient sums" in layers["head"].why


def test_memory_is_kept_to() -> None:
    model, inputs = net(width=256, vocab=2048)
    place = cluster(2, 2)
    free = plan_layers(model, inputs, cluster=place, memory_limit=np.inf)
    last = free.seconds
    for share in (0.9, 0.75):
        limit = share * free.memory_bytes
        try:
            plan = plan_layers(model, inputs, cluster=place, memory_limit=limit)
        except MemoryLimitError:
            break
        assert plan.memory_bytes <= limit
        assert plan.seconds >= last * (1 - 1e-6)
    with pytest.raises(MemoryLimitError, match=r"more than the limit of 1,000,000; .*embed"):
        plan_layers(model, inputs, cluster=place, memory_limit=1e6)


def test_layers_can_be_fixed(tmp_path: Path) -> None:
    model, inputs = net()
    place = cluster(2, 2)
    free = plan_layers(model, inputs, cluster=place)
    fixed = plan_layers(model, inputs, cluster=place, fixed={"up": {"out": 4}, "norm": {}})
    layers = {layer.name: layer for layer in fixed.layers}
    assert layers["up"].splits == {"out": ("m0", "m1")} and not layers["norm"].splits
    assert fixed.seconds >= free.seconds
    with pytest.raises(ConfigError, match="no layer 'nowhere'"):
        plan_layers(model, inputs, cluster=place, fixed={"nowhere": {}})
    with pytest.raises(ConfigError, match=r"can't be split as s×4 c×5: use one of"):
        plan_layers(model, inputs, cluster=place, fixed={"up": {"s": 4, "c": 5}})
    write_plan(fixed, tmp_path / "plan.json")
    assert read_plan(LayerPlan, tmp_path / "plan.json") == fixed
    drawn = draw_layers(fixed)
    assert all(layer.name in drawn for layer in fixed.layers)


def test_data_parallel_wins_above_a_bandwidth() -> None:
    graph = captured(width=256, vocab=512, batch=64)
    place = cluster(2, 1, latency_s=1e-7, memory_bytes_per_s=1e14)
    rate = crossing_bits_per_s(graph, place, Pricing(zero=False, recompute=False))
    assert rate is not None and rate > 0

    def gain(gbit: float) -> float:
        where = cluster(2, 1, gbit, latency_s=1e-7, memory_bytes_per_s=1e14)
        planner = Planner(graph, where, Pricing(zero=False, recompute=False))
        return planner.data_parallel().seconds / planner.best().seconds

    assert gain(rate / 1e9 / 1.3) > 1.01 > gain(rate / 1e9 * 1.3)


def test_pase_prices_know_no_latency_or_topology() -> None:
    graph = captured()
    pricing = Pricing(model="pase", overlap=0.0, zero=False, recompute=False)
    near = Planner(graph, cluster(1, 8, 80), pricing).data_parallel().seconds
    slow = Planner(graph, cluster(2, 4, 80), pricing).data_parallel().seconds
    assert near == pytest.approx(slow)


def test_plan_layers_on_the_command_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "tinymodel.py").write_text(
        "import torch\n"
        "class Net(torch.nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__(); self.one = torch.nn.Linear(64, 64)\n"
        "    def forward(self, x): return self.one(x).square().mean()\n"
    )
    call = ["plan-layers", "tinymodel:Net", "--cluster=8xa100-40gb", "--ranks=4"]
    with pytest.raises(SystemExit) as done:
        main([*call, "--input=32x64", "--fix=one=b:2,out:2", "--out=plan.json", "--svg=plan.svg"])
    assert done.value.code == 0
    printed = capsys.readouterr().out
    assert "a step of Net on 4 devices" in printed and "What is fixed costs" in printed
    assert "b×2 out×2" in printed
    assert (tmp_path / "plan.svg").read_text().startswith("<svg")
    with pytest.raises(SystemExit):
        main([*call, "--input=32x64", "--json"])
    told = json.loads(capsys.readouterr().out)
    assert told["layers"][0]["name"] == "one" and told["alternatives"]
    for wrong, words in (
        (["--input=32by64"], "write it like 128x3x224x224"),
        ([], "needs inputs"),
        (["--input=32x64", "--fix=one"], "write it like fc1=b:4"),
        (["--input=32x64", "--prices=x"], "use longspan or pase"),
        (["--input=32x64", "--memory=much"], "write it like 40GB"),
    ):
        with pytest.raises(SystemExit) as done:
            main([*call, *wrong])
        assert done.value.code == 2 and words in capsys.readouterr().err
