"""Exchanges between sites that come and go: each generation of them has a process group of its own.

A Gloo pair that has failed stays closed. So when an exchange fails, or a site is lost or comes, the
group is given up, which its peers notice at once as their connections close, and the sites of the
next generation build another. Between the two a site trains by itself.
"""

import json
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from longspan.comm.agree import first_words
from longspan.elastic.group import gloo_group
from longspan.elastic.membership import Generation, Membership, host_and_port
from longspan.elastic.reach import Reach, leaving, reach, words_of
from longspan.errors import ConfigError, ExchangeError, UnreachableError
from longspan.outer.average import GroupAverage, Work

__all__ = ["ElasticAverage", "Peers"]

_ATTEMPTS = 3  # before it's looked at who reaches whom


@dataclass
class Peers:
    """This rank and those in its place at the other sites, in one generation."""

    group: Any
    number: int
    timeout_s: float

    @property
    def here(self) -> int:
        """This site's place among them."""
        return int(self.group.rank())

    @property
    def sites(self) -> int:
        """How many they are."""
        return int(self.group.size())

    def all_gather(self, line: Tensor) -> list[Tensor]:
        """Everyone's line, as long at each; raises ExchangeError."""
        lines = [torch.empty_like(line) for _ in range(self.group.size())]
        self._wait([self.group.allgather([lines], [line])])
        return lines

    def send(self, values: Tensor, to: list[int]) -> None:
        """Send flat values to some; raises ExchangeError."""
        self._wait([self.group.send([values], peer, 0) for peer in to])

    def recv(self, values: Tensor, source: int) -> None:
        """Receive as many; raises ExchangeError."""
        self._wait([self.group.recv([values], source, 0)])

    def _wait(self, works: list[Any]) -> None:
        try:
            for work in works:
                work.wait(timedelta(seconds=self.timeout_s))
        except RuntimeError as error:
            raise ExchangeError(" ".join(str(error).split())[:200]) from None


class ElasticAverage:
    """``average`` for OuterSync; all ranks of a site make one, and call it alike.

    inside: a Gloo group of the site's ranks for this alone; None: the site is one rank.
    address: of the store (``longspan rendezvous``). site, sites: which one this is, of how many
    there may be. timeout_s: after which a silent site is lost; no wait is longer.

    Raises ConfigError for an address or a site that can't be.
    """

    def __init__(
        self,
        inside: dist.ProcessGroup | None,
        address: str,
        site: int,
        sites: int,
        timeout_s: float = 300.0,
    ) -> None:
        if not 0 <= site < sites:
            raise ConfigError(f"site {site} of {sites}: sites are counted from 0")
        host_and_port(address)  # refuses what is none
        self._inside, self._address = inside, address
        self._site, self._sites, self._timeout_s = site, sites, timeout_s
        self._membership: Membership | None = None
        self._peers: Peers | None = None
        self._tried = 0
        self._under_way: list[_Joint] = []

    @property
    def apart(self) -> bool:
        """Whether this site exchanges with nobody: the next generation is still to come."""
        return self._peers is None

    def __call__(self, message: Tensor, turn: int) -> Work:
        """Start; while the site is apart, it fails."""
        work = None
        if self._peers:
            work = GroupAverage(self._peers.group, self._timeout_s)(message, turn)
        joint = _Joint(self, work)
        self._under_way.append(joint)
        return joint

    def regrouped(self, held: int = 0) -> Peers | None:
        """The peers of a generation that is new to this rank; None if there is none.

        With the first call the others know of this site, and it waits to be taken in. ``held``:
        the last generation that it has exchanged in.

        Raises ExchangeError, on all ranks of the site, if not all the generation's sites come in
        time, and UnreachableError if that is so again and again, and this site must stop.
        """
        if self._membership is None and (self._inside is None or self._inside.rank() == 0):
            about = (self._address, self._site, self._sites, self._timeout_s)
            self._membership = Membership(*about)
            self._membership.wait()
        generation = self._newest()
        if generation is None or generation.number <= self._tried:
            return None
        self._tried = number = generation.number
        self._leave()
        lane = self._inside.rank() if self._inside else 0
        words, group = "", None
        if generation.failures and generation.failures % _ATTEMPTS == 0:
            words = self._apart(generation, lane, held)
        try:
            if not words:
                here, count = generation.sites.index(self._site), len(generation.sites)
                name = f"{number}/{lane}"
                group = gloo_group(self._address, name, here, count, self._timeout_s)
        except RuntimeError as error:
            words = f"the sites didn't come together: {' '.join(str(error).split())[:150]}"
        self._peers = Peers(group, number, self._timeout_s)
        self.agree(words, apart=True)
        return self._peers

    def agree(self, words: str, apart: bool = False) -> None:
        """Raise ExchangeError on all ranks of the site if there are words at any: what failed.

        ``apart``: what failed is that the generation comes together.
        """
        if self._inside:
            words = first_words(words, self._inside)
        if not words:
            return
        if self._peers and self._membership:
            self._membership.broken(self._peers.number, apart)
        self._leave()
        raise ExchangeError(words)

    def close(self) -> None:
        """Leave the other sites for good."""
        self._leave()
        if self._membership:
            self._membership.close()

    def _leave(self) -> None:
        """Give the group up, and all that is under way, so that its connections close."""
        for joint in self._under_way:
            joint.work = None
        self._under_way.clear()
        self._peers = None

    def _apart(self, generation: Generation, lane: int, held: int) -> str:
        """Find out who reaches whom: words if not all do; UnreachableError if this site stops."""
        told: dict[int, Reach] = {}
        with suppress(RuntimeError):  # the store is away
            told = reach(self._address, generation, self._site, lane, held, self._timeout_s)
        words = words_of(told, generation.failures)
        stop = words if self._site in leaving(told) else ""
        if self._inside:
            stop = first_words(stop, self._inside)
        if stop:
            self.close()
            raise UnreachableError(stop)
        return words

    def _newest(self) -> Generation | None:
        """What the site's first rank knows, at all its ranks."""
        found = self._membership.newest() if self._membership else None
        if self._inside is None:
            return found
        words = first_words(json.dumps(asdict(found)) if found else "", self._inside)
        if not words:
            return None
        told = json.loads(words)
        members = {int(site): name for site, name in told["members"].items()}
        return Generation(told["number"], members, told["failures"])

    def finish(self, joint: "_Joint") -> list[Tensor]:
        """Wait for an exchange, and for the site's other ranks to have theirs."""
        words, messages = "", []
        try:
            if joint.work is None:
                raise ExchangeError("the site is apart from the others")
            messages = joint.work.wait()
        except ExchangeError as error:
            words = str(error)
        if joint in self._under_way:
            self._under_way.remove(joint)
        self.agree(words)
        return messages


@dataclass(eq=False)
class _Joint:
    average: ElasticAverage
    work: Work | None

    def wait(self) -> list[Tensor]:
        return self.average.finish(self)
