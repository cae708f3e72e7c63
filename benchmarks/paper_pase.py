"""Figure 6 of PaSE (arXiv 2407.04001) beside what our prices, and PaSE's own, say of it.

The paper measured the strategies that its search found, against data-parallel training, on two
clusters of 4 to 64 devices. Its released programs have both written out (``models.pase``).
Here both are priced: by our prices on the clusters' presets, and by PaSE's own cost model with the
10 TFLOP/s and 16 GB/s that its search assumes.

One number is fitted, the same for all 40 points: the seconds that a hop of a ring takes in
Mesh-TensorFlow, where every hop is TensorFlow operations that are dispatched one by one for each
device (``placement_mesh_impl.py``), and every tensor is reduced by itself. The presets have NCCL's
latencies. It is also fitted to one cluster, or to three models, to foretell the rest; and, as the
paper doesn't say how long RNNLM's sequences were, with other lengths of these.

    python -m benchmarks.paper_pase
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from statistics import mean

import numpy as np

from benchmarks.models.pase import DEVICES, as_run, data_parallel, found, program, seconds
from benchmarks.record import conclude
from longspan.cluster.fabric import Link
from longspan.cluster.spec import Cluster, Device, read_cluster, uniform
from longspan.planner.capture import capture
from longspan.planner.graph import Graph
from longspan.planner.price import Prices, Pricing

PAPER = {
    "8x1080ti": {
        "alexnet": (1.65, 1.75, 1.85, 1.44, 1.41),
        "inception": (1.03, 1.08, 1.07, 1.09, 1.12),
        "rnnlm": (1.85, 1.76, 1.45, 1.41, 1.36),
        "transformer": (1.03, 1.02, 1.55, 1.51, 1.43),
    },
    "8x2080ti": {
        "alexnet": (3.54, 4.00, 3.99, 2.78, 1.75),
        "inception": (1.01, 1.09, 1.10, 1.11, 1.18),
        "rnnlm": (2.02, 2.41, 1.68, 1.62, 1.33),
        "transformer": (1.00, 1.83, 1.75, 1.60, 2.70),
    },
}
# Nothing is overlapped or put together in buckets, sums go around one ring; plain SGD.
OURS = Pricing(
    overlap=0.0,
    zero=False,
    recompute=False,
    optimizer_bytes=0,
    bucket_bytes=1.0,
    flat_sums=True,
)
THEIRS = replace(OURS, model="pase")


@dataclass(frozen=True)
class Point:
    """One bar of the figure; steps take fixed seconds and so many hops, one after another."""

    cluster: str
    model: str
    devices: int
    paper: float
    fixed: tuple[float, float]  # data-parallel, and what was found
    hops: tuple[float, float]
    preset: float
    pase: float

    def speedup(self, hop_s: float) -> float:
        """Data-parallel over what was found, if a hop takes ``hop_s``."""
        base, best = (f + hop_s * h for f, h in zip(self.fixed, self.hops, strict=True))
        return base / best


def with_latency(cluster: Cluster, hop_s: float) -> Cluster:
    """The same cluster where every hop takes ``hop_s``."""
    kind, *_ = cluster.kinds
    node = cluster.nodes[0]
    assert node.link and node.network
    return uniform(
        cluster.devices[kind],
        nodes=len(cluster.nodes),
        devices=cluster.ranks // len(cluster.nodes),
        link=node.link.model_copy(update={"latency_s": hop_s}),
        network=node.network.model_copy(update={"latency_s": hop_s}),
    )


def assumed() -> Cluster:
    """The cluster of PaSE's search: the defaults of its ``scheduler.py``."""
    device = Device(memory_bytes="11GB", bytes_per_s=1e15, peak={"matmul": {"float32": 1e13}})
    link = Link(latency_s=0.0, bytes_per_s=16e9)
    return uniform(device, nodes=8, devices=8, link=link, network=link)


def points(graphs: dict[str, Graph]) -> Iterator[Point]:
    """All of the figure."""
    for name in PAPER:
        for model, graph in graphs.items():
            for devices, paper in zip(DEVICES, PAPER[name][model], strict=True):
                yield point_of(name, model, graph, devices, paper)


