"""Documents to packs: whole documents laid end to end, up to ``max_length`` tokens, no padding.

A document that is longer is split, dropped or refused, as the user says, and counted. An epoch is
a permutation of the pieces, taken a window at a time; each window is packed best-fit decreasing
(D. S. Johnson 1974), and its packs are shuffled. All of it is a pure function of the lengths, the
seed and the pack's number, so a cursor that can be saved is one integer.
"""

from bisect import bisect_left, bisect_right, insort
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np
import numpy.typing as npt

from longspan.data.store import Store
from longspan.errors import ConfigError, DataError

__all__ = [
    "LongDocuments",
    "Pack",
    "PackedSequence",
    "Packer",
    "Piece",
    "best_fit",
    "materialise",
    "split_documents",
    "split_long",
]

LongDocuments = Literal["split", "drop", "error"]
_Ints = npt.NDArray[np.int64]

# A window holds this many pieces, or packs' worth of them: enough that few packs stay half empty.
_WINDOW_PIECES = 1024
_WINDOW_PACKS = 64


@dataclass(frozen=True, slots=True)
class Piece:
    """``length`` tokens of a document from ``start`` on; each has the next one to predict."""

    document: int
    start: int
    length: int


Pack = tuple[Piece, ...]


@dataclass(frozen=True, slots=True)
class PackedSequence:
    """The pieces of a pack, end to end.

    ``tokens`` and ``targets``: int64 of shape (tokens,); ``cu_seqlens``: int64 of shape
    (pieces + 1,), from 0 to the count of tokens.
    """

    tokens: _Ints
    targets: _Ints
    cu_seqlens: _Ints


def split_documents(count: int, validation_share: float, seed: int) -> tuple[_Ints, _Ints]:
    """Numbers of the documents to train on and to validate with, ascending, none in both.

    Raises DataError unless each gets at least one of ``count`` documents.
    """
    if not 0 < validation_share < 1:
        raise DataError(f"validation share {validation_share}: give a number between 0 and 1")
    if count < 2:
        raise DataError(
            f"{count} document can't be split for training and validation: give at least 2"
        )
    held = min(max(round(count * validation_share), 1), count - 1)
    order = _random(0, seed).permutation(count)
    return np.sort(order[held:]), np.sort(order[:held])


