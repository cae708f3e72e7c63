"""Trains with every layer split in its own way, as a plan of them says (PaSE, arXiv 2407.04001).

A document has a row to itself, padded to ``data.max_length``. The model's own causal mask keeps
its tokens from what follows, padding among it, and other documents are in other rows: so a row is
exact without a mask of ours. Padding has no target and counts for nothing.
"""

import json
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from math import prod
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from pydantic import TypeAdapter
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from transformers import PreTrainedModel

from longspan.cluster.spec import read_cluster
from longspan.comm.agree import leaders_words
from longspan.errors import ConfigError, LongspanError, PlanError
from longspan.models.layers import parallelize_layers
from longspan.plan import LayerPlan, read_plan, write_plan
from longspan.planner.layers import plan_layers
from longspan.schedule.exported import language_inputs
from longspan.train.batches import StepBatch
from longspan.train.config import Config
from longspan.train.parallelize import build_model
from longspan.train.record import Recorder

__all__ = ["RowRunner", "check_strategy", "strategy_of", "tell_strategy"]

_NO_TARGET = -100


def check_strategy(config: Config, world: int) -> None:
    """Raise ConfigError for settings that don't go with ``parallel.strategy``."""
    ways, train = config.parallel, config.train
    assert ways.strategy
    if ways.sp not in (None, 1):
        raise ConfigError(
            f"parallel.sp is {ways.sp}, but with parallel.strategy no ranks share a sequence in a "
            "ring: leave it out"
        )
    for key in ("mode", "order", "inside", "grads_in", "sharding"):
        if (value := getattr(ways, key)) != type(ways).model_fields[key].default:
            raise ConfigError(
                f"parallel.{key} is {value}, but parallel.strategy decides how the work is "
                "spread: leave one of them out"
            )
    if config.outer.sites > 1:
        raise ConfigError("outer.sites is more than 1: parallel.strategy spreads one site's layers")
    if train.checkpointing != "none":
        raise ConfigError(
            f"train.checkpointing is {train.checkpointing}, but parallel.strategy decides what is "
            "computed again: leave it out, or lower parallel.memory_bytes"
        )
    if train.dtype != "float32":
        raise ConfigError(
            f"train.dtype is {train.dtype}, but parallel.strategy runs in float32 only"
        )
    if train.global_batch is None:
        raise ConfigError("parallel.strategy needs train.global_batch, documents a step")
    if train.global_batch % train.accumulate:
        raise ConfigError(
            f"train.accumulate is {train.accumulate}, which doesn't divide train.global_batch "
            f"{train.global_batch}: with parallel.strategy it is into how many parts a step goes"
        )
    if ways.strategy == "auto":
        if ways.cluster is None:
            raise ConfigError(
                "parallel.strategy auto plans for a cluster: run longspan probe, and set "
                "parallel.cluster to the file it writes"
            )
        found, where = read_cluster(ways.cluster).ranks, f"parallel.cluster {ways.cluster}"
    else:
        plan = read_plan(LayerPlan, Path(ways.strategy))
        found, where = prod(plan.axes.values()), f"parallel.strategy {ways.strategy}"
    if found != world:
        raise ConfigError(f"{where} is for {found} devices, but there are {world} processes")


def strategy_of(config: Config, vocab_size: int) -> LayerPlan:
    """The plan of the run's layers: found, or read, on rank 0; the same on all ranks.

    It is kept in the run's folder. Raises PlanError, on every rank, if there is none.
    """
    said = ""
    if dist.get_rank() == 0:
        try:
            plan = _plan(config, vocab_size)
            write_plan(plan, config.run / "strategy.json")
            said = json.dumps({"plan": asdict(plan)})
        except LongspanError as error:
            said = json.dumps({"error": str(error)})
    told = json.loads(leaders_words(said))
    if "error" in told:
        raise PlanError(told["error"])
    return TypeAdapter(LayerPlan).validate_python(told["plan"])


def tell_strategy(plan: LayerPlan, recorder: Recorder) -> None:
    """Record the plan, and say what it and its alternatives are to take."""
    recorder.note("strategy", asdict(plan))
    others = ", ".join(f"{name} {1e3 * s:.3g} ms" for name, s in plan.alternatives.items())
    recorder.say(
        f"a strategy for {len(plan.layers)} layers: {1e3 * plan.seconds:.3g} ms foretold"
        + (f" ({others})" if others else "")
    )


def _plan(config: Config, vocab_size: int) -> LayerPlan:
    ways = config.parallel
    if ways.strategy != "auto":
        return read_plan(LayerPlan, Path(str(ways.strategy)))
    assert ways.cluster, "check_strategy() has checked"
    return plan_layers(
        build_model(config, vocab_size, "meta").train(),
        _example(config, "meta"),
        cluster=read_cluster(ways.cluster),
        memory_limit=ways.memory_bytes,
    )


def _example(config: Config, device: torch.device | str) -> dict[str, Any]:
    rows = (config.train.global_batch or 1) // config.train.accumulate
    tokens = torch.zeros(rows, config.data.max_length, dtype=torch.long, device=device)
    return language_inputs(tokens, tokens.clone())


class RowRunner:
    """Runs a model that a plan splits; every rank is given all documents of a step."""

    def __init__(
        self, model: PreTrainedModel, plan: LayerPlan, config: Config, device: torch.device
    ) -> None:
        """Splits ``model``, which is the same on all ranks; raises what parallelize_layers does."""
        self.mesh: DeviceMesh = init_device_mesh(
            device.type, tuple(plan.axes.values()), mesh_dim_names=tuple(plan.axes)
        )
        assert dist.group.WORLD is not None
        self.device, self.site = device, dist.group.WORLD
        example = _example(config, device)
        rows, length = example["input_ids"].shape
        self._shape = int(rows), int(length)
        self.model = parallelize_layers(model.train(), plan, self.mesh, example)

    def evaluating(self) -> AbstractContextManager[None]:
        """Nothing changes: what is random in training is refused."""
        return nullcontext()

    def gradients(self, batch: StepBatch) -> Tensor:
        """Add the batch's gradients to the parameters; returns the loss on rank 0, 0 elsewhere."""
        total = torch.zeros((), device=self.device)
        for inputs in self._parts(batch):
            loss = self.model(**inputs).loss / batch.tokens
            loss.backward()
            total += loss.detach()
        return total if dist.get_rank() == 0 else torch.zeros_like(total)

    @torch.no_grad()
    def validation_loss(self, batch: StepBatch) -> float:
        """The mean loss over all tokens of the batch."""
        total = torch.zeros((), device=self.device)
        for inputs in self._parts(batch):
            total += self.model(**inputs).loss
        return float(total / batch.tokens)

    def padding(self, batch: StepBatch) -> float:
        """The share of what is computed with that is no token."""
        rows, length = self._shape
        return 1 - batch.tokens / (-(-len(batch.sequences) // rows) * rows * length)

    def _parts(self, batch: StepBatch) -> list[dict[str, Any]]:
        rows, _ = self._shape
        parts = []
        for start in range(0, len(batch.sequences), rows):
            tokens = torch.zeros(self._shape, dtype=torch.long)
            targets = torch.full_like(tokens, _NO_TARGET)
            for row, sequence in enumerate(batch.sequences[start : start + rows]):
                tokens[row, : len(sequence.tokens)] = torch.from_numpy(sequence.tokens)
                targets[row, : len(sequence.targets)] = torch.from_numpy(sequence.targets)
            parts.append(language_inputs(tokens.to(self.device), targets.to(self.device)))
        return parts
