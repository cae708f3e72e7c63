"""What a data-parallel rank trains on in each step: packed sequences of whole documents."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Literal

from torch.distributed.device_mesh import DeviceMesh

from longspan.data.packing import PackedSequence, Packer, Piece, materialise, split_documents
from longspan.data.store import Store, prepare
from longspan.data.tokens import Tokenizer, load_tokenizer
from longspan.errors import ConfigError
from longspan.train.config import Config

__all__ = ["Batches", "Place", "StepBatch"]


@dataclass(frozen=True)
class Place:
    """Where a micro-batch runs: the ranks of ``mesh`` share its sequence and attend ``inside``.

    An ``idle`` rank keeps step with the others on a sequence that counts for nothing.
    """

    mesh: DeviceMesh
    inside: Literal["ring", "heads"]
    idle: bool = False


@dataclass(frozen=True)
class StepBatch:
    """A step's sequences on one rank, a micro-batch each; the counts are over all ranks.

    Every token has a target, so ``tokens`` is what the loss is divided by. ``places``: where each
    sequence runs; none: all on the run's own mesh. ``reduce_once``: gradients are added up on each
    rank and reduced with the last micro-batch's, not after each.
    """

    sequences: tuple[PackedSequence, ...]
    tokens: int
    documents: int
    cursor: int
    places: tuple[Place, ...] | None = None
    reduce_once: bool = True


class Batches:
    """The documents of a config, tokenised and packed; raises DataError for unusable ones."""

    def __init__(self, config: Config) -> None:
        data = config.data
        self.tokenizer: Tokenizer = load_tokenizer(data.tokenizer, data.end_token)
        cache = data.cache or config.runs / ".tokens"
        self.store: Store = prepare(Path(data.path), data.field, self.tokenizer, cache)
        seed, lengths = config.train.seed, self.store.lengths
        training, validation = split_documents(len(self.store), data.validation_share, seed)
        self.training = Packer(lengths, training, data.max_length, seed, data.long_documents)
        self.validation = Packer(lengths, validation, data.max_length, seed, data.long_documents)
        self.validation_documents = len(validation)
        self._config = config

    @property
    def longest(self) -> int:
        """Most tokens that a sequence can have."""
        return min(self.training.max_length, self.training.tokens)

    @property
    def longest_piece(self) -> int:
        """Most tokens of a document, as it is trained on."""
        return min(self.training.max_length, int(self.store.lengths.max()))

    def check(self, dp: int) -> None:
        """Raise ConfigError unless an epoch has a sequence for each data-parallel rank."""
        sequences = self.training.epoch_packs(0)
        if sequences < dp:
            raise ConfigError(
                f"{dp} data-parallel ranks, but the documents fill only {sequences} sequences of "
                f"{self._config.data.max_length} tokens: raise parallel.sp or lower data.max_length"
            )

    def step(self, cursor: int, dp_rank: int, dp: int, site: int = 0, sites: int = 1) -> StepBatch:
        """The sequences from ``cursor`` on, dealt to the data-parallel ranks in turn.

        Of several sites, each has a batch of its own: what follows the one before it.
        """
        each = self._config.train.accumulate
        own = self._take(self.training, cursor + site * each * dp, each, dp_rank, dp)
        return replace(own, cursor=cursor + sites * each * dp)

    def documents_of(self, cursor: int, count: int) -> tuple[Piece, ...]:
        """``count`` documents from ``cursor`` on, for a step whose sequences a plan groups."""
        return tuple(self.training.piece(cursor + n) for n in range(count))

    def rows(self, cursor: int, count: int) -> StepBatch:
        """``count`` documents from ``cursor`` on, each by itself; the same on all ranks."""
        pieces = self.documents_of(cursor, count)
        return self._by_itself(pieces, cursor + count)

    def lengths_of(self, cursor: int, count: int) -> tuple[int, ...]:
        """Tokens of each of these documents."""
        return tuple(piece.length for piece in self.documents_of(cursor, count))

    def most_mixed(self, dp: int, steps: int = 256) -> int:
        """Where, among the first steps, the one with the most documents starts."""
        each = self._config.train.accumulate * dp
        cursors = range(0, steps * each, each)
        return max(cursors, key=lambda c: sum(len(self.training.pack(c + n)) for n in range(each)))

    def validate(self, dp_rank: int, dp: int) -> StepBatch:
        """The same validation sequences at every call."""
        wanted = min(self._config.train.validation_sequences, self.validation.epoch_packs(0))
        return self._take(self.validation, 0, -(-wanted // dp), dp_rank, dp)

    def validation_rows(self) -> StepBatch:
        """The same validation documents at every call, each by itself, on all ranks."""
        wanted = min(self._config.train.validation_sequences, self.validation.pieces)
        return self._by_itself([self.validation.piece(n) for n in range(wanted)], wanted)

    def _by_itself(self, pieces: Sequence[Piece], cursor: int) -> StepBatch:
        return StepBatch(
            tuple(materialise(self.store, (piece,)) for piece in pieces),
            tokens=sum(piece.length for piece in pieces),
            documents=len(pieces),
            cursor=cursor,
        )

    def _take(self, packer: Packer, cursor: int, each: int, dp_rank: int, dp: int) -> StepBatch:
        packs = [packer.pack(cursor + n) for n in range(each * dp)]
        pieces = [piece for pack in packs for piece in pack]
        return StepBatch(
            tuple(materialise(self.store, pack) for pack in packs[dp_rank::dp]),
            tokens=sum(piece.length for piece in pieces),
            documents=len(pieces),
            cursor=cursor + each * dp,
        )

    def documents(self, sequence: PackedSequence) -> Iterator[tuple[int, int]]:
        """(start, stop) of each document in a packed sequence."""
        ends = [int(end) for end in sequence.cu_seqlens]
        return pairwise(ends)
