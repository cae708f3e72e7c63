"""A cluster's wires, flattened: which pipes a message passes, and what each of them carries.

A pipe is one direction of a link. Inside a node a message leaves by its device's pipe and arrives
by the other device's; between nodes it leaves by the node's network pipe and, where one device
can't fill that alone, by the device's share of it; between sites it passes both sites' uplinks
as well. Pipes are full duplex: what goes out doesn't slow what comes in.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

__all__ = ["Fabric", "Link"]

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]

# The order in which a fabric numbers its pipes; "share" is a device's share of the network.
_LEVELS = ("device", "device", "share", "share", "node", "node", "site", "site")


class Link(BaseModel):
    """What joins one device, node or site to its likes.

    ``latency_s`` is what a message takes from end to end before its bytes count; of two ends that
    differ the slower one's holds. ``bytes_per_s`` is the rate out of this end, and into it unless
    ``in_bytes_per_s`` says otherwise. ``device_bytes_per_s`` is the most that one device alone can
    put through a node's network link in either direction, where that is less than the whole.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    latency_s: float = Field(ge=0, allow_inf_nan=False)
    bytes_per_s: float = Field(gt=0, allow_inf_nan=False)
    in_bytes_per_s: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    device_bytes_per_s: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    source: str = ""

    @property
    def into_bytes_per_s(self) -> float:
        """Rate into this end, in bytes a second."""
        return self.bytes_per_s if self.in_bytes_per_s is None else self.in_bytes_per_s


def _both_ways(links: list[Link | None]) -> tuple[list[float], list[float]]:
    return (
        [link.bytes_per_s if link else np.inf for link in links],
        [link.into_bytes_per_s if link else np.inf for link in links],
    )


@dataclass(frozen=True, eq=False)
class Fabric:
    """Pipes and places of all ranks; a link that is None joins nothing and costs nothing.

    ``node`` and ``site`` say where each rank is; ``capacity`` is a pipe's bytes a second.
    """

    node: Ints
    site: Ints
    capacity: Floats
    names: tuple[str, ...]
    _latency: tuple[Floats, Floats, Floats]
    _wait: Floats
    _first: tuple[int, ...]

    @classmethod
    def build(
        cls,
        nodes: list[tuple[int, int, Link | None, Link | None]],
        sites: list[Link | None],
        waits: list[float],
    ) -> "Fabric":
        """From each node's (site, number of devices, link, network) and each site's uplink.

        ``waits``: how long each rank lets a message wait.
        """
        inside = [link for _, devices, link, _ in nodes for _ in range(devices)]
        networks = [network for _, _, _, network in nodes]
        shares = [network for _, devices, _, network in nodes for _ in range(devices)]
        share = [(link and link.device_bytes_per_s) or np.inf for link in shares]
        groups = [
            *_both_ways(inside),
            share,
            share,
            *_both_ways(networks),
            *_both_ways(sites),
        ]
        names = [
            f"{level} {index} {'in' if place % 2 else 'out'}"
            for place, (level, group) in enumerate(zip(_LEVELS, groups, strict=True))
            for index in range(len(group))
        ]
        starts = np.cumsum([0] + [len(group) for group in groups])
        levels = (inside, networks, sites)
        latency = [np.array([x.latency_s if x else 0.0 for x in links]) for links in levels]
        node = np.repeat(np.arange(len(nodes)), [devices for _, devices, _, _ in nodes])
        return cls(
            node=node,
            site=np.array([site for site, _, _, _ in nodes])[node],
            capacity=np.array([rate for group in groups for rate in group], dtype=np.float64),
            names=tuple(names),
            _latency=(latency[0], latency[1], latency[2]),
            _wait=np.array(waits),
            _first=tuple(int(start) for start in starts),
        )

    def latency(self, source: Ints, target: Ints) -> Floats:
        """Latency in seconds of a message from each ``source`` rank to each ``target`` rank."""
        device, network, uplink = self._latency
        node_a, node_b = self.node[source], self.node[target]
        site_a, site_b = self.site[source], self.site[target]
        result = np.maximum(device[source], device[target])
        apart = node_a != node_b
        result = np.where(apart, np.maximum(network[node_a], network[node_b]), result)
        far = site_a != site_b
        result = np.where(far, np.maximum(uplink[site_a], uplink[site_b]), result)
        return result

    def wait(self, source: Ints, target: Ints) -> Floats:
        """Seconds until both ends of a message attend to it, from ``source`` to ``target``."""
        return np.maximum(self._wait[source], self._wait[target])

    def load(
        self, source: Ints, target: Ints, size: Floats, *, spread: bool = False
    ) -> tuple[Ints, Floats]:
        """The pipes that messages of ``size`` bytes pass, ascending, and the bytes on each.

        ``spread`` messages leave and enter a node by the shares of all these ranks in it, as the
        many rings of one collective do. Pipes of unlimited rate are left out.
        """
        node_a, node_b = self.node[source], self.node[target]
        site_a, site_b = self.site[source], self.site[target]
        apart, far = node_a != node_b, site_a != site_b
        near = ~apart
        leaving, entering = (source[apart], size[apart]), (target[apart], size[apart])
        if spread:
            ranks = np.union1d(source, target)
            leaving = self._spread(ranks, *leaving)
            entering = self._spread(ranks, *entering)
        passed = (
            (source[near], size[near]),
            (target[near], size[near]),
            leaving,
            entering,
            (node_a[apart], size[apart]),
            (node_b[apart], size[apart]),
            (site_a[far], size[far]),
            (site_b[far], size[far]),
        )
        pipes = np.concatenate(
            [first + ends for first, (ends, _) in zip(self._first, passed, strict=False)]
        )
        sizes = np.concatenate([amount for _, amount in passed])
        limited = np.isfinite(self.capacity[pipes]) & (sizes > 0)
        unique, place = np.unique(pipes[limited], return_inverse=True)
        total = np.zeros(len(unique))
        np.add.at(total, place, sizes[limited])
        return unique, total

    def _spread(self, ranks: Ints, ends: Ints, size: Floats) -> tuple[Ints, Floats]:
        node = self.node[ranks]
        nodes = int(self.node[-1]) + 1
        total = np.zeros(nodes)
        np.add.at(total, self.node[ends], size)
        return ranks, (total / np.maximum(np.bincount(node, minlength=nodes), 1))[node]
