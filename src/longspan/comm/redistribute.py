"""Runs a change of layout on one mesh axis: split and gather of a sequence dim, differentiable.

On the way back the gradient takes the opposite road, and which one depends on what follows the
replicated tensor. Where every rank does the same with it, each has the whole gradient
(``Replicate``) and a gather's gradient is a slice. Where each rank goes its own way, each has a
part of the sum (``Partial``) and a gather's gradient is a reduce-scatter. So the replicated
side's gradient layout is named.
"""

from itertools import accumulate
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Partial, Replicate, Shard
from torch.distributed.tensor.placement_types import Placement

from longspan.comm.mesh import axis_group
from longspan.errors import LayoutError
from longspan.layout import Layout, Order, local_length, positions

__all__ = ["redistribute"]


def redistribute(
    x: Tensor,
    src: Layout,
    dst: Layout,
    mesh: DeviceMesh,
    *,
    length: int,
    grad: Placement | None = None,
) -> Tensor:
    """Move ``x`` from one layout to another over a mesh of one named axis.

    Replicate → Shard(dim) is a split: no traffic; Shard(dim) → Replicate a gather. ``length`` is
    the whole dim's size, divisible or not; the shard's order is its layout's. ``grad``: the
    gradient's placement on the replicated side, ``Replicate()`` (the default) or ``Partial()``;
    on the sharded side it is always the same Shard. Raises LayoutError for other transitions or
    a tensor of another size.
    """
    group = axis_group(mesh)
    (axis,) = mesh.mesh_dim_names or ("",)
    before = src.placements.get(axis, Replicate())
    after = dst.placements.get(axis, Replicate())
    out: Tensor
    partial = isinstance(grad, Partial)
    if not (grad is None or partial or isinstance(grad, Replicate)):
        raise LayoutError(f"grad must be Replicate() or Partial(), not {grad}")
    if isinstance(before, Replicate) and isinstance(after, Shard):
        _expect(x, after.dim, length)
        out = _Split.apply(x, after.dim, length, dst.order, group, partial)
        return out
    if isinstance(before, Shard) and isinstance(after, Replicate):
        _expect(x, before.dim, local_length(length, group.rank(), group.size(), src.order))
        out = _Gather.apply(x, before.dim, length, src.order, group, partial)
        return out
    if before == after and src.order == dst.order:
        return x
    raise LayoutError(f"no way from {before} ({src.order}) to {after} ({dst.order}): split, gather")


def _expect(x: Tensor, dim: int, size: int) -> None:
    if x.shape[dim] != size:
        raise LayoutError(f"dim {dim} should have {size} tokens here, it has {x.shape[dim]}")


def _shards(length: int, order: Order, group: dist.ProcessGroup) -> list[Tensor]:
    return [positions(length, rank, group.size(), order) for rank in range(group.size())]


def _own(x: Tensor, dim: int, length: int, order: Order, group: dist.ProcessGroup) -> Tensor:
    index = positions(length, group.rank(), group.size(), order)
    return x.index_select(dim, index.to(x.device))


def _all_to_all(parts: list[Tensor], shapes: list[torch.Size], group: Any) -> list[Tensor]:
    """Sends parts[i] to rank i; returns what each rank sent here, of the shapes given."""
    here = group.rank()
    sent = [part if rank != here else part[:0] for rank, part in enumerate(parts)]
    sizes = [shape.numel() if rank != here else 0 for rank, shape in enumerate(shapes)]
    flat = parts[0].new_empty(sum(sizes))
    outgoing = torch.cat([part.reshape(-1) for part in sent])
    dist.all_to_all_single(flat, outgoing, sizes, [part.numel() for part in sent], group=group)
    starts = accumulate(sizes, initial=0)
    return [
        parts[here] if rank == here else flat[start : start + size].view(shape)
        for rank, (start, size, shape) in enumerate(zip(starts, sizes, shapes, strict=False))
    ]


def _gather(x: Tensor, dim: int, length: int, order: Order, group: dist.ProcessGroup) -> Tensor:
    shards = _shards(length, order, group)
    shapes = [torch.Size((*x.shape[:dim], len(s), *x.shape[dim + 1 :])) for s in shards]
    parts = _all_to_all([x.contiguous()] * group.size(), shapes, group)
    whole = x.new_empty(*x.shape[:dim], length, *x.shape[dim + 1 :])
    return whole.index_copy_(dim, torch.cat(shards).to(x.device), torch.cat(parts, dim))


def _reduce_scatter(
    x: Tensor, dim: int, length: int, order: Order, group: dist.ProcessGroup
) -> Tensor:
    parts = [x.index_select(dim, s.to(x.device)) for s in _shards(length, order, group)]
    own = parts[group.rank()]
    received = _all_to_all(parts, [own.shape] * group.size(), group)
    return torch.stack(received).sum(0)


def _spread(x: Tensor, dim: int, length: int, order: Order, group: dist.ProcessGroup) -> Tensor:
    """A shard in its place in the whole, zeros elsewhere: this rank's part of a sum."""
    index = positions(length, group.rank(), group.size(), order)
    whole = x.new_zeros(*x.shape[:dim], length, *x.shape[dim + 1 :])
    return whole.index_copy_(dim, index.to(x.device), x)


class _Split(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        dim: int,
        length: int,
        order: Order,
        group: dist.ProcessGroup,
        partial: bool,
    ) -> Tensor:
        ctx.where, ctx.partial = (dim % x.ndim, length, order, group), partial
        return _own(x, *ctx.where)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        back = _spread if ctx.partial else _gather
        return back(grad, *ctx.where), None, None, None, None, None


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        dim: int,
        length: int,
        order: Order,
        group: dist.ProcessGroup,
        partial: bool,
    ) -> Tensor:
        ctx.where, ctx.partial = (dim % x.ndim, length, order, group), partial
        return _gather(x, *ctx.where)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        back = _reduce_scatter if ctx.partial else _own
        return back(grad, *ctx.where), None, None, None, None, None
