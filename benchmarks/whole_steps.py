"""Whole training steps, foretold and measured: is the setup that is foretold fastest the fastest?

In the lab, 2 nodes × 2 ranks of 0.45 core each, at 50, 200 and 1,000 Mbit/s, with uneven and with
even documents and two models: twelve cases, each trained in five ways. These take turns, a step
each, so that what disturbs the machine disturbs all. The first step, in which the planner starts
and groups are made, doesn't count; of the other rounds of turns those do in which the machine's
host gave at most 5 % of its processors to others, or the three in which it gave least. A step is
foretold from the model's own rates, as ``train`` measures them before its first step, and from the
probe alone; from the former a way is recommended as ``longspan plan`` does it, the simplest of
those about as fast as the fastest.

Memory is the most that torch's allocator has handed out on a rank, from before its model is built
to the end of the fifth step (in the first one there is no optimizer's state yet): counted, not
sampled, as ``torch.cuda.max_memory_allocated`` is on GPUs. What a process has beside its tensors
(libraries, sockets' buffers) isn't in it.
"""

import json
import os
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from itertools import product
from pathlib import Path
from statistics import mean, median, quantiles
from typing import Any

import yaml
from rich.console import Console
from rich.table import Table

from benchmarks.peak import peak_bytes
from benchmarks.record import conclude, timed
from longspan.cluster.spec import read_cluster
from longspan.plan import Setup
from longspan.planner.joint import simplest
from longspan.planner.workload import Rates
from longspan.train.config import Config, load_config

BANDWIDTHS = (50, 200, 1000)
MODELS = {"wide": (128, 2), "deep": (64, 5)}
CASES = tuple(product(("uneven", "even"), MODELS))
LONGEST, BATCH_TOKENS = 2048, 8192
FIRST, STEPS, MEMORY_STEPS = 1, 7, 5
QUIET, LEAST = 0.05, 3
SETUPS = {
    "4 contiguous ring": Setup("fixed", 4, "contiguous", "ring", "world", "none"),
    "4 balanced ring": Setup("fixed", 4, "balanced", "ring", "node", "none"),
    "2 zigzag heads": Setup("fixed", 2, "zigzag", "heads", "node", "none"),
    "data-parallel": Setup("fixed", 1, "zigzag", "ring", "world", "none"),
    "flexible": Setup("flexible", None, "balanced", "ring", "none", "none"),
}


def write_documents(path: Path, uneven: bool) -> None:
    """Documents of letters: most are short and some as long as can be, or all about alike."""
    draw = random.Random(0)
    with path.open("w", encoding="utf-8") as file:
        for _ in range(1200):
            if uneven:
                length = min(LONGEST, round(40 * draw.paretovariate(0.8)))
            else:
                length = draw.randrange(180, 220)
            text = "".join(draw.choices("abcdefgh ", k=length))
            file.write(json.dumps({"text": text}) + "\n")


def config_of(folder: Path, data: str, model: str, name: str, runs: str = "runs") -> Config:
    """The settings of one run."""
    from longspan.train.question import settings_of  # torch is not for the planner's process

    hidden, layers = MODELS[model]
    sizes = {"hidden_size": hidden, "intermediate_size": 2 * hidden, "num_hidden_layers": layers}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 4}
    values: dict[str, Any] = {
        "name": f"{data}-{model}-{name}".replace(" ", "-"),
        "runs": str(folder / runs),
        "data": {"path": str(folder / f"{data}.jsonl"), "max_length": LONGEST},
        "model": {"type": "llama", "config": sizes},
        "parallel": {"cluster": str(folder / "cluster.yaml")},
        "train": {"steps": FIRST + STEPS},
        "checks": {"leak_probe": False},
    }
    for key, value in settings_of(setup_of(folder, data, name), None).items():
        section, name_ = key.split(".")
        if value is not None:
            values.setdefault(section, {})[name_] = value
    path = folder / f"{os.environ.get('RANK', 'one')}.yaml"
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    return load_config(path)


