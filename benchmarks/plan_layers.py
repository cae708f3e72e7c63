"""How long a per-layer plan takes, capture and baselines included, for the models of PaSE's paper.

python -m benchmarks.plan_layers
"""

import time

from benchmarks.models.inputs import build
from benchmarks.record import conclude
from longspan.cluster.spec import read_cluster
from longspan.planner.layers import plan_layers

# Model, cluster, seconds that are aimed at.
CASES = (
    ("alexnet", "8x1080ti", 5.0),
    ("inception", "8x1080ti", 10.0),
    ("transformer", "8x1080ti", 20.0),
    ("llama7b", "8xa100-40gb", 30.0),
    ("resnet", "8x1080ti", 0.0),
    ("rnnlm", "8x1080ti", 0.0),
)


def main() -> None:
    """Print a row for each model."""
    log = f"{'64 devices':14}{'layers':>8}{'seconds':>10}{'step, ms':>12}"
    log += f"{'data-parallel':>16}{'FSDP':>10}{'tensor':>10}\n"
    print(log, end="", flush=True)
    figures, targets, holds = {}, {}, True
    for name, cluster, within in CASES:
        model, inputs = build(name)
        start = time.perf_counter()
        plan = plan_layers(model, inputs, cluster=read_cluster(cluster))
        seconds = time.perf_counter() - start
        figures[name] = round(seconds, 2)
        if within:
            targets[name] = within
            holds &= seconds <= within
        others = [f"{1e3 * other:.1f}" for other in plan.alternatives.values()]
        line = f"{name:14}{len(plan.layers):8}{seconds:10.2f}{1e3 * plan.seconds:12.1f}"
        line += f"{others[0]:>16}{others[1]:>10}{others[2]:>10}\n"
        print(line, end="", flush=True)
        log += line
    conclude("plan_layers", figures, targets, holds, log)


if __name__ == "__main__":
    main()
