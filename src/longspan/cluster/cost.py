"""What an op costs on a cluster, in seconds. It knows ops and wires, and no technique.

A collective is the messages that its algorithm sends, as NCCL and gloo send them:

==============  ==================================================  ==========================
all_gather      ring: each hop carries all but one contribution     n−1 hops one after another
reduce_scatter  ring: each hop carries all but one share            n−1 hops
all_reduce      ring: a reduce-scatter and an all-gather            2(n−1) hops
broadcast       chain in the order of the ranks, in pieces          n−1 hops
all_to_all      each pair directly, all at once                     the slowest pair's latency
send            one message                                         its latency
==============  ==================================================  ==========================

Gloo's broadcast is a binomial tree instead, and its reduce-scatter an all-reduce of the whole.

Every message loads the pipes on its way (``fabric``), and the op takes as long as its busiest
pipe does, after the latency, and at least as long as its ranks let messages wait. So a ring over
several nodes loads each node's network once each way, whatever the ranks inside, if the op's ranks
come node by node.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from longspan.cluster.fabric import Floats, Ints
from longspan.cluster.spec import Cluster, Device
from longspan.errors import ClusterError
from longspan.schedule.ops import Comm, CommKind, Compute, Op

__all__ = ["Demand", "computing", "demand", "handling", "seconds", "traffic"]

_LEAST_BYTE_S = 1e-12  # where messages take from computing, but not their bytes
_Load = tuple[Ints, Floats]  # pipes, and what passes each


@dataclass(frozen=True, slots=True, eq=False)
class Demand:
    """What a communication asks of the wires.

    ``bytes`` pass each of ``pipes`` after ``latency_s``; alone that takes ``transfer_s``. Pipes are
    numbered as in ``Cluster.capacity``: past the fabric's come the ranks' computing, whose load is
    in seconds. ``message_bytes`` is its largest message: where ops share a pipe, messages get equal
    shares.
    """

    latency_s: float
    pipes: Ints
    bytes: Floats
    transfer_s: float
    message_bytes: float


def seconds(op: Op, cluster: Cluster, ranks: Sequence[int] | None = None) -> float:
    """How long ``op`` takes on an otherwise idle cluster.

    ``ranks`` says where: for a Compute the ranks that run it, of which the slowest counts (all of
    them by default); for a Comm the cluster's rank for each place in ``op.ranks``, where those
    aren't the cluster's ranks themselves. Raises ClusterError if a rank or a rate isn't there.
    """
    if isinstance(op, Comm):
        if ranks is not None:
            if len(ranks) != len(op.ranks):
                raise ClusterError(f"{op.kind} among {len(op.ranks)} ranks, given {len(ranks)}")
            op = Comm(op.kind, tuple(ranks), op.sizes)
        asked = demand(op, cluster)
        return asked.latency_s + asked.transfer_s
    if ranks is None:
        devices = {kind: cluster.devices[kind] for kind in cluster.kinds}
    else:
        devices = {
            cluster.kinds[rank]: device for rank in ranks if (device := cluster.device(rank))
        }
    return max(_compute_seconds(op, kind, device) for kind, device in devices.items())


def traffic(ops: Iterable[Comm], cluster: Cluster) -> dict[str, float]:
    """Bytes that ``ops`` put on each pipe, by its name ("node 0 out", "site 1 in", …)."""
    total = np.zeros(len(cluster.fabric.names))
    for op in ops:
        asked = demand(op, cluster)
        wires = asked.pipes < len(total)
        total[asked.pipes[wires]] += asked.bytes[wires]
    return {cluster.fabric.names[pipe]: float(total[pipe]) for pipe in np.flatnonzero(total)}


def handling(op: Comm, cluster: Cluster) -> float:
    """Seconds of its computing that ``op`` takes from the busiest of its ranks."""
    if not cluster.handles:
        return 0.0
    asked = demand(op, cluster)
    return float(asked.bytes[asked.pipes >= len(cluster.fabric.capacity)].max(initial=0))


def computing(op: Compute, cluster: Cluster, rank: int) -> Demand:
    """What ``op`` asks of a rank whose sends take from its computing.

    It gets as much of it as a transfer does, and all that transfers leave.
    """
    took = seconds(op, cluster, (rank,))
    pipe = len(cluster.fabric.capacity) + rank
    as_bytes = took / max(float(cluster.byte_s[rank]), _LEAST_BYTE_S)
    return Demand(0.0, np.array([pipe]), np.array([took]), took, as_bytes)


def demand(op: Comm, cluster: Cluster) -> Demand:
    """What ``op`` asks of the wires of ``cluster``.

    Raises ClusterError if its ranks aren't the cluster's, or its sizes don't fit its ranks.
    """
    _check(op, cluster)
    fabric = cluster.fabric
    ranks = np.array(op.ranks, dtype=np.int64)
    sizes = np.array(op.sizes, dtype=np.float64)
    n = len(ranks)
    if n == 1:
        return Demand(0.0, np.empty(0, np.int64), np.empty(0), 0.0, 0.0)
    source, target = ranks, np.roll(ranks, -1)
    match op.kind:
        case "send" | "broadcast":
            source, target = ranks[:-1], ranks[1:]
            amount = np.full(n - 1, sizes[0])
        case "all_gather":
            amount = sizes.sum() - np.roll(sizes, -1)
        case "reduce_scatter":
            amount = sizes.sum() - sizes
        case "all_reduce":
            amount = np.full(n, 2 * (n - 1) * sizes[0] / n)
        case "all_to_all":
            table = sizes.reshape(n, n).copy()
            np.fill_diagonal(table, 0)
            row, column = np.nonzero(table)
            source, target, amount = ranks[row], ranks[column], table[row, column]
    spread = op.kind not in ("send", "all_to_all")
    pipes, load = fabric.load(source, target, amount, spread=spread)
    if cluster.handles:
        often = {"all_gather": n - 1, "reduce_scatter": n - 1, "all_reduce": 2 * (n - 1)}
        times = often.get(op.kind, 1)
        pipes, load = _with_computing(cluster, source, target, amount, times, (pipes, load))
    transfer = float((load / cluster.capacity[pipes]).max(initial=0))
    latency, wait = (_longest(op.kind, of(source, target)) for of in (fabric.latency, fabric.wait))
    # While bytes are on their way, both ends come to attend to them.
    latency += max(0.0, wait - transfer)
    return Demand(latency, pipes, load, transfer, float(amount.max(initial=0)))


def _with_computing(
    cluster: Cluster, source: Ints, target: Ints, amount: Floats, often: int, wires: _Load
) -> _Load:
    """With what ranks compute for what they send and receive, each amount in so many messages."""
    busy = np.zeros(cluster.ranks)
    far = cluster.fabric.node[source] != cluster.fabric.node[target]
    for ends in (source, target):
        a_byte = cluster.byte_s[ends] + far * cluster.far_byte_s[ends]
        took = cluster.message_s[ends] * often + a_byte * amount
        np.add.at(busy, ends, np.where(amount > 0, took, 0.0))
    ranks = np.flatnonzero(busy)
    pipes, load = wires
    first = len(cluster.fabric.capacity)
    return np.concatenate([pipes, first + ranks]), np.concatenate([load, busy[ranks]])


def _longest(kind: CommKind, hops: Floats) -> float:
    """What the longest way takes through hops that take so."""
    if kind in ("send", "broadcast"):
        return float(hops.sum())
    if kind == "all_to_all":
        return float(hops.max(initial=0))
    # A piece goes round the ring once (twice in an all-reduce) but for the hops it need not take.
    # The longest way leaves out the quickest ones, and no way takes a slow hop more often.
    if kind == "all_reduce":
        return float(2 * hops.sum() - (hops + np.roll(hops, -1)).min())
    return float(hops.sum() - hops.min())


def _compute_seconds(op: Compute, kind: str, device: Device) -> float:
    rate = device.rate(op.kind, op.dtype)
    if op.flops and rate is None:
        raise ClusterError(
            f"device {kind!r} has no rate for {op.kind} in {op.dtype}: "
            "add one to its peak or measured rates"
        )
    busy = op.flops / rate if rate else 0.0
    return op.kernels * device.overhead_s + max(busy, op.bytes / device.bytes_per_s)


def _check(op: Comm, cluster: Cluster) -> None:
    n = len(op.ranks)
    what = f"{op.kind} among ranks {', '.join(map(str, op.ranks[:8]))}{', …' * (n > 8)}"
    if not n or min(op.ranks) < 0 or max(op.ranks) >= cluster.ranks:
        raise ClusterError(f"{what}: the cluster has ranks 0 to {cluster.ranks - 1}")
    if len(set(op.ranks)) < n:
        raise ClusterError(f"{what}: a rank is named twice")
    if op.kind == "send" and n != 2:
        raise ClusterError(f"{what}: a send has two ranks")
    per_rank = {"all_gather": n, "reduce_scatter": n, "all_to_all": n * n}
    needed = per_rank.get(op.kind, 1)
    if len(op.sizes) != needed or min(op.sizes) < 0:
        raise ClusterError(f"{what}: needs {needed} sizes, none below zero; has {len(op.sizes)}")
