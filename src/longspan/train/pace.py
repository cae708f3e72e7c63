"""How fast the model itself is on these devices: a probe knows matrix products, not the model.

Three forward and backward passes tell apart what a micro-batch costs, what a token adds and what a
query-key pair adds: as many documents of usual length, half of them, and one document as long.
"""

import time
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist

from longspan.data.packing import PackedSequence
from longspan.train.batches import Place
from longspan.train.step import StepRunner

__all__ = ["Pace", "measure_pace"]

_REPEATS = 3


@dataclass(frozen=True, slots=True)
class Pace:
    """Seconds of forward and backward on a rank, while all do the same: in all three ≥ 0."""

    micro_batch_s: float
    token_s: float
    pair_s: float


def measure_pace(runner: StepRunner, place: Place, tokens: int, usual: int) -> tuple[Pace, ...]:
    """Each rank's pace at up to ``tokens`` tokens in documents of ``usual`` ones, on every rank.

    ``place`` is this rank alone. All ranks must call it; gradients are forgotten.
    """
    usual = max(1, min(usual, tokens // 4))
    count = max(2, tokens // usual // 2 * 2)
    shapes = [[usual] * (count // 2), [usual] * count, [usual * count]]
    times = [min(_seconds(runner, place, shape) for _ in range(_REPEATS)) for shape in shapes]
    half, many, one = times
    held = [float(sum(shape)) for shape in shapes]
    pairs = [sum(n * (n + 1) / 2 for n in shape) for shape in shapes]
    pair_s = max(0.0, (one - many) / (pairs[2] - pairs[1]))
    slope = (many - half) / (held[1] - held[0])
    token_s = max(0.0, slope - pair_s * (pairs[1] - pairs[0]) / (held[1] - held[0]))
    own = torch.tensor(
        [max(0.0, many - token_s * held[1] - pair_s * pairs[1]), token_s, pair_s],
        dtype=torch.float64,
        device=runner.device,
    )
    rows = [torch.empty_like(own) for _ in range(dist.get_world_size())]
    dist.all_gather(rows, own)
    return tuple(Pace(*row.tolist()) for row in rows)


def _seconds(runner: StepRunner, place: Place, lengths: list[int]) -> float:
    ends = np.cumsum([0, *lengths], dtype=np.int64)
    tokens = np.arange(ends[-1]) % runner.model.config.vocab_size
    sequence = PackedSequence(tokens, tokens, ends)
    runner.reduce_gradients(False)
    dist.barrier()
    start = time.perf_counter()
    runner.loss_sum(sequence, place).backward()  # type: ignore[no-untyped-call]
    if runner.device.type == "cuda":
        torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    runner.model.zero_grad()
    return seconds
