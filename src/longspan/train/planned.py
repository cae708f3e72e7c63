"""Batches whose sequences are grouped anew at every step, as a planner says (FlexSP)."""

from dataclasses import dataclass

import torch.distributed as dist
from pydantic import TypeAdapter

from longspan.comm.agree import leaders_words
from longspan.comm.groups import Groups
from longspan.data.packing import PackedSequence
from longspan.errors import LongspanError, PlanError
from longspan.plan import BatchPlan
from longspan.train.ahead import Ahead, Planned, Planner
from longspan.train.batches import Batches, StepBatch
from longspan.train.grouped import group_sequences, grouped

__all__ = ["PlannedBatches"]


@dataclass(frozen=True)
class _Said:
    """What rank 0 tells of a batch: its plan, or what is wrong with it."""

    planned: Planned | None = None
    error: str = ""


class PlannedBatches:
    """Every step's documents, planned by rank 0 ahead of time and told to all.

    ``planner`` is used on rank 0 only, which gives it up after half of ``timeout_s``. All ranks
    make the same calls.
    """

    def __init__(
        self,
        batches: Batches,
        groups: Groups,
        planner: Planner,
        *,
        global_batch: int,
        ahead: int,
        timeout_s: float,
    ) -> None:
        self._batches, self._groups, self._size = batches, groups, global_batch
        self._ahead: Ahead | None = None
        if dist.get_rank() == 0:
            # The other ranks, who wait for its words, must not give up before rank 0 does.
            self._ahead = Ahead(planner, self._lengths, ahead=ahead, timeout_s=timeout_s / 2)
            self._ahead.prepare(0)

    def step(self, cursor: int) -> tuple[StepBatch, Planned]:
        """This rank's part of the step that starts at ``cursor``, and its plan.

        Raises PlanError, on every rank, if it can't be planned.
        """
        planned = self._told(cursor)
        pieces = self._batches.documents_of(cursor, self._size)
        after = cursor + self._size
        share = grouped(planned.plan, pieces, self._batches.store, self._groups, after)
        return share, planned

    def sequences(self, cursor: int, plan: BatchPlan) -> tuple[PackedSequence, ...]:
        """The sequences of all groups, on any rank."""
        pieces = self._batches.documents_of(cursor, self._size)
        return group_sequences(plan, pieces, self._batches.store)

    def close(self) -> None:
        """End the planner."""
        if self._ahead:
            self._ahead.close()
        self._groups.close()

    def _lengths(self, number: int) -> tuple[int, ...]:
        return self._batches.lengths_of(number * self._size, self._size)

    def _told(self, cursor: int) -> Planned:
        said = _Said()
        if self._ahead:
            try:
                said = _Said(self._ahead.take(cursor // self._size))
            except LongspanError as error:
                said = _Said(error=str(error))
        words = _SAID.dump_json(said).decode() if self._ahead else ""
        said = _SAID.validate_json(leaders_words(words))
        if said.planned is None:
            raise PlanError(said.error)
        return said.planned


_SAID = TypeAdapter(_Said)
