"""From a probe's trace to a Cluster: the simulation read backwards.

A link's latency is the quickest ping's, less what a rank computes for a message; all else is a
median of repeats. Between nodes a link's rate is that of its largest message once the latency is
taken off. A node's rate out is the best it reached towards any other node, and likewise in: what is
less than that was the other end's. Inside a node, where copies and sums count too, it is the median
rate of all its sends and collectives. What messages take from a device's computing is the time of
its processors that they took: of small ones for each message, of large ones for each byte; a byte
takes no longer than where all went into sending, but for what more it takes between nodes. How long
a message waits for a rank that computes is what it took among such ranks, less the ping to the
farthest of them.
"""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import inf
from statistics import median
from typing import Any

from longspan.cluster.cost import seconds
from longspan.cluster.simulate import concurrent_seconds
from longspan.cluster.spec import Cluster, cluster_from
from longspan.errors import DataError
from longspan.schedule.ops import Comm, Compute
from longspan.trace import Note, Row

__all__ = ["Fit", "calibrate", "timings"]

_LONG_S = 0.01  # a timing that tells a rate rather than a latency
_ALIKE = 0.15  # rates that differ by less are of one kind
_SLOW = 0.7  # of what is usual for its kind: worth a warning


@dataclass(frozen=True)
class Fit:
    """How well the cluster explains its own measurements.

    ``errors``: relative, of every timing, by the level of the slowest link in it: "inside nodes",
    "between nodes", "between sites". ``remarks`` name what stands out: slow links and devices,
    and links slower one way.
    """

    errors: dict[str, tuple[float, ...]]
    remarks: tuple[str, ...]

    def __str__(self) -> str:
        told = [
            f"{level} {median(errors):.1%} (median of {len(errors)}), {max(errors):.0%} at worst"
            for level, errors in self.errors.items()
        ]
        return "fit error " + "; ".join(told or ["unknown: nothing was timed"])


def timings(rows: Iterable[Row]) -> list[tuple[tuple[Comm, ...], float]]:
    """What was timed at once, and its median seconds."""
    return [
        (tuple(_comm(op) for op in row.about["ops"]), median(row.about["seconds"]))
        for row in rows
        if isinstance(row, Note) and row.kind == "timing"
    ]


def calibrate(rows: Sequence[Row], name: str = "probed") -> tuple[Cluster, Fit]:
    """The cluster that a probe measured, and how well it fits.

    Raises DataError if the rows aren't a probe's.
    """
    notes = [row for row in rows if isinstance(row, Note)]
    place = next((note.about for note in notes if note.kind == "place"), None)
    if place is None:
        raise DataError("this trace is not a probe's: it doesn't say where the ranks are")
    links = _Links(place, notes)
    devices, kind_of = _devices(place, notes, links)
    links.take_off(min(device.get("message_s", 0.0) for device in devices.values()))
    values = {"name": name, "devices": devices, "sites": links.sites(kind_of)}
    cluster = cluster_from(values, "the probe's measurements")
    # Whatever was timed, but for the waits themselves, was timed among ranks that did nothing else.
    return cluster, _fit(cluster.idle, notes, (*links.remarks(), *_slow_devices(place, notes)))


def _comm(op: dict[str, Any]) -> Comm:
    return Comm(op["kind"], tuple(op["ranks"]), tuple(op["sizes"]))


