"""Local attention of one block, and its backward: one narrow seam, several kernels.

Shapes: q ``(B, Hq, Sq, D)``, k ``(B, Hkv, Skv, D)``, v ``(B, Hkv, Skv, Dv)``; Hq is a multiple of
Hkv (grouped queries). A kernel returns ``out (B, Hq, Sq, Dv)`` in q's dtype and
``lse (B, Hq, Sq)``, the natural logarithm of the softmax denominator, in the accumulation dtype;
-inf where nothing is attended. A causal block is square; an upper triangle is one read from its
end (``Flipped``).

Backward takes the *global* out and lse of a query, over all the keys it sees on all ranks, so
that each block's gradients simply add up.
"""

from typing import Protocol

import torch
from torch import Tensor

__all__ = [
    "CpuFlash",
    "CudaEfficient",
    "CudaFlash",
    "Flipped",
    "Kernel",
    "Padded",
    "Reference",
    "kernel_for",
]

aten = torch.ops.aten


class Kernel(Protocol):
    """The seam: forward and backward of one full or causal block."""

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, *, causal: bool, scale: float
    ) -> tuple[Tensor, Tensor]:
        """(out, lse) of the block."""

    def backward(
        self,
        dout: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        *,
        causal: bool,
        scale: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(dq, dk, dv) of the block."""


def kernel_for(q: Tensor, v: Tensor) -> Kernel:
    """The fastest kernel that is exact for these tensors' device, dtype and head dims."""
    kernel: Kernel
    if q.device.type == "cpu":
        kernel = CpuFlash()
    elif q.device.type == "cuda" and q.dtype in (torch.float16, torch.bfloat16):
        kernel = CudaFlash()
    elif q.device.type == "cuda" and q.dtype == torch.float32:
        kernel = CudaEfficient()
    else:
        return Reference()
    return kernel if q.shape[-1] == v.shape[-1] else Padded(kernel)


def _repeat(kv: Tensor, heads: int) -> Tensor:
    return kv.repeat_interleave(heads // kv.shape[1], dim=1)


def _fold(grad: Tensor, heads: int) -> Tensor:
    """The gradient of repeated heads, summed onto the heads that were repeated."""
    folded: Tensor = grad.unflatten(1, (heads, -1)).sum(2)
    return folded


class Reference:
    """The formulas written out, for any device and dtype; a half-precision input is widened."""

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, *, causal: bool, scale: float
    ) -> tuple[Tensor, Tensor]:
        """(out, lse) of the block."""
        scores = self._scores(q, k, causal, scale)
        lse = scores.logsumexp(-1)
        weights = (scores - lse.unsqueeze(-1)).exp().nan_to_num(0.0)
        out = weights @ _repeat(v, q.shape[1]).to(weights.dtype)
        return out.to(q.dtype), lse

    def backward(
        self,
        dout: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        *,
        causal: bool,
        scale: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(dq, dk, dv) of the block (FlashAttention-2, arXiv 2307.08691, section 3.1)."""
        heads = q.shape[1]
        weights = (self._scores(q, k, causal, scale) - lse.unsqueeze(-1)).exp()
        wide = weights.dtype
        dout, out = dout.to(wide), out.to(wide)
        dv = weights.mT @ dout
        dweights = dout @ _repeat(v, heads).to(wide).mT
        dscores = weights * (dweights - (dout * out).sum(-1, keepdim=True)) * scale
        dq = dscores @ _repeat(k, heads).to(wide)
        dk = dscores.mT @ q.to(wide)
        return dq.to(q.dtype), _fold(dk, k.shape[1]).to(k.dtype), _fold(dv, v.shape[1]).to(v.dtype)

    @staticmethod
    def _scores(q: Tensor, k: Tensor, causal: bool, scale: float) -> Tensor:
        wide = torch.promote_types(q.dtype, torch.float32)
        scores = q.to(wide) @ _repeat(k, q.shape[1]).to(wide).mT * scale
        if causal:
            hidden = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
            scores = scores.masked_fill(hidden, -torch.inf)
        return scores


class CpuFlash:
    """torch's flash attention for CPUs: any floating dtype, grouped queries without a copy."""

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, *, causal: bool, scale: float
    ) -> tuple[Tensor, Tensor]:
        """(out, lse) of the block."""
        out, lse = aten._scaled_dot_product_flash_attention_for_cpu(
            q, k, v, 0.0, causal, scale=scale
        )
        return out, lse

    def backward(
        self,
        dout: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        *,
        causal: bool,
        scale: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(dq, dk, dv) of the block."""
        dq, dk, dv = aten._scaled_dot_product_flash_attention_for_cpu_backward(
            dout, q, k, v, out, lse, 0.0, causal, scale=scale
        )
        return dq, dk, dv


class CudaFlash:
    """FlashAttention-2 as torch carries it: half precision, grouped queries without a copy."""

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, *, causal: bool, scale: float
    ) -> tuple[Tensor, Tensor]:
        """(out, lse) of the block."""
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        sizes = (q.shape[1], k.shape[1])
        out, lse, *_ = aten._flash_attention_forward(
            q, k, v, None, None, *sizes, 0.0, causal, False, scale=scale
        )
        return out.transpose(1, 2), lse

    def backward(
        self,
        dout: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        *,
        causal: bool,
        scale: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(dq, dk, dv) of the block."""
        dout, q, k, v, out = (x.transpose(1, 2) for x in (dout, q, k, v, out))
        sizes = (q.shape[1], k.shape[1])
        no_dropout = torch.empty(2, dtype=torch.uint64, device=q.device)
        grads = aten._flash_attention_backward(
            *(dout, q, k, v, out, lse.contiguous(), None, None, *sizes, 0.0, causal),
            *(no_dropout, no_dropout),
            scale=scale,
        )
        dq, dk, dv = (grad.transpose(1, 2) for grad in grads)
        return dq, dk, dv


class CudaEfficient:
    """Memory-efficient attention, for float32 on CUDA; key and value heads are repeated."""

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, *, causal: bool, scale: float
    ) -> tuple[Tensor, Tensor]:
        """(out, lse) of the block."""
        heads = q.shape[1]
        out, lse, *_ = aten._scaled_dot_product_efficient_attention(
            q, _repeat(k, heads), _repeat(v, heads), None, True, 0.0, causal, scale=scale
        )
        return out, lse[..., : q.shape[2]]  # the kernel pads lse

    def backward(
        self,
        dout: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        *,
        causal: bool,
        scale: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(dq, dk, dv) of the block."""
        heads = q.shape[1]
        padding = -q.shape[2] % 32
        lse = torch.nn.functional.pad(lse, (0, padding), value=torch.inf)
        no_dropout = torch.zeros((), dtype=torch.long, device=q.device)
        dq, dk, dv, _ = aten._scaled_dot_product_efficient_attention_backward(
            *(dout, q, _repeat(k, heads), _repeat(v, heads), None, out, lse),
            *(no_dropout, no_dropout, 0.0, [True, True, True, False], causal),
            scale=scale,
        )
        return dq, _fold(dk, k.shape[1]), _fold(dv, v.shape[1])


class Flipped:
    """Another kernel, with queries and keys read from their ends: causal sees the upper triangle.

    Attention knows no order but its mask's, so this is exact; it copies the block's tensors.
    """

    def __init__(self, kernel: Kernel) -> None:
        self.kernel = kernel

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, *, causal: bool, scale: float
    ) -> tuple[Tensor, Tensor]:
        """(out, lse) of the block."""
        q, k, v = (x.flip(2) for x in (q, k, v))
        out, lse = self.kernel.forward(q, k, v, causal=causal, scale=scale)
        return out.flip(2), lse.flip(2)

    def backward(
        self,
        dout: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        *,
        causal: bool,
        scale: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(dq, dk, dv) of the block."""
        flipped = (x.flip(2) for x in (dout, q, k, v, out, lse))
        dq, dk, dv = self.kernel.backward(*flipped, causal=causal, scale=scale)
        return dq.flip(2), dk.flip(2), dv.flip(2)


class Padded:
    """Another kernel, where values' head dim isn't the keys': the narrower get zeros, cut off."""

    def __init__(self, kernel: Kernel) -> None:
        self.kernel = kernel

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, *, causal: bool, scale: float
    ) -> tuple[Tensor, Tensor]:
        """(out, lse) of the block."""
        width = max(q.shape[-1], v.shape[-1])
        wide = (_widen(x, width) for x in (q, k, v))
        out, lse = self.kernel.forward(*wide, causal=causal, scale=scale)
        return out[..., : v.shape[-1]], lse

    def backward(
        self,
        dout: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        *,
        causal: bool,
        scale: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(dq, dk, dv) of the block."""
        width = max(q.shape[-1], v.shape[-1])
        dout, wide_q, wide_k, wide_v, out = (_widen(x, width) for x in (dout, q, k, v, out))
        grads = self.kernel.backward(
            dout, wide_q, wide_k, wide_v, out, lse, causal=causal, scale=scale
        )
        dq, dk, dv = (g[..., : x.shape[-1]] for g, x in zip(grads, (q, k, v), strict=True))
        return dq, dk, dv


def _widen(x: Tensor, width: int) -> Tensor:
    return torch.nn.functional.pad(x, (0, width - x.shape[-1]))
