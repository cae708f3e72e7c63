"""The cluster: devices in nodes in sites, and the links between them; YAML in and out.

Ranks are numbered site by site, node by node, device by device. Clusters may be uneven: each
node has its own devices and links. ``count`` repeats a site or a node that is alike.
"""

from functools import cached_property
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Self

import numpy as np
import yaml
from pydantic import (
    BaseModel,
    ByteSize,
    ConfigDict,
    Field,
    PositiveInt,
    ValidationError,
    model_validator,
)

from longspan.cluster.fabric import Fabric, Floats, Link
from longspan.errors import ClusterError

__all__ = [
    "Cluster",
    "Device",
    "Node",
    "Site",
    "cluster_from",
    "presets",
    "read_cluster",
    "uniform",
    "write_cluster",
]

_NARROW, _WIDE = 16, 64  # head dims that attention's rates are of
Rate = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Rates = dict[str, dict[str, Rate]]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Device(_Part):
    """A kind of device: its memory, and the rates it computes at.

    ``peak`` and ``measured`` are flops a second by op kind ("matmul", "attention", …) and dtype
    (torch's names); what was measured is believed before what was promised. A kind without rates
    of its own runs at those of its first words, or else at matmul's. Attention's are of heads of
    64, and those of "attention 16" of heads of 16: seconds a pair lie on a line through the two.
    ``bytes_per_s`` is its memory's rate, ``overhead_s`` what every kernel costs before it starts.
    What takes from its computing because it sends or receives: ``message_s`` for each message,
    ``byte_s`` for each byte and ``far_byte_s`` more for one between nodes; 0 where an engine of its
    own does that. ``wait_s``: how much longer a small message is on its way where ranks compute, as
    its peer isn't there at once; a message whose bytes take longer finds it there.
    """

    memory_bytes: ByteSize = Field(gt=0)
    bytes_per_s: Rate
    peak: Rates = {}
    measured: Rates = {}
    overhead_s: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    message_s: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    byte_s: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    far_byte_s: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    wait_s: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    source: str = ""

    def rate(self, kind: str, dtype: str) -> float | None:
        """Flops a second of an op kind in a dtype, or None where nothing is known of it."""
        words = kind.split()
        firsts = (" ".join(words[:count]) for count in range(len(words), 0, -1))
        for name in (*firsts, "matmul"):
            for rates in (self.measured, self.peak):
                if dtype in rates.get(name, {}):
                    return self._of_heads(kind, name, dtype, rates)
        return None

    @staticmethod
    def _of_heads(kind: str, name: str, dtype: str, rates: Rates) -> float:
        """The rate that ``name`` has, for the heads that ``kind`` is of."""
        rate, heads = rates[name][dtype], kind.removeprefix(f"{name} ")
        narrow = rates.get(f"{name} {_NARROW}", {}).get(dtype)
        if narrow is None or not heads.isdigit():
            return rate
        least, usual = _NARROW / narrow, _WIDE / rate
        slope = max(0.0, (usual - least) / (_WIDE - _NARROW))
        return int(heads) / (least + slope * (int(heads) - _NARROW))


class Node(_Part):
    """``count`` alike machines: how many ``devices`` of which kind, in the order of their ranks.

    ``link`` joins device to device inside it, ``network`` joins it to other nodes.
    """

    devices: dict[str, PositiveInt] = Field(min_length=1)
    link: Link | None = None
    network: Link | None = None
    count: PositiveInt = 1
    name: str = ""


class Site(_Part):
    """``count`` alike sites: their nodes, and the ``uplink`` that joins one to other sites."""

    nodes: tuple[Node, ...] = Field(min_length=1)
    uplink: Link | None = None
    count: PositiveInt = 1
    name: str = ""


