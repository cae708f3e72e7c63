"""A transformer over sensors and over time in turn, which foretells each sensor's next values.

Nothing in it knows of several ranks: ``longspan`` runs it on them by hooks.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["Forecaster"]


class _Attention(nn.Module):
    """Self-attention over one dim of (batch, time, sensor, channel)."""

    def __init__(self, width: int, heads: int, dim: int, causal: bool) -> None:
        super().__init__()
        self.heads, self.dim, self.causal = heads, dim, causal
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, time, sensor, channel) to the same."""
        # The mixed dim goes next to the channels, the other one to the batch.
        packed = self.qkv(x).movedim(self.dim, 2)
        batch, others, length, width = packed.shape
        width //= 3
        q, k, v = (
            part.reshape(batch * others, length, self.heads, width // self.heads).transpose(1, 2)
            for part in packed.chunk(3, -1)
        )
        y = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        y = y.transpose(1, 2).reshape(batch, others, length, width).movedim(2, self.dim)
        out: Tensor = self.out(y)
        return out


class _Block(nn.Module):
    def __init__(self, width: int, heads: int, dim: int, causal: bool) -> None:
        super().__init__()
        self.norm, self.mlp_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = _Attention(width, heads, dim, causal)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        """(batch, time, sensor, channel) to the same."""
        x = x + self.attention(self.norm(x))
        return x + self.mlp(self.mlp_norm(x))


class Forecaster(nn.Module):
    """Takes windows of ``patch`` readings of ``sensors`` sensors, ``times`` of them in a row."""

    def __init__(
        self, times: int, sensors: int, patch: int, width: int, heads: int, pairs: int
    ) -> None:
        super().__init__()
        self.embed = nn.Linear(patch, width)
        self.sensor = nn.Parameter(torch.randn(sensors, width) * 0.02)
        self.time = nn.Parameter(torch.randn(times, width) * 0.02)
        self.over_sensors = nn.ModuleList(_Block(width, heads, 2, False) for _ in range(pairs))
        self.over_time = nn.ModuleList(_Block(width, heads, 1, True) for _ in range(pairs))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, patch)

    def forward(self, readings: Tensor) -> Tensor:
        """(batch, time, sensor, patch): for each window the next one, given those up to it."""
        x = self.embed(readings) + self.sensor + self.time[:, None]
        for over_sensors, over_time in zip(self.over_sensors, self.over_time, strict=True):
            x = over_time(over_sensors(x))
        change: Tensor = self.head(self.norm(x))
        return readings[..., -1:] + change
