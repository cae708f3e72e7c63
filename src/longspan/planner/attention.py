"""Which way of spreading attention over ranks is the quickest on a cluster, and by how much.

Every way that ``attend`` knows is priced: rings, flat or double, and a head exchange among all ranks
or among a few, with a ring between those. A round of a ring takes as long as the slower of what is
computed and what is sent in it; what a double ring sends between nodes has a whole inner turn's
time. A head exchange and its computation come one after the other.
"""

from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import product
from typing import Literal, NamedTuple

import numpy as np

from longspan.cluster.cost import seconds
from longspan.cluster.spec import Cluster
from longspan.errors import ClusterError
from longspan.layout import Order, local_length
from longspan.schedule.heads import HeadShares, exchange_op
from longspan.schedule.ops import Comm, Compute
from longspan.schedule.ring import Ring
from longspan.schedule.ring_tasks import AttentionKernels
from longspan.schedule.rounds import Round, Travels, cheapest, rounds

__all__ = ["AttentionChoice", "best_attention", "plan_attention"]


@dataclass(frozen=True, slots=True)
class AttentionChoice:
    """A way to attend, and what it is foretold to take.

    ``mesh``: the sizes of the axes that ``attend`` is to be given, over the ranks in their order;
    ``inside``, ``travels`` (what is fewer bytes) and ``order``: its arguments of those names. Seconds of forward and of
    backward; bytes that the busiest rank sends in both, and that the busiest node sends to others.
    """

    name: Literal["flat ring", "double ring", "heads", "hybrid"]
    mesh: tuple[int, ...]
    inside: Literal["ring", "heads"]
    travels: Travels
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
    """Every way to attend, the quickest first; where two take as long, the one of fewer bytes.

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
        priced = _Pricer(cluster, ranks, kernels, tuple(documents), order, causal, window)
        found += priced.choices()
    return sorted(found, key=lambda choice: (choice.seconds, choice.between_nodes_bytes))


def best_attention(
    cluster: Cluster, kernels: AttentionKernels, length: int, ranks: Sequence[int]
) -> AttentionChoice:
    """The quickest way for a group of ranks to attend, causally, in one document."""
    return plan_attention(cluster, kernels, (0, length), ranks=ranks)[0]


class _Send(NamedTuple):
    source: int
    target: int
    bytes: int


@dataclass(frozen=True)
class _Way:
    """A ring of ``places``, each of ``width`` ranks that exchange heads."""

    name: Literal["flat ring", "double ring", "heads", "hybrid"]
    places: int
    width: int
    node_ranks: int = 0

    @property
    def mesh(self) -> tuple[int, ...]:
        if self.name == "double ring":
            return self.places // self.node_ranks, self.node_ranks
        return (self.places, self.width) if self.name == "hybrid" else (self.places * self.width,)


class _Priced(NamedTuple):
    seconds: float
    sends: list[_Send]


@dataclass(frozen=True)
class _Pricer:
    """One sequence in one order on some ranks of a cluster."""

    cluster: Cluster
    ranks: tuple[int, ...]
    kernels: AttentionKernels
    documents: tuple[int, ...]
    order: Order
    causal: bool
    window: int | None

    @cached_property
    def ranks_of_node(self) -> int:
        """How many of the ranks are in each node; 0 if not equally many, side by side."""
        nodes = self.cluster.fabric.node[list(self.ranks)]
        starts = np.flatnonzero(np.diff(nodes, prepend=-1))
        sizes = np.diff(starts, append=len(nodes))
        once = len(np.unique(nodes)) == len(starts)
        return int(sizes[0]) if once and len(set(sizes.tolist())) == 1 else 0

    @cached_property
    def _computed(self) -> dict[tuple[Hashable, ...], float]:
        """Seconds of blocks that are known already."""
        return {}

    @cached_property
    def _wired(self) -> dict[tuple[_Send, ...], float]:
        """Seconds of messages that are known already."""
        return {}

    def ways(self) -> Iterable[_Way]:
        world, node = len(self.ranks), self.ranks_of_node
        yield _Way("flat ring", world, 1)
        if world == 1:
            return
        yield _Way("heads", 1, world)
        if 1 < node < world:
            yield _Way("double ring", world, 1, node)
        for width in range(2, min(node, world - 1) + 1):
            if node % width == 0:
                yield _Way("hybrid", world // width, width)

    def choices(self) -> Iterable[AttentionChoice]:
        for way in self.ways():
            exchanged = self._exchange(way)
            travels = cheapest(self._parts(way)[0][0])
            forward = self._ring(way, False, "kv")
            backward = self._ring(way, True, travels)
            yield AttentionChoice(
                *(way.name, way.mesh, "heads" if way.width > 1 else "ring", travels, self.order),
                exchanged.seconds / 2 + forward.seconds,
                exchanged.seconds / 2 + backward.seconds,
                *self._busiest(exchanged.sends + forward.sends + backward.sends),
            )

    def _busiest(self, sends: Sequence[_Send]) -> tuple[int, int]:
        """Bytes that the busiest rank sends, and the busiest node to others."""
        node = self.cluster.fabric.node
        by_rank = np.zeros(self.cluster.ranks, dtype=np.int64)
        by_node = np.zeros(len(self.cluster.nodes), dtype=np.int64)
        for send in sends:
            by_rank[send.source] += send.bytes
            if node[send.source] != node[send.target]:
                by_node[node[send.source]] += send.bytes
        return int(by_rank.max()), int(by_node.max())

    def _exchange(self, way: _Way) -> "_Priced":
        """All head exchanges: queries, keys and values in, results out, and their gradients."""
        if way.width == 1:
            return _Priced(0.0, [])
        k, length, world = self.kernels, self.documents[-1], len(self.ranks)
        shares = HeadShares(k.heads, k.kv_heads, way.width)
        q_shares, kv_shares = ([of(r) for r in range(way.width)] for of in (shares.q, shares.kv))
        token_bytes = k.head_dim * k.dtype_bytes
        slowest, sends = 0.0, []
        for place in range(way.places):
            members = range(place * way.width, (place + 1) * way.width)
            counts = [local_length(length, rank, world, self.order) for rank in members]
            group = [self.ranks[rank] for rank in members]
            out = exchange_op(counts, q_shares, token_bytes, group)
            kv = exchange_op(counts, kv_shares, 2 * token_bytes, group)
            to_heads = tuple(a + b for a, b in zip(out.sizes, kv.sizes, strict=True))
            back = [tuple(np.array(s).reshape((way.width,) * 2).T.ravel().tolist())
                    for s in (out.sizes, to_heads)]  # fmt: skip
            # Queries, keys and values go as one, and so do their gradients.
            every = [to_heads, back[0], out.sizes, back[1]]
            ops = [Comm("all_to_all", out.ranks, sizes) for sizes in every]
            # What is sent is packed, and what has come unpacked: read and written each time.
            copied = 4 * max(sum(sizes) for sizes in every) / way.width
            packing = [Compute("elementwise", 0, copied, k.dtype)] * len(ops)
            took = sum(seconds(op, self.cluster) for op in ops)
            took += sum(seconds(op, self.cluster, group) for op in packing)
            slowest = max(slowest, took)
            for i, j in product(range(way.width), repeat=2):
                size = sum(sizes[i * way.width + j] for sizes in every)
                if i != j and size:
                    sends.append(_Send(group[i], group[j], size))
        return _Priced(slowest, sends)

    def _ring(self, way: _Way, backward: bool, travels: Travels) -> "_Priced":
        computed, payload, grads = self._by_round(way, backward, travels)
        node = self.cluster.fabric.node
        inner_ranks = way.node_ranks or way.places
        total, every = 0.0, list[_Send]()
        for start in range(0, way.places, inner_ranks):
            turn, far = 0.0, list[_Send]()
            for number in range(start, start + inner_ranks):
                near: list[_Send] = []
                for send in (*payload[number], *grads[number]):
                    between = way.node_ranks and node[send.source] != node[send.target]
                    (far if between else near).append(send)
                every += near
                turn += max(computed[number], self._wire(near))
            every += far
            total += max(turn, self._wire(far))
        return _Priced(total + self._wire(grads[-1]), every + grads[-1])

    def _by_round(
        self, way: _Way, backward: bool, travels: Travels
    ) -> tuple[list[float], list[list[_Send]], list[list[_Send]]]:
        """For each round what the slowest rank computes, and the sends that are under way.

        Gradients are under way in the round after theirs, so they have one round more.
        """
        computed = [0.0] * way.places
        payload: list[list[_Send]] = [[] for _ in range(way.places)]
        grads: list[list[_Send]] = [[] for _ in range(way.places + 1)]
        for ring, kernels, members in self._parts(way):
            for place in range(way.places):
                own = [self.ranks[place * way.width + member] for member in members]
                for number, turn in enumerate(rounds(ring, place, backward, travels)):
                    took = max(self._compute(kernels, turn, backward, rank) for rank in own)
                    computed[number] = max(computed[number], took)
                    for found, sent in (
                        (payload[number], turn.payload),
                        (grads[number + 1], turn.grads),
                    ):
                        for hop in sent:
                            if hop.sender == place:
                                to = hop.receiver * way.width
                                ends = zip(own, members, strict=True)
                                found += [
                                    _Send(a, self.ranks[to + member], hop.bytes)
                                    for a, member in ends
                                ]
        return computed, payload, grads

    def _compute(self, kernels: AttentionKernels, turn: Round, backward: bool, rank: int) -> float:
        total = 0.0
        for block in turn.blocks:
            rows, columns = block.q_stop - block.q_start, block.kv_stop - block.kv_start
            key = (kernels, rows, columns, block.causal, backward, self.cluster.kinds[rank])
            if key not in self._computed:
                alone = replace(turn, blocks=(block,))
                self._computed[key] = sum(
                    seconds(op, self.cluster, (rank,))
                    for _, op in kernels.attend(alone, False, backward)
                )
            total += self._computed[key]
        return total

    def _wire(self, sends: Sequence[_Send]) -> float:
        """Seconds that messages take that set off together."""
        key = tuple(sorted(sends))
        if key not in self._wired:
            self._wired[key] = self._fresh_wire(key)
        return self._wired[key]

    def _fresh_wire(self, sends: Sequence[_Send]) -> float:
        if not sends:
            return 0.0
        fabric = self.cluster.fabric
        source, target, size = (np.array(column) for column in zip(*sends, strict=True))
        pipes, load = fabric.load(source, target, size.astype(np.float64))
        transfer = float((load / fabric.capacity[pipes]).max(initial=0))
        return float(fabric.latency(source, target).max()) + transfer

    def _parts(self, way: _Way) -> list[tuple[Ring, AttentionKernels, list[int]]]:
        """The rings side by side, one a share of the heads: alike ones once, with their members."""
        shares = HeadShares(self.kernels.heads, self.kernels.kv_heads, way.width)
        alike: dict[AttentionKernels, list[int]] = {}
        for member in range(way.width):
            heads = len(shares.q(member))
            kv_heads = len(shares.kv(member)) if shares.even(member) else heads
            if heads:
                kernels = replace(self.kernels, heads=heads, kv_heads=kv_heads)
                alike.setdefault(kernels, []).append(member)
        return [(self._ring_of(kernels, way), kernels, members)
                for kernels, members in alike.items()]  # fmt: skip

    def _ring_of(self, kernels: AttentionKernels, way: _Way) -> Ring:
        return kernels.ring(
            *(self.documents[-1], way.places, self.order),
            documents=self.documents,
            causal=self.causal,
            window=self.window,
            node_ranks=way.node_ranks,
            width=way.width,
        )