def point_of(name: str, model: str, graph: Graph, devices: int, paper: float) -> Point:
    """One of them."""
    cluster = read_cluster(name)
    rules = data_parallel(devices), found(model, devices)
    sizes = (2,) * (devices.bit_length() - 1)

    def took(where: Cluster, pricing: Pricing) -> tuple[float, float]:
        prices = Prices(graph, where, sizes, pricing, min(3, len(sizes)))
        return seconds(graph, prices, rules[0]), seconds(graph, prices, rules[1])

    fixed = took(with_latency(cluster, 0.0), OURS)
    second = took(with_latency(cluster, 1.0), OURS)
    hops = (second[0] - fixed[0], second[1] - fixed[1])
    preset, pase = (a / b for a, b in (took(cluster, OURS), took(assumed(), THEIRS)))
    return Point(name, model, devices, paper, fixed, hops, preset, pase)


def error(some: list[Point], hop_s: float) -> float:
    """Mean absolute relative error."""
    return mean(abs(point.speedup(hop_s) / point.paper - 1) for point in some)


def fitted(some: list[Point]) -> float:
    """The seconds a hop with the least error, from 1 µs to 10 ms in steps of 2 %."""
    tried = np.exp(np.arange(np.log(1e-6), np.log(1e-2), np.log(1.02)))
    return float(min(tried, key=lambda hop_s: error(some, float(hop_s))))


def foretold(all_: list[Point], part: str) -> float:
    """The error of points of each cluster or model, fitted to all others."""
    errors = []
    for name in dict.fromkeys(getattr(point, part) for point in all_):
        rest = [point for point in all_ if getattr(point, part) != name]
        these = [point for point in all_ if getattr(point, part) == name]
        errors += [error(these, fitted(rest))] * len(these)
    return mean(errors)


def same_trend(points_of: list[Point], hop_s: float) -> bool:
    """Whether the speed-up grows or falls with the devices, as the paper's does, or stays."""
    places = np.log2([point.devices for point in points_of])
    ways = [
        np.polyfit(places, np.log(speedups), 1)[0]
        for speedups in (
            [point.paper for point in points_of],
            [point.speedup(hop_s) for point in points_of],
        )
    ]
    return bool(ways[0] * ways[1] > 0 or abs(ways[1]) < 0.02)


def figure(**lengths: int) -> list[Point]:
    """Points of all models, or of those that are named, with sequences of these lengths."""
    models = lengths or dict.fromkeys(PAPER["8x1080ti"])
    return list(points({name: as_run(capture(*program(name, n))) for name, n in models.items()}))


def main() -> None:
    """Print the table and the errors."""
    all_ = figure()
    hop_s = fitted(all_)
    log = f"{'':26}{'devices':>8}{'paper':>8}{'ours':>8}{'presets':>9}{'PaSE’s':>8}\n"
    print(log, end="", flush=True)
    figures: dict[str, float] = {}
    for point in all_:
        line = f"{point.cluster + ' ' + point.model:26}{point.devices:8}{point.paper:8.2f}"
        line += f"{point.speedup(hop_s):8.2f}{point.preset:9.2f}{point.pase:8.2f}\n"
        print(line, end="", flush=True)
        log += line
        name = f"{point.cluster}_{point.model}_{point.devices}"
        figures[name] = round(point.speedup(hop_s), 3)
    rest = [point for point in all_ if point.model != "rnnlm"]
    others = [(length, [*rest, *figure(rnnlm=length)]) for length in (32, 128, 256)]
    rows = [all_[at : at + len(DEVICES)] for at in range(0, len(all_), len(DEVICES))]
    figures |= {
        "hop_us": round(1e6 * hop_s, 1),
        "mean_error": round(error(all_, hop_s), 4),
        "mean_error_other_cluster": round(foretold(all_, "cluster"), 4),
        "mean_error_other_models": round(foretold(all_, "model"), 4),
        **{f"mean_error_rnnlm_{n}": round(error(some, fitted(some)), 4) for n, some in others},
        "mean_error_presets": round(mean(abs(p.preset / p.paper - 1) for p in all_), 4),
        "mean_error_pase": round(mean(abs(p.pase / p.paper - 1) for p in all_), 4),
        "right_sign": sum(p.speedup(hop_s) > 0.99 for p in all_),
        "right_trend": sum(same_trend(row, hop_s) for row in rows),
    }
    summary = "".join(f"{name}: {value}\n" for name, value in list(figures.items())[len(all_) :])
    print(summary, end="")
    holds = figures["mean_error"] <= 0.25 and figures["mean_error"] < figures["mean_error_pase"]
    holds &= figures["right_sign"] == len(all_) and figures["right_trend"] == len(rows)
    conclude("paper_pase", figures, {"mean_error": 0.25}, holds, log + summary)


if __name__ == "__main__":
    main()
