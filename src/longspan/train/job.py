"""Puts a run together: mesh, model, optimizer, data and recorder, checked before the first step."""

from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Literal

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from longspan.comm.mesh import make_mesh
from longspan.data.lengths import Lengths
from longspan.models.leak import leak_probe
from longspan.outer.sync import OuterSync
from longspan.planner.prices import Sharding
from longspan.train.ahead import Planned
from longspan.train.batches import Batches, StepBatch
from longspan.train.config import Config
from longspan.train.exactness import Exactness, exactness
from longspan.train.optimize import make_optimizer
from longspan.train.parallelize import build_model, parallelize
from longspan.train.planned import PlannedBatches
from longspan.train.planning import Planning, shards_of
from longspan.train.record import Recorder
from longspan.train.sites import make_outer
from longspan.train.step import StepRunner
from longspan.train.strategy import RowRunner, strategy_of, tell_strategy

__all__ = ["Job", "make_job", "prove"]


@dataclass
class Job:
    """All that a training loop needs."""

    config: Config
    mesh: DeviceMesh
    batches: Batches
    runner: StepRunner | RowRunner
    optimizer: torch.optim.Optimizer
    recorder: Recorder
    planned: PlannedBatches | None = None
    outer: OuterSync | None = None

    @property
    def site(self) -> int:
        """Which of the sites this rank is at."""
        if self.outer and not self.config.outer.rendezvous:
            return self.mesh["replica"].get_local_rank()
        return self.config.outer.site

    def step(self, cursor: int) -> tuple[StepBatch, Planned | None]:
        """This rank's part of the step that starts at ``cursor``, and the plan if it has one."""
        if self.planned:
            return self.planned.step(cursor)
        if isinstance(self.runner, RowRunner):
            return self.batches.rows(cursor, self.config.train.global_batch or 1), None
        sites = self.config.outer.sites
        return self.batches.step(cursor, self.dp_rank, self.dp, self.site, sites), None

    def validation(self) -> StepBatch:
        """This rank's part of what it is validated with."""
        if isinstance(self.runner, RowRunner):
            return self.batches.validation_rows()
        return self.batches.validate(self.dp_rank, self.dp)

    @property
    def dp(self) -> int:
        """How many sequences a site trains on at once."""
        return self.mesh["dp"].size()

    @property
    def dp_rank(self) -> int:
        """Which of them this rank has a share of."""
        return self.mesh["dp"].get_local_rank()


def make_job(config: Config, device: torch.device, recorder: Recorder) -> Job:
    """Build everything on this rank; the process group must stand."""
    if config.parallel.strategy:
        return _split_job(config, device, recorder)
    world = dist.get_world_size()
    ways = config.parallel
    mesh = make_mesh(world, ways.sp, device.type, config.outer.together)
    batches = Batches(config)
    batches.check(mesh["dp"].size() * config.outer.sites)
    model = build_model(config, batches.tokenizer.vocab_size, device)
    parameters = model.num_parameters()
    planning = Planning(config, batches, model.config) if ways.mode != "fixed" else None
    sharding = planning.sharding() if planning else _unplanned(ways.sharding)
    parallelize(model, config, mesh, shards_of(sharding, config))
    runner = StepRunner(model, mesh, ways.order)
    torch.manual_seed(config.train.seed + 1 + dist.get_rank())
    _describe(config, mesh, batches, parameters, recorder)
    return Job(
        config,
        mesh,
        batches,
        runner,
        make_optimizer(model, config.optimizer),
        recorder,
        planning.start(runner, sharding, recorder) if planning else None,
        make_outer(config, model, mesh),
    )


def _split_job(config: Config, device: torch.device, recorder: Recorder) -> Job:
    """A job whose layers a strategy splits."""
    batches = Batches(config)
    vocab_size = batches.tokenizer.vocab_size
    plan = strategy_of(config, vocab_size)
    model = build_model(config, vocab_size, device)
    parameters = model.num_parameters()
    runner = RowRunner(model, plan, config, device)
    torch.manual_seed(config.train.seed + 1 + dist.get_rank())
    _describe(config, runner.mesh, batches, parameters, recorder)
    tell_strategy(plan, recorder)
    optimizer = make_optimizer(runner.model, config.optimizer)
    return Job(config, runner.mesh, batches, runner, optimizer, recorder)


def _unplanned(sharding: Sharding | Literal["auto"]) -> Sharding:
    return "world" if sharding == "auto" else sharding


def prove(job: Job) -> None:
    """Run the checks that the config asks for; raises LeakError or ModelError."""
    checks, recorder = job.config.checks, job.recorder
    if checks.leak_probe and isinstance(job.runner, StepRunner):
        probe = leak_probe(job.runner.model, mesh=job.mesh["sp"], order=job.runner.order)
        recorder.note("leak_probe", asdict(probe) | {"leaks": 0})
        recorder.say(f"leak probe: 0 leaks in {probe.outputs} outputs")
    if checks.exactness and (found := _exactness(job)):
        recorder.note("exactness", asdict(found))
        recorder.say(
            f"exactness on {found.tokens} tokens: loss {found.loss:.6f}, in one process "
            f"{found.loss_one_process:.6f}; gradients differ by {found.gradient_difference:.1e}"
        )


def _exactness(job: Job) -> Exactness | None:
    """On the first batch of a plan, or on one of many documents."""
    batches = job.batches
    if isinstance(job.runner, RowRunner):
        own, _ = job.step(0)
        sequences = own.sequences
    elif job.planned:
        own, planned = job.planned.step(0)
        sequences = job.planned.sequences(0, planned.plan)
    else:
        cursor = batches.most_mixed(job.dp)
        shares = [batches.step(cursor, rank, job.dp) for rank in range(job.dp)]
        own = shares[job.dp_rank]
        sequences = tuple(sequence for share in shares for sequence in share.sequences)
    return exactness(job.runner, batches, job.config, own, sequences)


def _describe(
    config: Config, mesh: DeviceMesh, batches: Batches, parameters: int, recorder: Recorder
) -> None:
    if not recorder.leader:
        return
    recorder.note(
        "start",
        {
            "run": config.name,
            "world": mesh.size(),
            "axes": dict(zip(mesh.mesh_dim_names or (), mesh.shape, strict=True)),
            "order": config.parallel.order,
            "device": mesh.device_type,
            "backend": dist.get_backend(),
            "dtype": config.train.dtype,
            "parameters": parameters,
            "model_type": config.model.type or Path(str(config.model.path)).name,
            "torch": torch.__version__,
            "longspan": version("longspan"),
            "max_length": config.data.max_length,
            "steps": config.train.steps,
        },
    )
    if config.outer.sites > 1:
        recorder.note("outer", config.outer.model_dump(mode="json"))
    lengths = Lengths.of(batches.store.lengths, max_length=config.data.max_length)
    recorder.note(
        "data",
        {
            "documents": lengths.documents,
            "tokens": lengths.tokens,
            "percentiles": lengths.percentiles,
            "longest": lengths.longest,
            "histogram": [[b.up_to, b.documents, b.share_of_tokens] for b in lengths.bins],
            "padding_waste": lengths.waste_in_batches,
            "packed_fill": lengths.pack_fill,
            "split_documents": batches.training.split,
            "dropped_documents": batches.training.dropped,
            "validation_documents": batches.validation_documents,
        },
    )
