"""Models run as planned: loss and gradients of one process, bytes of the plan, by hooks alone."""

import warnings
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from math import prod
from random import Random
from typing import Any

import pytest
import torch
from ranks import Ranks
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from examples.plant.forecaster import Forecaster
from longspan.cluster.fabric import Link
from longspan.cluster.spec import Device, uniform
from longspan.comm.counting import CountBytes
from longspan.errors import LayoutError, ModelError
from longspan.models.diffusers import parallelize_latte
from longspan.models.forms import Form
from longspan.models.stages import Outside, Sees, parallelize_stages, sum_gradients
from longspan.plan import StagePlan
from longspan.planner.stage import Stage, transformer_block
from longspan.planner.stage_price import Price, Pricer
from longspan.planner.stages import plan_stages

PLANT = {"*": Sees("batch time sensor channel", attention="attention")}
PLANT_ENDS = Outside(
    inputs={"readings": "batch time sensor patch"},
    state={"time": "time channel", "sensor": "sensor channel"},
    result="batch time sensor patch",
)
CLUSTER = uniform(
    Device(memory_bytes=1, bytes_per_s=1e10, peak={"matmul": {"float64": 1e9}}),
    devices=2,
    nodes=2,
    link=Link(latency_s=1e-6, bytes_per_s=1e9),
    network=Link(latency_s=1e-5, bytes_per_s=1e8),
)


def stages(names: Sequence[str], dims: Sequence[str], sizes: dict[str, int]) -> list[Stage]:
    return [
        transformer_block(f"{name}.{i}", sizes, dim, 4, causal=name == "over_time", dtype="float64")
        for i in range(2)
        for name, dim in zip(names, dims, strict=True)
    ]


def plant_stages(times: int, sensors: int, batch: int = 2) -> list[Stage]:
    sizes = {"batch": batch, "time": times, "sensor": sensors, "channel": 16}
    return stages(("over_sensors", "over_time"), ("sensor", "time"), sizes)


def latte_stages(frames: int) -> list[Stage]:
    sizes = {"batch": 2, "time": frames, "space": 16, "channel": 32}
    names = ("transformer_blocks", "temporal_transformer_blocks")
    return stages(names, ("space", "time"), sizes)


def by_hand(
    found: Sequence[Stage], outside: str | None, ways: Sequence[tuple[str | None, str]]
) -> StagePlan:
    """A plan whose stages run in these ways, in turn."""
    sequence = list(dict.fromkeys(dim for stage in found for dim in stage.mixes))
    plan = plan_stages(found, sequence=sequence, cluster=CLUSTER)
    rows = tuple(
        replace(row, sharded=(way[0],), inside=way[1])  # type: ignore[arg-type]
        for row, way in zip(plan.stages, [*ways] * len(found), strict=False)
    )
    return replace(plan, axes={"sp": 4}, stages=rows, outside=(outside,))


def planned(found: Sequence[Stage], **told: Any) -> StagePlan:
    sequence = list(dict.fromkeys(dim for stage in found for dim in stage.mixes))
    return plan_stages(found, sequence=sequence, cluster=CLUSTER, **told)


def forecaster(times: int, sensors: int) -> tuple[nn.Module, dict[str, torch.Tensor]]:
    torch.manual_seed(0)
    model = Forecaster(times, sensors, 3, 16, 4, 2).double()
    return model, {"readings": torch.randn(2, times, sensors, 3, dtype=torch.float64)}


def latte(frames: int) -> tuple[nn.Module, dict[str, Any]]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from diffusers import LatteTransformer3DModel

        torch.manual_seed(0)
        model = LatteTransformer3DModel(
            num_attention_heads=4,
            attention_head_dim=8,
            in_channels=4,
            out_channels=8,
            num_layers=2,
            cross_attention_dim=32,
            attention_bias=True,
            sample_size=8,
            patch_size=2,
            activation_fn="gelu-approximate",
            num_embeds_ada_norm=1000,
            norm_type="ada_norm_single",
            norm_elementwise_affine=False,
            norm_eps=1e-6,
            caption_channels=12,
            video_length=frames,
        ).double()
    inputs = {
        "hidden_states": torch.randn(2, 4, frames, 8, 8, dtype=torch.float64),
        "encoder_hidden_states": torch.randn(2, 5, 12, dtype=torch.float64),
        "timestep": torch.tensor([3, 700]),
    }
    return model, inputs


