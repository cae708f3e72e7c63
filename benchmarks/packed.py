"""Orders of packed documents: how even the work is, what is sent, how long attention takes.

Documents of a corpus' lengths are packed without padding (``longspan.data.packing``) and dealt to
2, 4 and 8 ranks; the causal attention of Llama 3.1 8B's layer (32 heads, 8 of keys, head dim 128,
bfloat16) is played forward and backward on two clusters. Lengths are one number a line of
``--lengths``; without it they are drawn log-normal, as Wikipedia's are (median 345 tokens, one
document of a hundred over 10,000). Holds if in balanced order, in every pack, the busiest rank has
at most 1.05 times the mean of tokens and of attention's work.

    python -m benchmarks.packed [--lengths FILE]
"""

from argparse import ArgumentParser
from collections import defaultdict
from dataclasses import dataclass, replace
from itertools import accumulate
from statistics import fmean

import numpy as np
from numpy.typing import NDArray

from benchmarks.record import conclude
from longspan.balance import EVEN
from longspan.cluster.simulate import simulate
from longspan.cluster.spec import Cluster, read_cluster
from longspan.data.packing import Packer
from longspan.layout import Order
from longspan.schedule.ring import imbalance, pairs, tokens
from longspan.schedule.ring_tasks import AttentionKernels, ring_tasks
from longspan.schedule.rounds import comms

MAX_LENGTHS, WORLDS, PACKS = (8192, 32768, 131072), (2, 4, 8), 12
CLUSTERS = ("8xh100-80gb", "workstations-10gbe")
KERNELS = AttentionKernels(32, 8, 128)


@dataclass(frozen=True)
class Found:
    """Of one pack in one order; ``sent``: tokens' keys and values sent in forward, all ranks."""

    pairs: float
    tokens: float
    sent: int
    seconds: tuple[float, ...]


def play(ends: tuple[int, ...], world: int, order: Order, clusters: list[Cluster]) -> Found:
    """The schedule's figures, and the seconds on each cluster."""
    ring = replace(KERNELS.ring(ends[-1], world, order), documents=ends)
    ranks = range(world)
    tasks = [ring_tasks(ring, rank, KERNELS) for rank in ranks]
    return Found(
        imbalance([pairs(ring, rank) for rank in ranks]),
        imbalance([tokens(ring, rank) for rank in ranks]),
        sum(op.sizes[0] for rank in ranks for op in comms(ring, rank)) // ring.kv_bytes,
        tuple(simulate(tasks, cluster).seconds for cluster in clusters),
    )


def packs(lengths: NDArray[np.int64], max_length: int) -> list[tuple[int, ...]]:
    """The document boundaries of some packs."""
    packer = Packer(lengths, np.arange(len(lengths)), max_length, seed=0)
    random = np.random.default_rng(0)
    chosen = random.choice(packer.epoch_packs(0), PACKS, replace=False)
    pieces = [packer.pack(int(number)) for number in chosen]
    return [(0, *accumulate(piece.length for piece in pack)) for pack in pieces]


def main() -> None:
    """Print a line for each length, number of ranks and order."""
    parser = ArgumentParser()
    parser.add_argument("--lengths", help="A file of documents' lengths in tokens.")
    file = parser.parse_args().lengths
    drawn = np.random.default_rng(0).lognormal(np.log(345), 1.45, 100_000)
    lengths = np.loadtxt(file, dtype=np.int64) if file else np.maximum(1, drawn).astype(np.int64)
    clusters = [read_cluster(name) for name in CLUSTERS]
    log = f"{'tokens':>7}{'ranks':>6} {'order':12}{'pairs':>7}{'worst':>7}{'tokens':>8}{'sent':>7}"
    log += "".join(f"{f'ms, {name}':>26}" for name in CLUSTERS) + "\n"
    print(log, end="")
    worst: defaultdict[str, float] = defaultdict(float)
    for max_length in MAX_LENGTHS:
        packed = packs(lengths, max_length)
        for world in WORLDS:
            for order in Order:
                found = [play(ends, world, order, clusters) for ends in packed]
                most = max(one.pairs for one in found), max(one.tokens for one in found)
                # Of all that a ring sends without documents.
                whole = sum(ends[-1] for ends in packed) * (world - 1)
                line = f"{max_length:7}{world:6} {order:12}{fmean(one.pairs for one in found):7.3f}"
                line += f"{most[0]:7.3f}{most[1]:8.3f}{sum(o.sent for o in found) / whole:7.3f}"
                for number in range(len(CLUSTERS)):
                    line += f"{1e3 * fmean(one.seconds[number] for one in found):26.2f}"
                print(line, flush=True)
                log += line + "\n"
                worst[f"{order}_pairs"] = max(worst[f"{order}_pairs"], most[0])
                worst[f"{order}_tokens"] = max(worst[f"{order}_tokens"], most[1])
    figures = {name: round(value, 3) for name, value in worst.items()}
    targets = {"balanced_pairs": EVEN, "balanced_tokens": EVEN}
    conclude("packed", figures, targets, all(worst[x] <= EVEN for x in targets), log)


if __name__ == "__main__":
    main()
