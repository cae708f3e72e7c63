"""A proof of concept on the real cluster: baseline and plan in turns, each a short run."""

import os
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from longspan.comm.agree import first_words
from longspan.comm.mesh import connect
from longspan.errors import DataError
from longspan.plan import write_plan
from longspan.report.poc import Poc
from longspan.report.summary import summarise
from longspan.trace import curve, read_trace
from longspan.train.config import Checkpoint, Config, Parallel, save_config
from longspan.train.inspect import inspect
from longspan.train.job import make_job
from longspan.train.loop import train
from longspan.train.record import Recorder
from longspan.train.stop import StopWish
from longspan.train.worker import guarded

__all__ = ["Criterion", "Way", "baseline_of", "poc_folder", "run_poc"]

_FIRST_STEPS = 4
_FEWEST_STEPS, _MOST_STEPS = 4, 200


@dataclass(frozen=True)
class Criterion:
    """What is set before the start: minutes to take, turns, and the least speed-up that passes."""

    minutes: float
    speedup: float
    predicted: float | None = None
    turns: int = 6


@dataclass(frozen=True)
class Way:
    """One side of the comparison, and the file that it comes from."""

    config: Config
    file: str = ""


def baseline_of(config: Config) -> Config:
    """The plain way: every sequence on all its ranks in contiguous pieces, nothing planned."""
    mode = "fixed" if config.parallel.mode == "fixed" else "static"
    plain = config.parallel.model_dump() | {"mode": mode, "order": "contiguous"}
    return config.model_copy(update={"parallel": Parallel(**plain)})


def poc_folder(config: Config) -> Path:
    """Where a proof of concept of this run is kept."""
    return config.runs / f"{config.name}-poc"


def run_poc(plan: Way, baseline: Way, criterion: Criterion) -> int:
    """Run the turns on this rank; rank 0 writes what was found. Returns the exit code.

    The first turn is short, and proves the plan exact and without leaks; it says how many steps
    the others may have.
    """
    return guarded(plan.config, lambda: _turns(plan, baseline, criterion))


def _turns(plan: Way, baseline: Way, criterion: Criterion) -> None:
    config = plan.config
    folder = poc_folder(config)
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    leader = rank == 0
    ways = {"baseline": baseline.config, "plan": config}
    for name, settings in ways.items():
        # Once, as it would be run: a mistake is told before anything is started.
        inspect(_turn(settings, folder, name, 1, False), world, int(os.environ["LOCAL_WORLD_SIZE"]))
    device = connect(config.train.timeout_s)
    if leader:
        shutil.rmtree(folder, ignore_errors=True)
    dist.barrier()
    start, steps = time.perf_counter(), _FIRST_STEPS
    speeds: dict[str, list[float]] = {way: [] for way in ways}
    with StopWish() as wish:
        for turn in range(criterion.turns + 1):
            whole_s = step_s = 0.0
            for way, settings in ways.items():
                began = time.perf_counter()
                turned = _turn(settings, folder, f"{way}-{turn}", steps, prove=not turn)
                with Recorder(turned.run, leader, steps) as recorder:
                    job = make_job(turned, device, recorder)
                    train(job, wish)
                    if job.planned:
                        job.planned.close()
                _check_wish(wish, device)
                whole_s += time.perf_counter() - began
                if leader:
                    seconds, speed = _measured(turned.run)
                    step_s += seconds
                    if turn:
                        speeds[way].append(speed)
            if not turn:
                left_s = 60 * criterion.minutes - (time.perf_counter() - start)
                each_s = left_s / criterion.turns - (whole_s - steps * step_s)
                wanted = round(each_s / step_s) if step_s else 0
                told = str(min(_MOST_STEPS, max(_FEWEST_STEPS, wanted)))
                steps = int(first_words(told if leader else ""))
    dist.destroy_process_group()
    if leader:
        _conclude(plan, baseline, criterion, speeds, (time.perf_counter() - start) / 60)


def _check_wish(wish: StopWish, device: torch.device) -> None:
    """Raise DataError, on all ranks, if one was told to stop."""
    heard = torch.tensor(float(wish.heard), device=device)
    dist.all_reduce(heard)
    if heard:
        raise DataError("stopped before all turns were done: start the proof of concept again")


def _turn(settings: Config, folder: Path, name: str, steps: int, prove: bool) -> Config:
    checks = settings.checks.model_copy(update={"leak_probe": prove, "exactness": prove})
    train = settings.train.model_copy(update={"steps": steps, "validate_every": steps})
    cache = settings.data.cache or settings.runs / ".tokens"
    return settings.model_copy(
        update={
            "name": name,
            "runs": folder,
            "checks": checks,
            "train": train,
            "data": settings.data.model_copy(update={"cache": cache}),
            "checkpoint": Checkpoint(every=steps, keep=2),
        }
    )


def _measured(run: Path) -> tuple[float, float]:
    """Seconds of a step and tokens per second, without the first step; weights are thrown away."""
    rows = list(read_trace(run / "trace.jsonl"))
    seconds, tokens = (curve(rows, figure)[1:] for figure in ("step_s", "tokens"))
    total_s = sum(value for _, value in seconds)
    shutil.rmtree(run / "checkpoints", ignore_errors=True)
    return total_s / len(seconds), sum(value for _, value in tokens) / total_s


def _conclude(
    plan: Way, baseline: Way, criterion: Criterion, speeds: dict[str, list[float]], minutes: float
) -> None:
    config = plan.config
    folder = poc_folder(config)
    # What the first turn proved and what the last one learnt, as one run's trace for the report.
    parts = [folder / name / "trace.jsonl" for name in ("plan-0", f"plan-{criterion.turns}")]
    (folder / "trace.jsonl").write_bytes(b"".join(part.read_bytes() for part in parts))
    save_config(config, folder / "config.yaml")
    found = summarise(read_trace(folder / "trace.jsonl"), config.name)
    leaks = found.leak_probe.get("leaks")
    poc = Poc(
        name=config.name,
        baseline_name=_way(baseline.config),
        plan_name=_way(config),
        ranks=found.world or 1,
        minutes=minutes,
        criterion=criterion.speedup,
        predicted=criterion.predicted,
        baseline_tokens_per_s=tuple(speeds["baseline"]),
        plan_tokens_per_s=tuple(speeds["plan"]),
        leaks=leaks if isinstance(leaks, int) else None,
        difference=found.difference,
        plan_config=plan.file,
        baseline_config=baseline.file,
    )
    write_plan(poc, folder / "poc.json")


def _way(config: Config) -> str:
    ways = config.parallel
    return f"{ways.mode}, {ways.order}" + (f", sp {ways.sp}" if ways.sp else "")
