"""Predicted against measured: probe a cluster, then foretell communications it never timed.

In the lab, 2 nodes × 2 ranks of 0.45 core each, at 50, 200 and 1,000 Mbit/s. The probe times pairs,
each node's ranks and the world; foretold are other sizes, other groups, uneven parts, rings of
sends, and groups that contend for one link.
"""

import json
import os
import sys
import tempfile
from itertools import pairwise
from pathlib import Path
from statistics import median, quantiles

from rich.console import Console
from rich.table import Table

from benchmarks.record import conclude
from longspan.schedule.ops import Comm

BANDWIDTHS = (50, 200, 1000)
REPEATS = 7
# Seconds of a node's link that an op is about as large as.
LENGTHS_S = (0.06, 0.15, 0.4)


def cases(bytes_per_s: float) -> list[list[Comm]]:
    """Ops at the same time, none of which a probe times."""
    world, across, other, three = (0, 1, 2, 3), (0, 2), (1, 3), (0, 1, 2)
    found: list[list[Comm]] = []
    for length in LENGTHS_S:
        m = int(bytes_per_s * length) // 96 * 96
        ring = [0] * 16
        for place, (a, b) in enumerate(pairwise((*world, 0))):
            ring[4 * a + b] = m + 4096 * place
        uneven = [(m // 8) * (1 + (a + b) % 3) for a in world for b in world]
        found += [
            [Comm("all_to_all", world, tuple(uneven))],
            [Comm("all_to_all", three, (m // 2,) * 9)],
            [Comm("all_to_all", across, (m,) * 4)],
            [Comm("all_to_all", across, (m // 2,) * 4), Comm("all_to_all", other, (m // 2,) * 4)],
            [Comm("all_to_all", world, tuple(ring))],
            [Comm("all_gather", across, (m, m // 3))],
            [Comm("all_gather", three, (m // 3, m // 2, m))],
            [Comm("all_gather", across, (m // 2,) * 2), Comm("all_gather", other, (m // 2,) * 2)],
            [Comm("reduce_scatter", across, (m // 2,) * 2)],
            [Comm("all_reduce", across, (m,))],
            [Comm("all_reduce", three, (m,))],
            [Comm("all_reduce", across, (m // 2,)), Comm("all_reduce", other, (m // 2,))],
            [Comm("all_reduce", across, (m // 2,)), Comm("all_to_all", other, (m // 2,) * 4)],
            [Comm("send", (1, 2), (m,)), Comm("send", (3, 0), (m,))],
        ]
    return found


def worker(megabits: int, out: Path) -> None:
    """On every rank: probe, foretell, measure; rank 0 writes what came of it."""
    import torch

    from longspan.cluster.calibrate import calibrate
    from longspan.cluster.simulate import concurrent_seconds
    from longspan.comm.measure import Stopwatch
    from longspan.comm.mesh import connect
    from longspan.comm.probe import probe

    torch.set_num_threads(1)
    device = connect()
    cluster, fit = calibrate(probe(device, 1 << 30, "site0"))
    watch = Stopwatch(device)
    rows = []
    for ops in cases(megabits * 1e6 / 8):
        seconds = watch.time(ops, repeats=REPEATS)
        words = " and ".join(f"{op.kind} {op.ranks}" for op in ops)
        size = sum(sum(op.sizes) for op in ops)
        rows.append((words, size, max(concurrent_seconds(ops, cluster.idle)), median(seconds)))
    if watch.rank == 0:
        out.write_text(json.dumps({"fit": str(fit), "rows": rows}), encoding="utf-8")
    sys.stdout.flush()
    os._exit(0)


def main() -> None:
    """Run the lab at each bandwidth and compare."""
    from longspan.lab.lab import Lab
    from longspan.lab.spec import LabSpec

    console = Console(record=True, width=110)
    errors: dict[int, list[float]] = {}
    table = Table("Mbit/s", "what", "MB", "foretold ms", "measured ms", "error", box=None)
    with tempfile.TemporaryDirectory() as folder:
        for megabits in BANDWIDTHS:
            out = Path(folder) / f"{megabits}.json"
            with Lab(LabSpec(2, 2, bandwidth=f"{megabits}mbit", device_share=0.45)) as lab:
                command = [sys.executable, "-m", "benchmarks.predict", str(megabits), str(out)]
                lab.run(command, timeout_s=400).check()
            found = json.loads(out.read_text(encoding="utf-8"))
            console.print(f"{megabits} Mbit/s: {found['fit']}")
            errors[megabits] = []
            for words, size, foretold, measured in found["rows"]:
                error = foretold / measured - 1
                errors[megabits].append(abs(error))
                table.add_row(
                    *(str(megabits), words, f"{size / 1e6:.1f}"),
                    *(f"{foretold * 1e3:.1f}", f"{measured * 1e3:.1f}", f"{error:+.1%}"),
                )
    console.print(table)
    every = [error for some in errors.values() for error in some]
    figures = {
        "cases": len(every),
        "median_error": round(median(every), 4),
        "p90_error": round(quantiles(every, n=10)[-1], 4),
        "worst_error": round(max(every), 4),
        "median_error_by_mbit": {str(b): round(median(e), 4) for b, e in errors.items()},
    }
    targets = {"median_error": 0.10, "p90_error": 0.20}
    holds = all(float(figures[name]) <= limit for name, limit in targets.items())  # type: ignore[arg-type]
    conclude("predict", figures, targets, holds, console.export_text())


if __name__ == "__main__":
    if len(sys.argv) == 3:
        worker(int(sys.argv[1]), Path(sys.argv[2]))
    else:
        main()