class _Links:
    """Latencies and rates between ranks, read as links of devices, nodes and sites."""

    def __init__(self, place: dict[str, Any], notes: Sequence[Note]) -> None:
        self.node, self.site = place["node"], place["site"]
        self.latency: dict[frozenset[int], float] = {}
        self.rate: dict[tuple[int, int], float] = {}
        self.total: dict[tuple[int, int], float] = {}
        self.inside: dict[int, list[float]] = defaultdict(list)
        self.handled = 1.0  # the most bytes a second that a rank has sent and received
        for note in notes:
            if note.kind == "ping":
                self.latency[frozenset(note.about["ranks"])] = min(note.about["seconds"])
        for ops, duration in timings(notes):
            first, *_ = ops
            sent = max(first.sent_bytes(rank) for rank in first.ranks)
            if duration > _LONG_S:
                both = 1 if first.kind == "send" else 2
                self.handled = max(self.handled, both * sent / duration)
            if len({self.node[rank] for rank in first.ranks}) == 1:
                if duration > _LONG_S:
                    self.inside[self.node[first.ranks[0]]].append(sent / duration)
            elif first.kind == "send":
                self._learn_sends(ops, duration)

    def _learn_sends(self, ops: tuple[Comm, ...], duration: float) -> None:
        """Later timings are of larger messages, and so the better ones."""
        a, b = ops[0].ranks
        net = max(duration - self._latency_of(a, b), duration / 10)
        if len(ops) == 1:
            self.rate[a, b] = ops[0].sizes[0] / net
        else:
            self.total[self.node[a], self.node[b]] = sum(op.sizes[0] for op in ops) / net

    def take_off(self, message_s: float) -> None:
        """What ranks compute for a message is in the time that a ping takes, and has its price."""
        self.latency = {ends: max(0.0, took - message_s) for ends, took in self.latency.items()}

    def waits(self, told: Sequence[dict[str, Any]]) -> dict[str, float]:
        """How much longer messages took among ranks that compute than among idle ones.

        They stayed inside nodes, unless one has a single rank.
        """
        if not told:
            return {}
        took = median(second for one in told for second in one["seconds"])
        inside = min(self.node.count(node) for node in self.node) > 1
        pings = [
            ping
            for ends, ping in self.latency.items()
            if not inside or len({self.node[rank] for rank in ends}) == 1
        ]
        return {"wait_s": max(0.0, took - max(pings))}

    def _latency_of(self, a: int, b: int) -> float:
        return self.latency.get(frozenset((a, b)), 0.0)

    def sites(self, kind_of: Sequence[str]) -> list[dict[str, Any]]:
        """Sites and nodes as a cluster's YAML has them; ranks must come site by site."""
        found = []
        for site in dict.fromkeys(self.site):
            names = dict.fromkeys(n for n, s in zip(self.node, self.site, strict=True) if s == site)
            nodes = [self._node(name, kind_of, len(names) > 1) for name in names]
            values: dict[str, Any] = {"name": str(site), "nodes": nodes}
            if len(set(self.site)) > 1:
                values["uplink"] = self._link(self._between(self.site, site), False)
            found.append(values)
        return found

    def _node(self, name: int, kind_of: Sequence[str], among_several: bool) -> dict[str, Any]:
        ranks = [rank for rank, node in enumerate(self.node) if node == name]
        devices: dict[str, int] = defaultdict(int)
        for rank in ranks:
            devices[kind_of[rank]] += 1
        values: dict[str, Any] = {"name": f"node{name}", "devices": dict(devices)}
        if len(ranks) > 1:
            latency = self._latency_of(ranks[0], ranks[1])
            values["link"] = {"latency_s": latency, "bytes_per_s": median(self.inside[name])}
        if among_several:
            pairs = self._between(self.node, name, within=self.site)
            values["network"] = self._link(pairs, len(ranks) > 1)
        return values

    def _between(
        self, place: Sequence[Any], here: Any, within: Sequence[Any] | None = None
    ) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
        """Timed pairs of ranks out of ``here`` and into it, perhaps only inside one site."""
        known = [(a, b) for a, b in self.rate if within is None or within[a] == within[b]]
        out = [(a, b) for a, b in known if place[a] == here != place[b]]
        return out, [(a, b) for a, b in known if place[b] == here != place[a]]

    def _link(
        self, pairs: tuple[list[tuple[int, int]], list[tuple[int, int]]], shared: bool
    ) -> dict[str, Any]:
        out, into = pairs
        alone = [max(self.rate[pair] for pair in side) for side in pairs]
        whole = [max((self._total(pair) for pair in side), default=0.0) for side in pairs]
        rates = [max(one, both) for one, both in zip(alone, whole, strict=True)]
        link: dict[str, Any] = {
            "latency_s": min(self._latency_of(a, b) for a, b in (*out, *into)),
            "bytes_per_s": rates[0],
        }
        if abs(rates[0] / rates[1] - 1) > _ALIKE:
            link["in_bytes_per_s"] = rates[1]
        if shared and max(alone) < min(rates) * (1 - _ALIKE):
            link["device_bytes_per_s"] = max(alone)
        return link

    def _total(self, pair: tuple[int, int]) -> float:
        return self.total.get((self.node[pair[0]], self.node[pair[1]]), 0.0)

    def remarks(self) -> Iterable[str]:
        """Links that stand out among their likes, and those that are slower one way."""
        levels: dict[str, list[tuple[int, int]]] = defaultdict(list)
        for a, b in self.rate:
            if self.node[a] != self.node[b]:
                level = "nodes" if self.site[a] == self.site[b] else "sites"
                levels[level].append((a, b))
        for level, pairs in levels.items():
            usual = median(self.rate[pair] for pair in pairs)
            for a, b in pairs:
                ends = f"node {self.node[a]} to node {self.node[b]}"
                if self.rate[a, b] < _SLOW * usual:
                    share = self.rate[a, b] / usual
                    yield f"{ends}: {share:.0%} of the usual rate between {level}"
                back = self.rate.get((b, a), self.rate[a, b])
                if self.rate[a, b] < _SLOW * back:
                    yield f"{ends}: {self.rate[a, b] / back:.0%} of the rate the other way"


def _rates(notes: Sequence[Note]) -> dict[int, dict[str, tuple[Compute, float]]]:
    """Each rank's median seconds by op."""
    found: dict[int, dict[str, tuple[Compute, float]]] = defaultdict(dict)
    for note in notes:
        if note.kind == "compute":
            op = Compute(**note.about["op"])
            duration = median(note.about["seconds"])
            found[note.about["rank"]][f"{op.kind} {op.dtype}"] = (op, duration)
    return found


