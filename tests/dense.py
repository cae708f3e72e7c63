"""Plain attention over a whole sequence, in one process: what every parallel path must equal."""

from collections.abc import Sequence

import torch
from torch import Tensor


def dense_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    documents: Sequence[int],
    causal: bool,
    scale: float,
    window: int | None = None,
) -> tuple[Tensor, Tensor]:
    """(out, lse); q (B, Hq, S, D), k and v (B, Hkv, S, D); documents as cu_seqlens."""
    where = torch.arange(q.shape[2])
    document = torch.bucketize(where, torch.tensor(documents[1:]), right=True)
    seen = document[:, None] == document[None]
    if causal:
        seen &= where[:, None] >= where[None]
    if window is not None:
        seen &= where[:, None] - where[None] < window
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    scores = (q @ k.mT * scale).masked_fill(~seen, -torch.inf)
    return scores.softmax(-1) @ v, scores.logsumexp(-1)
