"""Planned per-layer strategies against data-parallel, FSDP and tensor-parallel training, run.

In the lab, 2 nodes × 2 ranks of 0.45 core each, 200 Mbit/s between the nodes; one run. The cluster
is probed first, and how long each model takes without links for a quarter and for half of the
batch: what a layer costs before it starts, and what its work costs. From these alone every model is
planned. A step is forward, backward and SGD in float32, of the same whole batch in every way.

- DDP, FSDP2 (on longspan's rings): torch's, whose sums go on beside backward.
- data-parallel, tensor-parallel: the same as plans, run by ``parallelize_layers`` as the planned
  strategy is. Tensor-parallel: the batch over the nodes, all else inside them (Megatron-style).

What is foretold is the planned strategy's gain over the data-parallel plan.
"""

import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.record import conclude
from longspan.cluster.spec import Cluster

REPEATS = 5
ALONE = (4, 2)  # parts of the batch
BASELINES = ("DDP", "FSDP", "data-parallel", "tensor-parallel")
LARGE = ("alexnet", "rnnlm")  # the models whose parameters are many for what they compute


def models() -> dict[str, Callable[[], tuple[Any, tuple[Any, ...]]]]:
    """The models by name, each with its inputs."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from benchmarks.models.alexnet import AlexNet
    from benchmarks.models.rnnlm import Rnnlm
    from benchmarks.models.transformer import Transformer

    def tokens(count: int, vocab: int, batch: int, length: int) -> tuple[torch.Tensor, ...]:
        return tuple(torch.randint(0, vocab, (batch, length)) for _ in range(count))

    class Llama(LlamaForCausalLM):  # type: ignore[misc]
        def forward(self, tokens: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
            loss: torch.Tensor = (
                super().forward(input_ids=tokens, labels=labels, use_cache=False).loss
            )
            return loss

    llama = LlamaConfig(
        vocab_size=2048, hidden_size=192, intermediate_size=512, num_hidden_layers=3,
        num_attention_heads=6, num_key_value_heads=2, attn_implementation="sdpa",
    )  # fmt: skip
    return {
        "alexnet": lambda: (
            AlexNet(width=3 / 8, classes=200, image=131),
            (torch.randn(16, 3, 131, 131), torch.randint(0, 200, (16,))),
        ),
        "rnnlm": lambda: (Rnnlm(8192, 256), tokens(2, 8192, 32, 24)),
        "transformer": lambda: (Transformer(2048, 128, 4, 512, 2, 32), tokens(3, 2048, 32, 32)),
        "llama": lambda: (Llama(llama), tokens(2, 2048, 32, 32)),
    }


def worker(folder: Path, quick: bool) -> None:
    """On every rank: probe, plan, run every model in every way; rank 0 writes what came of it."""
    import torch
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh

    from longspan.cluster.calibrate import calibrate
    from longspan.comm.mesh import connect
    from longspan.comm.probe import probe
    from longspan.models.pieces import Field
    from longspan.plan import LayerPlan, read_plan
    from longspan.schedule.exported import exported

    torch.set_num_threads(1)
    device = connect()
    cluster, _ = calibrate(probe(device, 1 << 30, "site0"))
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("m0", "m1"))
    field = Field(mesh, beside=True)
    rows = []
    for name, make in models().items():
        torch.manual_seed(0)
        model, inputs = make()
        told: list[float] = []
        if dist.get_rank() == 0:
            told = _plan_alone(folder, name, cluster)
        dist.barrier()
        alone = [_alone_s(folder, name, parts, field) for parts in ALONE]
        if dist.get_rank() == 0:
            _plan(folder, name, cluster, told, alone)
        dist.barrier()
        plans = {
            way: read_plan(LayerPlan, folder / f"{name}-{way}.json")
            for way in ("planned", "data-parallel", "tensor-parallel")
        }
        whole = {key: value.clone() for key, value in model.state_dict().items()}
        program = exported(model, inputs)
        losses, seconds = {}, {}
        for way in (*BASELINES, "planned"):
            model, _ = make()
            model.load_state_dict(whole)
            step = _stepper(way, model, inputs, plans.get(way), field, program)
            timed = []
            for repeat in range(-1, 2 if quick else REPEATS):
                dist.barrier()
                start = time.perf_counter()
                loss = step()
                dist.barrier()
                if repeat >= 0:  # the first one opens connections
                    timed.append(time.perf_counter() - start)
                else:
                    losses[way] = loss
            seconds[way] = median(timed)
            del model, step
        if any(abs(loss / losses["planned"] - 1) > 1e-4 for loss in losses.values()):
            raise AssertionError(f"{name}: losses differ: {losses}")
        rows.append(
            {
                "model": name,
                "seconds": seconds,
                "foretold": {way: plan.seconds for way, plan in plans.items()},
                "alone_s": alone,
                "wait_s": next(iter(cluster.devices.values())).wait_s,
                "splits": _said(plans["planned"]),
            }
        )
    if dist.get_rank() == 0:
        (folder / "rows.json").write_text(json.dumps(rows), encoding="utf-8")
    sys.stdout.flush()
    os._exit(0)


def _alone_s(folder: Path, name: str, parts: int, field: Any) -> float:
    """Seconds of a step with a part of the batch, while all ranks do the same by themselves."""
    import torch
    import torch.distributed as dist

    from longspan.plan import LayerPlan, read_plan

    model, inputs = models()[name]()
    part = tuple(x[: len(x) // parts] for x in inputs)
    plan = read_plan(LayerPlan, folder / f"{name}-alone-{parts}.json")
    step = _stepper("alone", model, part, plan, field, part)
    timed = []
    for _ in range(5):
        dist.barrier()
        start = time.perf_counter()
        step()
        timed.append(time.perf_counter() - start)
    rows = [torch.empty(1, dtype=torch.float64) for _ in range(dist.get_world_size())]
    dist.all_gather(rows, torch.tensor([median(timed[1:])], dtype=torch.float64))
    return median(float(row) for row in rows)


def _plan_alone(folder: Path, name: str, cluster: Any) -> list[float]:
    """Write the plans of a model of which every rank does all, with parts of the batch.

    Returns what is foretold of each, by devices that take no time to start.
    """
    import torch

    from longspan.plan import write_plan
    from longspan.planner.capture import capture
    from longspan.planner.layer_search import Found, Planner
    from longspan.planner.layers import plan_of
    from longspan.planner.price import OPTIONS

    told = []
    for parts in ALONE:
        with torch.device("meta"):
            model, inputs = models()[name]()
        graph = capture(model, tuple(x[: len(x) // parts] for x in inputs))
        planner = Planner(graph, _paced(cluster, 1.0, 0.0), _pricing())
        same = tuple(
            [set(choice.dims) for choice in node.choices].index({None}) * len(OPTIONS)
            for node in planner.nodes
        )
        told.append(planner.measure(same))
        plan = plan_of(planner, Found(same, 0.0, 0.0, 0.0), name, {})
        write_plan(plan, folder / f"{name}-alone-{parts}.json")
    return told


def _plan(folder: Path, name: str, cluster: Any, told: list[float], alone: list[float]) -> None:
    """Write the plans of a model, on a cluster whose devices are as fast as the model was alone."""
    import torch

    from longspan.plan import write_plan
    from longspan.planner.capture import capture
    from longspan.planner.layer_search import Planner
    from longspan.planner.layers import plan_of

    with torch.device("meta"):
        model, inputs = models()[name]()
    graph = capture(model, inputs)
    # What more of the batch adds is computing; what is there anyway, starting it.
    factor = (told[1] - told[0]) / max(alone[1] - alone[0], alone[0] / 4)
    overhead_s = max(0.0, alone[0] - told[0] / factor) / (2 * len(graph.layers))
    planner = Planner(graph, _paced(cluster, factor, overhead_s), _pricing())
    found = {
        "planned": planner.best(),
        "data-parallel": planner.data_parallel(),
        "tensor-parallel": planner.tensor_parallel(),
    }
    for way, one in found.items():
        write_plan(plan_of(planner, one, name, {}), folder / f"{name}-{way}.json")


def _pricing() -> Any:
    """Memory is no concern, and SGD keeps nothing."""
    from longspan.planner.price import Pricing

    return Pricing(zero=False, recompute=False, optimizer_bytes=0)


def _paced(cluster: Cluster, factor: float, overhead_s: float) -> Cluster:
    """The cluster with devices that compute so many times as fast, once they have started."""
    devices = {
        kind: device.model_copy(
            update={
                "bytes_per_s": device.bytes_per_s * factor,
                "overhead_s": overhead_s,
                "measured": {
                    op: {dtype: rate * factor for dtype, rate in rates.items()}
                    for op, rates in device.measured.items()
                },
            }
        )
        for kind, device in cluster.devices.items()
    }
    return cluster.with_devices(devices)


def _stepper(
    way: str, model: Any, inputs: tuple[Any, ...], plan: Any, field: Any, program: Any
) -> Callable[[], float]:
    """One step of training in this way; it returns the whole batch's loss."""
    import torch
    import torch.distributed as dist
    from torch.distributed.fsdp import FSDPModule, fully_shard
    from torch.nn.parallel import DistributedDataParallel

    from longspan.comm.rings import use_rings
    from longspan.models.layers import parallelize_layers

    rank, world = dist.get_rank(), dist.get_world_size()
    given = inputs
    if plan is not None:
        model = parallelize_layers(model, plan, field, program)
    else:
        given = tuple(x.chunk(world)[rank] for x in inputs)
        if way == "DDP":
            model = DistributedDataParallel(model)
        else:
            for module in list(model.modules()):
                if module is not model and any(True for _ in module.parameters(recurse=False)):
                    fully_shard(module)
            fully_shard(model)
            for module in model.modules():
                if isinstance(module, FSDPModule):
                    module.set_gradient_divide_factor(1.0)
                    module.set_force_sum_reduction_for_comms(True)
            use_rings(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)

    def step() -> float:
        optimizer.zero_grad()
        loss = model(*given)
        (loss / world if way == "FSDP" else loss).backward()  # its sums are sums
        optimizer.step()
        mean = loss.detach().clone()
        if plan is None:
            dist.all_reduce(mean)
            mean /= world
        return float(mean)

    return step


