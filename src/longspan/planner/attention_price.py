"""Prices of one way to attend: a head exchange among a few ranks, a ring of such places, or both.

A ring's rounds are played: what is sent sets off when its round begins, or if it is a gradient when
it ends, and waits for what was sent before it; a round waits for what it needs. What a double ring
sends inside nodes and between them doesn't wait for each other. A head exchange's parts set off one
after another; each is computed when it is there, and goes home while the next one is. What a rank
sends and receives meanwhile takes from its computing, where the device does both.
"""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import accumulate, chain, pairwise, product
from typing import Literal, NamedTuple

import numpy as np

from longspan.cluster.cost import handling, seconds
from longspan.cluster.spec import Cluster
from longspan.layout import Order, local_length
from longspan.schedule.heads import GPU_ROWS, HeadShares, trips
from longspan.schedule.ops import Compute
from longspan.schedule.ring import Block, Ring, mean_document
from longspan.schedule.ring_tasks import CPU_TILE, AttentionKernels
from longspan.schedule.rounds import Round, Travels, cheapest, rounds, turns

__all__ = ["Came", "Priced", "Pricer", "Send", "Step", "Way", "WayName"]

WayName = Literal["flat ring", "double ring", "heads", "hybrid"]
_ALIKE_FROM = 17  # places of a ring whose rounds are taken to be alike: their blocks are many


class Send(NamedTuple):
    """A message between two of the cluster's ranks."""

    source: int
    target: int
    bytes: int


@dataclass(frozen=True)
class Way:
    """A ring of ``places``, each of ``width`` ranks that exchange heads.

    ``parts``: of the heads, in which the ring goes or, if there is none, the exchange.
    """

    name: WayName
    places: int
    width: int
    node_ranks: int = 0
    parts: int = 1

    @property
    def mesh(self) -> tuple[int, ...]:
        """The sizes of the axes for ``attend``."""
        if self.name == "double ring":
            return self.places // self.node_ranks, self.node_ranks
        return (self.places, self.width) if self.name == "hybrid" else (self.places * self.width,)

    def node_of(self, place: int) -> int:
        """The inner ring that a place is in; in a flat ring each is by itself."""
        return place // (self.node_ranks or 1)


class Priced(NamedTuple):
    """What something takes, and sends."""

    seconds: float
    sends: list[Send]


class Came(NamedTuple):
    """The messages of one round and kind; ``far``: from one inner ring to another."""

    round: int
    is_grad: bool
    far: bool


def _no_sends() -> dict[tuple[bool, bool], list[Send]]:
    return {(is_grad, far): [] for is_grad in (False, True) for far in (False, True)}


@dataclass
class Step:
    """A round: seconds of the slowest rank, (is_grad, far) messages, and what it waits for."""

    computed: float = 0.0
    sends: dict[tuple[bool, bool], list[Send]] = field(default_factory=_no_sends)
    needs: set[Came] = field(default_factory=set)


