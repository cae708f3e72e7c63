"""What travels around a ring, as one message each: several tensors in one flat buffer of bytes."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from longspan.schedule.ring import Ring, tokens

__all__ = ["Flat", "Sums"]


@dataclass(frozen=True)
class Flat:
    """Tensors of shape (batch, heads, tokens, …) of any rank in one flat buffer of bytes.

    ``like`` are this rank's; those of another rank differ in the number of tokens: of keys, or of
    queries.
    """

    ring: Ring
    keys: bool
    like: tuple[Tensor, ...]

    def _shape(self, x: Tensor, source: int) -> torch.Size:
        return torch.Size((*x.shape[:2], tokens(self.ring, source, self.keys), *x.shape[3:]))

    def empty(self, source: int) -> Tensor:
        """A buffer for the tensors of a rank."""
        size = sum(self._shape(x, source).numel() * x.element_size() for x in self.like)
        return self.like[0].new_empty(size, dtype=torch.uint8)

    def filled(self, tensors: Sequence[Tensor]) -> Tensor:
        """A buffer with the tensors of a rank, in the dtypes of this rank's."""
        pairs = zip(tensors, self.like, strict=True)
        flat = [x.to(like.dtype).contiguous().view(-1).view(torch.uint8) for x, like in pairs]
        return torch.cat(flat)

    def views(self, flat: Tensor, source: int) -> list[Tensor]:
        """The tensors in a rank's buffer."""
        shapes = [self._shape(x, source) for x in self.like]
        sizes = [s.numel() * x.element_size() for x, s in zip(self.like, shapes, strict=True)]
        parts = zip(flat.split(sizes), shapes, self.like, strict=True)
        return [part.view(x.dtype).view(shape) for part, shape, x in parts]


class Sums:
    """Gradients of any rank's payload: added up in wide buffers, sent in those of ``wire``."""

    def __init__(self, like: Flat, wire: torch.dtype) -> None:
        self.wide = self._wire = like
        if any(x.dtype != wire for x in like.like):
            self._wire = replace(like, like=tuple(x[:, :, :0].to(wire) for x in like.like))

    def zeros(self, source: int) -> Tensor:
        """A buffer to add up in."""
        return self.wide.empty(source).zero_()

    def arriving(self, source: int) -> Tensor:
        """A buffer to receive into."""
        return self._wire.empty(source)

    def leaving(self, sums: Tensor, source: int) -> Tensor:
        """What is sent of the sums."""
        if self._wire is self.wide:
            return sums
        return self._wire.filled(self.wide.views(sums, source))

    def add(self, sums: Tensor, parts: list[Tensor], source: int) -> None:
        """Add what has come."""
        for part in parts:
            pairs = zip(self.wide.views(sums, source), self._wire.views(part, source), strict=True)
            for total, share in pairs:
                total += share
