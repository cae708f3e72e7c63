"""Plan: what was decided, and what was predicted for it and for the alternatives.

A plan is a frozen dataclass of plain values, kept as one JSON file that says which plan it is.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import TypeAdapter, ValidationError

from longspan.errors import ConfigError

__all__ = ["BatchPlan", "Group", "MicroBatch", "SitePlan", "read_plan", "write_plan"]

P = TypeVar("P")


@dataclass(frozen=True, slots=True)
class Group:
    """Ranks that share ``sequences`` (places in the batch's lengths) in one micro-batch.

    ``inside``: how attention is spread over several ranks, a ring or a head exchange.
    ``sent_bytes`` and ``peak_bytes``: what its busiest rank sends, and holds at most.
    """

    ranks: tuple[int, ...]
    sequences: tuple[int, ...]
    inside: Literal["ring", "heads"]
    seconds: float
    sent_bytes: int
    peak_bytes: int


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """Groups that work side by side; no rank is in two of them, some may be in none."""

    groups: tuple[Group, ...]
    seconds: float


@dataclass(frozen=True, slots=True)
class BatchPlan:
    """How one batch of uneven sequences is trained on (FlexSP, arXiv 2412.01523).

    ``sharding``: over which ranks parameters are spread. ``lower_bound_s``: no plan is faster.
    """

    lengths: tuple[int, ...]
    micro_batches: tuple[MicroBatch, ...]
    sharding: Literal["world", "node", "none"]
    seconds: float
    lower_bound_s: float


@dataclass(frozen=True, slots=True)
class SitePlan:
    """How a model is trained at several sites (Streaming DiLoCo, arXiv 2501.18512).

    ``method``: data-parallel where that keeps the devices at work, else streaming with the
    settings that follow. ``utilisation``: the share of the time that devices compute.
    ``mean_gbit_per_s`` and ``peak_gbit_per_s``: what a site sends over all, and while the largest
    fragment is under way if that is to be back in time. ``data_parallel_gbit_per_s``: the link
    that data-parallel training would need for the utilisation that was asked for.
    """

    method: Literal["data-parallel", "streaming"]
    sites: int
    sync_every: int
    delay: int
    fragment_layers: int
    fragments: int
    codec: str
    outer_lr: float
    utilisation: float
    mean_gbit_per_s: float
    peak_gbit_per_s: float
    link_gbit_per_s: float
    data_parallel_utilisation: float
    data_parallel_gbit_per_s: float


def write_plan(plan: Any, path: Path) -> None:
    """Write a plan as JSON that ``read_plan`` reads; an old file is replaced whole."""
    kind = type(plan)
    values = TypeAdapter(kind).dump_python(plan, mode="json")
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps({"plan": kind.__name__} | values, indent=1), encoding="utf-8")
    part.replace(path)


def read_plan(kind: type[P], path: Path) -> P:
    """Read a plan of that kind; raises ConfigError: no such file, not JSON, another kind."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"no plan at {path}: {error.strerror}") from None
    except ValueError as error:
        raise ConfigError(f"{path} is not JSON: {error}") from None
    if not isinstance(values, dict) or values.pop("plan", None) != kind.__name__:
        raise ConfigError(f"{path} holds no {kind.__name__}")
    try:
        return TypeAdapter(kind).validate_python(values)
    except ValidationError as error:
        mistake = error.errors()[0]
        place = ".".join(map(str, mistake["loc"]))
        raise ConfigError(f"{path}: {place}: {mistake['msg']}") from None