def loss_and_grads(
    model: nn.Module, inputs: dict[str, torch.Tensor]
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    model.zero_grad()
    out = model(**inputs)
    out = out if isinstance(out, torch.Tensor) else out.sample
    torch.manual_seed(5)
    loss = (out * torch.randn(out.shape, dtype=out.dtype)).sum() + out.square().mean()
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters()}  # type: ignore[misc]


@lru_cache(4)
def grid(inter: int, intra: int) -> DeviceMesh:
    return init_device_mesh("cpu", (inter, intra), mesh_dim_names=("sp_inter", "sp_intra"))


def same_as_one_process(
    line: DeviceMesh, which: str, size: tuple[int, ...], plan: StagePlan, chunks: int
) -> tuple[int, int]:
    """Asserts on this rank; bytes that it sent in stages, forward and backward."""
    mesh = line if len(plan.axes) == 1 else grid(*plan.axes.values())
    model, inputs = (forecaster if which == "plant" else latte)(*size)
    loss, grads = loss_and_grads(model, inputs)
    if which == "plant":
        hooked = parallelize_stages(model, plan, mesh, PLANT, outside=PLANT_ENDS, chunks=chunks)
    else:
        hooked = parallelize_latte(model, plan, mesh, chunks=chunks)
    again = {name: x.clone() for name, x in inputs.items()}
    with CountBytes() as count:
        found, found_grads = loss_and_grads(model, again)
    sent = count.total_sent
    sum_gradients(model, mesh)
    assert abs(found - loss) <= 1e-9 * abs(loss)
    for name, grad in grads.items():
        got = found_grads[name]
        assert got is not None, name
        assert torch.allclose(got, grad, rtol=1e-9, atol=1e-11), name
    hooked.remove()
    plain, _ = loss_and_grads(model, inputs)
    assert torch.equal(plain, loss), "the hooks are gone"
    out = prod(inputs["readings" if which == "plant" else "hidden_states"].shape) * 8
    return sent, out


@pytest.mark.parametrize(
    ("times", "sensors", "outside", "ways"),
    [
        (7, 5, "sensor", [("time", "nothing"), ("sensor", "nothing")]),
        (7, 3, "time", [("time", "nothing"), ("sensor", "nothing")]),  # a rank without sensors
        (9, 6, "time", [("time", "nothing"), ("time", "heads")]),
        (9, 6, "time", [("time", "nothing"), ("time", "ring")]),
        (6, 10, "sensor", [("sensor", "heads"), ("sensor", "nothing")]),
        (6, 10, "sensor", [("sensor", "ring"), ("time", "ring")]),
        (6, 9, "time", [("time", "nothing"), (None, "nothing")]),
        (6, 9, None, [(None, "nothing"), ("sensor", "nothing")]),
    ],
)
@pytest.mark.parametrize("chunks", [1, 2])
def test_the_forecaster_on_four_ranks(
    ranks: Ranks,
    times: int,
    sensors: int,
    outside: str | None,
    ways: list[tuple[str | None, str]],
    chunks: int,
) -> None:
    plan = by_hand(plant_stages(times, sensors), outside, ways)
    ranks.run(same_as_one_process, "plant", (times, sensors), plan, chunks)


@pytest.mark.parametrize(
    ("frames", "ways", "chunks"),
    [
        (8, [("time", "nothing"), ("space", "nothing")], 1),
        (7, [("time", "nothing"), ("space", "nothing")], 2),  # one frame on the last rank
        (7, [("space", "heads"), ("space", "nothing")], 1),
        (8, [("time", "nothing"), ("time", "ring")], 2),
        (8, [("time", "nothing"), (None, "nothing")], 1),
    ],
)
def test_an_unchanged_video_transformer(
    ranks: Ranks, frames: int, ways: list[tuple[str | None, str]], chunks: int
) -> None:
    plan = by_hand(latte_stages(frames), "time", ways)
    ranks.run(same_as_one_process, "latte", (frames,), plan, chunks)


def no_frame_for_a_rank(mesh: DeviceMesh, plan: StagePlan) -> None:
    with pytest.raises(LayoutError, match="one would have none"):
        parallelize_latte(latte(3)[0], plan, mesh)
    with pytest.raises(ModelError, match="a Latte model"):
        parallelize_latte(forecaster(3, 4)[0], plan, mesh)


