"""RNNLM: a language model of two LSTM layers and a large softmax, with PaSE's sizes."""

import torch
from torch import nn
from torch.nn.functional import cross_entropy

__all__ = ["Rnnlm"]


class Rnnlm(nn.Module):
    """Embedding, ``layers`` of LSTM and an output layer, all ``units`` wide."""

    def __init__(self, vocab: int = 100_000, units: int = 2048, layers: int = 2) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocab, units)
        self.lstm = nn.LSTM(units, units, layers, batch_first=True)
        self.output = nn.Linear(units, vocab, bias=False)

    def forward(self, tokens: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Loss of tokens and labels, both (b, s)."""
        hidden, _ = self.lstm(self.embedding(tokens))
        return cross_entropy(self.output(hidden).flatten(0, 1), labels.flatten())
