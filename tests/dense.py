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
    kv_documents: Sequence[int] | None = None,
    sinks: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(out, lse); q (B, Hq, S, D), k and v (B, Hkv, Skv, D); documents as cu_seqlens.

    ``sinks (Hq,)`` are logits of one more column without a value. A query without keys has out 0.
    """
    both = (documents, documents if kv_documents is None else kv_documents)
    rows, columns = (torch.arange(ends[-1]) for ends in both)
    of_row, of_column = (
        torch.bucketize(where, torch.tensor(ends[1:]), right=True)
        for where, ends in zip((rows, columns), both, strict=True)
    )
    seen = of_row[:, None] == of_column[None]
    if causal:
        seen &= rows[:, None] >= columns[None]
    if window is not None:
        seen &= rows[:, None] - columns[None] < window
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    scores = (q @ k.mT * scale).masked_fill(~seen, -torch.inf)
    sink = q.new_full(q.shape[1:2], -torch.inf) if sinks is None else sinks
    scores = torch.cat([scores, sink.view(1, -1, 1, 1).expand(*q.shape[:3], 1)], -1)
    lse = scores.detach().logsumexp(-1)
    blind = (lse == -torch.inf).unsqueeze(-1)
    weights = scores.masked_fill(blind, 0.0).softmax(-1).masked_fill(blind, 0.0)
    return weights[..., :-1] @ v, lse