def _in_turn(there: Sequence[float], computed: Sequence[float], home: Sequence[float]) -> float:
    """Seconds of parts that set off one after another, are computed, and go home meanwhile."""
    wire, clock = sum(there), 0.0
    for came, work, back in zip(accumulate(there), computed, home, strict=True):
        clock = max(clock, came) + work
        wire = max(wire, clock) + back
    return max(clock, wire)


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
    def _wired(self) -> dict[tuple[Send, ...], tuple[float, float]]:
        """Latency and transfer of messages that are known already."""
        return {}

    def cuts(self, way: Way) -> list[int]:
        """In how many parts of the heads it may go."""
        if way.places > 1:
            each = [self._ring_of(k, way).cuts(k.kv_heads) for k, _ in self._shared(way)]
            return sorted(set.intersection(*map(set, each)))
        shares = HeadShares(self.kernels.heads, self.kernels.kv_heads, way.width)
        cpu = any(self.cluster.kinds[rank].startswith("cpu") for rank in self.ranks)
        rows = 1 if cpu else GPU_ROWS
        return shares.cuts(mean_document(self.documents) // way.width, *self._head_bytes, rows)

    @property
    def _head_bytes(self) -> tuple[int, int]:
        """Of a token of one head: its query, and its key and value."""
        size = self.kernels.head_dim * self.kernels.dtype_bytes
        return size, 2 * size

    def seconds(self, way: Way, backward: bool, ring: Priced) -> Priced:
        """A ring or, in its parts, what is computed by itself, with the exchanges around it."""
        if way.width == 1:
            return ring
        k, length, world = self.kernels, self.documents[-1], len(self.ranks)
        cut = way.parts if way.places == 1 else 1
        shares = HeadShares(k.heads, k.kv_heads, way.width, cut)
        slowest, sends = 0.0, list(ring.sends)
        for place in range(way.places):
            members = range(place * way.width, (place + 1) * way.width)
            counts = [
                local_length(length, rank, world, self.order, self.documents) for rank in members
            ]
            group = [self.ranks[rank] for rank in members]
            every = trips(shares, counts, *self._head_bytes, group, backward)
            # What is sent is packed, and what has come unpacked: read and written each time.
            packing = [
                Compute("elementwise", 0, 4 * sum(map(sum, sizes)) / way.width, k.dtype)
                for sizes in ((there.sizes, home.sizes) for there, home in every)
            ]
            took = {op: seconds(op, self.cluster, group) for op in {*packing}}
            wired = {op: seconds(op, self.cluster) for op in {*chain.from_iterable(every)}}
            there, home = ([wired[op] for op in ops] for ops in zip(*every, strict=True))
            # While a part is computed, the next one comes and the last one goes home.
            comes = [handling(op, self.cluster) for op, _ in every[1:]]
            goes = [handling(op, self.cluster) for _, op in every[:-1]]
            computed = [
                ring.seconds / cut + took[op] + sum(beside)
                for op, *beside in zip(packing, [*comes, 0.0], [0.0, *goes], strict=True)
            ]
            slowest = max(slowest, _in_turn(there, computed, home))
            total = np.array([op.sizes for ops in every for op in ops]).sum(0)
            for i, j in product(range(way.width), repeat=2):
                if i != j and (size := int(total[i * way.width + j])):
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
        by_round = self.by_round if way.places < _ALIKE_FROM else self.alike_rounds
        clock, free, came, every = 0.0, [0.0, 0.0], dict[Came, float](), list[Send]()
        for number, step in enumerate(by_round(way, backward, travels)):
            for is_grad, took in ((False, 0.0), (True, step.computed)):
                due = [came[one] for one in step.needs if one.is_grad is is_grad]
                clock = max(clock + took, *due, 0.0)
                for far in (False, True):
                    sends = step.sends[is_grad, far]
                    if sends:
                        latency, transfer = self._wire(sends)
                        free[far] = max(free[far], clock) + transfer
                        came[Came(number, is_grad, far)] = free[far] + latency
                        every += sends
        return Priced(max(clock, *came.values(), 0.0), every)

    def by_round(self, way: Way, backward: bool, travels: Travels) -> list[Step]:
        """For each round what the slowest rank computes, and what all ranks send."""
        parts = self._parts(way)
        steps = [Step() for _ in range(way.places * parts[0][0].parts)]
        for (ring, kernels, members), place in product(parts, range(way.places)):
            own = [self.ranks[place * way.width + member] for member in members]
            brought: dict[tuple[int, int, bool], set[Came]] = {}
            for number, turn in enumerate(rounds(ring, place, backward, travels)):
                step, blocks = steps[number], (turn.blocks, ring.parts)
                hops = (*turn.payload, *turn.grads)
                ends = [
                    (hop.receiver if hop.sender == place else hop.sender) * way.width
                    for hop in hops
                ]
                took = max(
                    self._compute(kernels, *blocks, backward, rank, turn.source == place)
                    + sum(
                        self._handle(hop.bytes, rank, self.ranks[end + member])
                        for hop, end in zip(hops, ends, strict=True)
                    )
                    for rank, member in zip(own, members, strict=True)
                )
                step.computed = max(step.computed, took)
                for is_grad, sent in ((False, turn.payload), (True, turn.grads)):
                    if turn.source != place:
                        step.needs |= brought.pop((turn.source, turn.part, is_grad), set())
                    for hop in sent:
                        far = way.node_of(hop.sender) != way.node_of(hop.receiver)
                        if hop.receiver == place:
                            key = (hop.source, hop.part, is_grad)
                            brought.setdefault(key, set()).add(Came(number, is_grad, far))
                            continue
                        to = hop.receiver * way.width
                        step.sends[is_grad, far] += [
                            Send(a, self.ranks[to + member], hop.bytes)
                            for a, member in zip(own, members, strict=True)
                        ]
        return steps

    def alike_rounds(self, way: Way, backward: bool, travels: Travels) -> list[Step]:
        """The same as if every rank had as much to do in every round, and all went everywhere."""
        parts = self._parts(way)
        inner, cut, kv = way.node_ranks or 1, parts[0][0].parts, travels == "kv"
        count = -(-self.documents[-1] // way.places)
        columns = count if self.order is Order.CONTIGUOUS else self._columns(count, way.places)
        blocks = (Block(0, count, 0, columns, False),)
        hops = _no_sends()
        computed = 0.0
        for (ring, kernels, members), place in product(parts, range(way.places)):
            node, spot = divmod(place, inner)
            near, far = node * inner + (spot + 1) % inner, (place + inner) % way.places
            sizes = (ring.kv_bytes, ring.grad_bytes) if kv else (ring.q_bytes, ring.dq_bytes)
            for member in members:
                rank = self.ranks[place * way.width + member]
                computed = max(computed, self._compute(kernels, blocks, cut, backward, rank))
                for is_grad, is_far in hops:
                    target = self.ranks[(far if is_far else near) * way.width + member]
                    send = Send(rank, target, count * sizes[is_grad] // cut)
                    hops[is_grad, is_far].append(send)
        number = {which: turn for turn, which in enumerate(turns(parts[0][0], backward))}
        steps = [Step(computed) for _ in range(len(number) * inner)]
        for (outer, part), turn in number.items():
            for hop in range(inner):
                step, last = steps[turn * inner + hop], hop == inner - 1
                if hop:
                    step.needs.add(Came(turn * inner + hop - 1, False, False))
                if backward and hop > (outer == 0):
                    step.needs.add(Came(turn * inner + hop - 1, True, False))
                if not last:
                    step.sends[False, False] += hops[False, False]
                if backward and (hop or outer):
                    away = last and outer > 0
                    step.sends[True, away] += hops[True, away]
            if outer:
                # From home it left with the turn of the part's number.
                before = number[outer - 1, part] if outer > 1 else part
                steps[before * inner].sends[False, True] += hops[False, True]
                steps[turn * inner].needs.add(Came(before * inner, False, True))
            if backward and outer > 1:
                last_before = (number[outer - 1, part] + 1) * inner - 1
                steps[(turn + 1) * inner - 1].needs.add(Came(last_before, True, True))
        # A rank receives as much as it sends.
        handled = {
            which: max(2 * self._handle(one.bytes, one.source, one.target) for one in sends)
            for which, sends in hops.items()
        }
        for step in steps:
            step.computed += sum(handled[which] for which, sends in step.sends.items() if sends)
        return steps

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
        self,
        kernels: AttentionKernels,
        blocks: Sequence[Block],
        parts: int,
        backward: bool,
        rank: int,
        first: bool = False,
    ) -> float:
        total = 0.0
        for block in blocks:
            rows, columns = block.q_stop - block.q_start, block.kv_stop - block.kv_start
            how = (parts, backward, first, self.cluster.kinds[rank])
            key = (kernels, rows, columns, block.causal, *how)
            if key not in self._computed:
                on_cpu = self.cluster.kinds[rank].startswith("cpu")
                own = replace(kernels, tile=CPU_TILE if on_cpu else 1)
                alone = Round(0, (block,), (), (), parts=parts)
                self._computed[key] = sum(
                    seconds(op, self.cluster, (rank,))
                    for _, op in own.attend(alone, first, backward)
                )
            total += self._computed[key]
        return total

    def _handle(self, size: int, rank: int, other: int) -> float:
        """Seconds that a message of ``size`` bytes, to or from ``other``, takes from computing."""
        where = self.cluster
        far = where.fabric.node[rank] != where.fabric.node[other]
        a_byte = where.byte_s[rank] + far * where.far_byte_s[rank]
        return float(where.message_s[rank] + size * a_byte)

    def _wire(self, sends: Sequence[Send]) -> tuple[float, float]:
        """Seconds of latency and of transfer of messages that set off together."""
        key = tuple(sorted(sends))
        if key not in self._wired:
            self._wired[key] = self._fresh_wire(key)
        return self._wired[key]

    def _fresh_wire(self, sends: Sequence[Send]) -> tuple[float, float]:
        fabric = self.cluster.fabric
        source, target, size = (np.array(column) for column in zip(*sends, strict=True))
        pipes, load = fabric.load(source, target, size.astype(np.float64))
        transfer = float((load / fabric.capacity[pipes]).max(initial=0))
        wait = max(0.0, float(fabric.wait(source, target).max()) - transfer)
        return float(fabric.latency(source, target).max()) + wait, transfer

    def _parts(self, way: Way) -> list[tuple[Ring, AttentionKernels, list[int]]]:
        """The rings side by side, one a share of the heads: alike ones once, with their members."""
        # Rings of unequal heads are priced as if they took turns together.
        parts = way.parts if way.places > 1 else 1
        return [(replace(self._ring_of(kernels, way), parts=parts), kernels, members)
                for kernels, members in self._shared(way)]  # fmt: skip

    def _shared(self, way: Way) -> list[tuple[AttentionKernels, list[int]]]:
        """The heads of alike members of a place, and which members these are."""
        shares = HeadShares(self.kernels.heads, self.kernels.kv_heads, way.width)
        alike: dict[AttentionKernels, list[int]] = {}
        for member in range(way.width):
            heads = len(shares.q(member))
            kv_heads = len(shares.kv(member)) if shares.even(member) else heads
            if heads:
                kernels = replace(self.kernels, heads=heads, kv_heads=kv_heads)
                alike.setdefault(kernels, []).append(member)
        return list(alike.items())

    def _ring_of(self, kernels: AttentionKernels, way: Way) -> Ring:
        return kernels.ring(
            *(self.documents[-1], way.places, self.order),
            documents=self.documents,
            causal=self.causal,
            window=self.window,
            node_ranks=way.node_ranks,
            width=way.width,
        )
