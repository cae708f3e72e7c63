"""How long documents are, and what their unevenness costs: percentiles, bins, padding, packing."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from longspan.data.packing import Packer, split_long
from longspan.errors import ConfigError, DataError

__all__ = ["Bin", "Lengths", "expected_longest", "inline_histogram"]

_PERCENTILES = (1, 5, 25, 50, 75, 90, 95, 99, 99.9)
# What a length that "fits" must leave whole: this share of the tokens.
_WHOLE = 0.95


@dataclass(frozen=True, slots=True)
class Bin:
    """Documents of more than ``over`` and at most ``up_to`` tokens."""

    over: int
    up_to: int
    documents: int
    tokens: int
    share_of_documents: float
    share_of_tokens: float


@dataclass(frozen=True, slots=True)
class Lengths:
    """What there is to know of a set of document lengths, all in tokens.

    ``empty`` documents count only in ``documents``. ``bins`` are powers of two without gaps.
    ``fitting_length``: the smallest power of two that leaves 95 % of the tokens in whole
    documents. ``over_max_length`` documents are cut into pieces of at most ``max_length``; of
    these pieces, padding wastes a share of all positions, ``waste_in_batches`` (each padded to
    the longest of ``batch_size`` in random order, expected) or ``waste_to_max_length``; they
    make ``packs`` of which ``pack_fill`` is the mean fill, and ``packing_gain`` says how many
    times fewer positions packs compute than padded batches.
    """

    documents: int
    empty: int
    tokens: int
    mean: float
    longest: int
    percentiles: dict[str, int]
    bins: tuple[Bin, ...]
    fitting_length: int
    max_length: int
    batch_size: int
    over_max_length: int
    waste_in_batches: float
    waste_to_max_length: float
    packs: int
    pack_fill: float
    packing_gain: float

    @classmethod
    def of(
        cls, lengths: npt.NDArray[np.int64], *, max_length: int, batch_size: int = 8
    ) -> "Lengths":
        """Summarise lengths of shape (documents,).

        Raises DataError if there is no token at all, ConfigError for a ``max_length`` or
        ``batch_size`` below 1.
        """
        for name, value in (("max_length", max_length), ("batch size", batch_size)):
            if value < 1:
                raise ConfigError(f"{name} {value}: give at least 1")
        sizes = np.sort(lengths[lengths > 0])
        if not len(sizes):
            raise DataError(f"all {len(lengths)} documents are empty: give others")
        tokens = int(sizes.sum())
        values = np.percentile(sizes, _PERCENTILES, method="inverted_cdf")
        whole = int(sizes[np.searchsorted(np.cumsum(sizes), _WHOLE * tokens)])
        _, _, pieces = split_long(sizes, max_length)
        padded = expected_longest(pieces, batch_size) * len(pieces)
        packs = Packer(sizes, np.arange(len(sizes)), max_length, seed=0).epoch_packs(0)
        return cls(
            documents=len(lengths),
            empty=len(lengths) - len(sizes),
            tokens=tokens,
            mean=tokens / len(sizes),
            longest=int(sizes[-1]),
            percentiles={
                f"{p:g}": int(value) for p, value in zip(_PERCENTILES, values, strict=True)
            },
            bins=_bins(sizes, tokens),
            fitting_length=1 << (whole - 1).bit_length(),
            max_length=max_length,
            batch_size=batch_size,
            over_max_length=int((sizes > max_length).sum()),
            waste_in_batches=1 - tokens / padded,
            waste_to_max_length=1 - tokens / (len(pieces) * max_length),
            packs=packs,
            pack_fill=tokens / (packs * max_length),
            packing_gain=padded / tokens,
        )

    def share_over(self, length: int) -> tuple[float, float]:
        """Shares of documents and of tokens in documents over ``length``, a power of two."""
        over = [b for b in self.bins if b.over >= length]
        return sum(b.share_of_documents for b in over), sum(b.share_of_tokens for b in over)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)


def expected_longest(lengths: npt.NDArray[np.int64], batch_size: int) -> float:
    """Expected longest of ``batch_size`` lengths drawn at random without replacement, exactly.

    Of n sorted lengths the i-th is the longest of C(i-1, b-1) of the C(n, b) batches.
    """
    sizes, count = np.sort(lengths), len(lengths)
    batch = min(batch_size, count)
    chance = np.full(count, batch / count)
    for j in range(1, batch):
        chance *= np.maximum(np.arange(1, count + 1) - j, 0) / (count - j)
    return float(chance @ sizes)


def inline_histogram(values: Sequence[float]) -> str:
    """A line of blocks, one a value, the largest full; only zero is blank."""
    blocks = " ▁▂▃▄▅▆▇█"
    most = max(values, default=0)
    if most <= 0:
        return " " * len(values)
    return "".join(blocks[int(np.ceil(8 * value / most))] for value in values)


def _bins(sizes: npt.NDArray[np.int64], tokens: int) -> tuple[Bin, ...]:
    exponents = [(int(size) - 1).bit_length() for size in (sizes[0], sizes[-1])]
    edges = [0 if exponents[0] == 0 else 1 << (exponents[0] - 1)]
    edges += [1 << e for e in range(exponents[0], exponents[1] + 1)]
    at = np.searchsorted(sizes, edges, side="right")
    sums = np.concatenate([[0], np.cumsum(sizes)])
    rows = []
    for low, high, begin, end in zip(edges, edges[1:], at, at[1:], strict=False):
        held, inside = int(end - begin), int(sums[end] - sums[begin])
        rows.append(Bin(low, high, held, inside, held / len(sizes), inside / tokens))
    return tuple(rows)