def _devices(
    place: dict[str, Any], notes: Sequence[Note], links: _Links
) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """Kinds of device, and which of them each rank is: like ones within 15 % are one kind."""
    kinds: dict[str, list[int]] = {}
    kind_of: list[str] = []
    rates = _rates(notes)
    for rank, label in enumerate(place["kind"]):
        base = "-".join(str(label).lower().split())
        speed = _speed(rates[rank])
        for kind, members in kinds.items():
            usual = median(_speed(rates[member]) for member in members)
            if kind.rsplit("_", 1)[0] == base and abs(speed / usual - 1) <= _ALIKE:
                break
        else:
            same = sum(kind.rsplit("_", 1)[0] == base for kind in kinds)
            kind = f"{base}_{same + 1}" if same else base
            kinds[kind] = []
        kinds[kind].append(rank)
        kind_of.append(kind)
    # All ranks of a name together, the slower ones, too: such small differences are told by many.
    label = place["kind"]

    def told(ranks: list[int], kind: str) -> list[dict[str, Any]]:
        found = [note.about for note in notes if note.kind == kind]
        return [one for one in found if label[one["rank"]] == label[ranks[0]]]

    devices = {
        kind: _device(ranks, place, rates)
        | _taken(told(ranks, "handled"), links)
        | links.waits(told(ranks, "wait"))
        for kind, ranks in kinds.items()
    }
    return devices, kind_of


def _speed(ops: dict[str, tuple[Compute, float]]) -> float:
    op, duration = ops["matmul float32"]
    return op.flops / duration


def _device(
    ranks: Sequence[int],
    place: dict[str, Any],
    rates: dict[int, dict[str, tuple[Compute, float]]],
) -> dict[str, Any]:
    durations: dict[str, list[float]] = defaultdict(list)
    ops: dict[str, Compute] = {}
    for rank in ranks:
        for name, (op, duration) in rates[rank].items():
            durations[name].append(duration)
            ops[name] = op
    measured: dict[str, dict[str, float]] = defaultdict(dict)
    for name, op in ops.items():
        if op.flops:
            measured[op.kind][op.dtype] = op.flops / median(durations[name])
    return {
        "memory_bytes": min(place["memory_bytes"][rank] for rank in ranks),
        "bytes_per_s": ops["copy float32"].bytes / median(durations["copy float32"]),
        "measured": dict(measured),
        "overhead_s": median(durations["nothing float32"]),
    }


def _taken(handled: Sequence[dict[str, Any]], links: _Links) -> dict[str, float]:
    """What messages take from computing: the line through small ones and large ones.

    A byte takes no longer than it did where all went into sending.
    """
    near, far = ([one for one in handled if one.get("far", False) is way] for way in (False, True))
    if not near:
        return {}
    message_s, byte_s = _line(near, 1 / links.handled)
    found = {"message_s": message_s, "byte_s": byte_s}
    return found | ({"far_byte_s": max(0.0, _line(far)[1] - byte_s)} if far else {})


def _line(handled: Sequence[dict[str, Any]], most: float = inf) -> tuple[float, float]:
    """Seconds of a message, and of each byte, ``most`` at the most."""
    by_size: dict[float, list[float]] = defaultdict(list)
    for one in handled:
        size = one["bytes"] / one["messages"]
        by_size[size].append(median(one["seconds"]) / one["messages"])
    (few_bytes, small), (many_bytes, large) = sorted(
        (size, median(took)) for size, took in by_size.items()
    )
    byte_s = min(max(0.0, (large - small) / (many_bytes - few_bytes)), most)
    return max(0.0, small - byte_s * few_bytes), byte_s


def _slow_devices(place: dict[str, Any], notes: Sequence[Note]) -> Iterable[str]:
    speeds = {rank: _speed(ops) for rank, ops in _rates(notes).items()}
    for rank, speed in speeds.items():
        alike = [speeds[r] for r in speeds if place["kind"][r] == place["kind"][rank]]
        if speed < _SLOW * median(alike):
            yield f"rank {rank}: {speed / median(alike):.0%} of its kind's usual speed"


def _fit(cluster: Cluster, notes: Sequence[Note], remarks: Iterable[str]) -> Fit:
    errors: dict[str, list[float]] = defaultdict(list)
    fabric = cluster.fabric
    for ops, duration in timings(notes):
        alone = len(ops) == 1
        expected = seconds(ops[0], cluster) if alone else max(concurrent_seconds(ops, cluster))
        ranks = [rank for op in ops for rank in op.ranks]
        level = "inside nodes"
        if len(set(fabric.node[ranks])) > 1:
            level = "between sites" if len(set(fabric.site[ranks])) > 1 else "between nodes"
        errors[level].append(abs(expected / duration - 1))
    return Fit({level: tuple(found) for level, found in errors.items()}, tuple(remarks))
