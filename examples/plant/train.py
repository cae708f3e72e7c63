"""Train the forecaster on the plant's log, on as many ranks as there are.

    python -m examples.plant.train --tanks 32 --hours 24
    torchrun --nproc-per-node 4 -m examples.plant.train --tanks 32 --hours 24

The log is made here, from physics and with faults. The layouts are planned for the cluster that
``longspan probe`` described (``--cluster cluster.yaml``) and applied by hooks.
"""

import argparse
import os
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from examples.plant.forecaster import Forecaster
from examples.plant.tanks import PlantLog, simulate_plant
from longspan.cluster.spec import read_cluster
from longspan.models.stages import Outside, Sees, parallelize_stages, sum_gradients
from longspan.plan import StagePlan
from longspan.planner.stage import transformer_block
from longspan.planner.stages import plan_stages

__all__ = ["Result", "Settings", "plan_for", "shard", "train"]


@dataclass(frozen=True)
class Settings:
    """Sizes of plant, windows, model and training; a reading a second."""

    tanks: int = 32
    seconds: int = 24 * 3600
    patch: int = 16
    times: int = 256
    width: int = 64
    heads: int = 4
    pairs: int = 2
    batch: int = 4
    steps: int = 200
    rate: float = 2e-3
    seed: int = 0


@dataclass(frozen=True)
class Result:
    """Mean squared errors on the last fifth of the log, in standard deviations of a sensor.

    ``persistence``: of saying that nothing changes. ``faulty`` and ``normal``: where something is
    broken, and where nothing is.
    """

    losses: list[float]
    error: float
    persistence: float
    faulty: float
    normal: float


def plan_for(settings: Settings, cluster: str, ranks: int) -> StagePlan:
    """The layouts of the forecaster's blocks on the first ranks of a cluster."""
    sizes = {
        "batch": settings.batch,
        "time": settings.times,
        "sensor": 3 * settings.tanks,
        "channel": settings.width,
    }
    stages = [
        transformer_block(
            *(f"{name}.{pair}", sizes, dim, settings.heads), causal=dim == "time", dtype="float32"
        )
        for pair in range(settings.pairs)
        for name, dim in (("over_sensors", "sensor"), ("over_time", "time"))
    ]
    return plan_stages(
        stages, sequence=["time", "sensor"], cluster=read_cluster(cluster), ranks=ranks
    )


def shard(model: Forecaster, plan: StagePlan, mesh: DeviceMesh) -> None:
    """All that the model's parallelism takes: which dim is which."""
    outside = Outside(
        inputs={"readings": "batch time sensor patch"},
        state={"time": "time channel", "sensor": "sensor channel"},
        result="batch time sensor patch",
    )
    sees = {"*": Sees("batch time sensor channel", attention="attention")}
    parallelize_stages(model, plan, mesh, sees, outside=outside)


def train(
    settings: Settings, cluster: str = "8xh100-80gb", mesh: DeviceMesh | None = None
) -> Result:
    """Make the log, train on its first four fifths, and judge on the rest."""
    log = simulate_plant(settings.seconds, settings.tanks, settings.seed)
    torch.manual_seed(settings.seed)
    model = Forecaster(
        *(settings.times, 3 * settings.tanks, settings.patch),
        *(settings.width, settings.heads, settings.pairs),
    )
    if mesh is not None:
        shard(model, plan_for(settings, cluster, mesh.size()), mesh)
    optimizer = torch.optim.AdamW(model.parameters(), settings.rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, settings.rate, total_steps=settings.steps
    )
    split = settings.seconds * 4 // 5
    generator = torch.Generator().manual_seed(settings.seed)
    losses = []
    for _ in range(settings.steps):
        starts = torch.randint(split - _span(settings), (settings.batch,), generator=generator)
        readings, target, _ = _windows(log, starts.tolist(), settings)
        optimizer.zero_grad()
        loss = (model(readings) - target).square().mean()
        loss.backward()
        if mesh is not None:
            sum_gradients(model, mesh)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    return _judge(model, log, split, settings, losses)


def _span(settings: Settings) -> int:
    return (settings.times + 1) * settings.patch


def _windows(log: PlantLog, starts: list[int], settings: Settings) -> tuple[Tensor, Tensor, Tensor]:
    """Readings, those of the next patch, and where these are of something broken."""

    def cut(values: Tensor) -> Tensor:
        pieces = torch.stack([values[s : s + _span(settings)] for s in starts])
        return pieces.unflatten(1, (-1, settings.patch)).transpose(2, 3)

    values, fault = cut(log.values), cut(log.fault)
    return values[:, :-1].contiguous(), values[:, 1:], fault[:, 1:]


@torch.no_grad()
def _judge(
    model: Forecaster, log: PlantLog, split: int, settings: Settings, losses: list[float]
) -> Result:
    span = _span(settings)
    starts = list(range(split, settings.seconds - span, span))
    errors, idle, faults = [], [], []
    for at in range(0, len(starts) - settings.batch + 1, settings.batch):
        readings, target, fault = _windows(log, starts[at : at + settings.batch], settings)
        errors.append((model(readings) - target).square())
        idle.append((readings[..., -1:] - target).square())
        faults.append(fault)
    error, fault = torch.cat(errors), torch.cat(faults)
    return Result(
        losses,
        error.mean().item(),
        torch.cat(idle).mean().item(),
        error[fault].mean().item(),
        error[~fault].mean().item(),
    )


def main() -> None:
    """Train as the command line says, and tell what came of it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tanks", type=int, default=Settings.tanks)
    parser.add_argument("--hours", type=float, default=Settings.seconds / 3600)
    parser.add_argument("--steps", type=int, default=Settings.steps)
    parser.add_argument("--cluster", default="8xh100-80gb")
    told = parser.parse_args()
    settings = Settings(tanks=told.tanks, seconds=int(told.hours * 3600), steps=told.steps)
    mesh = None
    if "RANK" in os.environ:
        dist.init_process_group("gloo")
        mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("sp",))
    result = train(settings, told.cluster, mesh)
    if mesh is None or mesh.get_rank() == 0:
        print(f"loss {result.losses[0]:.4f} → {result.losses[-1]:.4f}")
        print(f"foretold: {result.error:.4f}, by persistence {result.persistence:.4f}")
        print(f"where something is broken {result.faulty:.4f}, else {result.normal:.4f}")
    if mesh is not None:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
