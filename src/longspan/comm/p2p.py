"""Sends between pairs of ranks that are under way while something else is computed."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch.distributed as dist
from torch import Tensor

from longspan.schedule.ring import Transfer

__all__ = ["UnderWay", "start"]


@dataclass
class UnderWay:
    """Transfers that have started; keeps what is sent alive until it has left."""

    works: list[dist.Work] = field(default_factory=list)
    sent: Tensor | None = None
    received: dict[int, Tensor] = field(default_factory=dict)

    def wait(self) -> dict[int, Tensor]:
        """What has arrived, by the transfer's source."""
        for work in self.works:
            work.wait()
        self.sent = None
        return self.received


def start(
    transfers: Iterable[Transfer],
    group: dist.ProcessGroup,
    outgoing: Tensor | None,
    buffer: Callable[[int], Tensor],
) -> UnderWay:
    """Start this rank's part of ``transfers``, all at once.

    ``outgoing`` is the contiguous tensor to send, if this rank is the sender of one;
    ``buffer(source)`` makes the tensor to receive into. Ranks are those of ``group``. An empty
    tensor is not sent.
    """
    moving = UnderWay(sent=outgoing)
    ops: list[dist.P2POp] = []
    # Receives first: Gloo announces them over the same connection that the sends fill.
    for transfer in sorted(transfers, key=lambda t: t.sender == group.rank()):
        if transfer.sender == group.rank():
            assert outgoing is not None
            op = dist.P2POp(dist.isend, outgoing, group=group, group_peer=transfer.receiver)
        else:
            tensor = moving.received[transfer.source] = buffer(transfer.source)
            op = dist.P2POp(dist.irecv, tensor, group=group, group_peer=transfer.sender)
        if transfer.bytes:
            ops.append(op)
    if ops:
        moving.works = dist.batch_isend_irecv(ops)
    return moving
