"""Who takes part: every site's heartbeat, and numbered generations of those that live.

Both are in a store that all sites reach. Whatever changes is a new generation, which the first of
the living sites proposes and the store gives to one proposal only, so that a site which doesn't
reach the store is in none: there are never two halves that each go on by themselves.
"""

import json
import secrets
import threading
import time
from dataclasses import dataclass, field
from datetime import timedelta

from torch.distributed import TCPStore  # type: ignore[attr-defined]
from torch.distributed.distributed_c10d import Store

from longspan.errors import ConfigError

__all__ = ["Generation", "Membership", "connect_store", "host_and_port", "serve_store"]

_MOST_PULSE_S = 1.0
_PULSES = 10  # in a timeout


@dataclass(frozen=True)
class Generation:
    """The sites that exchange with each other, by number, each with its process's own name.

    ``failures``: how many generations of the same sites before it have never come together.
    """

    number: int
    members: dict[int, str]
    failures: int = 0

    @property
    def sites(self) -> list[int]:
        """In the order in which they count."""
        return sorted(self.members)


def host_and_port(address: str) -> tuple[str, int]:
    """Of an address host:port; raises ConfigError for another."""
    host, colon, port = address.rpartition(":")
    if not (colon and host and port.isdigit()):
        raise ConfigError(f"{address!r} is no rendezvous: write it as host:port")
    return host, int(port)


def connect_store(address: str, timeout_s: float) -> Store:
    """The store that ``longspan rendezvous`` serves at host:port; RuntimeError if it can't be."""
    host, port = host_and_port(address)
    wait = timedelta(seconds=timeout_s)
    return TCPStore(host, port, is_master=False, timeout=wait, wait_for_workers=False)


def serve_store(port: int) -> TCPStore:
    """A store on this machine, for as long as what is returned is kept; port 0: any.

    Raises ConfigError if the port is taken.
    """
    try:
        return TCPStore("0.0.0.0", port, is_master=True, wait_for_workers=False)
    except RuntimeError as error:
        words = " ".join(str(error).split())[:150]
        raise ConfigError(f"sites can't meet at port {port} ({words}): choose another") from None


@dataclass
class _Heard:
    """A site's last heartbeat, and when it came; a single one may be left from a dead process."""

    beat: str
    at_s: float
    alive: bool = False


@dataclass
class Membership:
    """One site's part in it: a thread that beats, listens and proposes. ``newest`` never waits.

    sites: how many there may be; ``site``: which one this is. A site that isn't heard for
    ``timeout_s`` is lost. The first generation waits half as long for all sites.
    """

    address: str
    site: int
    sites: int
    timeout_s: float
    name: str = field(default_factory=lambda: secrets.token_hex(4))

    def __post_init__(self) -> None:
        """Start."""
        self._pulse_s = min(_MOST_PULSE_S, self.timeout_s / _PULSES)
        self._heard: dict[int, _Heard] = {}
        self._newest: Generation | None = None
        self._broken = self._reported = (0, False)
        self._trouble_s: float | None = None
        self._began_s = self._pulsed_s = time.monotonic()
        self._wake, self._in, self._closed = threading.Event(), threading.Event(), False
        self._epoch = 0
        threading.Thread(target=self._supervise, daemon=True).start()

    def newest(self) -> Generation | None:
        """The last generation that this process is known to be in."""
        return self._newest

    def wait(self) -> None:
        """Until this process is in a generation, but ``timeout_s`` at most."""
        self._in.wait(self.timeout_s)

    def broken(self, number: int, apart: bool = False) -> None:
        """Say that a generation's exchanges fail, so that there must be another one.

        ``apart``: its sites have never come together.
        """
        self._broken = max(self._broken, (number, apart))
        self._wake.set()

    def close(self) -> None:
        """Leave: the others hear no more of this site."""
        self._closed = True
        self._wake.set()

    def _supervise(self) -> None:
        """Keep one thread at work: a store's calls may hang for as long as a link is cut."""
        while not self._closed:
            self._epoch += 1
            self._pulsed_s = time.monotonic()
            worker = threading.Thread(target=self._work, args=(self._epoch,), daemon=True)
            worker.start()
            while worker.is_alive() and not self._closed:
                worker.join(self._pulse_s)
                if time.monotonic() - self._pulsed_s > self.timeout_s:
                    break
            time.sleep(self._pulse_s)

    def _work(self, epoch: int) -> None:
        count = 0
        try:
            store = connect_store(self.address, self.timeout_s)
            while not self._closed and epoch == self._epoch:
                count += 1
                store.set(f"beat/{self.site}", f"{self.name} {epoch}.{count}")
                self._pulse(store)
                self._pulsed_s = time.monotonic()
                self._wake.wait(self._pulse_s)
                self._wake.clear()
        except RuntimeError:  # the store is away; another thread tries again
            return

    def _pulse(self, store: Store) -> None:
        """Hear all sites; read the newest generation, or propose one."""
        self._listen(store)
        current = self._read(store)
        number = current.number if current else 0
        if self._broken > self._reported:
            self._reported = self._broken
            store.set(f"broken/{self._reported[0]}", "apart" if self._reported[1] else "failed")
        now = time.monotonic()
        living = {s: h.beat.split()[0] for s, h in self._heard.items() if self._lives(h, now)}
        if current and current.members.get(self.site) == self.name:
            self._newest = current
            self._in.set()
        if current and living == current.members and not store.check([f"broken/{number}"]):
            self._trouble_s = None
            return
        if self._trouble_s is None:
            self._trouble_s = now
        if self._settled(current, now) and living and min(living) == self.site:
            failures = 0
            if current and living == current.members and store.get(f"broken/{number}") == b"apart":
                failures = current.failures + 1
            number = max(number, self._broken[0], self._newest.number if self._newest else 0) + 1
            proposal = json.dumps({"members": living, "failures": failures})
            store.compare_set(f"members/{number}", "", proposal)
            store.set("newest", str(number))
            self._trouble_s = None
            self._wake.set()

    def _listen(self, store: Store) -> None:
        for site in range(self.sites):
            key = f"beat/{site}"
            if not store.check([key]):
                continue
            beat, before = store.get(key).decode(), self._heard.get(site)
            if before is None or beat != before.beat:
                alive = before is not None or site == self.site
                self._heard[site] = _Heard(beat, time.monotonic(), alive)

    def _read(self, store: Store) -> Generation | None:
        """The newest generation; what the store says of the newest may be a little old."""
        number = self._newest.number if self._newest else 0
        if store.check(["newest"]):
            number = max(number, int(store.get("newest")))
        while store.check([f"members/{number + 1}"]):
            number += 1
        if not number or not store.check([f"members/{number}"]):
            return None
        told = json.loads(store.get(f"members/{number}"))
        members = {int(site): name for site, name in told["members"].items()}
        return Generation(number, members, told["failures"])

    def _lives(self, heard: _Heard, now: float) -> bool:
        return heard.alive and now - heard.at_s < self.timeout_s

    def _settled(self, current: Generation | None, now: float) -> bool:
        """Whether each site was heard since there is trouble, or is given up."""
        assert self._trouble_s is not None
        if current is None:
            all_here = sum(self._lives(h, now) for h in self._heard.values()) == self.sites
            if not all_here and now - self._began_s < self.timeout_s / 2:
                return False
        return all(
            now - heard.at_s >= self.timeout_s or (heard.alive and heard.at_s >= self._trouble_s)
            for heard in self._heard.values()
        )
