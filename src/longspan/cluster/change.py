"""The same cluster, changed: faster or slower parts, other links, more nodes, one site alone."""

from collections.abc import Callable

from pydantic import ByteSize

from longspan.cluster.fabric import Link
from longspan.cluster.spec import Cluster, Device, Node, Rates, Site
from longspan.errors import ClusterError

__all__ = ["faster", "one_site", "relinked", "scaled", "with_memory", "with_nodes"]

Level = str  # "link" inside nodes, "network" between them, "uplink" between sites


def scaled(cluster: Cluster, *, devices: float = 1.0, links: float = 1.0) -> Cluster:
    """Devices and links so many times as fast, latencies and overheads as many times shorter."""

    def link(level: Level, one: Link) -> Link:
        return faster(one, links).model_copy(update={"latency_s": one.latency_s / links})

    kinds = {name: _quicker(device, devices) for name, device in cluster.devices.items()}
    return relinked(cluster.model_copy(update={"devices": kinds}), link)


def faster(link: Link, factor: float) -> Link:
    """A link of so many times the rate, with the same latency."""
    rates = ("bytes_per_s", "in_bytes_per_s", "device_bytes_per_s")
    values = {name: getattr(link, name) for name in rates}
    return link.model_copy(
        update={name: rate * factor for name, rate in values.items() if rate is not None}
    )


def relinked(cluster: Cluster, change: Callable[[Level, Link], Link]) -> Cluster:
    """Every link as ``change`` makes it of its level ("link", "network", "uplink") and itself."""

    def changed(level: Level, link: Link | None) -> Link | None:
        return None if link is None else change(level, link)

    def node(one: Node) -> Node:
        links = {level: changed(level, getattr(one, level)) for level in ("link", "network")}
        return one.model_copy(update=links)

    def site(one: Site) -> Site:
        nodes = tuple(map(node, one.nodes))
        return one.model_copy(update={"nodes": nodes, "uplink": changed("uplink", one.uplink)})

    return _anew(cluster, tuple(map(site, cluster.sites)))


def with_nodes(cluster: Cluster, nodes: int) -> Cluster:
    """A cluster of one site with so many nodes, all like its first; ClusterError if it can't be."""
    if nodes < 1:
        raise ClusterError(f"{nodes} nodes: give at least 1")
    if len(cluster.sites) > 1 or cluster.sites[0].count > 1:
        raise ClusterError("a cluster of several sites can't be given another number of nodes")
    first = cluster.nodes[0]
    if nodes > 1 and first.network is None:
        raise ClusterError("the node has no network: give its cluster file one")
    node = first.model_copy(update={"count": nodes})
    return _anew(cluster, (cluster.sites[0].model_copy(update={"nodes": (node,)}),))


def with_memory(cluster: Cluster, memory_bytes: int) -> Cluster:
    """Every device with so much memory."""
    update = {"memory_bytes": ByteSize(memory_bytes)}
    kinds = {name: one.model_copy(update=update) for name, one in cluster.devices.items()}
    return _anew(cluster.model_copy(update={"devices": kinds}), cluster.sites)


def one_site(cluster: Cluster, index: int = 0) -> Cluster:
    """The ``index``-th site alone, as a cluster."""
    sites = [site for site in cluster.sites for _ in range(site.count)]
    return _anew(cluster, (sites[index].model_copy(update={"count": 1, "uplink": None}),))


def _anew(cluster: Cluster, sites: tuple[Site, ...]) -> Cluster:
    """A new one, whose wires are yet to be laid out."""
    values = {name: getattr(cluster, name) for name in Cluster.model_fields}
    return Cluster(**values | {"sites": sites})


def _quicker(device: Device, factor: float) -> Device:
    def rates(given: Rates) -> Rates:
        return {
            kind: {dtype: rate * factor for dtype, rate in by_dtype.items()}
            for kind, by_dtype in given.items()
        }

    return device.model_copy(
        update={
            "bytes_per_s": device.bytes_per_s * factor,
            "peak": rates(device.peak),
            "measured": rates(device.measured),
            "overhead_s": device.overhead_s / factor,
            "message_s": device.message_s / factor,
            "byte_s": device.byte_s / factor,
            "far_byte_s": device.far_byte_s / factor,
            "wait_s": device.wait_s / factor,
        }
    )
