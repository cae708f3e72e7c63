"""The encoder-decoder Transformer (arXiv 1706.03762), norms first, with the big model's sizes."""

import torch
from torch import nn
from torch.nn.functional import cross_entropy, scaled_dot_product_attention

__all__ = ["Transformer"]


class Attention(nn.Module):
    """Multi-head attention of ``x`` to ``memory``."""

    def __init__(self, width: int, heads: int, causal: bool) -> None:
        super().__init__()
        self.heads, self.causal = heads, causal
        self.query, self.key = nn.Linear(width, width), nn.Linear(width, width)
        self.value, self.out = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x: torch.Tensor, memory: torch.Tensor) -> torch.Tensor:
        """(b, s, width) from two of them."""
        q, k, v = (
            project(source).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for project, source in ((self.query, x), (self.key, memory), (self.value, memory))
        )
        done = scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        return self.out(done.transpose(1, 2).flatten(2))


class Block(nn.Module):
    """Self-attention, in the decoder also attention to the encoder, and a feed-forward net."""

    def __init__(self, width: int, heads: int, inner: int, decoder: bool) -> None:
        super().__init__()
        self.norm1, self.attention = nn.LayerNorm(width), Attention(width, heads, decoder)
        self.decoder = decoder
        if decoder:
            self.norm2, self.cross = nn.LayerNorm(width), Attention(width, heads, False)
        self.norm3 = nn.LayerNorm(width)
        self.feed = nn.Sequential(nn.Linear(width, inner), nn.ReLU(), nn.Linear(inner, width))

    def forward(self, x: torch.Tensor, memory: torch.Tensor | None = None) -> torch.Tensor:
        """(b, s, width)."""
        normed = self.norm1(x)
        x = x + self.attention(normed, normed)
        if memory is not None:
            x = x + self.cross(self.norm2(x), memory)
        return x + self.feed(self.norm3(x))


class Transformer(nn.Module):
    """``layers`` of encoder and of decoder."""

    def __init__(
        self,
        vocab: int = 50_000,
        width: int = 1024,
        heads: int = 16,
        inner: int = 4096,
        layers: int = 6,
        length: int = 128,
    ) -> None:
        super().__init__()
        self.sources, self.targets = nn.Embedding(vocab, width), nn.Embedding(vocab, width)
        self.positions = nn.Parameter(torch.zeros(length, width))
        self.encoder = nn.ModuleList(Block(width, heads, inner, False) for _ in range(layers))
        self.decoder = nn.ModuleList(Block(width, heads, inner, True) for _ in range(layers))
        self.encoded, self.decoded = nn.LayerNorm(width), nn.LayerNorm(width)
        self.output = nn.Linear(width, vocab, bias=False)

    def forward(
        self, sources: torch.Tensor, targets: torch.Tensor, labels: torch.Tensor
    ) -> torch.Tensor:
        """Loss of tokens and labels, all (b, s)."""
        memory = self.sources(sources) + self.positions
        for block in self.encoder:
            memory = block(memory)
        memory = self.encoded(memory)
        x = self.targets(targets) + self.positions
        for block in self.decoder:
            x = block(x, memory)
        return cross_entropy(self.output(self.decoded(x)).flatten(0, 1), labels.flatten())
