"""Activation checkpointing of a patched model: layers keep their input and are computed again.

Of attention the late tokens' results may be kept as well, so that backward repeats only a part of
its work and of its traffic (``attention.kept``).
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from longspan.attention.kept import Kept
from longspan.errors import ModelError

__all__ = ["checkpoint_layers"]


def checkpoint_layers(model: PreTrainedModel, *, attention_kept: float = 0.0) -> None:
    """Recompute the layers of a patched model in backward instead of keeping their activations.

    ``attention_kept``: the share of the tokens, the last ones by position, whose attention is kept.
    0 keeps a layer's input only; 0.5 half of attention's output for a quarter of its work again; 1
    all of it, and nothing is sent again. To be called before the model is sharded with FSDP2.
    Raises ModelError for a share outside of 0 to 1 and for a model without layers that can be
    checkpointed.
    """
    if not 0 <= attention_kept <= 1:
        raise ModelError(f"attention_kept is {attention_kept}: it is a share, from 0 to 1")
    layers = [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]
    if not layers:
        raise ModelError(f"{type(model).__name__} has no layers that can be checkpointed")
    for layer in layers:
        layer.forward = partial(_checkpointed, layer.forward, attention_kept)


def _checkpointed(forward: Callable[..., Any], share: float, *args: Any, **kwargs: Any) -> Any:
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    kept = Kept(share)

    def run(*args: Any, **kwargs: Any) -> Any:
        kept.rewind()
        return forward(*args, longspan_kept=kept, **kwargs)

    return checkpoint(run, *args, use_reentrant=False, **kwargs)
