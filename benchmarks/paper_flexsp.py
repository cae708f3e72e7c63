"""FlexSP's planner beside ours, on its own lengths, cost model and rules.

Wikipedia's lengths as released with FlexSP, padded as there to a multiple of 128, batches of 512
sequences, 64 ranks (arXiv 2412.01523, section 6). For 192K and 384K, and the constants of 7B, 13B
and 30B: the predicted seconds of its mixed integer program (``flexsp_milp``), of our search under
its rules (powers of two; a barrier after every micro-batch), and of our search with groups of any
size; how long planning takes on one core; and the baselines, packed as its own are and by our
search. As FlexSP does, the program stops at a time limit, of 10 s each; it plans the first batches
only (a quarter as many for other models than the first), as one can take it two minutes.
Its time is the wall's, so run it with nothing beside.

    python -m benchmarks.paper_flexsp --lengths FILE [--models 7b 13b 30b] [--batches 40]
        [--milp-batches 2] [--limit 10]
"""

import argparse
import sys
import time
from collections import defaultdict
from pathlib import Path
from statistics import mean, median

import numpy as np

from benchmarks.flexsp_milp import Milp, best_fit
from benchmarks.record import conclude, keep
from longspan.plan import BatchPlan
from longspan.planner.batches import plan_priced
from longspan.planner.prices import Prices
from longspan.planner.published import published_prices

RANKS, BATCH, LIMITS = 64, 512, (192_000, 384_000)
# 7B, Wikipedia, 192K: how much faster than static are flexible groups, and the best uniform ones.
PAPER = {"static_over_ours": 1.72, "static_over_uniform": 1.34}
WITHIN = 0.06


def batches(path: Path, longest: int, count: int) -> list[list[int]]:
    """The first batches of those sequences that are shorter than ``longest``, padded."""
    if not path.is_file():
        sys.exit(
            f"no lengths at {path}: give a file with one length a line "
            "(wikipedia.txt of PKU-DAIR/Hetu-Galvatron, branch flexsp)"
        )
    step = 2 * RANKS
    padded = (np.loadtxt(path, dtype=np.int64) - 1) // step * step + step
    kept = padded[padded <= longest - step]
    return [kept[i * BATCH : (i + 1) * BATCH].tolist() for i in range(count)]


def compare(
    name: str, steps: list[list[int]], longest: int, milp_steps: int, limit_s: float
) -> tuple[dict[str, float], str]:
    """All planners on the batches of one longest length; means over batches, and their table."""
    strict = published_prices(name, RANKS, longest=longest)
    free = published_prices(name, RANKS, longest=longest, powers_of_two=False)
    milp = Milp(strict, limit_s)
    took: dict[str, list[float]] = defaultdict(list)
    plan_s: dict[str, list[float]] = defaultdict(list)
    head = ("bound", "ours", "any size", "uniform", "static", "bfd uni.", "bfd static", "milp")
    log = f"{name}, {longest // 1000}K\n" + "".join(f"{word:>11}" for word in head) + "\n"
    sizes = [price.ranks for price in strict.pools[0].prices]
    # Where not even all ranks hold the longest allowed, they hold the longest there is.
    largest = min(longest, strict.capacity)
    degree = next(p.ranks for p in strict.pools[0].prices if p.most_tokens >= largest)

    def timed(key: str, lengths: list[int], prices: Prices) -> BatchPlan:
        start = time.process_time()
        plan = plan_priced(lengths, [prices])
        plan_s[key].append(time.process_time() - start)
        return plan

    for step, lengths in enumerate(steps):
        plan = timed("ours", lengths, strict)
        row = {
            "bound": plan.lower_bound_s,
            "ours": plan.seconds,
            "any": timed("any", lengths, free).seconds,
            "uniform": plan_priced(lengths, [strict], mode="uniform").seconds,
            "static": plan_priced(lengths, [strict], mode="static", longest=largest).seconds,
            "bfd_uniform": min(best_fit(lengths, strict, size) for size in sizes),
            "bfd_static": best_fit(lengths, strict, degree),
        }
        if step < milp_steps:
            start = time.perf_counter()
            row["milp"] = milp.plan(lengths)
            plan_s["milp"].append(time.perf_counter() - start)
        log += "".join(f"{value:11.3f}" for value in row.values()) + "\n"
        for key, value in row.items():
            took[key].append(value)
    figures = {key: mean(values) for key, values in took.items()}
    log += "".join(f"{value:11.3f}" for value in figures.values()) + "   mean\n"
    same = slice(len(took["milp"]))
    ratios = {
        "static_over_ours": figures["bfd_static"] / figures["ours"],
        "static_over_uniform": figures["bfd_static"] / figures["bfd_uniform"],
        "static_over_ours_same_packing": figures["static"] / figures["ours"],
        "any_over_ours": figures["any"] / figures["ours"],
        "gap_to_bound": figures["ours"] / figures["bound"] - 1,
    }
    if took["milp"]:
        ratios["ours_over_milp"] = sum(took["ours"][same]) / sum(took["milp"])
        ratios["static_over_milp"] = sum(took["bfd_static"][same]) / sum(took["milp"])
        ratios["any_over_milp"] = sum(took["any"][same]) / sum(took["milp"])
        ratios["worst_over_milp"] = max(
            ours / theirs for ours, theirs in zip(took["ours"], took["milp"], strict=False)
        )
    log += "".join(f"{key}: {value:.3f}\n" for key, value in ratios.items())
    for key, values in plan_s.items():
        ratios[f"plan_{key}_median_ms"] = 1e3 * median(values)
        ratios[f"plan_{key}_worst_ms"] = 1e3 * max(values)
        log += (
            f"planning, {key}: {1e3 * median(values):.0f} ms median, {1e3 * max(values):.0f} worst"
            f", of {len(values)} batches\n"
        )
    return figures | ratios, log + "\n"


def main() -> None:
    """Compare for every model at every longest length."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--lengths", type=Path, required=True)
    parser.add_argument("--models", nargs="+", default=["7b", "13b", "30b"])
    parser.add_argument("--batches", type=int, default=40)
    parser.add_argument(
        "--milp-batches",
        type=int,
        default=2,
        help="a quarter as many for other models than the first",
    )
    parser.add_argument("--limit", type=float, default=10.0, help="seconds of one program")
    asked = parser.parse_args()
    figures: dict[str, float] = {}
    log, holds = "", True
    for name in asked.models:
        milp_steps = -(-asked.milp_batches // (1 if name == asked.models[0] else 4))
        for longest in LIMITS:
            steps = batches(asked.lengths, longest, asked.batches)
            found, table = compare(name, steps, longest, milp_steps, asked.limit)
            print(table, flush=True)
            log += table
            keep("paper_flexsp", log + "(stopped after this table)\n")
            label = f"{name}_{longest // 1000}k"
            figures |= {f"{label}_{key}": round(value, 4) for key, value in found.items()}
            holds &= found.get("ours_over_milp", 0) <= 1 and found["any_over_ours"] <= 1
            holds &= found["plan_ours_median_ms"] <= 50 and found["plan_ours_worst_ms"] <= 200
            if (name, longest) == ("7b", 192_000):
                for key, published in PAPER.items():
                    holds &= abs(found.get(key, published) / published - 1) <= WITHIN
    targets = {
        "ours_over_milp": 1.0,
        "any_over_ours": 1.0,
        "plan_ours_median_ms": 50,
        "plan_ours_worst_ms": 200,
        "7b_192k": PAPER,
        "within": WITHIN,
    }
    conclude("paper_flexsp", figures, targets, bool(holds), log)


if __name__ == "__main__":
    main()
