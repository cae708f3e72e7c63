"""Loss and gradients of a step: exact sums over all tokens of all ranks."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedModel

from longspan.comm.mesh import flat_group, site_group
from longspan.data.packing import PackedSequence
from longspan.layout import Order, positions
from longspan.train.batches import Place, StepBatch

__all__ = ["StepRunner", "summed"]


class StepRunner:
    """Runs a parallelized model on this rank's share of each sequence."""

    def __init__(self, model: PreTrainedModel, mesh: DeviceMesh, order: Order | str) -> None:
        self.model = model
        self.device = torch.device(mesh.device_type, torch.cuda.current_device()) if (
            mesh.device_type == "cuda"
        ) else torch.device("cpu")  # fmt: skip
        self.sp = mesh["sp"].get_group()
        self.site = site_group(mesh)
        self.order = Order.of(order)

    def loss_sum(self, sequence: PackedSequence, place: Place | None = None) -> Tensor:
        """The summed cross-entropy of this rank's tokens of one sequence, in float32."""
        ends = sequence.cu_seqlens.tolist()
        group = flat_group(place.mesh) if place else self.sp
        own = positions(ends[-1], group.rank(), group.size(), self.order, ends)
        tokens = torch.from_numpy(sequence.tokens)[own].to(self.device)
        targets = torch.from_numpy(sequence.targets)[own].to(self.device)
        loss: Tensor = self.model(
            input_ids=tokens[None],
            targets=targets[None],
            cu_seqlens=ends,
            **({"mesh": place.mesh, "inside": place.inside} if place else {}),
        ).loss
        # An idle rank's backward runs as well: its peers wait for its part of every layer.
        return loss * 0.0 if place and place.idle else loss

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """The model without dropout for as long as this lasts."""
        training = self.model.training
        self.model.eval()
        try:
            yield
        finally:
            self.model.train(training)

    def gradients(self, batch: StepBatch) -> Tensor:
        """Add the batch's gradients to the parameters; returns this rank's part of the loss."""
        total = torch.zeros((), device=self.device)
        places = batch.places or (None,) * len(batch.sequences)
        work = zip(batch.sequences, places, strict=True)
        for number, (sequence, place) in enumerate(work, 1):
            self.reduce_gradients(number == len(batch.sequences) or not batch.reduce_once)
            loss = self.loss_sum(sequence, place) / batch.tokens
            loss.backward()
            total += loss.detach()
        return total

    @torch.no_grad()
    def validation_loss(self, batch: StepBatch) -> float:
        """The mean loss over all tokens of the batch, on all ranks of the site."""
        with self.evaluating():
            total = torch.zeros((), device=self.device)
            for sequence in batch.sequences:
                total += self.loss_sum(sequence)
        return summed(self.site, total / batch.tokens)[0]

    def reduce_gradients(self, now: bool) -> None:
        """Whether the next backward pass reduces gradients over the ranks, or only adds them up."""
        if isinstance(self.model, FSDPModule):
            self.model.set_requires_gradient_sync(now)


def summed(group: dist.ProcessGroup, *values: Tensor) -> list[float]:
    """The sums of scalars over the ranks of a group."""
    stacked = torch.stack([value.detach().to(torch.float32) for value in values])
    dist.all_reduce(stacked, group=group)
    return [float(value) for value in stacked.tolist()]
