"""Switching dims against the known ways: one space-time model, forward, backward and step.

In the lab, 2 nodes × 2 ranks of 0.45 core each, float32. The model is examples/plant's, attention
over sensors and over time in turn. Ours: the planner's layouts, switched by hooks. Peers:
DeepSpeed's Ulysses around the attention over time, Megatron-style tensor and sequence parallelism
(a gather before and a reduce-scatter behind each attention and each perceptron), and one rank with
the whole model. Ours, Ulysses and one rank keep all weights, whose gradients are summed;
Megatron-style ranks keep shares of them. All have the same loss.

How much of the switches overlap hides is measured where compute allows: a larger model, whose
stages take longer than their switches at 200 Mbit/s, on ranks of 0.3 core, which leave the cores
time to send. Forward and backward are run as they are (t), in chunks and without sending, which
does all copies, in turns; hidden is the median of (t − t in chunks) over that of (t − t without
sending).

`make bench-peers` installs DeepSpeed.
"""

import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.record import conclude

BANDWIDTHS, OVERLAPPED = (100, 1000), 200  # Mbit/s of a node's link
SHARE, FAIR_SHARE = 0.45, 0.3  # of a core, a rank; 4 of the latter leave 0.8 core to send with
PATCH, CHUNKS = 8, 8


@dataclass(frozen=True)
class Size:
    """Of the model and its batch."""

    batch: int
    times: int
    sensors: int
    width: int
    heads: int
    pairs: int
    repeats: int


# Where communication dominates; where a stage computes for longer than its switches take: the last
# one has two, which come to it and leave it. Pieces have 1024 tokens a rank: each piece's backward
# adds to all weights' gradients, which takes as long for few tokens as for many.
SENDING = Size(2, 64, 128, 32, 4, 2, 5)
COMPUTING = Size(8, 64, 64, 256, 4, 1, 9)
NAMES = {
    "switch": "longspan",
    "ulysses": "DeepSpeed-Ulysses",
    "megatron": "Megatron-style",
    "alone": "one process",
}


def worker(megabits: int, what: str, out: Path) -> None:
    """On every rank: every way, or what overlap hides; rank 0 writes what was found."""
    import torch
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh

    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (4,), mesh_dim_names=("sp",))
    found: dict[str, Any]
    if what == "ways":
        found = {way: measure(SENDING, way, mesh, megabits) for way in NAMES}
    else:
        found = overlapped(mesh, megabits)
    if dist.get_rank() == 0:
        out.write_text(json.dumps(found), encoding="utf-8")
    sys.stdout.flush()
    os._exit(0)


def measure(size: Size, way: str, mesh: Any, megabits: int) -> tuple[float, float, int]:
    """Median seconds of a step, the first step's loss, and bytes over the node's link."""
    import torch
    import torch.distributed as dist

    forward_and_backward, finish = prepared(size, way, mesh, megabits)

    def step() -> float:
        loss = forward_and_backward()
        finish()
        return loss

    seconds, crossed, first = [], 0, torch.zeros(())
    for repeat in range(size.repeats + 1):
        before = _left()
        took, loss = timed(step if way != "alone" or dist.get_rank() == 0 else lambda: 0.0)
        crossed = _left() - before
        if repeat == 0:  # it opens connections
            first = torch.tensor(loss)
            dist.all_reduce(first)
        else:
            seconds.append(took)
    return median(seconds), first.item(), crossed


def overlapped(mesh: Any, megabits: int) -> dict[str, list[float]]:
    """Seconds of forward and backward, turn by turn: as it is, in chunks, without sending."""
    ways = ("switch", "chunks", "silent")
    runs = {way: prepared(COMPUTING, way, mesh, megabits)[0] for way in ways}
    found: dict[str, list[float]] = {way: [] for way in ways}
    for turn in range(COMPUTING.repeats + 1):
        for place in range(len(ways)):
            way = ways[(turn + place) % len(ways)]
            with silence(way == "silent"):
                took, _ = timed(runs[way])
            if turn:  # the first one opens connections
                found[way].append(took)
    return found


def timed(run: Callable[[], float]) -> tuple[float, float]:
    """Seconds that the slowest rank took, and what this one found."""
    import torch
    import torch.distributed as dist

    dist.barrier()
    start = time.perf_counter()
    found = run()
    took = torch.tensor(time.perf_counter() - start)
    dist.all_reduce(took, op=dist.ReduceOp.MAX)
    return took.item(), found