class Cluster(_Part):
    """Sites, their nodes, and the kinds of device that the nodes name.

    ``launch``: the words before a longspan command that start it on all devices, such as
    "torchrun … -m".
    """

    devices: dict[str, Device]
    sites: tuple[Site, ...] = Field(min_length=1)
    name: str = ""
    source: str = ""
    launch: str = ""

    @model_validator(mode="after")
    def _whole(self) -> Self:
        for i, site in enumerate(self.sites):
            if len(self._all_sites) > 1 and site.uplink is None:
                raise ValueError(f"sites.{i}: a site among several needs an uplink")
            if site.uplink and site.uplink.device_bytes_per_s:
                raise ValueError(f"sites.{i}.uplink: device_bytes_per_s is for a node's network")
            for j, node in enumerate(site.nodes):
                where = f"sites.{i}.nodes.{j}"
                for kind in node.devices:
                    if kind not in self.devices:
                        known = ", ".join(self.devices) or "none"
                        raise ValueError(f"{where}: no device kind {kind!r} (known: {known})")
                if sum(node.devices.values()) > 1 and node.link is None:
                    raise ValueError(f"{where}: a node of several devices needs a link")
                if node.link and node.link.device_bytes_per_s:
                    raise ValueError(f"{where}.link: device_bytes_per_s is for a node's network")
                if sum(x.count for x in site.nodes) > 1 and node.network is None:
                    raise ValueError(f"{where}: a node among several needs a network")
        return self

    @cached_property
    def _all_sites(self) -> list[Site]:
        return [site for site in self.sites for _ in range(site.count)]

    @cached_property
    def nodes(self) -> tuple[Node, ...]:
        """Every node, in the order of ranks."""
        return tuple(
            node for site in self._all_sites for node in site.nodes for _ in range(node.count)
        )

    @cached_property
    def kinds(self) -> tuple[str, ...]:
        """Name of the device kind of every rank."""
        return tuple(
            kind for node in self.nodes for kind, n in node.devices.items() for _ in range(n)
        )

    @property
    def ranks(self) -> int:
        """How many devices there are."""
        return len(self.kinds)

    def device(self, rank: int) -> Device:
        """The device of a rank; ClusterError if there is no such rank."""
        if not 0 <= rank < self.ranks:
            raise ClusterError(f"there is no rank {rank} in a cluster of {self.ranks} devices")
        return self.devices[self.kinds[rank]]

    @cached_property
    def fabric(self) -> Fabric:
        """Its wires."""
        site_of = [
            index
            for index, site in enumerate(self._all_sites)
            for _ in range(sum(node.count for node in site.nodes))
        ]
        nodes = [
            (site, sum(node.devices.values()), node.link, node.network)
            for site, node in zip(site_of, self.nodes, strict=True)
        ]
        waits = [self.devices[kind].wait_s for kind in self.kinds]
        return Fabric.build(nodes, [site.uplink for site in self._all_sites], waits)

    @cached_property
    def idle(self) -> "Cluster":
        """The same, where ranks only send and receive: no message waits for its peer."""
        still = {"wait_s": 0.0}
        return self.with_devices(
            {kind: device.model_copy(update=still) for kind, device in self.devices.items()}
        )

    def with_devices(self, devices: dict[str, Device]) -> "Cluster":
        """The same with other devices, and wires of its own."""
        parts = {name: getattr(self, name) for name in Cluster.model_fields}
        return Cluster(**parts | {"devices": devices})

    @cached_property
    def message_s(self) -> Floats:
        """Of every rank, how long it computes for a message that it sends or receives."""
        return np.array([self.devices[kind].message_s for kind in self.kinds])

    @cached_property
    def byte_s(self) -> Floats:
        """Of every rank, how long it computes for a byte that it sends or receives."""
        return np.array([self.devices[kind].byte_s for kind in self.kinds])

    @cached_property
    def far_byte_s(self) -> Floats:
        """Of every rank, how much longer it computes for a byte to or from another node."""
        return np.array([self.devices[kind].far_byte_s for kind in self.kinds])

    @cached_property
    def handles(self) -> bool:
        """Whether any rank computes for what it sends and receives."""
        return bool(self.message_s.any() or self.byte_s.any() or self.far_byte_s.any())

    @cached_property
    def capacity(self) -> Floats:
        """Of every pipe of the fabric in bytes a second; then of every rank, 1: its computing.

        What loads the latter is in seconds, and nothing does where sends take nothing from it.
        """
        return np.concatenate([self.fabric.capacity, np.ones(self.ranks)])

    def ranks_of_node(self, index: int) -> tuple[int, ...]:
        """The ranks of the ``index``-th node."""
        return tuple(int(rank) for rank in np.flatnonzero(self.fabric.node == index))

    def ranks_of_site(self, index: int) -> tuple[int, ...]:
        """The ranks of the ``index``-th site."""
        return tuple(int(rank) for rank in np.flatnonzero(self.fabric.site == index))


def uniform(
    device: Device,
    *,
    devices: int = 1,
    nodes: int = 1,
    sites: int = 1,
    link: Link | None = None,
    network: Link | None = None,
    uplink: Link | None = None,
) -> Cluster:
    """A cluster of ``sites`` × ``nodes`` × ``devices`` that are all alike.

    Raises ClusterError if a link is missing.
    """
    node = {"devices": {"device": devices}, "link": link, "network": network, "count": nodes}
    site = {"nodes": [node], "uplink": uplink, "count": sites}
    return cluster_from({"devices": {"device": device}, "sites": [site]}, "uniform cluster")


def presets() -> tuple[str, ...]:
    """Names of the clusters that come with longspan."""
    folder = resources.files("longspan.cluster") / "presets"
    return tuple(sorted(file.name.removesuffix(".yaml") for file in folder.iterdir()))


def read_cluster(source: str | Path) -> Cluster:
    """The cluster of a YAML file, or of a preset's name.

    Raises ClusterError, in one line, if there is no such file or what it says is wrong.
    """
    if str(source) in presets():
        text = (resources.files("longspan.cluster") / "presets" / f"{source}.yaml").read_text()
    else:
        path = Path(source)
        if not path.is_file():
            raise ClusterError(
                f"no cluster at {path}: give a YAML file or one of {', '.join(presets())}"
            )
        text = path.read_text(encoding="utf-8")
    try:
        values = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ClusterError(f"{source} is not YAML: {' '.join(str(error).split())}") from None
    return cluster_from(values, str(source))


def write_cluster(cluster: Cluster, path: Path) -> None:
    """Write a cluster as YAML, without what is left at its default."""
    values = cluster.model_dump(mode="json", exclude_defaults=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(values, sort_keys=False, allow_unicode=True), encoding="utf-8")


def cluster_from(values: Any, where: str) -> Cluster:
    """A cluster from plain values, as YAML has them; ClusterError names ``where`` it is wrong."""
    try:
        return Cluster.model_validate(values)
    except ValidationError as error:
        first, *rest = error.errors(include_url=False)
        place = ".".join(str(part) for part in first["loc"])
        more = f" (and {len(rest)} more)" if rest else ""
        message = first["msg"].removeprefix("Value error, ")
        raise ClusterError(f"{where}: {place + ': ' if place else ''}{message}{more}") from None
