"""Table 4 of Streaming DiLoCo (arXiv 2501.18512) beside what our simulator says.

The bandwidth between two sites that keeps the devices computing 50 to 99 % of the time, for five
methods and three models. A cell holds if it is at most one step of the paper's grid away
(0.1 to 1,000 Gbit/s in 50 steps, 20.7 % each).

    python -m benchmarks.paper_streaming_diloco
"""

import time

import numpy as np

from benchmarks.record import conclude
from longspan.cluster.bandwidth import paper_grid, required_bits_per_s
from longspan.schedule.outer import Method, OuterJob

UTILISATIONS = (0.5, 0.8, 0.9, 0.95, 0.99)

# Parameters, layers and seconds a step (the paper's Table 4; H = 100).
MODELS = {"1B": (1e9, 24, 0.1), "10B": (10e9, 48, 0.8), "100B": (100e9, 108, 4.9)}

# Method, delay in steps, bits a parameter, and the paper's Gbit/s by model.
METHODS: dict[str, tuple[Method, int, int, tuple[str, str, str]]] = {
    "Data-parallel": (
        "data-parallel",
        0,
        16,
        (
            "86.8 152.6 184.2 222.3 569.0",
            "104.8 222.3 222.3 268.3 471.5",
            "184.2 323.8 390.7 390.7 471.5",
        ),
    ),
    "DiLoCo": (
        "diloco",
        0,
        16,
        ("1.4 6.2 13.3 23.3 86.8", "1.7 7.5 16.0 33.9 104.8", "3.0 11.0 23.3 49.4 184.2"),
    ),
    "Streaming": (
        "streaming",
        0,
        16,
        ("1.4 5.2 9.1 16.0 28.1", "1.7 5.2 9.1 13.3 19.3", "2.4 6.2 9.1 11.0 19.3"),
    ),
    "+ overlap": (
        "streaming",
        1,
        16,
        ("1.4 4.3 6.2 9.1 11.0", "1.7 3.6 5.2 6.2 7.5", "1.7 3.6 4.3 5.2 5.2"),
    ),
    "+ 4 bits": (
        "streaming",
        1,
        4,
        ("0.4 0.9 1.7 2.0 3.0", "0.4 0.9 1.4 1.4 1.7", "0.5 0.9 1.1 1.1 1.4"),
    ),
}


def steps_apart(paper: float, ours: float) -> int:
    """Steps of the grid between the point that the paper rounded to ``paper``, and ours."""
    grid = paper_grid() / 1e9

    def nearest(value: float) -> int:
        return int(np.argmin(np.abs(np.log(grid / value))))

    return nearest(ours) - nearest(paper)


def main() -> None:
    """Print the table, and how many cells hold."""
    start = time.perf_counter()
    lines = [f"{'Gbit/s, paper / ours':26}" + "".join(f"{u:>16.0%}" for u in UTILISATIONS)]
    apart = []
    for name, (method, delay, bits, table) in METHODS.items():
        for (model, (params, layers, step_s)), row in zip(MODELS.items(), table, strict=True):
            job = OuterJob(params, layers, step_s, every=100, delay=delay, bits=bits).by(method)
            ours = [value / 1e9 for value in required_bits_per_s(job, UTILISATIONS)]
            paper = [float(cell) for cell in row.split()]
            apart += [steps_apart(*pair) for pair in zip(paper, ours, strict=True)]
            cells = (f"{a:.1f} / {b:.1f}" for a, b in zip(paper, ours, strict=True))
            lines.append(f"{name:20}{model:6}" + "".join(f"{cell:>16}" for cell in cells))
            print(*(lines if len(lines) == 2 else lines[-1:]), sep="\n", flush=True)
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
