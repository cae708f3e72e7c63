"""All-gather and reduce-scatter around a ring, as NCCL does them, for FSDP2 on Gloo.

Gloo's reduce-scatter is an all-reduce of the whole, twice the bytes, and its all-gather often
fills a link in one direction after the other. Here all receives are announced before anything is
sent: an announcement must not queue behind data on a slow link. So a link carries what the
schedule says, at its full rate in both directions.
"""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.distributed.fsdp._fully_shard._fsdp_api import AllGather, ReduceScatter

__all__ = [
    "RingAllGather",
    "RingReduceScatter",
    "ring_all_gather",
    "ring_reduce_scatter",
    "use_rings",
]


def ring_all_gather(parts: list[Tensor], group: dist.ProcessGroup) -> None:
    """Fill ``parts``, one a rank, of which this rank's own is given; n-1 hops.

    The parts may differ in size, and must be contiguous. NCCL has a ring of its own.
    """
    here, world = group.rank(), group.size()
    if dist.get_backend(group) == "nccl":
        dist.all_gather(parts, parts[here], group=group)
        return
    arriving = [_receive(parts[(here - hop) % world], group) for hop in range(1, world)]
    leaving = []
    for hop in range(world - 1):
        leaving.append(_send(parts[(here - hop) % world], group))
        arriving[hop].wait()
    for work in leaving:
        work.wait()


def ring_reduce_scatter(parts: list[Tensor], group: dist.ProcessGroup) -> Tensor:
    """The sum over ranks of this rank's part of ``parts``, one a rank; n-1 hops.

    Rank i's part is summed in the order i+1, i+2, …, i: the same at every call.
    """
    here, world = group.rank(), group.size()
    if dist.get_backend(group) == "nccl":
        total = torch.empty_like(parts[here])
        dist.reduce_scatter(total, parts, group=group)
        return total
    own = [parts[(here - hop) % world] for hop in range(1, world + 1)]
    received = [torch.empty_like(part) for part in own[1:]]
    arriving = [_receive(buffer, group) for buffer in received]
    leaving = []
    total = own[0]
    for hop in range(world - 1):
        leaving.append(_send(total, group))
        arriving[hop].wait()
        total = received[hop].add_(own[hop + 1])
    for work in leaving:
        work.wait()
    return total


class _Nothing:
    """The transfer of an empty tensor."""

    def wait(self) -> None:
        """Nothing is to be waited for."""


def _receive(tensor: Tensor, group: dist.ProcessGroup) -> dist.Work | _Nothing:
    source = (group.rank() - 1) % group.size()
    work = dist.irecv(tensor, group=group, group_src=source) if tensor.numel() else None
    return work or _Nothing()


def _send(tensor: Tensor, group: dist.ProcessGroup) -> dist.Work | _Nothing:
    target = (group.rank() + 1) % group.size()
    work = dist.isend(tensor, group=group, group_dst=target) if tensor.numel() else None
    return work or _Nothing()


class RingAllGather(AllGather):
    """FSDP2's seam for the all-gather of parameters."""

    def allocate(
        self, size: Sequence[int | torch.SymInt], *, dtype: torch.dtype, device: torch.device
    ) -> Tensor:
        """A plain tensor."""
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(
        self,
        output_tensor: Tensor,
        input_tensor: Tensor,
        group: dist.ProcessGroup,
        async_op: bool = False,
    ) -> None:
        """Gather; done when it returns."""
        parts = list(output_tensor.chunk(group.size()))
        parts[group.rank()].copy_(input_tensor)
        ring_all_gather(parts, group)


class RingReduceScatter(ReduceScatter):
    """FSDP2's seam for the reduce-scatter of gradients; sums only."""

    def allocate(
        self, size: Sequence[int | torch.SymInt], *, dtype: torch.dtype, device: torch.device
    ) -> Tensor:
        """A plain tensor."""
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(
        self,
        output_tensor: Tensor,
        input_tensor: Tensor,
        group: dist.ProcessGroup,
        op: object,
        async_op: bool = False,
    ) -> None:
        """Reduce; done when it returns."""
        assert op == dist.ReduceOp.SUM, "parallelize() makes FSDP2 sum"
        parts = list(input_tensor.view(group.size(), -1))
        output_tensor.copy_(ring_reduce_scatter(parts, group).view_as(output_tensor))


def use_rings(model: torch.nn.Module) -> None:
    """Let every FSDP2 module in ``model`` communicate around rings."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_custom_all_gather(RingAllGather())
            module.set_custom_reduce_scatter(RingReduceScatter())
