"""Static, best uniform and flexible groups in whole training runs on an emulated cluster.

In the lab, 2 nodes × 2 ranks of 0.45 core each, joined at 200 Mbit/s: ``longspan probe``, then
``longspan train`` in each mode on the same batches. Lengths are real ones, a line each in the file
that is given, scaled to the machine; a device's memory is such that the longest document needs all
four. Step times are end to end, and what ``train`` foretold of them is beside them.
"""

import json
import random
import sys
import tempfile
from itertools import islice
from pathlib import Path
from statistics import median
from typing import Any

import yaml
from rich.console import Console
from rich.table import Table

from benchmarks.record import conclude
from longspan.cluster.memory import Transformer, memory
from longspan.lab.lab import Lab
from longspan.lab.spec import LabSpec
from longspan.trace import Note, curve, read_trace

MODES = ("static", "uniform", "flexible")
SCALE = 4  # real tokens to one of ours
LONGEST = 4096
DOCUMENTS, BATCH, STEPS = 1500, 128, 9
STEADY = 3  # the first step that counts: by then connections are open
MODEL = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
}


def memory_bytes() -> int:
    """What a device needs for a little more than a quarter of the longest document."""
    sizes = Transformer(layers=4, hidden=128, heads=4, kv_heads=4, head_dim=32, ffn=256, vocab=257)
    return memory(sizes, int(LONGEST / 4 * 1.08)).total


def write_documents(lengths: Path, path: Path) -> None:
    """Documents as long as the first real ones, in tokens of ours; their text doesn't matter."""
    draw = random.Random(0)
    letters = "".join(draw.choices("abcdefghijklmnopqrstuvwxyz     ", k=1 << 20))
    with lengths.open(encoding="utf-8") as file, path.open("w", encoding="utf-8") as out:
        for line in islice(file, DOCUMENTS):
            length = max(1, round(int(line) / SCALE))
            start = draw.randrange(len(letters) - length)
            out.write(json.dumps({"text": letters[start : start + length]}) + "\n")


def config(folder: Path, mode: str) -> Path:
    """The settings of a run, in a file."""
    values = {
        "name": mode,
        "runs": str(folder),
        "data": {"path": str(folder / "documents.jsonl"), "max_length": LONGEST},
        "model": {"type": "llama", "config": MODEL},
        "parallel": {
            "mode": mode,
            "cluster": str(folder / "cluster.yaml"),
            "memory_bytes": memory_bytes(),
        },
        "train": {
            "steps": STEPS,
            "global_batch": BATCH,
            "validate_every": 10 * STEPS,
            "validation_sequences": 1,
        },
        "checks": {"leak_probe": False},
        "checkpoint": {"every": 10 * STEPS},
    }
    path = folder / f"{mode}.yaml"
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    return path


def found(folder: Path, mode: str) -> dict[str, Any]:
    """What a run's trace tells of its steady steps."""
    rows = list(read_trace(folder / mode / "trace.jsonl"))

    def steady(figure: str) -> list[float]:
        return [value for step, value in curve(rows, figure) if step >= STEADY]

    plans = [row.about for row in rows if isinstance(row, Note) and row.kind == "plan"]
    sizes = [
        len(group["ranks"])
        for plan in plans
        if plan["step"] >= STEADY
        for micro_batch in plan["micro_batches"]
        for group in micro_batch["groups"]
    ]
    return {
        "step_s": steady("step_s"),
        "planned_s": steady("planned_s"),
        "wait_s": steady("plan_wait_s"),
        "planning_s": steady("planning_s"),
        "micro_batches": steady("micro_batches"),
        "tokens": steady("tokens"),
        "sharding": plans[0]["sharding"],
        "groups": {size: sizes.count(size) for size in sorted(set(sizes))},
    }


def main(lengths: Path) -> None:
    """Run the three modes in one lab and compare."""
    console = Console(record=True, width=110)
    results: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_documents(lengths, folder / "documents.jsonl")
        with Lab(LabSpec(2, 2, bandwidth="200mbit", device_share=0.45)) as lab:
            longspan = [sys.executable, "-m", "longspan"]
            one_thread = {"OMP_NUM_THREADS": "1"}
            probe = [*longspan, "probe", "--out", str(folder / "cluster.yaml")]
            lab.run(probe, env=one_thread, timeout_s=150).check()
            for mode in MODES:
                command = [*longspan, "train", str(config(folder, mode))]
                lab.run(command, env=one_thread, timeout_s=240).check()
                results[mode] = found(folder, mode)
        console.print((folder / "cluster.yaml").read_text(encoding="utf-8"), markup=False)
    table = Table("mode", "groups of", "micro-batches", "step s", "foretold s", "error", box=None)
    errors: list[float] = []
    for mode, run in results.items():
        own = [p / s - 1 for p, s in zip(run["planned_s"], run["step_s"], strict=True)]
        errors += map(abs, own)
        sizes = ", ".join(f"{size}: {count}" for size, count in run["groups"].items())
        table.add_row(
            *(f"{mode} ({run['sharding']})", sizes, f"{sum(run['micro_batches']):.0f}"),
            *(f"{sum(run['step_s']):.2f}", f"{sum(run['planned_s']):.2f}"),
            f"{median(own):+.1%}",
        )
    console.print(f"{STEPS - STEADY + 1} steps, {sum(results['flexible']['tokens']):.0f} tokens")
    console.print(table)
    flexible = sum(results["flexible"]["step_s"])
    figures = {
        "over_static": round(sum(results["static"]["step_s"]) / flexible, 3),
        "over_uniform": round(sum(results["uniform"]["step_s"]) / flexible, 3),
        "median_error": round(median(errors), 4),
        "worst_wait_s": round(max(results["flexible"]["wait_s"]), 4),
        "planning_s": round(median(results["flexible"]["planning_s"]), 4),
    }
    targets = {"over_static": 1.5, "over_uniform": 1.15, "median_error": 0.15, "worst_wait_s": 0.01}
    holds = (
        figures["over_static"] >= targets["over_static"]
        and figures["over_uniform"] >= targets["over_uniform"]
        and figures["median_error"] <= targets["median_error"]
        and figures["worst_wait_s"] <= targets["worst_wait_s"]
    )
    conclude("flexible", figures, targets, holds, console.export_text())


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m benchmarks.flexible LENGTHS, a file of document lengths")
    main(Path(sys.argv[1]))
