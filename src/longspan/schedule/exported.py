"""torch.export's graph of a module: what is planned, and what runs a plan."""

import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from longspan.errors import ModelError
from longspan.schedule.groups import called

__all__ = ["exported", "language_inputs"]


@contextmanager
def _unlogged() -> Iterator[None]:
    """Without torch's log of what it can't follow: the error says it."""
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    before = logger.disabled
    logger.disabled = True
    try:
        yield
    finally:
        logger.disabled = before


def exported(
    module: nn.Module, example_inputs: Sequence[Any] | Mapping[str, Any]
) -> torch.export.ExportedProgram:
    """What ``module`` does with inputs like these, by place or by name, node by node.

    Nothing is computed. Raises ModelError if torch.export can't follow the module.
    """
    named = isinstance(example_inputs, Mapping)
    args = () if named else tuple(example_inputs)
    try:
        with warnings.catch_warnings(), _unlogged():
            warnings.simplefilter("ignore")  # of modules that set attributes as they run
            return torch.export.export(
                module,
                args,
                dict(example_inputs) if named else {},
                strict=False,
                preserve_module_call_signature=called(module),
            )
    except Exception as error:  # torch.export raises whatever the model's own code raises
        line = next(iter(str(error).splitlines()), "")
        raise ModelError(
            f"torch.export can't follow {type(module).__name__}: {line or type(error).__name__}"
        ) from error


def language_inputs(tokens: Tensor, targets: Tensor) -> dict[str, Any]:
    """What a causal language model of transformers is called with for a loss that is a sum.

    ``targets``, like ``tokens`` (rows, length): the token that follows each; -100: nothing.
    """
    # Already shifted, over a count of one.
    shifted = {"labels": targets, "shift_labels": targets, "num_items_in_batch": 1}
    return {"input_ids": tokens, **shifted, "use_cache": False}
