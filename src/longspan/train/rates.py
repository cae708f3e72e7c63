"""How fast the model itself is on these devices: a probe knows matrix products, not the model.

Four forward and backward passes tell apart what a micro-batch costs, what a document, a token and
a query-key pair add: a single token, documents of usual length, documents a quarter as long, and
one document of as many tokens. A micro-batch's cost is timed nearly by itself, not told from a
difference of long times: it is what small micro-batches are mostly made of, and kernels and
messages have it whatever their size.
"""

import time
from collections.abc import Sequence
from dataclasses import astuple, replace
from statistics import median

import numpy as np
import torch
import torch.distributed as dist

from longspan.cluster.spec import Cluster
from longspan.data.packing import PackedSequence
from longspan.planner.workload import Rates
from longspan.schedule.ring_tasks import CPU_TILE, tiled_pairs
from longspan.train.batches import Place
from longspan.train.config import Optimizer
from longspan.train.optimize import make_optimizer, set_lr
from longspan.train.step import StepRunner

__all__ = ["measure_rates", "told_apart"]

_REPEATS = 5


def measure_rates(
    runner: StepRunner, place: Place, cluster: Cluster, tokens: int, usual: int
) -> dict[str, Rates]:
    """The median rank's rates, by kind of device, while all ranks do the same by themselves.

    ``place`` is this rank alone; it works on up to ``tokens`` tokens, in documents of ``usual``
    ones. The gathering of parameters is in what a micro-batch costs. All ranks must call it;
    gradients are forgotten.
    """
    usual = max(1, min(usual, tokens // 4))
    short = -(-usual // 4)
    total = max(2, tokens // usual // 2 * 2) * usual
    shapes = [[1], [usual] * (total // usual), [short] * (total // short), [total]]
    took = [_seconds(runner, place, shape) for shape in shapes]
    # FSDP2 has added the gradients up out of reach; to be forgotten they must be reduced first.
    runner.reduce_gradients(True)
    _pass(runner, place, [1])
    step_s = _step_s(runner)
    runner.model.zero_grad()
    tile = CPU_TILE if runner.device.type == "cpu" else 1
    found_here = replace(told_apart(shapes, took, tile), step_s=step_s)
    own = torch.tensor(astuple(found_here), dtype=torch.float64, device=runner.device)
    rows = [torch.empty_like(own) for _ in range(dist.get_world_size())]
    dist.all_gather(rows, own)
    found: dict[str, Rates] = {}
    for kind in cluster.devices:
        alike = [row.tolist() for row, k in zip(rows, cluster.kinds, strict=True) if k == kind]
        if alike:
            found[kind] = Rates(*(median(column) for column in zip(*alike, strict=True)))
    return found


def told_apart(shapes: Sequence[Sequence[int]], took_s: Sequence[float], tile: int) -> Rates:
    """The rates by which passes over documents of these lengths take so.

    Relative errors are least, and nothing takes less than no time. ``tile``: that of the pairs that
    attention computes (``tiled_pairs``).
    """
    rows = [
        (1, len(shape), sum(shape), sum(float(tiled_pairs(n, tile)) for n in shape))
        for shape in shapes
    ]
    times = np.array(took_s)
    relative = np.array(rows, dtype=np.float64) / times[:, None]
    found, free = np.zeros(4), np.arange(4)
    while len(free):
        some = np.linalg.lstsq(relative[:, free], np.ones(len(times)))[0]
        if some.min() >= 0:
            found[free] = some
            break
        free = np.delete(free, some.argmin())
    micro_batch_s, document_s, token_s, pair_s = found.tolist()
    # Noise must not make tokens free.
    token_s = max(token_s, 0.1 * max(took_s) / max(map(sum, shapes)))
    return Rates(micro_batch_s, token_s, pair_s, document_s=document_s)


def _seconds(runner: StepRunner, place: Place, lengths: list[int]) -> float:
    """The median of some passes over documents of these lengths, after one that doesn't count.

    They follow each other without a pause, as in training: ranks that share a processor or its
    memory slow each other down.
    """
    runner.reduce_gradients(False)
    dist.barrier()
    return median([_pass(runner, place, lengths) for _ in range(_REPEATS + 1)][1:])


def _step_s(runner: StepRunner) -> float:
    """The median of some steps of training's optimizer at rate 0, after one to begin with."""
    parameters = list(runner.model.parameters())
    still = make_optimizer(runner.model, Optimizer())
    set_lr(still, 0.0)

    def step() -> float:
        dist.barrier()
        start = time.perf_counter()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        still.step()
        if runner.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    return median([step() for _ in range(_REPEATS + 1)][1:])


def _pass(runner: StepRunner, place: Place, lengths: list[int]) -> float:
    """Seconds of forward and backward on this rank."""
    ends = np.cumsum([0, *lengths], dtype=np.int64)
    tokens = np.arange(ends[-1]) % runner.model.config.vocab_size
    sequence = PackedSequence(tokens, tokens, ends)
    start = time.perf_counter()
    runner.loss_sum(sequence, place).backward()
    if runner.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start
