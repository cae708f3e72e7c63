"""All-to-all of uneven parts that keeps both directions of every link busy."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch.distributed as dist
from torch import Tensor

__all__ = ["Exchange", "exchange"]


@dataclass
class Exchange:
    """An all-to-all under way; the tensors must not be touched before ``wait()``."""

    works: Sequence[dist.Work]

    def wait(self) -> None:
        """Return when this rank's part is done."""
        for work in self.works:
            work.wait()


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
    if dist.get_backend(group) == "nccl":
        work = dist.all_to_all_single(
            received, sent, list(receive_sizes), list(send_sizes), group=group, async_op=True
        )
        return Exchange([work] if work else [])
    here, world = group.rank(), group.size()
    targets, sources = sent.split(list(send_sizes)), received.split(list(receive_sizes))
    # Each rank starts with its next neighbour, so that not all send to the same one first.
    before = [(here - hop) % world for hop in range(1, world)]
    after = [(here + hop) % world for hop in range(1, world)]
    works = [dist.irecv(sources[r], group=group, group_src=r) for r in before if receive_sizes[r]]
    works += [dist.isend(targets[r], group=group, group_dst=r) for r in after if send_sizes[r]]
    if send_sizes[here]:
        sources[here].copy_(targets[here])
    return Exchange([work for work in works if work])
