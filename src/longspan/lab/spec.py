"""LabSpec: what cluster a lab emulates."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from longspan.errors import LabError
from longspan.lab.units import Amount, parse_bytes, parse_rate, parse_seconds

__all__ = ["LabSpec"]

T = TypeVar("T", int, float)
PerNode = Amount | Sequence[Amount] | None


@dataclass(frozen=True)
class LabSpec:
    """``nodes`` nodes of ``ranks`` ranks each, dealt evenly over ``sites``, and their links.

    Amounts are numbers (bits/s, seconds, bytes) or text ("200mbit", "20ms", "2GiB").

    bandwidth: of every node's link, each way; a list gives each node its own; None: unshaped.
    site_bandwidth: of every site's uplink, each way.
    latency, site_latency: one way, added by a node's link and by a site's uplink.
    device_share: the share of one core that each rank is; a list: by node; None: not limited.
    device_memory: of each rank; a list: by node; None: not limited.

    Raises LabError where these can't be.
    """

    nodes: int = 2
    ranks: int = 1
    sites: int = 1
    bandwidth: PerNode = None
    site_bandwidth: Amount | None = None
    latency: Amount = 0.0
    site_latency: Amount = 0.0
    device_share: float | Sequence[float] | None = None
    device_memory: PerNode = None

    def __post_init__(self) -> None:
        for name, count in (("nodes", self.nodes), ("ranks", self.ranks), ("sites", self.sites)):
            if count < 1:
                raise LabError(f"{name} is {count}: a lab has at least one")
        if self.nodes > 1000:
            raise LabError(f"{self.nodes} nodes are too many for one machine: 1000 at most")
        if self.nodes % self.sites:
            raise LabError(
                f"{self.nodes} nodes can't be divided evenly over {self.sites} sites:"
                f" make nodes a multiple of sites"
            )
        for node in range(self.nodes):
            self.bandwidth_of(node)
            self.memory_of(node)
            share = self.share_of(node)
            if share is not None and share < 0.01:
                raise LabError(f"device_share {share:g} is too small: 0.01 of a core is the least")
        if self.latency_s and self.bandwidth is None:
            raise LabError("latency needs a bandwidth too: give the nodes' links one")
        if self.site_latency_s and self.site_bandwidth is None:
            raise LabError("site_latency needs a site_bandwidth too: give the uplinks one")
        if self.sites == 1 and (self.site_bandwidth is not None or self.site_latency_s):
            raise LabError("one site has no uplink to shape: set sites to 2 or more")

    @property
    def world(self) -> int:
        """How many ranks there are."""
        return self.nodes * self.ranks

    @property
    def latency_s(self) -> float:
        """Seconds that a node's link adds, one way."""
        return parse_seconds(self.latency)

    @property
    def site_latency_s(self) -> float:
        """Seconds that a site's uplink adds, one way."""
        return parse_seconds(self.site_latency)

    @property
    def site_bits_per_s(self) -> float | None:
        """Rate of a site's uplink."""
        return None if self.site_bandwidth is None else parse_rate(self.site_bandwidth)

    def site_of(self, node: int) -> int:
        """The site that ``node`` is in: neighbours share one."""
        return node // (self.nodes // self.sites)

    def bandwidth_of(self, node: int) -> float | None:
        """Bits/s of a node's link."""
        return self._of(node, self.bandwidth, parse_rate, "bandwidth")

    def share_of(self, node: int) -> float | None:
        """The share of one core that each rank of ``node`` is."""
        return self._of(node, self.device_share, float, "device_share")

    def memory_of(self, node: int) -> int | None:
        """Bytes that each rank of ``node`` may use."""
        return self._of(node, self.device_memory, parse_bytes, "device_memory")

    def _of(self, node: int, values: PerNode, parse: Callable[[Amount], T], what: str) -> T | None:
        if values is None:
            return None
        if isinstance(values, str | int | float):
            return parse(values)
        if len(values) != self.nodes:
            raise LabError(
                f"{what} has {len(values)} values for {self.nodes} nodes: give one, or one a node"
            )
        return parse(values[node])
