"""What a transformer's training step takes on a described cluster, for groups of every size.

Counted are, in flops and bytes: the matrix products of a token, attention's of a query-key pair,
the elementwise passes over a token's activations, the launches of a layer's kernels; what a head
exchange or a ring sends in every layer; the gathering of parameters in every micro-batch and the
reduction of gradients once a batch; the optimizer. Rates, latencies and bandwidths are the
cluster's. What a device takes for a token or a pair can also be given as measured.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass, replace
from functools import cached_property

import numpy as np

from longspan.cluster.memory import Checkpointing, Transformer
from longspan.cluster.spec import Cluster, Device
from longspan.errors import ClusterError
from longspan.planner.prices import Floats, Ints, Pool, Price, Prices, Sharding
from longspan.planner.state import State
from longspan.planner.wires import Wires
from longspan.schedule.ring import Block
from longspan.schedule.ring_tasks import CPU_TILE, AttentionKernels, tiled_pairs
from longspan.schedule.rounds import Round

__all__ = ["Rates", "Workload", "shardings"]

_BACKWARD = 2.5  # attention's five matrix products to forward's two (Dao, arXiv 2307.08691)
# Kernels of a Llama layer of the transformers library in one micro-batch: seven matrix products,
# two norms of six kernels, rotary embedding, attention, activation, residuals, and twice that back.
_KERNELS = 3 * 45
_ALL_SIZES = 64  # above it not every size of a group is tried, but steps of 4 %


@dataclass(frozen=True, slots=True)
class Rates:
    """Seconds of one device, forward and backward: a micro-batch, each token, each pair.

    ``step_s``: of the clipping of gradients and the optimizer, once a step; 0: not known.
    ``document_s``: of each document, however short; 0 where kernels are launched ahead, as on GPUs.
    ``plan_s``: of planning a batch, where that takes its time from training.
    """

    micro_batch_s: float
    token_s: float
    pair_s: float
    step_s: float = 0.0
    document_s: float = 0.0
    plan_s: float = 0.0

    @classmethod
    def slowest(cls, rates: "Iterable[Rates]") -> "Rates":
        """The most that any of these takes, of each."""
        return cls(*map(max, zip(*map(astuple, rates), strict=True)))


@dataclass(frozen=True)
class Workload:
    """A model's training on a cluster; the sizes of activations are the model's ``dtype_bytes``.

    ``memory_limit``: bytes of each device, where that is less than it has. ``window``: tokens that
    attention looks back. ``rates``: what was measured, by kind of device. ``overlap``: parameters
    are gathered while ranks compute, as on GPUs; None: everywhere but on a device named "cpu".
    """

    cluster: Cluster
    model: Transformer
    memory_limit: int | None = None
    checkpointing: Checkpointing = "none"
    attention_kept: float = 1.0
    window: int | None = None
    powers_of_two: bool = False
    rates: Mapping[str, Rates] | None = None
    overlap: bool | None = None

    def pairs(self, tokens: Ints) -> Floats:
        """Query-key pairs of causal documents of so many tokens, as kernels compute them.

        What a document takes however short is among them, as so many pairs: ranks that share
        documents share it, too.
        """
        n = tokens.astype(np.float64)
        if self.window is None and any(kind.startswith("cpu") for kind in self.cluster.kinds):
            tiled: Floats = tiled_pairs(n, CPU_TILE) + self._document_pairs
            return tiled
        seen = n if self.window is None else np.minimum(n, self.window)
        found: Floats = seen * (seen + 1) / 2 + (n - seen) * seen + self._document_pairs
        return found

    @cached_property
    def _document_pairs(self) -> float:
        """As many pairs as take as long as a document takes beside its tokens and pairs."""
        rates = Rates.slowest(self.rates_of(kind) for kind in set(self.cluster.kinds))
        return rates.document_s / rates.pair_s if rates.pair_s else 0.0

    @property
    def dtype(self) -> str:
        """Torch's name of the activations' type."""
        return {2: "bfloat16", 4: "float32", 8: "float64"}[self.model.dtype_bytes]

    def rates_of(self, kind: str) -> Rates:
        """What one device of a kind takes; ClusterError if it has no rates."""
        if self.rates and kind in self.rates:
            return self.rates[kind]
        model, device = self.model, self.cluster.devices[kind]
        again = 1.0 if self.checkpointing != "none" else 0.0
        kept = self.attention_kept if self.checkpointing == "selective" else 0.0
        flops = (6 + 2 * again) * model.layers * model.layer_params
        flops += 6 * model.vocab * model.hidden
        wide = model.head_dim * (model.heads + model.kv_heads)
        passes = 22 * model.hidden + 8 * wide + 6 * model.ffn
        moved = (3 + again) * model.layers * passes * model.dtype_bytes
        # Cross entropy: logits in fp32, log-softmax and gradient, each written and read.
        moved += 24 * model.vocab
        token_s = flops / self._rate(device, kind, "matmul") + moved / device.bytes_per_s
        heads = model.head_dim
        pair = 4 * model.heads * model.head_dim * model.layers
        pair_s = (1 + again * (1 - kept)) * pair / self._rate(device, kind, f"attention {heads}")
        pair_s += _BACKWARD * pair / self._rate(device, kind, f"attention backward {heads}")
        document_s = 0.0
        if kind.startswith("cpu"):  # where nothing runs ahead of what launches it
            document_s = self._block_kernels(True) * model.layers * device.overhead_s
        return Rates(self._kernels * device.overhead_s, token_s, pair_s, document_s=document_s)

    @property
    def _kernels(self) -> float:
        """Of all layers in a micro-batch."""
        again = 1.0 if self.checkpointing != "none" else 0.0
        return self.model.layers * _KERNELS * (1 + again / 3)

    @cached_property
    def calibrated(self) -> Cluster:
        """The cluster with rates of attention, and costs of a kernel, as they were measured."""
        if not self.rates:
            return self.cluster
        told, kinds = replace(self, rates=None), dict(self.cluster.devices)
        for kind, rates in self.rates.items():
            if kind.startswith("cpu"):
                a_kernel = rates.micro_batch_s / self._kernels
                least = kinds[kind].overhead_s
                kinds[kind] = kinds[kind].model_copy(update={"overhead_s": max(least, a_kernel)})
            slower = rates.pair_s / told.rates_of(kind).pair_s
            if slower > 0:
                names = [
                    f"{op} {self.model.head_dim}" for op in ("attention", "attention backward")
                ]
                own = {name: {self.dtype: self._rate(kinds[kind], kind, name) / slower}
                       for name in names}  # fmt: skip
                kinds[kind] = kinds[kind].model_copy(
                    update={"measured": kinds[kind].measured | own}
                )
        return self.cluster.model_copy(update={"devices": kinds})

    def _rate(self, device: Device, kind: str, op: str) -> float:
        rate = device.rate(op, self.dtype)
        if rate is None:
            raise ClusterError(
                f"device {kind!r} has no rate for {op} in {self.dtype}: "
                "add one to its peak or measured rates"
            )
        return rate

    def state(self, sharding: Sharding, *, reduce_once: bool) -> State:
        """Parameters, gradients and optimizer, if they are spread and reduced so."""
        return State(
            *(self.calibrated, self.model, sharding, reduce_once, self.memory_limit),
            *(self.checkpointing, self.attention_kept),
            step_s=self._measured("step_s"),
        )

    def _measured(self, name: str) -> float:
        """The most that any device was measured to take once a step, 0 if none was."""
        return max((getattr(rates, name) for rates in (self.rates or {}).values()), default=0.0)

    def prices(self, sharding: Sharding, *, reduce_once: bool = True) -> Prices:
        """The prices of all groups, if parameters are spread so.

        With ``reduce_once`` gradients stay whole until the last micro-batch and are reduced then.
        Raises MemoryLimitError if the model alone doesn't fit, ClusterError for lacking rates.
        """
        nodes = list(_nodes(self.cluster))
        speeds = {kind: 1 / self.rates_of(kind).token_s for kind in {kind for _, kind in nodes}}
        fastest = max(speeds.values())
        nodes.sort(key=lambda node: (-speeds[node[1]], node[0][0]))
        ranks = tuple(ranks for ranks, _ in nodes)
        alike: dict[object, list[int]] = {}
        for index, (members, kind) in enumerate(nodes):
            place = int(self.cluster.fabric.node[members[0]])
            node = self.cluster.nodes[place]
            site = int(self.cluster.fabric.site[members[0]])
            key = (kind, len(members), str(node.link), str(node.network), site)
            alike.setdefault(key, []).append(index)
        state = self.state(sharding, reduce_once=reduce_once)
        pools = []
        for places in alike.values():
            kind = nodes[places[0]][1]
            wires = Wires.of(self.cluster, [ranks[node] for node in places])
            sizes = range(1, wires.world + 1)
            pools.append(self._pool(places, (kind,), wires, sizes, state, speeds[kind] / fastest))
        if len(pools) > 1:
            kinds = tuple(sorted(speeds))
            wires = Wires.of(self.cluster, ranks)
            largest = max(sum(len(ranks[node]) for node in pool.nodes) for pool in pools)
            sizes = range(largest + 1, wires.world + 1)
            slow = min(speeds.values()) / fastest
            pools.append(self._pool(range(len(ranks)), kinds, wires, sizes, state, slow))
        return Prices(
            nodes=ranks,
            pools=tuple(pools),
            pairs_of=self.pairs,
            bytes_of=state.bytes_of,
            gather_s=state.gather_s(),
            batch_s=state.batch_s() + self._measured("plan_s"),
            overlap=self.overlaps,
            sharding=sharding,
            reduce_once=reduce_once,
        )

    @property
    def overlaps(self) -> bool:
        """Whether parameters are gathered while ranks compute."""
        return "cpu" not in self.cluster.kinds if self.overlap is None else self.overlap

    def _pool(
        self,
        nodes: Sequence[int],
        kinds: tuple[str, ...],
        wires: Wires,
        sizes: range,
        state: State,
        weight: float,
    ) -> Pool:
        slowest = Rates.slowest([self.rates_of(kind) for kind in kinds])
        devices = [self.calibrated.devices[kind] for kind in kinds]
        # A group of several may exchange heads.
        most = [
            min(state.most_tokens(kind, several) for kind in kinds) for several in (False, True)
        ]
        found = tuple(
            self._price(size, slowest, devices, most[size > 1], wires)
            for size in sizes
            if (size & (size - 1) == 0 if self.powers_of_two else _tried(size, wires.node))
        )
        return Pool(tuple(nodes), weight, found)

    def _price(
        self, size: int, rates: Rates, devices: Sequence[Device], most: int, wires: Wires
    ) -> Price:
        model, counts = self.model, wires.counts(size)
        again = 1 if self.checkpointing != "none" else 0
        q = model.heads * model.head_dim * model.dtype_bytes
        # A KV head goes to every rank that has one of its query heads.
        copies = max(1.0, min(size, model.heads) / model.kv_heads)
        kv = 2 * model.kv_heads * model.head_dim * model.dtype_bytes
        exchanged = (2 + again) * (2 * q + kv * copies) * model.layers
        most_heads = -(-model.heads // size) * size / model.heads
        heads_s, heads_sent = wires.all_to_all(counts, exchanged)
        grad = 2 * model.kv_heads * model.head_dim * 4
        stats = 8 * model.heads
        hops, home = (size - 1) / size, 1.0
        back = min(
            hops * kv + home * grad, hops * (2 * q + stats) + home * (q / model.dtype_bytes * 4)
        )
        ring = ((1 + again) * hops * kv + back) * model.layers if size > 1 else 0.0
        rounds = (size - 1) * (2 + again) + 1
        latency = wires.latency(counts)
        # Of the hops to and from a rank, those to another node.
        far = 0 if len(counts) == 1 else 1 + int(counts.min() == 1)
        heads_busy, ring_busy = (
            max(device.message_s * messages + device.overhead_s * kernels for device in devices)
            for messages, kernels in self._handled(size)
        )
        return Price(
            ranks=size,
            most_tokens=most * size,
            fixed_s=rates.micro_batch_s,
            token_s=rates.token_s / size,
            heads_fixed_s=(4 * (2 + again) * latency + heads_busy) * model.layers,
            heads_pair_s=rates.pair_s / size * most_heads,
            heads_token_s=heads_s,
            ring_fixed_s=(rounds * latency + ring_busy) * model.layers if size > 1 else np.inf,
            ring_pair_s=rates.pair_s / size,
            ring_token_s=ring / wires.hop_bytes_per_s(counts) if size > 1 else 0.0,
            ring_busy_s=ring * max(2 * d.byte_s + far * d.far_byte_s for d in devices),
            heads_sent=heads_sent,
            ring_sent=ring,
        )

    def _handled(self, size: int) -> tuple[tuple[int, int], tuple[int, int]]:
        """Messages and kernels that a group of a size adds to a layer's: by heads, by a ring.

        A ring's are those of one document that all share; what is whole on a rank adds none.
        """
        others, again = size - 1, 1 if self.checkpointing != "none" else 0
        # Keys and values go around forward; backward they or the queries, and gradients.
        ring = 2 * (3 + again) * others, others * self._block_kernels(False)
        # Two exchanges forward, two backward, each with a message to each of the others and one
        # from it, which are packed and unpacked.
        each = 2 * (2 + again) * 2 * others
        return (each, each), ring

    def _block_kernels(self, first: bool) -> int:
        """Of a document's attention on a rank, forward and backward; ``first``: in round one."""
        again = 1 if self.checkpointing != "none" else 0
        own = AttentionKernels(1, 1, 1, self.dtype)
        a_round = Round(0, (Block(0, 1, 0, 1, False),), (), ())
        forward, backward = (
            sum(op.kernels for _, op in own.attend(a_round, first, back)) for back in (False, True)
        )
        return (1 + again) * forward + backward


def _tried(size: int, node: int) -> bool:
    if size <= _ALL_SIZES or (size % node == 0 and size <= 4 * _ALL_SIZES):
        return True
    return int(np.log(size) / 0.04) != int(np.log(size - 1) / 0.04)


def shardings(cluster: Cluster) -> tuple[Sharding, ...]:
    """How parameters can be spread; inside a node only where nodes are alike and several."""
    sizes = np.bincount(cluster.fabric.node)
    if cluster.ranks == 1:
        return ("none",)
    if len(sizes) > 1 and sizes[0] > 1 and (sizes == sizes[0]).all():
        return ("world", "node", "none")
    return ("world", "none")


def _nodes(cluster: Cluster) -> Iterator[tuple[tuple[int, ...], str]]:
    """The ranks of every node, apart by kind of device where it has several."""
    for index in range(len(cluster.nodes)):
        ranks = cluster.ranks_of_node(index)
        for kind in dict.fromkeys(cluster.kinds[rank] for rank in ranks):
            yield tuple(rank for rank in ranks if cluster.kinds[rank] == kind), kind
