"""FlexSP's planner beside ours, on its own lengths, cost model and rules.

Wikipedia's lengths as released with FlexSP, padded as there to a multiple of 128, batches of 512
sequences, 64 ranks (arXiv 2412.01523, section 6). For 192K and 384K: the predicted seconds of its
mixed integer program (``flexsp_milp``), of our search under its rules (powers of two; a barrier
after every micro-batch), and of our search with groups of any size; how long planning takes on one
core; and the baselines, packed as its own are and by our search.

    python -m benchmarks.paper_flexsp [--model 7b] [--lengths FILE] [--batches 8] [--limit 10]
"""

import argparse
import os
import sys
import time
from collections import defaultdict
from pathlib import Path
from statistics import median

import numpy as np

from benchmarks.flexsp_milp import Milp, best_fit
from benchmarks.record import conclude
from longspan.planner.batches import plan_priced
from longspan.planner.published import published_prices

LENGTHS = Path(__file__).parents[2] / "shared" / "data" / "wikipedia_lengths.txt"
RANKS, BATCH, LIMITS = 64, 512, (192_000, 384_000)
PAPER = {"static": 1.72, "uniform": 1.34}  # 7B, Wikipedia, 192K: over static, uniform over static


def batches(path: Path, longest: int, count: int) -> list[list[int]]:
    """The first batches of those sequences that are shorter than ``longest``, padded."""
    if not path.is_file():
        sys.exit(
            f"no lengths at {path}: give --lengths, or set LONGSPAN_LENGTHS, a file with one "
            "length a line (wikipedia.txt of PKU-DAIR/Hetu-Galvatron, branch flexsp)"
        )
    step = 2 * RANKS
    padded = (np.loadtxt(path, dtype=np.int64) - 1) // step * step + step
    kept = padded[padded <= longest - step]
    return [kept[i * BATCH : (i + 1) * BATCH].tolist() for i in range(count)]


def compare(
    name: str, path: Path, longest: int, count: int, limit_s: float
) -> tuple[dict[str, float], str]:
    """All planners on the batches of one longest length; sums over batches, and their table."""
    strict = published_prices(name, RANKS, longest=longest)
    free = published_prices(name, RANKS, longest=longest, powers_of_two=False)
    milp = Milp(strict, limit_s)
    took: dict[str, list[float]] = defaultdict(list)
    plan_s: dict[str, list[float]] = defaultdict(list)
    head = ("bound", "milp", "ours", "any size", "uniform", "static", "bfd uni.", "bfd static")
    log = f"{name}, {longest // 1000}K\n" + "".join(f"{word:>11}" for word in head) + "\n"
    sizes = [price.ranks for price in strict.pools[0].prices]
    # At 384K not even all ranks hold the longest allowed; the longest there is, they do.
    largest = min(longest, strict.capacity)
    degree = next(p.ranks for p in strict.pools[0].prices if p.most_tokens >= largest)
    for lengths in batches(path, longest, count):

        def timed(key: str, make):  # type: ignore[no-untyped-def]
            clock = time.perf_counter if key == "milp" else time.process_time
            start = clock()
            found = make()
            plan_s[key].append(clock() - start)
            return found

        plan = timed("ours", lambda: plan_priced(lengths, strict))  # noqa: B023
        row = {
            "bound": plan.lower_bound_s,
            "milp": timed("milp", lambda: milp.plan(lengths)),  # noqa: B023
            "ours": plan.seconds,
            "any": timed("any", lambda: plan_priced(lengths, free)).seconds,  # noqa: B023
            "uniform": plan_priced(lengths, strict, mode="uniform").seconds,
            "static": plan_priced(lengths, strict, mode="static", longest=largest).seconds,
            "bfd_uniform": min(best_fit(lengths, strict, size) for size in sizes),
            "bfd_static": best_fit(lengths, strict, degree),
        }
        log += "".join(f"{value:11.3f}" for value in row.values()) + "\n"
        for key, value in row.items():
            took[key].append(value)
    figures = {key: sum(values) for key, values in took.items()}
    log += "".join(f"{value:11.2f}" for value in figures.values()) + "   sum\n"
    figures["never_over_milp"] = max(
        ours / theirs for ours, theirs in zip(took["ours"], took["milp"], strict=True)
    )
    for key in ("ours", "any", "milp"):
        figures[f"plan_{key}_median_ms"] = 1e3 * median(plan_s[key])
        figures[f"plan_{key}_worst_ms"] = 1e3 * max(plan_s[key])
        log += (
            f"planning, {key}: {figures[f'plan_{key}_median_ms']:.0f} ms median, "
            f"{figures[f'plan_{key}_worst_ms']:.0f} worst\n"
        )
    return figures, log


def main() -> None:
    """Compare at every longest length."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="7b")
    parser.add_argument("--batches", type=int, default=8)
    parser.add_argument("--limit", type=float, default=10.0, help="seconds of one program")
    given = os.environ.get("LONGSPAN_LENGTHS", str(LENGTHS))
    parser.add_argument("--lengths", type=Path, default=Path(given))
    asked = parser.parse_args()
    figures: dict[str, float] = {}
    log, holds = "", True
    for longest in LIMITS:
        found, table = compare(asked.model, asked.lengths, longest, asked.batches, asked.limit)
        ratios = {
            "static_over_ours": found["bfd_static"] / found["ours"],
            "static_over_uniform": found["bfd_static"] / found["bfd_uniform"],
            "static_over_ours_same_packing": found["static"] / found["ours"],
            "any_size_over_milp": found["any"] / found["milp"],
            "ours_over_milp": found["ours"] / found["milp"],
            "gap_to_bound": found["ours"] / found["bound"] - 1,
        }
        table += "".join(f"{key}: {value:.3f}\n" for key, value in ratios.items()) + "\n"
        print(table, flush=True)
        log += table
        label = f"{longest // 1000}k"
        figures |= {f"{label}_{k}": round(v, 4) for k, v in (found | ratios).items()}
        holds &= ratios["ours_over_milp"] <= 1
        holds &= found["plan_ours_median_ms"] <= 50 and found["plan_ours_worst_ms"] <= 200
    if asked.model == "7b":
        holds &= abs(figures["192k_static_over_ours"] / PAPER["static"] - 1) <= 0.06
        holds &= abs(figures["192k_static_over_uniform"] / PAPER["uniform"] - 1) <= 0.06
    targets = {
        "ours_over_milp": 1.0,
        "plan_ours_median_ms": 50,
        "plan_ours_worst_ms": 200,
        "static_over_ours": PAPER["static"],
        "static_over_uniform": PAPER["uniform"],
        "ratios_within": 0.06,
    }
    conclude("paper_flexsp", figures, targets, bool(holds), log)


if __name__ == "__main__":
    main()
