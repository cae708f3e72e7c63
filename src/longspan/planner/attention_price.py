"""Prices of one way to attend: a head exchange among a few ranks, a ring of such places, or both.

A round of a ring takes as long as the slower of what is computed and what is sent in it; what a
double ring sends between nodes has a whole inner turn's time. A head exchange and its computation
come one after the other.
"""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise, product
from typing import Literal, NamedTuple

import numpy as np

from longspan.cluster.cost import seconds
from longspan.cluster.spec import Cluster
from longspan.layout import Order, local_length
from longspan.schedule.heads import HeadShares, exchange_op
from longspan.schedule.ops import Comm, Compute
from longspan.schedule.ring import Block, Ring
from longspan.schedule.ring_tasks import AttentionKernels
from longspan.schedule.rounds import Round, Travels, cheapest, rounds

__all__ = ["Priced", "Pricer", "Send", "Way", "WayName"]

WayName = Literal["flat ring", "double ring", "heads", "hybrid"]
_ALIKE_FROM = 17  # places of a ring whose rounds are taken to be alike: their blocks are many


class Send(NamedTuple):
    """A message between two of the cluster's ranks."""

    source: int
    target: int
    bytes: int


@dataclass(frozen=True)
class Way:
    """A ring of ``places``, each of ``width`` ranks that exchange heads."""

    name: WayName
    places: int
    width: int
    node_ranks: int = 0

    @property
    def mesh(self) -> tuple[int, ...]:
        """The sizes of the axes for ``attend``."""
        if self.name == "double ring":
            return self.places // self.node_ranks, self.node_ranks
        return (self.places, self.width) if self.name == "hybrid" else (self.places * self.width,)


class Priced(NamedTuple):
    """What something takes, and sends."""

    seconds: float
    sends: list[Send]


