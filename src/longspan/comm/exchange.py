"""All-to-all of uneven parts that keeps both directions of every link busy."""

from collections.abc import Sequence

import torch.distributed as dist
from torch import Tensor

__all__ = ["Announced", "Exchange", "exchange"]


class Exchange:
    """An all-to-all under way; the tensors must not be touched before ``wait()``."""

    def __init__(
        self, arriving: Sequence[dist.Work] = (), leaving: Sequence[dist.Work] = ()
    ) -> None:
        self._arriving, self._leaving = list(arriving), list(leaving)

    def arrive(self) -> None:
        """Return when all that comes to this rank is there."""
        while self._arriving:  # Gloo waits for ever where it is asked a second time
            self._arriving.pop(0).wait()

    def wait(self) -> None:
        """Return when this rank's part is done."""
        self.arrive()
        while self._leaving:
            self._leaving.pop(0).wait()


class Announced:
    """An all-to-all that is going to be sent: what comes is to be written into ``received``.

    Flat and contiguous, as of ``exchange``. Several that are announced must be sent in that order.
    """

    def __init__(
        self, received: Tensor, receive_sizes: Sequence[int], group: dist.ProcessGroup
    ) -> None:
        self.received, self._sizes, self._group = received, list(receive_sizes), group
        self._together = bool(dist.get_backend(group) == "nccl")  # it has no announcements
        self._sources = received.split(self._sizes)
        self._arriving: list[dist.Work] = []
        if not self._together:
            here, world = group.rank(), group.size()
            before = [(here - hop) % world for hop in range(1, world)]
            works = [
                dist.irecv(self._sources[r], group=group, group_src=r)
                for r in before
                if self._sizes[r]
            ]
            self._arriving = [work for work in works if work]

    def send(self, sent: Tensor, sizes: Sequence[int]) -> Exchange:
        """Start it: ``sent``'s i-th part goes to rank i."""
        group = self._group
        if self._together:
            work = dist.all_to_all_single(
                self.received, sent, self._sizes, list(sizes), group=group, async_op=True
            )
            return Exchange([work] if work else [])
        here, world = group.rank(), group.size()
        targets = sent.split(list(sizes))
        # Each rank starts with its next neighbour, so that not all send to the same one first.
        after = [(here + hop) % world for hop in range(1, world)]
        works = [dist.isend(targets[r], group=group, group_dst=r) for r in after if sizes[r]]
        if sizes[here]:
            self._sources[here].copy_(targets[here])
        return Exchange(self._arriving, [work for work in works if work])


def exchange(
    received: Tensor,
    sent: Tensor,
    receive_sizes: Sequence[int],
    send_sizes: Sequence[int],
    group: dist.ProcessGroup,
) -> Exchange:
    """Start an all-to-all: ``sent``'s i-th part goes to rank i, ``received`` takes the parts.

    Both are flat and contiguous; sizes are in elements, one a rank of ``group``. What a rank has
    for itself is copied.

    Gloo's own all-to-all often fills a link in one direction after the other: a rank that is late
    announces its receive behind the data that it already sends. Here every receive is announced
    before anything is sent.
    """
    return Announced(received, receive_sizes, group).send(sent, send_sizes)
