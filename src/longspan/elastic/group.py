"""A process group of the sites that are there: built in bounded time, and thrown away."""

from datetime import timedelta

from torch.distributed.distributed_c10d import PrefixStore, ProcessGroupGloo

from longspan.elastic.membership import connect_store

__all__ = ["gloo_group"]

_PATIENCE = 5  # Gloo waits so many times its timeout for a connection


def gloo_group(
    address: str, name: str, place: int, count: int, timeout_s: float
) -> ProcessGroupGloo:
    """A Gloo group of ``count`` processes, this one at ``place``; its name is used once.

    All must call it. Raises RuntimeError if not all do so within ``timeout_s`` or, from then on,
    not all connect within it.
    """
    wait = timedelta(seconds=timeout_s)
    store = PrefixStore(name, connect_store(address, timeout_s))
    store.set(f"here/{place}", "yes")
    store.wait([f"here/{other}" for other in range(count)], wait)
    group = ProcessGroupGloo(store, place, count, wait / _PATIENCE)
    group._set_default_timeout(wait)
    return group