def setup_of(folder: Path, data: str, name: str) -> Setup:
    """A setup with about as many tokens a step as all."""
    setup = SETUPS[name]
    if setup.mode == "fixed":
        return replace(setup, accumulate=BATCH_TOKENS * (setup.sp or 1) // (4 * LONGEST))
    lines = (folder / f"{data}.jsonl").read_text(encoding="utf-8").splitlines()
    tokens = [len(json.loads(line)["text"]) for line in lines]
    return replace(setup, global_batch=round(BATCH_TOKENS * len(tokens) / sum(tokens)))


def time_steps(folder: Path) -> dict[str, Any]:
    """On every rank: probe, then train each case in each way, in turns."""
    import torch
    import torch.distributed as dist

    from longspan.cluster.calibrate import calibrate
    from longspan.cluster.spec import write_cluster
    from longspan.comm.mesh import connect
    from longspan.comm.probe import probe
    from longspan.train.checkpoint import Progress
    from longspan.train.job import make_job
    from longspan.train.loop import advance
    from longspan.train.record import Recorder
    from longspan.train.stop import StopWish

    torch.set_num_threads(1)
    device = connect()
    cluster, fit = calibrate(probe(device, 1 << 30, "site0"))
    leader = dist.get_rank() == 0
    if leader:
        write_cluster(cluster, folder / "cluster.yaml")
    dist.barrier()
    found: dict[str, Any] = {"fit": str(fit), "runs": [], "lost": {}}
    for data, model in CASES:
        runs: dict[str, dict[str, Any]] = {
            name: {"data": data, "model": model, "setup": name, "step_s": [], "tokens": []}
            for name in SETUPS
        }
        lost = []
        with StopWish() as wish, ExitStack() as open_:
            jobs = {}
            for name in SETUPS:
                config = config_of(folder, data, model, name)
                recorder = open_.enter_context(Recorder(config.run, leader, FIRST + STEPS))
                with timed() as rates:  # measured where the flexible job, the last one, is made
                    jobs[name] = make_job(config, device, recorder)
            progress = dict.fromkeys(jobs, Progress(0, 0))
            for _ in range(FIRST + STEPS):
                with timed() as round_:
                    for name, job in jobs.items():
                        dist.barrier()
                        with timed() as step:
                            progress[name], _ = advance(job, progress[name], wish)
                        runs[name]["step_s"].append(step.seconds)
                lost.append(round_.lost)
                time.sleep(0.5)  # a batch to come is being planned, which is no other run's matter
            for job in jobs.values():
                if job.planned:
                    job.planned.close()
        for name, run in runs.items():
            if leader:
                run["tokens"] = figures(config_of(folder, data, model, name).run, "tokens")
            found["runs"].append(run)
        found["lost"][f"{data} {model}"] = {"rounds": lost, "rates": rates.lost}
    return found


def rates_of(folder: Path, data: str, model: str) -> dict[str, Rates]:
    """The rates that the flexible run has measured."""
    run = config_of(folder, data, model, "flexible").run
    kept = json.loads((run / "rates.json").read_text())["rates"]
    return {kind: Rates(**values) for kind, values in kept.items()}


def count_memory(folder: Path) -> dict[str, Any]:
    """On every rank: the peak of some steps of each case in each way, the fullest rank's.

    That of fixed ways only in the first lab: it doesn't depend on links.
    """
    import gc

    import torch
    import torch.distributed as dist

    from longspan.comm.mesh import connect
    from longspan.train.checkpoint import Progress
    from longspan.train.job import make_job
    from longspan.train.loop import advance
    from longspan.train.record import Recorder
    from longspan.train.stop import StopWish

    torch.set_num_threads(1)
    device = connect()
    leader = dist.get_rank() == 0
    peaks = {}
    first = (folder / "first").is_file()
    for (data, model), name in product(CASES, SETUPS):
        if not first and SETUPS[name].mode == "fixed":
            continue
        config = config_of(folder, data, model, name, "memory")
        if leader and SETUPS[name].mode != "fixed":  # they were timed already
            config.run.mkdir(parents=True)
            shutil.copy(config_of(folder, data, model, name).run / "rates.json", config.run)

        def some_steps(config: Config = config) -> None:
            with StopWish() as wish, Recorder(config.run, leader, MEMORY_STEPS) as recorder:
                job, progress = make_job(config, device, recorder), Progress(0, 0)
                for _ in range(MEMORY_STEPS):
                    progress, _ = advance(job, progress, wish)
                if job.planned:
                    job.planned.close()

        peak = torch.tensor(float(peak_bytes(some_steps)))
        dist.all_reduce(peak, dist.ReduceOp.MAX)
        peaks[f"{data} {model} {name}"] = peak.item()
        gc.collect()
    return peaks


def figures(run: Path, name: str) -> list[float]:
    """A figure of a run's steps."""
    from longspan.trace import curve, read_trace

    return [value for _, value in curve(list(read_trace(run / "trace.jsonl")), name)]


def planned_bytes(run: Path) -> int:
    """The most that a run's plans foretell."""
    from longspan.trace import Note, read_trace

    notes = [row for row in read_trace(run / "trace.jsonl") if isinstance(row, Note)]
    plans = [note.about for note in notes if note.kind == "plan"]
    return max(
        int(group["peak_bytes"])
        for plan in plans
        for micro in plan["micro_batches"]
        for group in micro["groups"]
    )


def worker(folder: Path, out: Path, work: Callable[[Path], dict[str, Any]]) -> None:
    """On every rank: do it; rank 0 writes what came of it."""
    found = work(folder)
    if os.environ["RANK"] == "0":
        out.write_text(json.dumps(found), encoding="utf-8")
    sys.stdout.flush()
    os._exit(0)


def foretold(
    folder: Path, run: dict[str, Any], rates: dict[str, Rates] | None, rounds: list[int]
) -> Any:
    """What the planner says of some rounds of a run, from all that it reads."""
    from longspan.train.question import question_of

    config = config_of(folder, run["data"], run["model"], run["setup"])
    forecaster = question_of(config, read_cluster(folder / "cluster.yaml")).forecaster
    work = replace(forecaster.work, rates=rates, memory_limit=None)
    setup, counts = setup_of(folder, run["data"], run["setup"]), range(1, FIRST + STEPS + 1)
    side_by_side = 4 // (setup.sp or 4)
    packs = setup.accumulate * side_by_side
    told = [
        replace(forecaster, work=work, packs=packs * count, batches=count).of(setup)
        for count in (counts if side_by_side == 1 else counts[-1:])
    ]
    if side_by_side > 1:  # foretold is the slowest of several packs, whichever they are
        return told[-1]

    def mean_of(values: list[float]) -> float:
        """Of the rounds' values, from the means of the first ones of each count."""
        sums = [0.0, *(value * count for count, value in zip(counts, values, strict=True))]
        return mean(sums[number + 1] - sums[number] for number in rounds)

    return replace(
        told[-1],
        step_s=mean_of([one.step_s for one in told]),
        tokens=mean_of([one.tokens for one in told]),
    )


def in_lab(folder: Path, work: str, megabits: int | None) -> dict[str, Any]:
    """Have all ranks of a lab do it: of fixed speed, unless the links have none."""
    from longspan.lab.lab import Lab
    from longspan.lab.spec import LabSpec

    out = folder / f"{work}.json"
    spec = LabSpec(2, 2)
    if megabits:
        spec = replace(spec, bandwidth=f"{megabits}mbit", device_share=0.45)
    with Lab(spec) as lab:
        command = [sys.executable, "-m", "benchmarks.whole_steps", work, str(folder), str(out)]
        lab.run(command, timeout_s=900).check()
    found: dict[str, Any] = json.loads(out.read_text(encoding="utf-8"))
    return found


def main() -> None:
    """Run the lab at each bandwidth and compare."""
    console = Console(record=True, width=120)
    table = Table("Mbit/s", "case", "setup", "measured s", "foretold s", "error", "from the probe",
                  "peak MB", "foretold MB", "error", box=None)  # fmt: skip
    errors, probed, memory = [], [], []
    within: list[float] = []
    peaks: dict[str, float] = {}
    for megabits in BANDWIDTHS:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            for data in ("uneven", "even"):
                write_documents(folder / f"{data}.jsonl", data == "uneven")
            if not peaks:
                (folder / "first").touch()
            found = in_lab(folder, "time", megabits)
            peaks |= in_lab(folder, "memory", None)
            console.print(f"{megabits} Mbit/s: {found['fit']}")
            for data, model in CASES:
                lost = found["lost"][f"{data} {model}"]
                rounds = sorted(range(FIRST, FIRST + STEPS), key=lambda n: lost["rounds"][n])
                rounds = rounds[: max(LEAST, sum(lost["rounds"][n] <= QUIET for n in rounds))]
                runs = [r for r in found["runs"] if (r["data"], r["model"]) == (data, model)]
                rates = rates_of(folder, data, model)
                told = {run["setup"]: foretold(folder, run, rates, rounds) for run in runs}
                speeds = {}
                for run in runs:
                    setup = run["setup"]
                    step_s, tokens = (
                        mean(run[of][n] for n in rounds) for of in ("step_s", "tokens")
                    )
                    speeds[setup] = tokens / step_s
                    one, plain = told[setup], foretold(folder, run, None, rounds)
                    error, alone = (x.step_s / step_s - 1 for x in (one, plain))
                    errors.append(abs(error))
                    probed.append(abs(alone))
                    peak, held = peaks[f"{data} {model} {setup}"], one.memory_bytes
                    if SETUPS[setup].mode != "fixed":
                        held = planned_bytes(config_of(folder, data, model, setup, "memory").run)
                    memory.append(held / peak - 1)
                    table.add_row(
                        *(str(megabits), f"{data}, {model}", setup),
                        *(f"{step_s:.3f}", f"{one.step_s:.3f}", f"{error:+.0%}", f"{alone:+.0%}"),
                        *(f"{peak / 1e6:.1f}", f"{held / 1e6:.1f}", f"{memory[-1]:+.0%}"),
                    )
                names = {setup_of(folder, data, name): name for name in told}
                best = names[simplest({own: told[name] for own, name in names.items()})]
                within.append(max(speeds.values()) / speeds[best] - 1)
                console.print(
                    f"{megabits} Mbit/s, {data}, {model}: {best} is recommended, the fastest is "
                    f"{max(speeds, key=lambda setup: speeds[setup])}; {within[-1]:.1%} apart"
                )
                taken = mean(lost["rounds"][n] for n in rounds), mean(lost["rounds"][FIRST:])
                console.print(
                    f"  {len(rounds)} rounds count; the host took {taken[0]:.1%} of them, "
                    f"{taken[1]:.1%} of all, {lost['rates']:.1%} while rates were measured"
                )
    console.print(table)
    figures = {
        "cases": len(within),
        "median_error": round(median(errors), 4),
        "p90_error": round(quantiles(errors, n=10)[-1], 4),
        "probe_only_median_error": round(median(probed), 4),
        "recommended_is_fastest": sum(gap <= 0.001 for gap in within),
        "recommended_worst_gap": round(max(within), 4),
        "memory_least": round(min(memory), 4),
        "memory_most": round(max(memory), 4),
    }
    targets = {"median_error": 0.10, "p90_error": 0.20, "recommended_is_fastest": 10}
    targets |= {"recommended_worst_gap": 0.05, "memory_least": 0.0, "memory_most": 0.10}
    least = ("recommended_is_fastest", "memory_least")
    holds = all(
        figures[name] >= limit if name in least else figures[name] <= limit
        for name, limit in targets.items()
    )
    conclude("whole_steps", figures, targets, holds, console.export_text())


if __name__ == "__main__":
    if len(sys.argv) == 4:
        works = {"time": time_steps, "memory": count_memory}
        worker(Path(sys.argv[2]), Path(sys.argv[3]), works[sys.argv[1]])
    else:
        main()
