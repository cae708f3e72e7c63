"""The lab's network: a namespace a node, shaped links, bridges in a namespace of their own.

::

    longspan-NAME-node0          longspan-NAME-switch              longspan-NAME-node1
      eth0 ──────────────── node0 ─ [site0]   [site1] ─ node1 ──────────────── eth0
                                up0 ─ core0 [core] core1 ─ up1

Every veth pair has a token bucket on both ends, so each way has its own rate. Nothing is made in
the host's own network. Frames are jumbo ones, as clusters use, so that headers take under 1 %; on
slow links they are smaller.
"""

import json
import os
import shutil
import signal
import subprocess
import time
from contextlib import suppress
from dataclasses import dataclass
from math import inf
from pathlib import Path

from longspan.errors import LabError
from longspan.lab.spec import LabSpec

__all__ = ["LinkBytes", "Network", "address", "namespace", "remove_network", "require_network"]

NAMESPACES = Path("/run/netns")
# `ip netns exec` lays what is here over /etc: so nodes know each other by name.
FILES = Path("/etc/netns")
# A bucket lets the first bytes of each message through for nothing, and must hold a frame: so that
# is what the slowest link carries in 0.4 ms. The room above it is for timers that come late.
MTUS = (1500, 9000)
FRAME_S = 400e-6
LATE_S = 60e-6
HEADER_BYTES = 14
# Long enough that nothing is lost where links join: what is timed is then the link's rate and
# not how TCP recovers.
QUEUE_BYTES = 32 * 1024**2
LATE_PACKETS = 100_000


@dataclass(frozen=True, slots=True)
class LinkBytes:
    """Bytes that a node, or a site, put on its link and took from it, headers and all."""

    sent: int
    received: int

    def __sub__(self, other: "LinkBytes") -> "LinkBytes":
        return LinkBytes(self.sent - other.sent, self.received - other.received)


def namespace(lab: str, part: int | str) -> str:
    """The namespace's name of a node, or of the "switch"."""
    return f"longspan-{lab}-{f'node{part}' if isinstance(part, int) else part}"


def address(node: int) -> str:
    """A node's IPv4 address; labs don't see each other, so all use the same."""
    return f"10.77.{(node + 1) // 256}.{(node + 1) % 256}"


def _run(*command: str, lines: list[str] | None = None) -> str:
    done = subprocess.run(
        command,
        input=None if lines is None else "\n".join(lines) + "\n",
        stdin=subprocess.DEVNULL if lines is None else None,
        capture_output=True,
        text=True,
        process_group=0,  # Ctrl-C is for the lab; it must not stop the cleaning
    )
    if done.returncode:
        said = (done.stderr.strip() or done.stdout.strip() or "no reason given").splitlines()[0]
        raise LabError(f"`{' '.join(command[:3])}` failed: {said}")
    return done.stdout


def require_network(*, latency: bool = False) -> None:
    """Raise LabError, with the reason, if this machine can't emulate a network (and latency)."""
    if not NAMESPACES.parent.is_dir() or os.name != "posix":
        raise LabError("a lab needs Linux, with its network namespaces")
    if os.geteuid() != 0:
        raise LabError("a lab needs root, to make network namespaces: run it with sudo")
    tools = {"ip": "iproute2", "tc": "iproute2", "setpriv": "util-linux", "unshare": "util-linux"}
    for tool, package in tools.items():
        if not shutil.which(tool):
            raise LabError(f"a lab needs `{tool}`: install {package} (apt-get install {package})")
    try:
        _run("unshare", "--net", "true")
    except LabError as error:
        raise LabError(
            f"network namespaces can't be made here ({error}): a container needs"
            f" CAP_SYS_ADMIN and CAP_NET_ADMIN"
        ) from None
    trials = [("tbf", "rate 1mbit burst 10kb limit 1mb", "shaped")]
    trials += [("netem", "delay 1ms", "given latency")] if latency else []
    for kind, options, done in trials:
        try:
            words = f"unshare --net tc qdisc replace dev lo root {kind} {options}"
            _run(*words.split())
        except LabError:
            raise LabError(
                f"links can't be {done} here: this kernel has no `{kind}` (sch_{kind})"
            ) from None


def _mtu(spec: LabSpec) -> int:
    """Bytes of a lab's frames: all its links have the same, as bridges don't divide them."""
    rates = [spec.site_bits_per_s, *map(spec.bandwidth_of, range(spec.nodes))]
    slowest = min((rate for rate in rates if rate is not None), default=inf)
    least, most = MTUS
    return round(min(max(slowest / 8 * FRAME_S, least), most))


def _shape(device: str, mtu: int, bits_per_s: float | None, latency_s: float = 0.0) -> list[str]:
    """tc's lines that give one end of a link its rate, and what leaves by it some latency."""
    if bits_per_s is None:
        return []
    burst = mtu + HEADER_BYTES + round(bits_per_s / 8 * LATE_S)
    rate = f"rate {round(bits_per_s)}bit burst {burst}b limit {QUEUE_BYTES}b"
    lines = [f"qdisc replace dev {device} root handle 1: tbf {rate}"]
    if latency_s:
        delay = f"delay {latency_s * 1e6:.0f}us limit {LATE_PACKETS}"
        lines.append(f"qdisc replace dev {device} parent 1:1 handle 10: netem {delay}")
    return lines