def _said(plan: Any) -> str:
    """The layers by their splits."""
    found: dict[str, list[str]] = {}
    for layer in plan.layers:
        split = " ".join(f"{dim}:{'+'.join(axes)}" for dim, axes in layer.splits.items())
        found.setdefault((split or "all the same") + " sharded" * layer.zero, []).append(layer.name)
    return "; ".join(
        f"{split}: {len(names)} layers, {', '.join(names[:3])}" for split, names in found.items()
    )


def main() -> None:
    """Run the lab and compare."""
    from longspan.lab.lab import Lab
    from longspan.lab.spec import LabSpec

    quick = "--quick" in sys.argv
    console = Console(record=True, width=120)
    with tempfile.TemporaryDirectory() as folder:
        with Lab(LabSpec(2, 2, bandwidth="200mbit", device_share=0.45)) as lab:
            command = [sys.executable, "-m", "benchmarks.strategy", "--worker", folder]
            lab.run(command + ["--quick"] * quick, timeout_s=600).check()
        rows = json.loads((Path(folder) / "rows.json").read_text(encoding="utf-8"))
    ways = (*BASELINES, "planned")
    table = Table("seconds a step", *ways, "over DDP", "over best", "foretold", "ran", box=None)
    figures: dict[str, dict[str, float]] = {}
    for row in rows:
        seconds, foretold = row["seconds"], row["foretold"]
        planned = seconds["planned"]
        data = min(seconds["DDP"], seconds["data-parallel"])
        promised = foretold["data-parallel"] / foretold["planned"]
        ran = seconds["data-parallel"] / planned
        figures[row["model"]] = {
            "over_data_parallel": round(data / planned, 3),
            "over_ddp": round(seconds["DDP"] / planned, 3),
            "over_best": round(min(seconds[way] for way in BASELINES) / planned, 3),
            "foretold_ratio": round(promised, 3),
            "measured_ratio": round(ran, 3),
            "foretold_error": round(promised / ran - 1, 3),
        }
        mine = figures[row["model"]]
        table.add_row(
            row["model"],
            *(f"{seconds[way]:.3f}" for way in ways),
            *(f"{mine[one]:.2f}" for one in ("over_ddp", "over_best")),
            *(f"{mine[one]:.2f}" for one in ("foretold_ratio", "measured_ratio")),
        )
    console.print(table)
    console.print(f"messages wait {1e3 * rows[0]['wait_s']:.2f} ms for ranks that compute")
    for row in rows:
        said = " and ".join(f"{one:.3f}" for one in row["alone_s"])
        told = {way: f"{one:.3f}" for way, one in row["foretold"].items()}
        console.print(f"{row['model']}: alone {said} s; foretold {told}")
        console.print(f"  {row['splits']}", style="dim")
    targets = {"over_data_parallel": 1.8, "over_best": 0.97, "foretold_error": 0.2}
    holds = (
        all(figures[name]["over_data_parallel"] >= 1.8 for name in LARGE)
        and all(one["over_best"] >= 0.97 for one in figures.values())
        and all(abs(one["foretold_error"]) <= 0.2 for one in figures.values())
    )
    conclude("strategy", figures, targets, holds, console.export_text())


if __name__ == "__main__":
    if "--worker" in sys.argv:
        worker(Path(sys.argv[sys.argv.index("--worker") + 1]), "--quick" in sys.argv)
    else:
        main()
