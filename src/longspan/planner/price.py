"""What each choice of a layer costs and holds, and what it costs to hand a tensor on.

Two sums of seconds are kept apart. ``now`` is what nothing hides: computing, moving activations and
their gradients, summing partial outputs and the last bucket of weights' gradients. ``later`` is
what can go on beside the backward of other layers: summing the others, less the backward that it
may hide behind. A step takes the sum of all ``now`` and, if that is positive, of all ``later``.
Where devices compute for what they send, hidden sums make backward longer, which is in ``now``.

Forward moves what ``Layer`` counts; backward computes twice as much (once where only the weights or
only the input need gradients), attention 2.5 times.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Literal

import numpy as np

from longspan.cluster.cost import seconds
from longspan.cluster.spec import Cluster
from longspan.planner.choices import Choice, choices, codes_of, given_codes
from longspan.planner.eliminate import Floats
from longspan.planner.graph import Graph, Layer, Operand, Weight
from longspan.planner.layer_edges import Edge, unique
from longspan.planner.layer_wires import (
    PARTIAL,
    REPLICATE,
    ClusterWires,
    Codes,
    Moves,
    PaseWires,
    Wires,
)
from longspan.planner.weights import WeightPrice, held_share, share_of, weight_price
from longspan.schedule.keeping import BUCKET_BYTES
from longspan.schedule.ops import Compute

__all__ = ["OPTIONS", "Costs", "Node", "Prices", "Pricing"]

# The options that other layers don't see: (zero, recompute).
OPTIONS = ((False, False), (True, False), (False, True), (True, True))


@dataclass(frozen=True)
class Pricing:
    """How a plan is priced.

    ``model``: "longspan", or "pase" for PaSE's own (words of 8 bytes, one bandwidth, no latency,
    multiply-adds counted as one, embeddings as dense products). ``overlap``: the share of backward
    that gradient reductions can hide behind. ``zero`` and ``recompute``: whether these are
    options. ``synchronised``: batch norms take the statistics of the whole batch, as one process
    does; else each rank its own. ``optimizer_bytes`` of state are kept for a parameter.
    ``bucket_bytes``: gradients are reduced so many at a time, which share a latency; the last ones
    when backward has ended, so that nothing hides them.
    ``flat_sums``: over several mesh axes around one ring, as elsewhere, not inwards first as here.
    """

    model: Literal["longspan", "pase"] = "longspan"
    overlap: float = 1.0
    zero: bool = True
    recompute: bool = True
    synchronised: bool = True
    optimizer_bytes: int = 8
    bucket_bytes: float = BUCKET_BYTES
    flat_sums: bool = False


@dataclass(frozen=True, slots=True, eq=False)
class Costs:
    """A node's choices, (choices, options) each; inf is an option that there isn't."""

    now: Floats
    later: Floats
    memory: Floats


@dataclass(frozen=True, slots=True, eq=False)
class Node:
    """Layers that choose together, as all of them take the same tensor in the same way."""

    layers: tuple[int, ...]
    choices: tuple[Choice, ...]
    costs: Costs
    outputs: tuple[tuple[Codes, ...], ...]  # of each layer, by choice
    kind: int  # nodes of one kind have the same costs


class Prices:
    """Prices of one graph on one cluster's mesh, whose last ``inside`` axes are within a node."""

    def __init__(
        self,
        graph: Graph,
        cluster: Cluster,
        sizes: Sequence[int],
        pricing: Pricing,
        inside: int = 0,
    ) -> None:
        self.inside = inside
        self.graph, self.cluster, self.pricing = graph, cluster, pricing
        self.sizes = tuple(sizes)
        self.pase = pricing.model == "pase"
        if self.pase:
            itemsize = graph.layers[0].output.itemsize or 4
            wires: Wires = PaseWires(self.sizes, _slowest(cluster), 8 / itemsize)
        else:
            wires = ClusterWires(cluster, self.sizes, pricing.flat_sums)
        self.moves = Moves(wires)
        self._handling: Moves | None = None  # what moves take from computing
        if cluster.handles and not self.pase:
            taken = ClusterWires(cluster, self.sizes, pricing.flat_sums, handling=True)
            self._handling = Moves(taken)
        self._kinds: dict[tuple[object, ...], Node] = {}
        self._edges: dict[tuple[object, ...], Edge] = {}
        self._between: dict[tuple[object, ...], Floats] = {}
        self._steps: dict[tuple[object, ...], tuple[float, float]] = {}
        self._outputs: dict[tuple[int, Choice], Codes] = {}
        self._last, self._last_bytes = _last_summed(graph.layers, pricing.bucket_bytes)
        self._memory_rate = min(cluster.devices[kind].bytes_per_s for kind in cluster.kinds)

    # Nodes

    def nodes(self) -> list[Node]:
        """All layers, those that take the same tensor for a product joined in one node."""
        groups: dict[object, list[int]] = {}
        for place, layer in enumerate(self.graph.layers):
            key: object = place
            if layer.kind == "linear" and len(layer.inputs) == 1:
                x = layer.inputs[0]
                if x.source is not None:
                    key = (x.source, x.through, x.shape, x.dims)
            groups.setdefault(key, []).append(place)
        return [self.node(tuple(group)) for group in groups.values()]

    def node(self, places: tuple[int, ...]) -> Node:
        """One node; what is alike is priced once."""
        layers = [self.graph.layers[place] for place in places]
        key = tuple((layer.likeness, id(layer) in self._last) for layer in layers)
        known = self._kinds.get(key)
        if known is None:
            found = choices(layers, self.sizes, self.inside)
            rows = [[self.layer(one, choice) for one in layers] for choice in found]
            tables = [
                np.array([np.sum([one[at] for one in row], axis=0) for row in rows])
                for at in range(3)
            ]
            outputs = tuple(tuple(self.output(one, choice) for choice in found) for one in layers)
            known = Node(places, tuple(found), Costs(*tables), outputs, len(self._kinds))
            self._kinds[key] = known
        return Node(places, known.choices, known.costs, known.outputs, known.kind)

    def output(self, layer: Layer, choice: Choice) -> Codes:
        """How the output is left: partial sums are summed, and scattered if so chosen."""
        key = (id(layer), choice)
        if key not in self._outputs:
            to = REPLICATE if choice.to is None else layer.output.dims.index(choice.to)
            summed = layer.summed
            self._outputs[key] = tuple(
                to if code == REPLICATE and dim in summed else code
                for dim, code in zip(choice.dims, codes_of(layer.output.dims, choice), strict=True)
            )
        return self._outputs[key]

    def layer(self, layer: Layer, choice: Choice) -> tuple[Floats, Floats, Floats]:
        """One layer's (now, later, memory) for every option."""
        forward, backward = self.compute(layer, choice)
        summing, summing_back = self._summed(layer, choice)
        now = forward + backward + summing + summing_back
        again = forward + summing
        weights = self._weights(layer, choice, self.moves)
        taken = WeightPrice()
        if self._handling:
            taken = self._weights(layer, choice, self._handling)
        held, sharded = weights.held, weights.sharded
        update = held * (3 + 2 * self.pricing.optimizer_bytes / 4) * 4 / self._memory_rate
        update_sharded = sharded * (3 + 2 * self.pricing.optimizer_bytes / 4) * 4
        update_sharded /= self._memory_rate
        state = self._state_bytes(layer)
        kept = layer.kept_bytes * self.moves.local(self.output(layer, choice))
        if self.pase:
            update = update_sharded = 0.0
        overlap, hidden = self.pricing.overlap, id(layer) not in self._last
        none = np.inf
        zero = 0.0 if self.pricing.zero and sharded < held else none
        once_more = 0.0 if self.pricing.recompute and kept else none
        rows = []
        for with_zero, with_again in OPTIONS:
            sums_s, taken_s = weights.reduce_s, taken.reduce_s
            if with_zero:
                sums_s, taken_s = weights.scatter_s, taken.scatter_s
            cost = now + (update_sharded if with_zero else update)
            if hidden:
                cost += overlap * taken_s
                later = sums_s - overlap * (backward + taken_s)
            else:
                cost, later = cost + sums_s, -overlap * backward
            bytes_held = (sharded if with_zero else held) * state
            bytes_held += 0.0 if with_again else kept
            if with_zero:
                # Gathers aren't made ahead of their layer.
                cost += weights.gather_s + weights.again_s + zero
            if with_again:
                cost += again + once_more
            rows.append((cost, later, bytes_held))
        table = np.array(rows)
        return table[:, 0], table[:, 1], table[:, 2]

    def parts(self, layer: Layer, choice: Choice, zero: bool) -> dict[str, float]:
        """What a layer's seconds go to, as if nothing was hidden."""
        weights = self._weights(layer, choice, self.moves)
        sharded_s = weights.scatter_s + weights.gather_s + weights.again_s
        return {
            "computing": sum(self.compute(layer, choice)),
            "partial sums": sum(self._summed(layer, choice)),
            "gradient sums": sharded_s if zero else weights.reduce_s,
        }

    def compute(self, layer: Layer, choice: Choice) -> tuple[float, float]:
        """Seconds of forward and of backward on a rank."""
        parts = choice.parts(self.sizes)
        key = (id(layer), tuple(sorted(parts.items())))
        if key not in self._steps:
            self._steps[key] = self._compute(layer, parts)
        return self._steps[key]

    def _compute(self, layer: Layer, parts: Mapping[str, int]) -> tuple[float, float]:
        share = prod(share_of(layer.sizes[dim], n) for dim, n in parts.items())
        flops, moved = layer.flops * share, self._moved(layer, parts, share)
        needs = any(one.source is not None for one in layer.inputs)
        trains = any(weight.trained for weight in layer.weights)
        times = float(needs + trains if layer.weights else 2 * needs)
        if layer.kind == "attention":
            times *= 1.25
        if self.pase:
            if layer.kind == "embedding":
                flops = 2.0 * prod(layer.sizes.values()) * share
            rate = self._rate(layer)
            return flops / 2 / rate, 2 * flops / 2 / rate
        forward = seconds(Compute(layer.rate, flops, moved, layer.dtype), self.cluster)
        if not times:
            return forward, 0.0
        back = Compute(layer.rate, times * flops, times * moved, layer.dtype)
        return forward, seconds(back, self.cluster)

    def _rate(self, layer: Layer) -> float:
        devices = (self.cluster.devices[kind] for kind in set(self.cluster.kinds))
        return min(device.rate(layer.rate, layer.dtype) or np.inf for device in devices)

    @staticmethod
    def _moved(layer: Layer, parts: Mapping[str, int], share: float) -> float:
        """Bytes through a rank's memory, forward; what isn't split is all there."""
        after = layer.followed_bytes * held_share(layer.output, parts)
        if layer.rate == "gather":
            return layer.bytes * share + after
        tensors: list[Operand | Weight] = [*layer.inputs, *layer.weights, layer.output]
        whole = [prod(one.shape) * one.itemsize for one in tensors]
        here = sum(size * held_share(one, parts) for one, size in zip(tensors, whole, strict=True))
        return here + max(0.0, layer.bytes - sum(whole)) * share + after

    def _summed(self, layer: Layer, choice: Choice) -> tuple[float, float]:
        """Seconds of summing partial outputs, and what belongs to it backward."""
        parts = choice.parts(self.sizes)
        done = self.output(layer, choice)
        forward = back = 0.0
        left = codes_of(layer.output.dims, choice)
        summed = layer.summed
        partial = tuple(
            PARTIAL if code == REPLICATE and dim in summed else code
            for dim, code in zip(choice.dims, left, strict=True)
        )
        sums = any(code == PARTIAL for code in partial)
        if sums and layer.output.shape:
            once, each = self.moves.price(partial, done)
            forward += once + each * layer.output.bytes
            whole = tuple(REPLICATE if code == PARTIAL else code for code in partial)
            once, each = self.moves.price(done, whole)
            back += once + each * layer.output.bytes
        norm = layer.kind == "batch_norm"
        if norm and not self.pricing.synchronised:
            return forward, back
        for dims, size in layer.reduced_bytes.items():
            axes = tuple(PARTIAL if at in dims else REPLICATE for at in choice.dims)
            once, each = self.moves.price(axes, (REPLICATE,) * len(axes))
            # What is summed over some dims is apart by the others; a loss' sums aren't.
            others = [share_of(layer.sizes[d], n) for d, n in parts.items() if d not in dims]
            took = once + each * size * (prod(others) if norm or "vocab" in dims else 1)
            forward += took
            back += took * norm
        return forward, back

    def _weights(self, layer: Layer, choice: Choice, moves: Moves) -> WeightPrice:
        last = id(layer) in self._last
        done, bucket = self.output(layer, choice), self.pricing.bucket_bytes
        bucket = min(bucket, self._last_bytes) if last else bucket
        return weight_price(layer, choice, done, moves, bucket)

    def _state_bytes(self, layer: Layer) -> float:
        """Bytes a parameter: itself, its gradient, the optimizer's state."""
        item = layer.weights[0].itemsize if layer.weights else 4
        return 2.0 * item + self.pricing.optimizer_bytes

    # Edges

    def edges(self, nodes: Sequence[Node]) -> dict[tuple[int, int], Edge]:
        """Seconds to hand tensors on, forward and their gradients back, by pairs of nodes."""
        place = {at: n for n, node in enumerate(nodes) for at in node.layers}
        found: dict[tuple[int, int], list[tuple[object, ...]]] = {}
        builders: dict[tuple[object, ...], tuple[Node, int, Node, Operand]] = {}
        for n, node in enumerate(nodes):
            # Layers of one node take the same tensor, which is moved once.
            layer = self.graph.layers[node.layers[0]]
            for index, operand in enumerate(layer.inputs):
                if operand.source is None:
                    continue
                giver = place[operand.source]
                member = nodes[giver].layers.index(operand.source)
                key = (nodes[giver].kind, member, node.kind, index)
                builders.setdefault(key, (nodes[giver], member, node, operand))
                found.setdefault((giver, n), []).append(key)
        return {pair: self._together(tuple(keys), builders) for pair, keys in found.items()}

    def _together(
        self,
        keys: tuple[tuple[object, ...], ...],
        builders: Mapping[tuple[object, ...], tuple[Node, int, Node, Operand]],
    ) -> Edge:
        if keys not in self._edges:
            edges = []
            for key in keys:
                if key not in self._edges:
                    self._edges[key] = self._edge(*builders[key])
                edges.append(self._edges[key])
            self._edges[keys] = Edge.sum(edges) if len(edges) > 1 else edges[0]
        return self._edges[keys]

    def _edge(self, giver: Node, member: int, taker: Node, operand: Operand) -> Edge:
        made = self.graph.layers[giver.layers[member]].output
        left = giver.outputs[member]
        taken = [given_codes(operand, made.shape, choice, self.sizes) for choice in taker.choices]
        from_, rows = unique(left)
        to, columns = unique(taken)
        prices = self._moved_between(tuple(from_), tuple(to))
        # What is handed on is as long as what was made, even if only a part of it is looked at.
        part = min(1.0, prod(operand.shape) / max(1, prod(made.shape)))
        return Edge.of(prices[..., 0] + prices[..., 1] * made.bytes * part, rows, columns)

    def _moved_between(
        self, from_: tuple[Codes, ...], to: tuple[tuple[Codes, Codes], ...]
    ) -> Floats:
        """(givers' layouts, takers' layouts, 2): ``edge_price`` of each."""
        known = self._between.get((from_, to))
        if known is None:
            known = np.array([[self.edge_price(a, *b) for b in to] for a in from_])
            self._between[from_, to] = known
        return known

    def edge_price(self, left: Codes, taken: Codes, grad: Codes) -> tuple[float, float]:
        """Of a tensor forward and its gradient back; the giver's gradient is as its output."""
        once, each = self.moves.price(left, taken)
        again, every = self.moves.price(grad, left)
        return once + again, each + every


def _last_summed(layers: Sequence[Layer], bucket_bytes: float) -> tuple[frozenset[int], float]:
    """Layers whose gradients fill the last bucket, when backward has ended, and its bytes."""
    last: list[int] = []
    held = 0.0
    for layer in reversed(layers):
        own = sum(weight.numel * weight.itemsize for weight in layer.weights if weight.trained)
        if own and held >= bucket_bytes:
            last, held = [], 0.0
        if own:
            last.append(id(layer))
            held += own
    return frozenset(last), held


def _slowest(cluster: Cluster) -> float:
    """The least bandwidth that any device has to any other, in bytes a second."""
    capacity = cluster.fabric.capacity
    return float(capacity[np.isfinite(capacity)].min(initial=np.inf))
