"""Joins partial attention results over disjoint sets of keys."""

import torch
from torch import Tensor

__all__ = ["merge_"]


def merge_(out: Tensor, lse: Tensor, part_out: Tensor, part_lse: Tensor) -> None:
    """Fold a part into ``out (B, H, S, D)`` and ``lse (B, H, S)``, in place.

    Both sides are softmax-normalised over their own keys; an lse of -inf means none so far.
    Source: online softmax, as in FlashAttention (arXiv 2205.14135, section 3.1).
    """
    total = torch.logaddexp(lse, part_lse)
    shift = total.masked_fill(total == -torch.inf, 0.0)
    out.mul_((lse - shift).exp().unsqueeze(-1))
    out.addcmul_(part_out.to(out.dtype), (part_lse - shift).exp().unsqueeze(-1))
    lse.copy_(total)