def test_three_frames_take_two_axes(ranks: Ranks) -> None:
    axes = {"sp_inter": 2, "sp_intra": 2}
    plan = planned(latte_stages(3), outside=["time"], empty=False, axes=axes)
    assert set(plan.outside) == {"time", None}
    ranks.run(same_as_one_process, "latte", (3,), plan, 1)
    alone = by_hand(latte_stages(3), "time", [("time", "nothing"), ("space", "nothing")])
    ranks.run(no_frame_for_a_rank, alone)


def test_two_switches_a_pair_to_the_byte(ranks: Ranks) -> None:
    plan = planned(plant_stages(8, 12), outside=["time"])
    assert [row.sharded for row in plan.stages] == [("time",), ("sensor",)] * 2
    share = 2 * 8 * 12 * 16 * 8 // 4
    switches = 2 * 2  # of two pairs
    for sent, out in ranks.run(same_as_one_process, "plant", (8, 12), plan, 1):
        # The result is gathered at the end: that is the model's, not the stages'.
        assert sent - out * 3 // 4 == 2 * switches * share * 3 // 4 == plan.sent_bytes
    rivals = {one.name: one.sent_bytes for one in plan.rivals}
    assert plan.sent_bytes <= 0.5 * rivals["ulysses"]
    assert plan.sent_bytes <= 0.1 * rivals["megatron"]


