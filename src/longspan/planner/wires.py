"""Links that groups of ranks use, in closed form: what an exchange or a hop of a ring takes.

A group takes ranks of one node, or whole nodes and a rest. The arithmetic is ``cluster.cost``'s for
messages of equal size, without naming every pair of a thousand ranks.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from longspan.cluster.fabric import Fabric
from longspan.cluster.spec import Cluster
from longspan.planner.prices import Ints

__all__ = ["Wires"]


@dataclass(frozen=True, eq=False)
class Wires:
    """The links of nodes with ``sizes`` ranks each, at the slowest of them."""

    sizes: tuple[int, ...]
    device_bytes_per_s: float
    share_bytes_per_s: float
    network_bytes_per_s: float
    near_latency_s: float
    far_latency_s: float

    @classmethod
    def of(cls, cluster: Cluster, nodes: Sequence[tuple[int, ...]]) -> "Wires":
        """The links of these nodes, given as their ranks."""
        fabric = cluster.fabric
        firsts = np.array([ranks[0] for ranks in nodes])
        every = np.concatenate([np.array(ranks) for ranks in nodes])
        near = [np.array(ranks[:2]) for ranks in nodes if len(ranks) > 1]
        rates = partial(_slowest_pipe, cluster)
        far = 0.0
        if len(firsts) > 1:
            far = _latency(fabric, firsts, np.roll(firsts, -1))
        return cls(
            sizes=tuple(len(ranks) for ranks in nodes),
            device_bytes_per_s=rates("device", every),
            share_bytes_per_s=rates("share", every),
            network_bytes_per_s=min(
                rates("node", fabric.node[every]),
                rates("site", fabric.site[every]) if len(set(fabric.site[every])) > 1 else np.inf,
            ),
            near_latency_s=max(
                (_latency(fabric, pair[:1], pair[1:]) for pair in near), default=0.0
            ),
            far_latency_s=far,
        )

    @property
    def world(self) -> int:
        """Ranks of all of them."""
        return sum(self.sizes)

    @property
    def node(self) -> int:
        """Ranks of the first one."""
        return self.sizes[0]

    def counts(self, size: int) -> Ints:
        """How many ranks of each node a group takes."""
        found = []
        if size <= max(self.sizes):
            return np.array([size])
        for count in self.sizes:
            found.append(min(count, size))
            size -= found[-1]
            if not size:
                break
        return np.array(found)

    def latency(self, counts: Ints) -> float:
        """Of a message between the farthest of a group; a rank alone sends none."""
        if counts.sum() == 1:
            return 0.0
        return self.far_latency_s if len(counts) > 1 else self.near_latency_s

    def all_to_all(self, counts: Ints, token_bytes: float) -> tuple[float, float]:
        """Seconds a token, and bytes that a rank sends, of exchanging what each token weighs."""
        size = int(counts.sum())
        if size == 1:
            return 0.0, 0.0
        pair = token_bytes / size**2
        near = (counts.max() - 1) * pair / self.device_bytes_per_s
        out = size - counts
        share = out.max() * pair / self.share_bytes_per_s if len(counts) > 1 else 0.0
        node = (counts * out).max() * pair / self.network_bytes_per_s if len(counts) > 1 else 0.0
        return float(max(near, share, node)), (size - 1) * pair

    def hop_bytes_per_s(self, counts: Ints) -> float:
        """The rate from one rank of a ring to the next, at the slowest place."""
        near = self.device_bytes_per_s if counts.max() > 1 else np.inf
        if len(counts) == 1:
            return near
        return min(near, self.share_bytes_per_s, self.network_bytes_per_s)


def _slowest_pipe(cluster: Cluster, level: str, places: Ints) -> float:
    fabric = cluster.fabric
    names = {f"{level} {place} {way}" for place in set(places.tolist()) for way in ("out", "in")}
    rates = [
        rate for name, rate in zip(fabric.names, fabric.capacity, strict=True) if name in names
    ]
    return float(min(rates, default=np.inf))


def _latency(fabric: Fabric, source: Ints, target: Ints) -> float:
    """The longest of small messages between these, until both ends attend to it."""
    return float((fabric.latency(source, target) + fabric.wait(source, target)).max())
