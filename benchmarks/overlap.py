"""What transfers between sites cost the steps, and sites of unequal speed.

The job of benchmarks/outer.py. First a link so slow that a fragment is under way for three inner
steps: the time of steps during transfers over that of the others, and utilisation beside what the
simulator says. Then one site with half the speed of the other, the same cores and tokens in all as
two equal ones: what they wait for each other, and their loss over that of the equal ones.

    python -m benchmarks.overlap [--steps 600]
"""

import argparse
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Console

from benchmarks.outer import (
    LAYERS,
    OVERLAP_DELAY,
    OVERLAP_EVERY,
    RANKS,
    SITES,
    documents,
    run,
    told_by,
)
from benchmarks.record import conclude

OVERLAP_STEPS, FLIGHT_STEPS = 144, 3


def main() -> None:
    """Equal sites, a link that is nearly too slow, unequal sites."""
    from longspan.schedule.outer import Send, fragments

    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=600)
    given = parser.parse_args()
    console, began = Console(record=True, width=110), time.perf_counter()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        documents(folder, 0, given.steps)
        equal = run("streaming", 20e6, given.steps, given.steps, 0, folder)
        quiet = median(one["train_s"] for one in equal["rows"])
        bits = max(one["sent"] for one in equal["rows"]) * RANKS * 8
        rate = bits / (FLIGHT_STEPS * quiet)
        steps = min(OVERLAP_STEPS, 6 * given.steps)
        slow = run("overlap", rate, steps, steps, 0, folder)
        uneven = run("unequal", 20e6, given.steps, given.steps, 0, folder)
        waited = waiting(folder)
    sends = [
        step
        for step in range(1, steps + 1)
        if any(isinstance(e, Send) for e in fragments(step, LAYERS + 1, OVERLAP_EVERY))
    ]
    overlap = overlapped(slow["rows"], sends, rate, equal["parameters"])
    console.print(f"overlap at {rate / 1e6:.2f} Mbit/s: {overlap}")
    console.print(
        f"equal sites: loss {equal['loss']:.4f}; unequal: {uneven['loss']:.4f}, "
        f"each waited {waited} of its time"
    )
    figures = {
        "steps": given.steps,
        **overlap,
        "unequal_over_equal": round(uneven["loss"] / equal["loss"] - 1, 5),
        "unequal_waiting": max(waited),
        "seconds": round(time.perf_counter() - began),
    }
    targets = {
        "step_during_transfers": 1.05,
        "utilisation_off": 0.03,
        "unequal_over_equal": 0.01,
        "unequal_waiting": 0.05,
    }
    holds = all(figures[name] <= target for name, target in targets.items())
    conclude("overlap", figures, targets, holds, console.export_text())


def waiting(folder: Path) -> list[float]:
    """The share of each unequal site's time that it has waited for the other."""
    sites = [told_by(site, "unequal", folder) for site in range(SITES)]
    return [
        round(sum(one["wait_s"] for one in found["rows"]) / found["seconds"], 4) for found in sites
    ]


def overlapped(
    rows: list[dict[str, Any]], sends: list[int], bits_per_s: float, parameters: int
) -> dict[str, float]:
    """Steps during transfers over the others, and utilisation beside the simulator's."""
    from longspan.cluster.bandwidth import utilisation
    from longspan.schedule.outer import OuterJob

    busy = {step + after for step in sends for after in range(1, FLIGHT_STEPS + 1)}
    settled = range(OVERLAP_EVERY + 1, len(rows) + 1)
    times = {step: rows[step - 1]["train_s"] for step in settled}
    quiet = median(seconds for step, seconds in times.items() if step not in busy)
    during = median(seconds for step, seconds in times.items() if step in busy)
    # Not the median step over the mean one: the machine's own speed changes by more than this.
    measured = sum(times.values()) / sum(rows[step - 1]["step_s"] for step in settled)
    job = OuterJob(
        parameters, LAYERS, quiet, OVERLAP_EVERY, OVERLAP_DELAY, bits=4.125, fragment_layers=1
    )
    told = utilisation(job, bits_per_s)
    return {
        "step_during_transfers": round(during / quiet, 3),
        "utilisation": round(measured, 4),
        "utilisation_foretold": round(told, 4),
        "utilisation_off": round(abs(measured - told), 4),
    }


if __name__ == "__main__":
    main()
