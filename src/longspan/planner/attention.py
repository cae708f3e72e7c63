"""Which way of spreading attention over ranks is the quickest on a cluster, and by how much.

Every way that ``attend`` knows is priced (``attention_price``): rings, flat or double, and a head
exchange among all ranks or among a few, with a ring between those.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from longspan.cluster.spec import Cluster
from longspan.errors import ClusterError
from longspan.layout import Order
from longspan.planner.attention_price import Pricer, Send, Way, WayName
from longspan.schedule.ring_tasks import AttentionKernels
from longspan.schedule.rounds import Travels

__all__ = ["AttentionChoice", "best_attention", "plan_attention", "price_attention"]

_ALIKE = 1.05


@dataclass(frozen=True, slots=True)
class AttentionChoice:
    """A way to attend, and what it is foretold to take.

    ``mesh``: the sizes of the axes that ``attend`` is to be given, over the ranks in their order;
    ``inside``, ``travels`` (what is fewer bytes), ``parts`` and ``order``: its arguments of those
    names.
    Seconds of forward and of backward; bytes that the busiest rank sends in both, and that the
    busiest node sends to others.
    """

    name: WayName
    mesh: tuple[int, ...]
    inside: Literal["ring", "heads"]
    travels: Travels
    parts: int
    order: Order
    forward_s: float
    backward_s: float
    sent_bytes: int
    between_nodes_bytes: int

    @property
    def seconds(self) -> float:
        """Forward and backward together."""
        return self.forward_s + self.backward_s


def plan_attention(
    cluster: Cluster,
    kernels: AttentionKernels,
    documents: Sequence[int],
    *,
    ranks: Sequence[int] | None = None,
    orders: Sequence[Order | str] = (Order.ZIGZAG,),
    causal: bool = True,
    window: int | None = None,
) -> list[AttentionChoice]:
    """Every way to attend, the quickest first; of those about as quick, that of fewest bytes.

    About as quick is within 5 %: prices aren't surer, and what is sent less disturbs less.

    ``kernels``: heads, head dim and dtype. ``documents``: where each starts in the sequence, and
    the end of the last (cu_seqlens). ``ranks``: the cluster's ranks that share the sequence, by
    default all. Double rings and exchanges in a part of the ranks need ranks that lie node by node,
    equally many in each. Raises ClusterError for ranks that the cluster hasn't got, LayoutError for
    an order, window or documents that can't be.
    """
    ranks = tuple(range(cluster.ranks)) if ranks is None else tuple(ranks)
    if not ranks or min(ranks) < 0 or max(ranks) >= cluster.ranks or len(set(ranks)) < len(ranks):
        raise ClusterError(f"ranks must be different ones of 0 to {cluster.ranks - 1}: {ranks}")
    found: list[AttentionChoice] = []
    for order in map(Order.of, orders):
        pricer = Pricer(cluster, ranks, kernels, tuple(documents), order, causal, window)
        for way in _ways(len(ranks), _ranks_of_node(cluster, ranks)):
            found.append(_priced(pricer, way, pricer.cuts(way)))
    alike = min(choice.seconds for choice in found) * _ALIKE
    return sorted(
        found,
        key=lambda choice: (
            choice.seconds > alike,
            choice.between_nodes_bytes if choice.seconds <= alike else 0,
            choice.seconds,
        ),
    )


def best_attention(
    cluster: Cluster, kernels: AttentionKernels, length: int, ranks: Sequence[int]
) -> AttentionChoice:
    """The quickest way for a group of ranks to attend, causally, in one document."""
    return plan_attention(cluster, kernels, (0, length), ranks=ranks)[0]


def price_attention(
    cluster: Cluster,
    kernels: AttentionKernels,
    documents: Sequence[int],
    *,
    ranks: Sequence[int],
    order: Order | str,
    inside: Literal["ring", "heads"],
    window: int | None = None,
) -> AttentionChoice:
    """What one way takes: a flat ring or one head exchange, as ``longspan train`` is told."""
    pricer = Pricer(
        *(cluster, tuple(ranks), kernels, tuple(documents), Order.of(order), True, window)
    )
    world = len(ranks)
    way = Way("flat ring", world, 1) if inside == "ring" else Way("heads", 1, world)
    return _priced(pricer, way, pricer.cuts(way)[-1:])


def _ranks_of_node(cluster: Cluster, ranks: Sequence[int]) -> int:
    """How many of the ranks are in each node; 0 if not equally many, side by side."""
    nodes = cluster.fabric.node[list(ranks)]
    starts = np.flatnonzero(np.diff(nodes, prepend=-1))
    sizes = np.diff(starts, append=len(nodes))
    together = len(np.unique(nodes)) == len(starts)
    return int(sizes[0]) if together and len(set(sizes.tolist())) == 1 else 0


def _ways(world: int, node: int) -> Iterable[Way]:
    yield Way("flat ring", world, 1)
    if world == 1:
        return
    yield Way("heads", 1, world)
    if 1 < node < world:
        yield Way("double ring", world, 1, node)
    for width in range(2, min(node, world - 1) + 1):
        if node % width == 0:
            yield Way("hybrid", world // width, width)


def _priced(pricer: Pricer, way: Way, cuts: Sequence[int]) -> AttentionChoice:
    """In the fewest parts of these that are about as quick as any: messages disturb, too."""
    travels = pricer.travels(way)
    found: list[AttentionChoice] = []
    for parts in cuts:
        split = replace(way, parts=parts)
        forward = pricer.seconds(split, False, pricer.ring(split, False, "kv"))
        backward = pricer.seconds(split, True, pricer.ring(split, True, travels))
        found.append(
            AttentionChoice(
                *(way.name, way.mesh, "heads" if way.width > 1 else "ring", travels, parts),
                *(pricer.order, forward.seconds, backward.seconds),
                *_busiest(pricer.cluster, forward.sends + backward.sends),
            )
        )
    alike = min(choice.seconds for choice in found) * _ALIKE
    return next(choice for choice in found if choice.seconds <= alike)


def _busiest(cluster: Cluster, sends: Sequence[Send]) -> tuple[int, int]:
    """Bytes that the busiest rank sends, and the busiest node to others."""
    node = cluster.fabric.node
    by_rank = np.zeros(cluster.ranks, dtype=np.int64)
    by_node = np.zeros(len(cluster.nodes), dtype=np.int64)
    for send in sends:
        by_rank[send.source] += send.bytes
        if node[send.source] != node[send.target]:
            by_node[node[send.source]] += send.bytes
    return int(by_rank.max()), int(by_node.max())
