"""A planned batch on this rank: what of it the rank works on, and where, by micro-batch."""

from collections.abc import Sequence

from longspan.comm.groups import Groups
from longspan.data.packing import PackedSequence, Piece, materialise
from longspan.data.store import Store
from longspan.plan import BatchPlan
from longspan.train.batches import Place, StepBatch

__all__ = ["group_sequences", "grouped"]


def grouped(
    plan: BatchPlan, pieces: Sequence[Piece], store: Store, groups: Groups, cursor: int
) -> StepBatch:
    """This rank's part of a plan for ``pieces``, after which comes ``cursor``. All ranks call it.

    A group's sequences are packed end to end and shared by its ranks. Where a rank is in no group
    it gets a single token that doesn't count, so that all go through the same layers together; but
    where every rank has all parameters and gradients are reduced once, it goes on without waiting.
    """
    planned = [group for batch in plan.micro_batches for group in batch.groups]
    meshes = iter(groups.meshes(group.ranks for group in planned))
    sequences: list[PackedSequence] = []
    places: list[Place] = []
    idle = Place(groups.alone, "ring", idle=True)
    alone = plan.sharding == "none" and plan.reduce_once
    first = pieces[0]
    for number, micro_batch in enumerate(plan.micro_batches, 1):
        pack: tuple[Piece, ...] = (Piece(first.document, first.start, 1),)
        place = idle
        for group in micro_batch.groups:
            mesh = next(meshes)
            if mesh is not None:
                pack = tuple(pieces[i] for i in group.sequences)
                place = Place(mesh, group.inside if mesh.size() > 1 else "ring")
        # The last one reduces gradients, layer by layer: all ranks take part.
        if place.idle and alone and number < len(plan.micro_batches):
            continue
        sequences.append(materialise(store, pack))
        places.append(place)
    tokens = sum(piece.length for piece in pieces)
    return StepBatch(
        *(tuple(sequences), tokens, len(pieces), cursor),
        places=tuple(places),
        reduce_once=plan.reduce_once,
    )


def group_sequences(
    plan: BatchPlan, pieces: Sequence[Piece], store: Store
) -> tuple[PackedSequence, ...]:
    """The packed sequence of every group of a plan."""
    return tuple(
        materialise(store, tuple(pieces[i] for i in group.sequences))
        for batch in plan.micro_batches
        for group in batch.groups
    )
