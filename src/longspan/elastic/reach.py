"""Who reaches whom, pair by pair, when the sites of a generation never come together."""

import json
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import timedelta

from torch.distributed.distributed_c10d import ProcessGroupGloo

from longspan.elastic.group import gloo_group
from longspan.elastic.membership import Generation, connect_store

__all__ = ["Reach", "leaving", "reach", "words_of"]


@dataclass(frozen=True, slots=True)
class Reach:
    """What a site tells of itself: the last generation that it was in, and whom it misses."""

    held: int
    misses: tuple[int, ...]


def reach(
    address: str, generation: Generation, site: int, lane: int, held: int, timeout_s: float
) -> dict[int, Reach]:
    """What each site found that took part, this one connecting to each of the others alone.

    lane: the rank's place in its site. A pair may take twice ``timeout_s``, and so long the others
    wait for what they tell. All sites of the generation must call it, with the same lanes. Raises
    RuntimeError if the store is away.
    """
    prefix = f"reach/{generation.number}/{lane}"
    peers = [peer for peer in generation.sites if peer != site]

    def connect(peer: int) -> ProcessGroupGloo | None:
        low, high = sorted((site, peer))
        try:
            name = f"{prefix}/{low}-{high}"
            return gloo_group(address, name, int(site == high), 2, timeout_s)
        except RuntimeError:
            return None

    # A group that is given up while its peer still connects would fail there: all are kept until
    # everyone has told what he found.
    with ThreadPoolExecutor(len(peers)) as pool:
        groups = dict(zip(peers, pool.map(connect, peers), strict=True))
    misses = [peer for peer, group in groups.items() if group is None]
    patience_s = 2 * timeout_s
    store = connect_store(address, patience_s + timeout_s)  # a client that gives up first is lost
    store.set(f"{prefix}/{site}", json.dumps([held, misses]))
    told = {}
    for one in generation.sites:
        try:
            store.wait([f"{prefix}/{one}"], timedelta(seconds=patience_s))
        except RuntimeError:  # it is lost, which is another matter
            continue
        its_held, its_misses = json.loads(store.get(f"{prefix}/{one}"))
        told[one] = Reach(its_held, tuple(its_misses))
    return told


def leaving(told: Mapping[int, Reach]) -> list[int]:
    """The sites that must stop, so that those left all reach each other.

    Sites that exchanged last stay before others, then those that miss the fewest, then by number.
    """
    stay: set[int] = set()
    pairs = _apart(told)
    missing = {site: sum(site in pair for pair in pairs) for site in told}
    for site in sorted(told, key=lambda s: (-told[s].held, missing[s], s)):
        if not any((min(site, one), max(site, one)) in pairs for one in stay):
            stay.add(site)
    return sorted(told.keys() - stay)


def words_of(told: Mapping[int, Reach], attempts: int) -> str:
    """Who stops, because of whom, and what to look at; empty if all reach each other."""
    pairs = _apart(told)
    if not pairs:
        return ""
    apart = ", ".join(f"{low} and {high}" for low, high in sorted(pairs))
    stopping = ", ".join(map(str, leaving(told)))
    return (
        f"sites {apart} reach the rendezvous but not each other, in {attempts} attempts; stopping: "
        f"site {stopping}. Let their firewalls pass TCP both ways on all ports, and set "
        "GLOO_SOCKET_IFNAME to the interface that faces the other sites"
    )


def _apart(told: Mapping[int, Reach]) -> set[tuple[int, int]]:
    """Pairs that don't reach each other, of the sites that took part."""
    return {
        (min(site, peer), max(site, peer))
        for site, found in told.items()
        for peer in found.misses
        if peer in told
    }