def split_long(lengths: _Ints, max_length: int) -> tuple[_Ints, _Ints, _Ints]:
    """Pieces of at most ``max_length`` tokens: (index into ``lengths``, start, length) of each."""
    pieces = -(-lengths // max_length)
    index = np.repeat(np.arange(len(lengths)), pieces)
    nth = np.arange(len(index)) - np.repeat(np.cumsum(pieces) - pieces, pieces)
    start = nth * max_length
    return index, start, np.minimum(lengths[index] - start, max_length)


def best_fit(lengths: Sequence[int] | _Ints, max_length: int) -> list[list[int]]:
    """Pack lengths into as few sums ≤ ``max_length`` as best-fit decreasing finds.

    Gives the indices in each pack. Every length must be at most ``max_length``.
    """
    sizes = np.asarray(lengths, np.int64)
    order = np.argsort(-sizes, kind="stable")
    packs: list[list[int]] = []
    # Packs with room left, as (room, pack) in one integer: sorted by room, the older first.
    scale = len(sizes) + 1
    open_packs: list[int] = []
    for index, size in zip(order.tolist(), sizes[order].tolist(), strict=True):
        at = bisect_left(open_packs, size * scale)
        if at < len(open_packs):
            room, pack = divmod(open_packs.pop(at), scale)
            packs[pack].append(index)
        else:
            room, pack = max_length, len(packs)
            packs.append([index])
        if room > size:
            insort(open_packs, (room - size) * scale + pack)
    return packs


class Packer:
    """The endless stream of packs of some documents, and what became of those that don't fit.

    ``lengths`` are those of all documents, in tokens; ``ids`` the documents to pack. Counts to
    report: ``split`` documents (into ``pieces`` in all), ``dropped`` and ``empty`` ones, and
    ``tokens`` in an epoch. Raises DataError if nothing is left to pack, or for a document over
    ``max_length`` where ``long_documents`` is "error"; ConfigError for an unusable setting.
    """

    def __init__(
        self,
        lengths: _Ints,
        ids: _Ints,
        max_length: int,
        seed: int,
        long_documents: LongDocuments = "split",
    ) -> None:
        if max_length < 1:
            raise ConfigError(f"max_length {max_length}: give at least 1 token")
        if long_documents not in ("split", "drop", "error"):
            raise ConfigError(f"long_documents {long_documents!r}: give split, drop or error")
        ids = np.asarray(ids, np.int64)
        sizes = np.asarray(lengths, np.int64)[ids]
        long = sizes > max_length
        over = int(long.sum())
        if over and long_documents == "error":
            first = int(np.argmax(long))
            raise DataError(
                f"document {ids[first]} has {sizes[first]} tokens, more than max_length "
                f"{max_length} ({over} such): raise max_length, or split or drop long documents"
            )
        self.empty = int((sizes == 0).sum())
        self.split = over if long_documents == "split" else 0
        self.dropped = over if long_documents == "drop" else 0
        if self.dropped:
            ids, sizes = ids[~long], sizes[~long]
        index, self._starts, self._lengths = split_long(sizes, max_length)
        self._documents = ids[index]
        self.pieces = len(index)
        self.tokens = int(sizes.sum())
        if not self.pieces:
            raise DataError(
                f"no tokens in {len(sizes) + self.dropped} documents ({self.empty} empty, "
                f"{self.dropped} over max_length {max_length}): give more, or raise max_length"
            )
        self.max_length = max_length
        self._seed = seed
        self._window_pieces = max(
            _WINDOW_PIECES, _WINDOW_PACKS * max_length * self.pieces // self.tokens
        )
        self._windows = -(-self.pieces // self._window_pieces)
        # The number of the first pack of each window so far, over all epochs.
        self._first = [0]
        self._permutation = lru_cache(2)(self._permute)
        self._window = lru_cache(2)(self._pack_window)

    def pack(self, n: int) -> Pack:
        """Pack ``n`` of the stream: epoch after epoch, each in a new order.

        Quick where n ascends; from afar the packs before it are counted from the lengths alone.
        """
        if n < 0:
            raise IndexError(f"there is no pack {n}")
        while self._first[-1] <= n:
            self._count_window()
        window = bisect_right(self._first, n) - 1
        pieces = self._window(window)[n - self._first[window]]
        return tuple(map(self._piece, pieces))

    def piece(self, n: int) -> Piece:
        """Piece ``n`` of the stream: the same epochs, in the same order, before packing."""
        epoch, nth = divmod(n, self.pieces)
        return self._piece(self._permutation(epoch)[nth])

    def _piece(self, i: int) -> Piece:
        return Piece(int(self._documents[i]), int(self._starts[i]), int(self._lengths[i]))

    def epoch_packs(self, epoch: int) -> int:
        """How many packs an epoch has; it varies a little from one to the next."""
        begin, end = epoch * self._windows, (epoch + 1) * self._windows
        while len(self._first) <= end:
            self._count_window()
        return self._first[end] - self._first[begin]

    def _count_window(self) -> None:
        self._first.append(self._first[-1] + len(self._window(len(self._first) - 1)))

    def _permute(self, epoch: int) -> _Ints:
        return _random(1, self._seed, epoch).permutation(self.pieces)

    def _pack_window(self, window: int) -> list[_Ints]:
        epoch, nth = divmod(window, self._windows)
        begin = nth * self._window_pieces
        chosen = self._permutation(epoch)[begin : begin + self._window_pieces]
        packs = best_fit(self._lengths[chosen], self.max_length)
        order = _random(2, self._seed, epoch, nth).permutation(len(packs))
        return [chosen[packs[i]] for i in order]


def materialise(store: Store, pack: Pack) -> PackedSequence:
    """Read a pack's tokens, and for each the token after it (a document's last: its end)."""
    read = [store.tokens(p.document, p.start, p.start + p.length + 1) for p in pack]
    return PackedSequence(
        tokens=np.concatenate([tokens[:-1] for tokens in read]),
        targets=np.concatenate([tokens[1:] for tokens in read]),
        cu_seqlens=np.cumsum([0, *(piece.length for piece in pack)], dtype=np.int64),
    )


def _random(*key: int) -> np.random.Generator:
    # numpy takes missing words of a key for zeros: the first says what the numbers are for.
    return np.random.default_rng(key)
