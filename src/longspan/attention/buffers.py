"""What travels around a ring, as one message each: several tensors in one flat buffer of bytes."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from longspan.schedule.ring import Ring
from longspan.schedule.rounds import Travels, travelling

__all__ = ["Flat", "Sums"]


class _Laid(NamedTuple):
    """A rank's buffer: where what travels lies in its tensors and in the buffer, and by tensor."""

    spans: list[tuple[slice, slice]]
    shapes: list[torch.Size]
    types: list[torch.dtype]
    sizes: list[int]


@dataclass(frozen=True)
class Flat:
    """What travels of any rank's tensors (batch, heads, tokens, …), in one flat buffer of bytes.

    ``own`` are this rank's, whole; those of another rank differ in the number of tokens. ``dtype``:
    what they are in on the way; none: their own.
    """

    ring: Ring
    travels: Travels
    own: tuple[Tensor, ...]
    dtype: torch.dtype | None = None

    @cached_property
    def _known(self) -> dict[int, _Laid]:
        """How a rank's buffer is laid out, of those that were asked for already."""
        return {}

    def _laid(self, source: int) -> _Laid:
        if source not in self._known:
            spans, before = [], 0
            for start, stop in travelling(self.ring, source, self.travels):
                spans.append((slice(start, stop), slice(before, before := before + stop - start)))
            shapes = [torch.Size((*x.shape[:2], before, *x.shape[3:])) for x in self.own]
            types = [self.dtype or x.dtype for x in self.own]
            sizes = [s.numel() * t.itemsize for s, t in zip(shapes, types, strict=True)]
            self._known[source] = _Laid(spans, shapes, types, sizes)
        return self._known[source]

    def empty(self, source: int) -> Tensor:
        """A buffer for the tensors of a rank."""
        return self.own[0].new_empty(sum(self._laid(source).sizes), dtype=torch.uint8)

    def filled(self, rank: int) -> Tensor:
        """A buffer with what travels of this rank's tensors."""
        flat = self.empty(rank)
        for part, x in zip(self.views(flat, rank), self.own, strict=True):
            for here, there in self._laid(rank).spans:
                part[:, :, there] = x[:, :, here]
        return flat

    def add(self, flat: Tensor, rank: int) -> None:
        """Add what a buffer holds to this rank's tensors."""
        for part, x in zip(self.views(flat, rank), self.own, strict=True):
            for here, there in self._laid(rank).spans:
                x[:, :, here] += part[:, :, there]

    def views(self, flat: Tensor, source: int) -> list[Tensor]:
        """The tensors in a rank's buffer."""
        laid = self._laid(source)
        parts = zip(flat.split(laid.sizes), laid.types, laid.shapes, strict=True)
        return [part.view(dtype).view(shape) for part, dtype, shape in parts]


class Sums:
    """Gradients of any rank's payload: added up in their own dtype, sent in ``wire``."""

    def __init__(self, own: Flat, wire: torch.dtype) -> None:
        self.own = self._wire = own
        if any(x.dtype != wire for x in own.own):
            self._wire = replace(own, dtype=wire)

    def zeros(self, source: int) -> Tensor:
        """A buffer to add up in."""
        return self.own.empty(source).zero_()

    def arriving(self, source: int) -> Tensor:
        """A buffer to receive into."""
        return self._wire.empty(source)

    def leaving(self, sums: Tensor, source: int) -> Tensor:
        """What is sent of the sums."""
        if self._wire is self.own:
            return sums
        sent = self._wire.empty(source)
        for x, total in self._pairs(sent, sums, source):
            x.copy_(total)
        return sent

    def join(self, sums: Tensor, came: list[Tensor], source: int) -> None:
        """Add what has come to the sums of another rank's."""
        for part in came:
            for x, total in self._pairs(part, sums, source):
                total += x

    def home(self, came: list[Tensor], rank: int) -> None:
        """Add what has come to this rank's tensors."""
        for part in came:
            self._wire.add(part, rank)

    def _pairs(self, wire: Tensor, sums: Tensor, source: int) -> Iterator[tuple[Tensor, Tensor]]:
        return zip(self._wire.views(wire, source), self.own.views(sums, source), strict=True)