def prepared(
    size: Size, way: str, mesh: Any, megabits: int
) -> tuple[Callable[[], float], Callable[[], None]]:
    """Forward and backward, which gives the loss, and the rest of a step."""
    import torch

    from examples.plant.forecaster import Forecaster
    from longspan.layout import positions
    from longspan.models.stages import Outside, Sees, parallelize_stages, sum_gradients

    torch.manual_seed(0)
    shape = (size.batch, size.times, size.sensors, PATCH)
    model = Forecaster(size.times, size.sensors, PATCH, size.width, size.heads, size.pairs)
    readings, target = torch.randn(2, *shape)
    plan = planned(size, megabits)
    if way in ("ulysses", "megatron"):
        # Time stays sharded, and the stages see to what they mix themselves.
        rows = tuple(replace(row, sharded=("time",), inside="nothing") for row in plan.stages)
        plan = replace(plan, stages=rows)
    own = list(model.parameters())
    if way != "alone":
        ends = Outside(
            inputs={"readings": "batch time sensor patch"}, state={"time": "time channel"}
        )
        sees = {"*": Sees("batch time sensor channel", attention="attention")}
        chunks = CHUNKS if way == "chunks" else 1
        parallelize_stages(model, plan, mesh, sees, outside=ends, chunks=chunks)
        target = target[:, positions(size.times, mesh.get_local_rank(), 4, "contiguous")]
    if way == "ulysses":
        share_by_ulysses(model, mesh)
    if way == "megatron":
        own = share_by_megatron(model, mesh, size.heads)
    optimizer = torch.optim.AdamW(own)

    def forward_and_backward() -> float:
        optimizer.zero_grad()
        loss = (model(readings) - target).square().sum() / readings.numel()
        loss.backward()
        return loss.item()

    def finish() -> None:
        if way == "megatron":
            sum_gradients(torch.nn.ParameterList(p for p in own if not hasattr(p, "share")), mesh)
        elif way != "alone":
            sum_gradients(model, mesh)
        optimizer.step()

    return forward_and_backward, finish


def _left() -> int:
    """Bytes that have left this node by its link."""
    return int(Path("/sys/class/net/eth0/statistics/tx_bytes").read_text(encoding="ascii"))


def planned(size: Size, megabits: int) -> Any:
    """The planner's choice for the lab."""
    from longspan.cluster.fabric import Link
    from longspan.cluster.spec import Device, uniform
    from longspan.planner.stage import transformer_block
    from longspan.planner.stages import plan_stages

    sizes = {
        "batch": size.batch,
        "time": size.times,
        "sensor": size.sensors,
        "channel": size.width,
    }
    stages = [
        transformer_block(
            *(f"{name}.{i}", sizes, dim, size.heads), causal=dim == "time", dtype="float32"
        )
        for i in range(size.pairs)
        for name, dim in (("over_sensors", "sensor"), ("over_time", "time"))
    ]
    lab = uniform(
        Device(memory_bytes=1 << 30, bytes_per_s=5e9, peak={"matmul": {"float32": 1e10}}),
        nodes=2,
        devices=2,
        link=Link(latency_s=1e-4, bytes_per_s=1e9),
        network=Link(latency_s=1e-4, bytes_per_s=megabits * 1e6 / 8),
    )
    return plan_stages(stages, sequence=["time", "sensor"], cluster=lab, outside=["time"])


@contextmanager
def silence(silent: bool) -> Iterator[None]:
    """Exchanges that send nothing: what they would receive is left as it is."""
    from longspan.comm import exchange, move

    kept = move.exchange
    if silent:
        move.exchange = lambda *_: exchange.Exchange(())
    try:
        yield
    finally:
        move.exchange = kept


def share_by_ulysses(model: Any, mesh: Any) -> None:
    """DeepSpeed's layer in the attention over time; it wants (tokens, batch, heads, dim)."""
    import deepspeed
    import torch.nn.functional as F
    from deepspeed.sequence.layer import DistributedAttention
    from torch.overrides import TorchFunctionMode

    deepspeed.init_distributed("gloo", auto_mpi_discovery=False, verbose=False)

    def local(q: Any, k: Any, v: Any, *_: Any, **__: Any) -> Any:
        q, k, v = (x.permute(1, 2, 0, 3) for x in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, is_causal=True).permute(2, 0, 1, 3)

    layer = DistributedAttention(local, mesh.get_group(), scatter_idx=2, gather_idx=0)

    class Shared(TorchFunctionMode):
        def __torch_function__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            if func is F.scaled_dot_product_attention:
                q, k, v = (x.permute(2, 0, 1, 3).contiguous() for x in args)
                return layer(q, k, v, 1).permute(1, 2, 0, 3)
            return func(*args, **(kwargs or {}))

    def shared(forward: Callable[..., Any]) -> Callable[..., Any]:
        def run(x: Any) -> Any:
            with Shared():
                return forward(x)

        return run

    for block in model.over_time:
        block.attention.forward = shared(block.attention.forward)


