"""A model named on the command line, on the meta device, with inputs to capture it with."""

import importlib
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from longspan.errors import ConfigError
from longspan.schedule.exported import language_inputs

__all__ = ["load"]


def load(
    name: str,
    *,
    batch: int | None = None,
    length: int = 2048,
    inputs: Sequence[str] = (),
    dtype: str = "float32",
) -> tuple[nn.Module, Sequence[Any] | Mapping[str, Any]]:
    """The model of that name, and its inputs.

    ``name``: "package.module:Class", a module that needs no arguments, or a function that returns
    one, or one and its inputs; or a file or folder with a config of transformers, of a causal
    language model, which is given ``batch`` sequences of ``length`` tokens. ``inputs`` are
    written "128x3x227x227", or with a dtype "128:int64". Nothing takes memory. Raises ConfigError
    if there is no such model, or it needs inputs that aren't given.
    """
    kind = getattr(torch, dtype, None)
    if not isinstance(kind, torch.dtype) or not kind.is_floating_point:
        raise ConfigError(f"--dtype {dtype!r}: use float32, bfloat16 or float16")
    with torch.device("meta"):
        if Path(name).exists():
            model = _config(Path(name))
            tokens = torch.empty(batch or 1, length, dtype=torch.long)
            given: Any = language_inputs(tokens, torch.empty_like(tokens))
        else:
            made = _imported(name)()
            model, given = made if isinstance(made, tuple) else (made, None)
        if inputs:
            given = tuple(_tensor(text) for text in inputs)
    if not isinstance(model, nn.Module):
        raise ConfigError(f"{name} makes a {type(model).__name__}, not a torch module")
    if given is None:
        raise ConfigError(f"{name} needs inputs: give each one's shape, --input 128x3x224x224")
    return model.to(kind), given


def _imported(name: str) -> Any:
    place, colon, attribute = name.partition(":")
    if not colon:
        raise ConfigError(
            f"no model {name!r}: give package.module:Class, or the path of a transformers config"
        )
    sys.path.insert(0, "")  # as python -m does
    try:
        found = getattr(importlib.import_module(place), attribute, None)
    except ModuleNotFoundError as error:
        raise ConfigError(f"no module {place!r}: {error}") from None
    finally:
        sys.path.pop(0)
    if not callable(found):
        raise ConfigError(f"module {place} has no class or function {attribute!r}")
    return found


def _config(path: Path) -> nn.Module:
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        config = AutoConfig.from_pretrained(path)
    except (OSError, ValueError) as error:
        line = str(error).splitlines()[0]
        raise ConfigError(f"{path} is no config of transformers: {line}") from None
    config._attn_implementation = "sdpa"
    model: nn.Module = AutoModelForCausalLM.from_config(config)
    return model


def _tensor(text: str) -> torch.Tensor:
    shape, _, name = text.partition(":")
    dtype = getattr(torch, name or "float32", None)
    try:
        sizes = [int(size) for size in shape.split("x")]
    except ValueError:
        sizes = []
    if not sizes or min(sizes) < 0 or not isinstance(dtype, torch.dtype):
        raise ConfigError(f"--input {text!r}: write it like 128x3x224x224 or 128:int64")
    return torch.empty(sizes, dtype=dtype)
