"""What a stage costs in a layout: moves, head exchanges, rings and computing.

What is priced is what is run: the table of layout changes, ``attend``'s head exchange and ring.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from math import prod
from typing import Literal

import torch
from torch.distributed.tensor import Partial

from longspan.cluster.cost import seconds
from longspan.cluster.simulate import concurrent_seconds
from longspan.cluster.spec import Cluster
from longspan.layout import Layout, Order
from longspan.planner.stage import Sharded, Stage
from longspan.schedule.ops import Comm, Compute
from longspan.schedule.ring import Ring
from longspan.schedule.rounds import cheapest, rounds
from longspan.schedule.switch import backward, head_placements, local_shape, transition

__all__ = ["Inside", "Price", "Pricer"]

Inside = Literal["nothing", "heads", "ring"]

_BACKWARD = 2.0  # a matrix product's backward is two of its size
_ATTENTION_BACKWARD = 2.5  # five products to forward's two (Dao, arXiv 2307.08691, section 4.1)


@dataclass(frozen=True, slots=True)
class Price:
    """Seconds that it takes, and the bytes that each rank sends."""

    seconds: float = 0.0
    sent: Counter[int] = field(default_factory=Counter)

    def __add__(self, other: "Price") -> "Price":
        return Price(self.seconds + other.seconds, self.sent + other.sent)

    @property
    def most_sent(self) -> int:
        """Bytes of the busiest rank."""
        return max(self.sent.values(), default=0)


class Pricer:
    """Prices of stages on a mesh of the first ranks of a cluster, forward and backward."""

    def __init__(self, cluster: Cluster, axes: Mapping[str, int]) -> None:
        self.cluster, self.axes = cluster, dict(axes)
        self._coordinates = list(product(*map(range, self.axes.values())))
        self._ways: dict[tuple[object, ...], Price] = {}
        self._inside: dict[tuple[object, ...], Price] = {}

    def move(self, stage: Stage, src: Sharded, dst: Sharded) -> Price:
        """Bring the stage's tensor from one layout to another, and its gradient back.

        Where all ranks of an axis have the whole, each has a part of the gradient's sum.
        """
        there = stage.layout(self.axes, src), stage.layout(self.axes, dst)
        back = backward(*there, dict.fromkeys(self.axes, Partial()), sums=False)
        return self._way(stage, *there) + self._way(stage, *back)

    def megatron(self, stage: Stage, dim: str) -> Price:
        """A gather and a reduce-scatter round each part of a stage, and again for the gradients.

        Megatron-LM's sequence parallelism (arXiv 2205.05198, section 4.2.2) on a mesh of one axis:
        inside a part the weights are sharded, between the parts the tensor is.
        """
        (axis,) = self.axes
        cut = stage.layout(self.axes, (dim,))
        both = self._way(stage, cut, Layout()) + self._way(stage, Layout({axis: Partial()}), cut)
        return sum((both for _ in range(2 * stage.parts)), Price())

    def compute_s(self, stage: Stage, sharded: Sharded, inside: Inside) -> float:
        """Seconds of the rank that has most to do; what all have, all compute."""
        share = self._share(stage, sharded)
        attention = share
        world = self._mixing_world(stage, sharded)
        if inside == "heads":
            whole = tuple(None if dim in stage.mixes else dim for dim in sharded)
            attention = self._share(stage, whole) * -(-stage.heads // world) / stage.heads
        elif inside == "ring" and stage.causal:
            # In contiguous order the last rank's queries see all, twice the mean.
            attention *= 2 - 1 / world
        return self._dense_s(stage, share) + self._attention_s(stage, attention)

    def inside(self, stage: Stage, sharded: Sharded, how: Inside) -> Price:
        """What is sent while a stage mixes a dim that one axis shards, beyond what computing hides.

        A ring sends while it computes; a head exchange doesn't.
        """
        if how == "nothing":
            return Price()
        key = (stage.kind, sharded, how)
        if key not in self._inside:
            self._inside[key] = (self._heads if how == "heads" else self._ring)(stage, sharded)
        return self._inside[key]

    def _way(self, stage: Stage, src: Layout, dst: Layout) -> Price:
        sides = [tuple(map(layout.placements.get, self.axes)) for layout in (src, dst)]
        key = (stage.shape, stage.dtype, *sides)
        if key not in self._ways:
            ops = transition(src, dst, stage.shape, stage.torch_dtype, self.axes)
            self._ways[key] = self._price(ops)
        return self._ways[key]

    def _price(self, ops: Sequence[Comm]) -> Price:
        """Ops one after another, but groups that share no rank talk side by side."""
        waves: list[list[Comm]] = []
        for op in ops:
            if not waves or any(set(op.ranks) & set(other.ranks) for other in waves[-1]):
                waves.append([])
            waves[-1].append(op)
        total = sum(
            max(concurrent_seconds(wave, self.cluster))
            if len(wave) > 1
            else seconds(wave[0], self.cluster)
            for wave in waves
        )
        sent: Counter[int] = Counter()
        for op in ops:
            sent.update({rank: op.sent_bytes(rank) for rank in op.ranks})
        return Price(total, sent)

    def _dense_s(self, stage: Stage, share: float) -> float:
        return self._kernels_s("matmul", stage.flops * share, _BACKWARD, stage)

    def _attention_s(self, stage: Stage, share: float) -> float:
        work = stage.attention_flops * share
        return self._kernels_s("attention", work, _ATTENTION_BACKWARD, stage)

    def _kernels_s(self, kind: str, flops: float, backward: float, stage: Stage) -> float:
        ops = [Compute(kind, flops * times, 0.0, stage.dtype) for times in (1.0, backward)]
        ranks = range(len(self._coordinates))
        return sum(seconds(op, self.cluster, ranks) for op in ops) if flops else 0.0

    def _share(self, stage: Stage, sharded: Sharded) -> float:
        """Of the first rank, which has most."""
        held = self._held(stage, sharded, self._coordinates[0])
        return prod(held) / max(1, prod(stage.shape))

    def _held(self, stage: Stage, sharded: Sharded, at: tuple[int, ...]) -> tuple[int, ...]:
        return local_shape(stage.layout(self.axes, sharded), stage.shape, self.axes, at)

    def _mixing_axis(self, stage: Stage, sharded: Sharded) -> int | None:
        return next((at for at, dim in enumerate(sharded) if dim in stage.mixes), None)

    def _mixing_world(self, stage: Stage, sharded: Sharded) -> int:
        at = self._mixing_axis(stage, sharded)
        return 1 if at is None else list(self.axes.values())[at]

    def _heads(self, stage: Stage, sharded: Sharded) -> Price:
        at = self._mixing_axis(stage, sharded)
        assert at is not None
        axis, dim = list(self.axes)[at], list(stage.sizes).index(stage.channel)
        kv_heads = stage.kv_heads or stage.heads
        q, kv = head_placements(dim, stage.heads, kv_heads, self.axes[axis])
        src = stage.layout(self.axes, sharded)
        found = Price()
        for placement, heads in ((q, stage.heads), (kv, kv_heads)):
            shape = list(stage.heads_shape)
            shape[dim] = heads
            dst = Layout({**src.placements, axis: placement})
            # Queries go and the output comes, keys and values go; so do all their gradients.
            for way in ((src, dst), (dst, src)):
                once = self._price(transition(*way, shape, stage.torch_dtype, self.axes))
                found += once + once
        return found

    def _ring(self, stage: Stage, sharded: Sharded) -> Price:
        at = self._mixing_axis(stage, sharded)
        assert at is not None
        groups: dict[tuple[int, ...], list[int]] = {}
        for rank, place in enumerate(self._coordinates):
            groups.setdefault((*place[:at], *place[at + 1 :]), []).append(rank)
        world = self._mixing_world(stage, sharded)
        both_s = self._attention_s(stage, self._share(stage, sharded))
        forward_s = both_s / (1 + _ATTENTION_BACKWARD)
        found = Price()
        for back in (False, True):
            computes_s = (both_s - forward_s if back else forward_s) / world
            tables = {
                tuple(ranks): self._rounds(stage, sharded, at, ranks[0], back)
                for ranks in groups.values()
            }
            for turn in range(world):
                ops = [Comm("all_to_all", g, each[turn]) for g, each in tables.items()]
                price = self._price([op for op in ops if any(op.sizes)])
                found += Price(max(0.0, price.seconds - computes_s), price.sent)
        return found

    def _rounds(
        self, stage: Stage, sharded: Sharded, at: int, first: int, back: bool
    ) -> list[tuple[int, ...]]:
        """For each round what a group's rank i sends rank j, by the ring's own schedule."""
        world, length = list(self.axes.values())[at], stage.sizes[sharded[at] or ""]
        others = tuple(None if place == at else dim for place, dim in enumerate(sharded))
        held = self._held(stage, others, self._coordinates[first])
        rows = prod(held) // max(1, length * stage.sizes[stage.channel])
        size = stage.torch_dtype.itemsize
        wide = torch.promote_types(stage.torch_dtype, torch.float32).itemsize
        kv = 2 * rows * (stage.kv_heads or stage.heads) * stage.head_dim
        q = rows * stage.heads
        ring = Ring(
            *(length, world, Order.CONTIGUOUS, stage.causal, (0, length), kv * size, kv * wide),
            q_bytes=q * (2 * stage.head_dim * size + 2 * wide),
            dq_bytes=q * stage.head_dim * wide,
        )
        way = cheapest(ring)
        tables = [[0] * (world * world) for _ in range(world)]
        for rank in range(world):
            for table, turn in zip(tables, rounds(ring, rank, back, way), strict=True):
                for sent in (*turn.payload, *turn.grads):
                    if sent.sender == rank:
                        table[rank * world + sent.receiver] += sent.bytes
        return [tuple(table) for table in tables]