def share_by_megatron(model: Any, mesh: Any, heads: int) -> list[Any]:
    """Each rank's share of the heads and of the perceptrons; its parameters."""
    import torch
    import torch.nn.functional as F
    from torch import nn
    from torch.distributed.tensor import Partial, Shard

    from longspan.comm.redistribute import redistribute
    from longspan.layout import Layout

    rank, world = mesh.get_local_rank(), mesh.size()
    cut, whole = Layout({"sp": Shard(1)}), Layout()

    def part(weight: Any, dim: int, pieces: int = 1) -> Any:
        shares = [piece.chunk(world, dim)[rank] for piece in weight.detach().chunk(pieces, 0)]
        found = nn.Parameter(torch.cat(shares).clone())
        found.share = True
        return found

    def shared(inner: Callable[[Any], Any], bias: Any) -> Callable[[Any], Any]:
        def run(x: Any) -> Any:
            length = x.shape[1] * world
            x = redistribute(x, cut, whole, mesh, length=length, grad=Partial())
            y = redistribute(inner(x), Layout({"sp": Partial()}), cut, mesh, length=length)
            return y + bias

        return run

    mine: list[Any] = []
    for block in (*model.over_sensors, *model.over_time):
        attention, mlp = block.attention, block.mlp
        for linear, pieces in ((attention.qkv, 3), (mlp[0], 1)):
            linear.weight, linear.bias = (
                part(linear.weight, 0, pieces),
                part(linear.bias, 0, pieces),
            )
            mine += [linear.weight, linear.bias]
        for linear in (attention.out, mlp[2]):
            linear.weight = part(linear.weight, 1)
            mine.append(linear.weight)
        bias, mlp_bias = attention.out.bias, mlp[2].bias
        mine += [bias, mlp_bias]
        attention.out.bias = None
        attention.heads = heads // world
        attention.forward = shared(attention.forward, bias)

        def perceptron(x: Any, mlp: Any = mlp) -> Any:
            return F.linear(F.gelu(mlp[0](x)), mlp[2].weight)

        mlp.forward = shared(perceptron, mlp_bias)
    kept = [p for p in model.parameters() if all(p is not other for other in mine)]
    return kept + mine


def in_the_lab(megabits: int, what: str, share: float) -> Any:
    """What a worker finds there."""
    from longspan.lab.lab import Lab
    from longspan.lab.spec import LabSpec

    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "found.json"
        with Lab(LabSpec(2, 2, bandwidth=f"{megabits}mbit", device_share=share)) as lab:
            command = [sys.executable, "-m", "benchmarks.dsp", str(megabits), what, str(out)]
            lab.run(command, timeout_s=400).check()
        return json.loads(out.read_text(encoding="utf-8"))


def main() -> None:
    """Run the lab at each bandwidth, and compare."""
    console = Console(record=True, width=110)
    table = Table("Mbit/s", *(f"{name} ms / MB" for name in NAMES.values()), box=None)
    figures: dict[str, Any] = {}
    for megabits in BANDWIDTHS:
        ways = in_the_lab(megabits, "ways", SHARE)
        losses = [loss for _, loss, _ in ways.values()]
        assert max(losses) - min(losses) < 1e-4 * max(losses), f"the ways disagree: {losses}"
        table.add_row(
            str(megabits), *(f"{s * 1e3:.0f} / {b / 1e6:.2f}" for s, _, b in ways.values())
        )
        ours = ways["switch"]
        for name in ("ulysses", "megatron", "alone"):
            figures[f"{name}_over_ours_{megabits}"] = round(ways[name][0] / ours[0], 2)
        for name in ("ulysses", "megatron"):
            figures[f"bytes_less_than_{name}_{megabits}"] = round(1 - ours[2] / ways[name][2], 3)
    console.print(table)
    slow = BANDWIDTHS[0]
    turns = in_the_lab(OVERLAPPED, "overlap", FAIR_SHARE)
    costs, gains = (
        [plain - other for plain, other in zip(turns["switch"], turns[way], strict=True)]
        for way in ("silent", "chunks")
    )
    figures["hidden"] = round(median(gains) / median(costs), 3)
    plain, chunked, silent = (median(turns[way]) * 1e3 for way in ("switch", "chunks", "silent"))
    console.print(
        f"{OVERLAPPED} Mbit/s, the larger model, forward and backward: {plain:.0f} ms, in {CHUNKS} "
        f"chunks {chunked:.0f} ms, without sending {silent:.0f} ms ({len(costs)} turns)"
    )
    targets = {f"ulysses_over_ours_{slow}": 1.7, f"megatron_over_ours_{slow}": 4.0, "hidden": 0.6}
    holds = all(figures[name] >= least for name, least in targets.items())
    conclude("dsp", figures, targets, holds, console.export_text())


if __name__ == "__main__":
    if len(sys.argv) == 4:
        worker(int(sys.argv[1]), sys.argv[2], Path(sys.argv[3]))
    else:
        main()