@dataclass(frozen=True)
class Pricer:
    """One sequence in one order on some ranks of a cluster."""

    cluster: Cluster
    ranks: tuple[int, ...]
    kernels: AttentionKernels
    documents: tuple[int, ...]
    order: Order
    causal: bool
    window: int | None

    @cached_property
    def _computed(self) -> dict[tuple[Hashable, ...], float]:
        """Seconds of blocks that are known already."""
        return {}

    @cached_property
    def _wired(self) -> dict[tuple[Send, ...], float]:
        """Seconds of messages that are known already."""
        return {}

    def exchange(self, way: Way) -> Priced:
        """All head exchanges: queries, keys and values in, results out, and their gradients."""
        if way.width == 1:
            return Priced(0.0, [])
        k, length, world = self.kernels, self.documents[-1], len(self.ranks)
        shares = HeadShares(k.heads, k.kv_heads, way.width)
        q_shares, kv_shares = ([of(r) for r in range(way.width)] for of in (shares.q, shares.kv))
        token_bytes = k.head_dim * k.dtype_bytes
        slowest, sends = 0.0, []
        for place in range(way.places):
            members = range(place * way.width, (place + 1) * way.width)
            counts = [
                local_length(length, rank, world, self.order, self.documents) for rank in members
            ]
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
                    sends.append(Send(group[i], group[j], size))
        return Priced(slowest, sends)

    def travels(self, way: Way) -> Travels:
        """What a ring's backward hands around for fewer bytes."""
        ring = self._parts(way)[0][0]
        if way.places < _ALIKE_FROM:
            return cheapest(ring)
        return "q" if ring.q_bytes + ring.dq_bytes < ring.kv_bytes + ring.grad_bytes else "kv"

    def ring(self, way: Way, backward: bool, travels: Travels) -> Priced:
        """All rounds of a ring, forward or backward."""
        few = way.places < _ALIKE_FROM
        by_round = self.by_round if few else self.alike_rounds
        computed, payload, grads = by_round(way, backward, travels)
        node = self.cluster.fabric.node
        inner_ranks = way.node_ranks or way.places
        total, every = 0.0, list[Send]()
        for start in range(0, way.places, inner_ranks):
            turn, far = 0.0, list[Send]()
            for number in range(start, start + inner_ranks):
                near: list[Send] = []
                for send in (*payload[number], *grads[number]):
                    between = way.node_ranks and node[send.source] != node[send.target]
                    (far if between else near).append(send)
                every += near
                turn += max(computed[number], self._wire(near))
            every += far
            total += max(turn, self._wire(far))
        return Priced(total + self._wire(grads[-1]), every + grads[-1])

    def by_round(
        self, way: Way, backward: bool, travels: Travels
    ) -> tuple[list[float], list[list[Send]], list[list[Send]]]:
        """For each round what the slowest rank computes, and the sends that are under way.

        Gradients are under way in the round after theirs, so they have one round more.
        """
        computed = [0.0] * way.places
        payload: list[list[Send]] = [[] for _ in range(way.places)]
        grads: list[list[Send]] = [[] for _ in range(way.places + 1)]
        for ring, kernels, members in self._parts(way):
            for place in range(way.places):
                own = [self.ranks[place * way.width + member] for member in members]
                for number, turn in enumerate(rounds(ring, place, backward, travels)):
                    took = max(self._compute(kernels, turn.blocks, backward, rank) for rank in own)
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
                                    Send(a, self.ranks[to + member], hop.bytes)
                                    for a, member in ends
                                ]
        return computed, payload, grads

    def alike_rounds(
        self, way: Way, backward: bool, travels: Travels
    ) -> tuple[list[float], list[list[Send]], list[list[Send]]]:
        """The same as if every rank had as much to do in every round, and all went everywhere."""
        computed = 0.0
        inner = way.node_ranks or way.places
        hops: list[list[list[Send]]] = [[[], []] for _ in range(2)]  # payload, grads: near, far
        count = -(-self.documents[-1] // way.places)
        for ring, kernels, members in self._parts(way):
            kv = travels == "kv"
            sizes = (ring.kv_bytes, ring.grad_bytes) if kv else (ring.q_bytes, ring.dq_bytes)
            columns = count if self.order is Order.CONTIGUOUS else self._columns(count, way.places)
            blocks = (Block(0, count, 0, columns, False),)
            for place in range(way.places):
                node, spot = divmod(place, inner)
                ahead = (node * inner + (spot + 1) % inner, (place + inner) % way.places)
                for member in members:
                    rank = self.ranks[place * way.width + member]
                    computed = max(computed, self._compute(kernels, blocks, backward, rank))
                    for found, size in zip(hops, sizes, strict=True):
                        for sends, to in zip(found, ahead, strict=True):
                            target = self.ranks[to * way.width + member]
                            sends.append(Send(rank, target, count * size))
        (near, far), (grad_near, grad_far) = hops
        payload: list[list[Send]] = []
        grads: list[list[Send]] = [[]]
        for number in range(way.places):
            turn, hop = divmod(number, inner)
            last = number + inner >= way.places
            payload.append((near if hop < inner - 1 else []) + (far if not (hop or last) else []))
            back: list[Send] = []
            if backward and number:
                back = grad_near if hop < inner - 1 or not turn else grad_far
            grads.append(back)
        return [computed] * way.places, payload, grads

    def _columns(self, rows: int, places: int) -> int:
        """Keys that a rank's every query sees in a round, on average."""
        pairs = 0
        for start, stop in pairwise(self.documents):
            length = stop - start
            reach = min(length, self.window or length)
            seen = reach * (reach + 1) // 2 + (length - reach) * reach
            pairs += seen if self.causal else length * length
        return max(1, round(pairs / (places * places * rows)))

    def _compute(
        self, kernels: AttentionKernels, blocks: Sequence[Block], backward: bool, rank: int
    ) -> float:
        total = 0.0
        for block in blocks:
            rows, columns = block.q_stop - block.q_start, block.kv_stop - block.kv_start
            key = (kernels, rows, columns, block.causal, backward, self.cluster.kinds[rank])
            if key not in self._computed:
                alone = Round(0, (block,), (), ())
                self._computed[key] = sum(
                    seconds(op, self.cluster, (rank,))
                    for _, op in kernels.attend(alone, False, backward)
                )
            total += self._computed[key]
        return total

    def _wire(self, sends: Sequence[Send]) -> float:
        """Seconds that messages take that set off together."""
        key = tuple(sorted(sends))
        if key not in self._wired:
            self._wired[key] = self._fresh_wire(key)
        return self._wired[key]

    def _fresh_wire(self, sends: Sequence[Send]) -> float:
        if not sends:
            return 0.0
        fabric = self.cluster.fabric
        source, target, size = (np.array(column) for column in zip(*sends, strict=True))
        pipes, load = fabric.load(source, target, size.astype(np.float64))
        transfer = float((load / fabric.capacity[pipes]).max(initial=0))
        return float(fabric.latency(source, target).max()) + transfer

    def _parts(self, way: Way) -> list[tuple[Ring, AttentionKernels, list[int]]]:
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

    def _ring_of(self, kernels: AttentionKernels, way: Way) -> Ring:
        return kernels.ring(
            *(self.documents[-1], way.places, self.order),
            documents=self.documents,
            causal=self.causal,
            window=self.window,
            node_ranks=way.node_ranks,
            width=way.width,
        )
