"""Proves on a real batch that the parallel model computes what one process computes.

The reference is the unpatched model on rank 0: whole weights, stock attention, each document by
itself, so that it shares nothing with the parallel path.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from longspan.data.packing import PackedSequence
from longspan.errors import ModelError
from longspan.train.batches import Batches, StepBatch
from longspan.train.config import Config
from longspan.train.parallelize import build_model
from longspan.train.step import StepRunner, summed
from longspan.train.strategy import RowRunner

__all__ = ["Exactness", "exactness"]

# What float32 sums in another order, or bfloat16 products, may differ by, relative to the largest.
_TOLERANCE = {"float32": 1e-4, "bfloat16": 1e-1}


@dataclass(frozen=True)
class Exactness:
    """Differences are relative: to the loss, and to the largest entry of each gradient."""

    loss: float
    loss_one_process: float
    loss_difference: float
    gradient_difference: float
    gradients: int
    tokens: int
    documents: int


def exactness(
    runner: StepRunner | RowRunner,
    batches: Batches,
    config: Config,
    own: StepBatch,
    sequences: Sequence[PackedSequence],
) -> Exactness | None:
    """Compare loss and every gradient of a step; figures on rank 0 only.

    ``own`` is this rank's part of the step, ``sequences`` are those of all. Raises ModelError on
    rank 0 if they differ by more than rounding.
    """
    with runner.evaluating():
        (loss,) = summed(runner.site, runner.gradients(own))
    gradients = {name: _whole(p.grad) for name, p in runner.model.named_parameters()}
    weights = {name: _whole(tensor) for name, tensor in runner.model.state_dict().items()}
    runner.model.zero_grad()
    if dist.get_rank() != 0:
        return None
    reference = build_model(config, batches.tokenizer.vocab_size, runner.device)
    reference.load_state_dict(weights)
    expected = torch.zeros(())
    for sequence in sequences:
        for start, stop in batches.documents(sequence):
            tokens, targets = (
                torch.from_numpy(x[start:stop]).to(runner.device)
                for x in (sequence.tokens, sequence.targets)
            )
            part = _loss(reference, tokens, targets, own.tokens)
            part.backward()
            expected += part.detach().cpu()
    found = Exactness(
        loss=loss,
        loss_one_process=expected.item(),
        loss_difference=abs(loss / expected.item() - 1),
        gradient_difference=max(
            _difference(gradients[name], p.grad) for name, p in reference.named_parameters()
        ),
        gradients=len(gradients),
        tokens=own.tokens,
        documents=own.documents,
    )
    if not found.gradient_difference < _TOLERANCE[config.train.dtype]:
        raise ModelError(
            f"{type(runner.model).__name__} on {dist.get_world_size()} ranks isn't one process's: "
            f"its gradients differ by {found.gradient_difference:.1e}; train it with parallel.sp 1"
        )
    return found


def _loss(model: PreTrainedModel, tokens: Tensor, targets: Tensor, count: int) -> Tensor:
    logits = model(input_ids=tokens[None], use_cache=False).logits[0]
    return F.cross_entropy(logits.float(), targets, reduction="sum") / count


def _whole(tensor: Tensor | None) -> Tensor:
    if tensor is None:
        return torch.zeros(())
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _difference(found: Tensor, expected: Tensor | None) -> float:
    expected = _whole(expected)
    largest = expected.abs().max().item()
    return (found - expected).abs().max().item() / max(largest, 1e-12)