class Network:
    """The network of the lab called ``lab``; ``build`` makes it, ``remove_network`` ends it."""

    def __init__(self, lab: str) -> None:
        self.lab = lab
        self.switch = namespace(lab, "switch")

    def build(self, spec: LabSpec) -> None:
        """Make namespaces, bridges and links; raises LabError with the kernel's reason."""
        _run("ip", "netns", "add", self.switch)
        mtu = _mtu(spec)
        for site in range(spec.sites):
            self._bridge(f"site{site}", mtu)
        if spec.sites > 1:
            self._bridge("core", mtu)
            for site in range(spec.sites):
                self._uplink(site, spec, mtu)
        hosts = Path("/etc/hosts").read_text(encoding="utf-8").rstrip("\n")
        for node in range(spec.nodes):
            hosts += f"\n{address(node)} node{node}\n::ffff:{address(node)} node{node}"
        for node in range(spec.nodes):
            self._node(node, spec, mtu)
            with suppress(OSError):  # a read-only /etc: nodes go by their addresses
                (FILES / namespace(self.lab, node)).mkdir(parents=True)
                (FILES / namespace(self.lab, node) / "hosts").write_text(f"{hosts}\n")

    def _bridge(self, name: str, mtu: int) -> None:
        self._ip(
            self.switch,
            f"link add {name} mtu {mtu} type bridge mcast_snooping 0",
            f"link set {name} addrgenmode none up",
        )

    def _uplink(self, site: int, spec: LabSpec, mtu: int) -> None:
        inner, outer = f"up{site}", f"core{site}"
        self._ip(
            self.switch,
            f"link add {inner} mtu {mtu} type veth peer name {outer} mtu {mtu}",
            f"link set {inner} master site{site} addrgenmode none up",
            f"link set {outer} master core addrgenmode none up",
        )
        rate = spec.site_bits_per_s
        self._tc(
            self.switch, *_shape(inner, mtu, rate, spec.site_latency_s), *_shape(outer, mtu, rate)
        )

    def _node(self, node: int, spec: LabSpec, mtu: int) -> None:
        name, port = namespace(self.lab, node), f"node{node}"
        _run("ip", "netns", "add", name)
        self._ip(
            self.switch,
            f"link add {port} mtu {mtu} type veth peer name eth0 mtu {mtu} netns {name}",
            f"link set {port} master site{spec.site_of(node)} addrgenmode none up",
        )
        self._ip(
            name,
            "link set lo up",
            "link set eth0 addrgenmode none up",
            f"addr add {address(node)}/16 dev eth0",
        )
        # Every machine's labs use one congestion control, whatever its own default is.
        with suppress(LabError):
            self._ip(name, f"route replace 10.77.0.0/16 dev eth0 src {address(node)} congctl cubic")
        rate = spec.bandwidth_of(node)
        self._tc(name, *_shape("eth0", mtu, rate, spec.latency_s))
        self._tc(self.switch, *_shape(port, mtu, rate))

    def counters(self) -> dict[str, LinkBytes]:
        """Bytes on each link since the lab began: "node0", …, and "site0", … if sites > 1."""
        found = {}
        for link in json.loads(_run("ip", "-n", self.switch, "-s", "-j", "link", "show")):
            # What the switch's port receives, the node has sent; an uplink sends for its site.
            name, stats = link["ifname"], link["stats64"]
            received, sent = stats["rx"]["bytes"], stats["tx"]["bytes"]
            if name.startswith("node"):
                found[name] = LinkBytes(sent=received, received=sent)
            elif name.startswith("up"):
                found[f"site{name[2:]}"] = LinkBytes(sent=sent, received=received)
        return {name: found[name] for name in sorted(found, key=lambda n: (n[:4], int(n[4:])))}

    def cut(self, node: int) -> None:
        """Take a node's link down: nothing passes, and nobody is told."""
        self._known(node)
        self._ip(self.switch, f"link set node{node} down")

    def heal(self, node: int) -> None:
        """Bring a node's link up again."""
        self._known(node)
        self._ip(self.switch, f"link set node{node} up")

    def rate(self, node: int, bits_per_s: float) -> None:
        """Give a node's link another rate, both ways."""
        self._known(node)
        port = f"node{node}"
        (link,) = json.loads(_run("ip", "-n", self.switch, "-j", "link", "show", port))
        self._tc(namespace(self.lab, node), *_shape("eth0", link["mtu"], bits_per_s))
        self._tc(self.switch, *_shape(port, link["mtu"], bits_per_s))

    def _known(self, node: int) -> None:
        if not (NAMESPACES / namespace(self.lab, node)).exists():
            raise LabError(f"lab {self.lab} has no node {node}: nodes are counted from 0")

    def _ip(self, where: str, *lines: str) -> None:
        _run("ip", "-n", where, "-batch", "-", lines=list(lines))

    def _tc(self, where: str, *lines: str) -> None:
        if lines:
            _run("tc", "-n", where, "-batch", "-", lines=list(lines))


def remove_network(lab: str) -> None:
    """End every process in a lab's namespaces, and remove them with all that is in them.

    Raises LabError if one can't be removed.
    """
    for path in FILES.glob(f"longspan-{lab}-*"):
        shutil.rmtree(path, ignore_errors=True)
    if not NAMESPACES.is_dir():
        return
    for path in sorted(NAMESPACES.glob(f"longspan-{lab}-*")):
        _end_processes(path.name)
        try:
            _run("ip", "netns", "del", path.name)
        except LabError:
            if path.exists():  # else another command has removed it
                raise


def _end_processes(name: str) -> None:
    """Kill until none is left: one may fork while the others are killed."""
    for _ in range(100):
        try:
            pids = _run("ip", "netns", "pids", name).split()
        except LabError:
            return
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)
        if not pids:
            return
        time.sleep(0.01)