@pytest.mark.parametrize("inside", ["heads", "ring", "gather"])
def test_the_known_ways_send_what_they_are_priced_for(ranks: Ranks, inside: str) -> None:
    found, pricer = plant_stages(8, 12), Pricer(CLUSTER, {"sp": 4})
    way = (None, "nothing") if inside == "gather" else ("time", inside)
    priced = Price()
    for stage in found[1::2]:
        for one in ((("time",), way[:1]), (way[:1], ("time",))):
            priced += pricer.move(stage, *one)
        priced += pricer.inside(stage, way[:1], way[1])  # type: ignore[arg-type]
    plan = by_hand(found, "time", [("time", "nothing"), way])
    sent = ranks.run(same_as_one_process, "plant", (8, 12), plan, 1)
    assert [one - out * 3 // 4 for one, out in sent] == [priced.sent[rank] for rank in range(4)]


class Mix(nn.Module):
    """Brings the places of one dim of (batch, time, sensor, channel) together, gated by another."""

    def __init__(self, size: int, dim: int) -> None:
        super().__init__()
        self.dim, self.weight = dim, nn.Parameter(torch.randn(size, size, dtype=torch.float64))

    def forward(self, x: torch.Tensor, gate: torch.Tensor | None = None) -> torch.Tensor:
        x = x if gate is None else x * gate.tanh()
        mixed: torch.Tensor = (self.weight @ x.movedim(self.dim, -2)).movedim(-2, self.dim)
        return x + mixed


# A graph with skips, a stage that takes what comes from outside again, and two that leave.
GRAPH: dict[str, tuple[str, tuple[str, ...]]] = {
    "a": ("sensor", ()),
    "b": ("time", ("a",)),
    "c": ("sensor", ("a",)),
    "d": ("time", ("b", "c")),
    "e": ("sensor", ()),
    "f": ("time", ("d", "a")),
    "g": ("sensor", ("e", "b")),
}


class Graph(nn.Module):
    def __init__(self, times: int, sensors: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.start = nn.Linear(2, 4).double()
        for name, (dim, _) in GRAPH.items():
            setattr(self, name, Mix(*((sensors, 2) if dim == "sensor" else (times, 1))))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        made: dict[str, torch.Tensor] = {}
        x = self.start(x)
        for name, (_, after) in GRAPH.items():
            made[name] = self.get_submodule(name)(*([made[one] for one in after] or [x]))
        return made["f"] * made["g"]


def graph_stages(times: int, sensors: int) -> list[Stage]:
    sizes = {"batch": 3, "time": times, "sensor": sensors, "channel": 4}
    return [
        Stage(name, sizes, (dim,), flops=1e9, dtype="float64", after=after)
        for name, (dim, after) in GRAPH.items()
    ]


def graph_on_ranks(line: DeviceMesh, times: int, sensors: int, plan: StagePlan, chunks: int) -> int:
    """Asserts that it is what one process finds; bytes that this rank sent."""
    mesh = line if len(plan.axes) == 1 else grid(*plan.axes.values())
    model, x = Graph(times, sensors), torch.randn(3, times, sensors, 2, dtype=torch.float64)
    words = "batch time sensor channel"
    sees = {
        name: Sees(words, joins={"gate": words} if len(after) == 2 else {})
        for name, (_, after) in GRAPH.items()
    }
    alone = [loss_and_grads(model, {"x": x[:some]}) for some in (3, 2)]
    ends = Outside(inputs={"x": words}, result=words)
    hooked = parallelize_stages(model, plan, mesh, sees, outside=ends, chunks=chunks)
    sent = []
    for some, (loss, grads) in zip((3, 2), alone, strict=True):
        with CountBytes() as count:
            found, found_grads = loss_and_grads(model, {"x": x[:some]})
        sent.append(count.total_sent)
        sum_gradients(model, mesh)
        assert torch.allclose(found, loss, rtol=1e-9)
        for name, grad in grads.items():
            assert torch.allclose(found_grads[name], grad, rtol=1e-9, atol=1e-11), name
    hooked.remove()
    return sent[0]


@pytest.mark.parametrize("axes", [{"sp": 4}, {"sp_inter": 2, "sp_intra": 2}])
def test_a_graph_as_planned_to_the_byte(ranks: Ranks, axes: dict[str, int]) -> None:
    plan = planned(graph_stages(8, 12), axes=axes)
    gathered = 3 * 8 * 12 * 4 * 8 * 3 // 4 if None not in plan.outside else 0
    sent = ranks.run(graph_on_ranks, 8, 12, plan, 1)
    assert max(sent) - gathered == plan.sent_bytes > 0


@pytest.mark.parametrize("seed", range(8))
def test_a_graph_in_any_layouts(ranks: Ranks, seed: int) -> None:
    times, sensors = [(6, 9), (7, 3)][seed % 2]
    plan, choose = planned(graph_stages(times, sensors), axes={"sp": 4}), Random(seed)
    rows = tuple(
        replace(row, sharded=(choose.choice([None, *({"time", "sensor"} - {*row.mixes})]),))
        for row in plan.stages
    )
    plan = replace(plan, stages=rows, outside=(choose.choice(["time", "sensor", None]),))
    ranks.run(graph_on_ranks, times, sensors, plan, 1 + seed // 4)


def refusals(mesh: DeviceMesh, plan: StagePlan) -> None:
    model, inputs = forecaster(8, 12)
    join = Sees("batch time sensor channel", joins={"skip": "batch time sensor channel"})
    for change, told, error, match in (
        ({"axes": {"sp": 3}}, {}, LayoutError, "the plan is for a mesh of"),
        ({}, {"sees": {}}, ModelError, "nothing says how stage 'over_sensors.0'"),
        ({}, {"sees": {"*": Sees("batch time")}}, ModelError, "has 4 dims, not batch time"),
        ({}, {"outside": Outside(inputs={"x": "a"})}, ModelError, "no argument 'x'"),
        ({}, {"outside": Outside(state={"x": "a"})}, ModelError, "no parameter or buffer 'x'"),
        ({}, {"chunks": 0}, ModelError, "0 chunks"),
        ({"stages": plan.stages[1:]}, {}, ModelError, "'over_sensors.0''s result, which isn't"),
        ({}, {"sees": {"*": join}}, ModelError, "takes 1 results, and its first argument"),
        ({"stages": (replace(plan.stages[0], name="x"),)}, {}, ModelError, "no module 'x'"),
    ):
        with pytest.raises(error, match=match):
            settings = {"sees": PLANT} | told
            hooked = parallelize_stages(model, replace(plan, **change), mesh, **settings)
            try:
                model(**inputs)
            finally:
                hooked.remove()
    mixed = by_hand(plant_stages(8, 12), "time", [("time", "nothing"), ("time", "heads")])
    for attention, match in (("", "say which module attends"), ("x", "no module 'x'")):
        sees = {"*": Sees("batch time sensor channel", attention=attention)}
        with pytest.raises(ModelError, match=match):
            parallelize_stages(model, mixed, mesh, sees)
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())


def test_what_is_refused(ranks: Ranks) -> None:
    ranks.run(refusals, planned(plant_stages(8, 12), outside=["time"]))
    for words in ("(a b", "a b)", "((a))", "", "a a"):
        with pytest.raises(ModelError):
            Form.of(words)
    x = torch.zeros(6, 2)
    for sizes, match in (({"a": 4}, "can't be"), ({}, "can't be"), ({"a": 2, "b": 2}, "can't be")):
        with pytest.raises(ModelError, match=match):
            Form.of("(a b) c").unfold(x, sizes, "x")
    assert Form.of("(a b) c").unfold(x, {"b": 2}, "x").shape == (3, 2, 2)
    assert str(Form.of("( a b)c")) == "(a b) c"
