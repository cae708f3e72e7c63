"""Table 4 of Streaming DiLoCo (arXiv 2501.18512) beside what our simulator says.

The bandwidth between two sites that keeps the devices computing 50 to 99 % of the time, for five
methods and three models. A cell holds if it is at most one step of the paper's grid away
(0.1 to 1,000 Gbit/s in 50 points, 20.7 % apart).

    python -m benchmarks.paper_streaming_diloco
"""

import time

from benchmarks.record import conclude
from longspan.cluster.papers import streaming_diloco


def main() -> None:
    """Print the table, and how many cells hold."""
    start = time.perf_counter()
    lines: list[str] = []
    apart: list[int] = []
    for row in streaming_diloco():
        if not lines:
            shares = "".join(f"{share:>16.0%}" for share in row.utilisations)
            lines.append(f"{'Gbit/s, paper / ours':24}{shares}")
            print(lines[0])
        pairs = zip(row.paper_gbit_per_s, row.ours_gbit_per_s, strict=True)
        cells = "".join(f"{f'{paper:.1f} / {ours:.1f}':>16}" for paper, ours in pairs)
        lines.append(f"{row.method:19}{row.model:5}{cells}")
        print(lines[-1], flush=True)
        apart += row.steps_apart
    figures = {
        "cells": len(apart),
        "within_one_step": sum(abs(steps) <= 1 for steps in apart),
        "same_point": apart.count(0),
        "seconds": round(time.perf_counter() - start, 1),
    }
    targets = {"within_one_step": 75, "seconds": 300}
    holds = figures["within_one_step"] == len(apart) == 75 and figures["seconds"] < 300
    conclude("paper_streaming_diloco", figures, targets, holds, "\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
