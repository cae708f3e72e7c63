"""How fast the model itself is on these devices: a probe knows matrix products, not the model.

Three forward and backward passes tell apart what a micro-batch costs, what a token adds and what a
query-key pair adds: a single token, some documents of usual length, and one document as long. A
micro-batch's cost is timed by itself, not told from a difference of long times: it is what small
micro-batches are mostly made of, and kernels and messages have it whatever their size.
"""

import time
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
    count = max(2, tokens // usual // 2 * 2)
    shapes = [[1], [usual] * count, [usual * count]]
    least, many, one = (_seconds(runner, place, shape) for shape in shapes)
    # FSDP2 has added the gradients up out of reach; to be forgotten they must be reduced first.
    runner.reduce_gradients(True)
    _pass(runner, place, [1])
    step_s = _step_s(runner)
    runner.model.zero_grad()
    tile = CPU_TILE if runner.device.type == "cpu" else 1
    found_here = replace(told_apart(usual, count, least, many, one, tile), step_s=step_s)
    own = torch.tensor(astuple(found_here), dtype=torch.float64, device=runner.device)
    rows = [torch.empty_like(own) for _ in range(dist.get_world_size())]
    dist.all_gather(rows, own)
    found: dict[str, Rates] = {}
    for kind in cluster.devices:
        alike = [row.tolist() for row, k in zip(rows, cluster.kinds, strict=True) if k == kind]
        if alike:
            found[kind] = Rates(*(median(column) for column in zip(*alike, strict=True)))
    return found


def told_apart(
    usual: int, count: int, least_s: float, many_s: float, one_s: float, tile: int
) -> Rates:
    """The rates by which one token, ``count`` documents of ``usual`` and one as long take so.

    ``tile``: that of the pairs that attention computes (``tiled_pairs``).
    """
    tokens = usual * count
    pairs, all_pairs = count * tiled_pairs(usual, tile), tiled_pairs(tokens, tile)
    pair_s = max(0.0, (one_s - many_s) / (all_pairs - pairs))
    # Noise must not make tokens free.
    token_s = max(many_s - least_s - pair_s * (pairs - 1), 0.1 * many_s) / (tokens - 1)
    return Rates(max(0.0, least_s - token_s - pair_s), token_s, pair_s)


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
