"""Parameters, gradients and optimizer on a cluster: what they hold, and what moving them takes.

Sharded over all ranks, or inside each node (HSDP), parameters are gathered layer by layer, forward
and backward, in every micro-batch (FSDP2; Zhao et al., arXiv 2304.11277). Gradients stay whole
until the last one and are reduced once a batch, or are reduced in every micro-batch.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from longspan.cluster.cost import seconds
from longspan.cluster.memory import Checkpointing, Transformer, longest, memory
from longspan.cluster.spec import Cluster
from longspan.errors import MemoryLimitError
from longspan.planner.prices import Sharding
from longspan.schedule.ops import Comm, CommKind, Compute

__all__ = ["State"]

_ADAM_BYTES = 64  # that Adam and the clipping of gradients move a parameter, in fp32


@dataclass(frozen=True, eq=False)
class State:
    """What is spread by ``sharding``, and how much a rank keeps of a token's activations.

    ``step_s``: what the optimizer was measured to take, at least.
    """

    cluster: Cluster
    model: Transformer
    sharding: Sharding
    reduce_once: bool
    memory_limit: int | None
    checkpointing: Checkpointing
    attention_kept: float
    step_s: float = 0.0

    @property
    def shards(self) -> int:
        """Over how many ranks they are spread."""
        return {
            "world": self.cluster.ranks,
            "node": int(np.bincount(self.cluster.fabric.node)[0]),
            "none": 1,
        }[self.sharding]

    @property
    def _how(self) -> dict[str, Any]:
        return {
            "shards": self.shards,
            "checkpointing": self.checkpointing,
            "attention_kept": self.attention_kept,
            "whole_gradients": self.reduce_once,
        }

    def bytes_of(self, tokens: int, exchanged: bool) -> int:
        """What a rank holds that has so many tokens; ``exchanged``: heads for tokens."""
        return memory(self.model, tokens, exchanged=exchanged, **self._how).total

    def most_tokens(self, kind: str, exchanged: bool) -> int:
        """The most tokens that fit a device of a kind."""
        limit = int(self.cluster.devices[kind].memory_bytes)
        limit = min(limit, self.memory_limit or limit)
        found = longest(self.model, limit, exchanged=exchanged, **self._how)
        if found < 1:
            least = self.bytes_of(1, exchanged) / 2**30
            raise MemoryLimitError(
                f"the model takes {least:.2f} GiB on each rank before the first token, with "
                f"parameters sharded over {self.shards}, and a device has "
                f"{limit / 2**30:.2f} GiB: use more ranks, or full checkpointing"
            )
        return found

    def _parts(self) -> list[tuple[int, int]]:
        """Parameters gathered together, and how often in a micro-batch: layers, then the rest."""
        model = self.model
        rest = model.params - model.layers * model.layer_params
        return [(model.layer_params, 2)] * model.layers + [(rest, 1)]

    def _groups(self) -> list[tuple[int, ...]]:
        cluster = self.cluster
        if self.sharding == "world":
            return [tuple(range(cluster.ranks))]
        return [cluster.ranks_of_node(node) for node in range(len(cluster.nodes))]

    def _slowest(self, kind: CommKind, groups: list[tuple[int, ...]], size: float) -> float:
        ops = [Comm(kind, ranks, (round(size / len(ranks)),) * len(ranks)) for ranks in groups]
        return max(seconds(op, self.cluster) for op in ops)

    def gather_s(self) -> float:
        """What all ranks send in one micro-batch: parameters, and gradients that don't stay."""
        total = 0.0 if self.reduce_once else self._reduce_s()
        if self.sharding == "none":
            return total
        groups, parts = self._groups(), self._parts()
        for params, times in set(parts):
            size = float(params * self.model.dtype_bytes)
            copies = seconds(Compute("copy", 0.0, 4 * size), self.cluster)
            once = self._slowest("all_gather", groups, size) + copies
            total += once * times * parts.count((params, times))
        return total

    def batch_s(self) -> float:
        """The optimizer's step, and the reduction of gradients that stayed."""
        moved = _ADAM_BYTES * self.model.params / self.shards
        step = max(self.step_s, seconds(Compute("copy", 0.0, moved), self.cluster))
        return step + (self._reduce_s() if self.reduce_once else 0.0)

    def _reduce_s(self) -> float:
        total, parts = 0.0, self._parts()
        for part in set(parts):
            size, once = 4.0 * part[0], 0.0
            if self.sharding != "none":
                once += self._slowest("reduce_scatter", self._groups(), size)
            if self.sharding == "node":
                # Each rank's share goes to its likes in other nodes: together, the whole.
                firsts = tuple(ranks[0] for ranks in self._groups())
                once += seconds(Comm("all_reduce", firsts, (round(size),)), self.cluster)
            if self.sharding == "none" and self.cluster.ranks > 1:
                world = tuple(range(self.cluster.ranks))
                once += seconds(Comm("all_reduce", world, (round(size),)), self.cluster)
            total += once * parts.count(part)
        return total
