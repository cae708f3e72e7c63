"""Runs a change of layout over a mesh, differentiable: the table is ``schedule/switch.py``'s.

On the way back the gradient takes the opposite road, and which one depends on what follows the
replicated tensor. Where every rank does the same with it, each has the whole gradient
(``Replicate``) and a gather's gradient is a slice. Where each rank goes its own way, each has a
part of the sum (``Partial``) and a gather's gradient is a reduce-scatter. So the replicated
side's gradient layout is named.
"""

from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.placement_types import Placement

from longspan.comm.exchange import Exchange
from longspan.comm.move import Moves, move
from longspan.errors import LayoutError
from longspan.layout import Layout
from longspan.schedule.step import Step
from longspan.schedule.switch import backward, local_shape, steps

__all__ = ["Moving", "redistribute", "redistribute_chunks", "start_redistribute"]


def redistribute(
    x: Tensor,
    src: Layout,
    dst: Layout,
    mesh: DeviceMesh,
    *,
    length: int | Mapping[int, int] | None = None,
    shape: Sequence[int] | None = None,
    grad: Placement | Mapping[str, Placement] | None = None,
    sums: bool = True,
) -> Tensor:
    """Bring ``x``, this rank's part of a tensor, from one layout to another over a mesh.

    ``length`` is the whole size of the dim that ``src`` shards (or ``dst``, where ``src`` shards
    none), divisible or not, or a mapping from dims to sizes; ``shape`` instead is the whole
    tensor's. Where ``src`` shards several dims one of the latter is needed; nothing is where it
    shards none. A layout's order holds for all its sharded dims. ``grad`` is the gradient's
    placement on a replicated side, ``Replicate()`` (the default) or ``Partial()``, for all axes
    or by axis; on a sharded side it is the same Shard, on a partial one replicated. An axis that
    is replicated on both sides hands its gradient on whole, or as it came where ``sums`` is false.
    The dtype stays. All ranks of the mesh must call it in the same order.

    Raises LayoutError for a tensor of another size, or a layout that doesn't fit it or the mesh.
    """
    moving = start_redistribute(x, src, dst, mesh, length=length, shape=shape, grad=grad, sums=sums)
    return moving.wait()


def start_redistribute(
    x: Tensor,
    src: Layout,
    dst: Layout,
    mesh: DeviceMesh,
    *,
    length: int | Mapping[int, int] | None = None,
    shape: Sequence[int] | None = None,
    grad: Placement | Mapping[str, Placement] | None = None,
    sums: bool = True,
) -> "Moving":
    """``redistribute`` that has set off: what is computed until ``.wait()`` overlaps it.

    Only the first exchange of a chain sets off. The gradient is under way as long: from the
    backward of ``wait`` to that of this call. ``x`` must not be changed before ``wait``.
    """
    axes = _axes(mesh)
    at = tuple(mesh.get_local_rank(axis) for axis in range(mesh.ndim))
    whole = _whole_shape(x, src, dst, axes, length, shape)
    named = grad if isinstance(grad, Mapping) else dict.fromkeys(axes, grad or Replicate())
    roads = [
        _Road(steps(here, there, whole, axes, at), mesh)
        for here, there in ((src, dst), backward(src, dst, named, sums))
    ]
    if (expected := local_shape(src, whole, axes, at)) != x.shape:
        raise _misfit(x, expected)
    return Moving(x, *roads)


def redistribute_chunks(
    chunks: Iterable[Tensor],
    src: Layout,
    dst: Layout,
    mesh: DeviceMesh,
    *,
    length: int | Mapping[int, int] | None = None,
    grad: Placement | Mapping[str, Placement] | None = None,
    sums: bool = True,
    ahead: int = 1,
) -> Iterator[Tensor]:
    """``redistribute`` of a tensor in chunks of a third dim: what computes them overlaps it.

    While ``ahead`` chunks are under way, the caller's loop works on the one before and the
    iterable makes the next: ``for y in redistribute_chunks((stage(c) for c in x.split(n, 0)),
    …): use(y)``. The gradients' exchanges overlap the stages' backward in the same way.
    """
    under_way: deque[Moving] = deque()
    for chunk in chunks:
        under_way.append(
            start_redistribute(chunk, src, dst, mesh, length=length, grad=grad, sums=sums)
        )
        if len(under_way) > ahead:
            yield under_way.popleft().wait()
    while under_way:
        yield under_way.popleft().wait()


class _Road:
    """Steps over the axes of a mesh."""

    def __init__(self, steps: tuple[Step, ...], mesh: DeviceMesh) -> None:
        self.steps, self.mesh = steps, mesh

    def start(self, x: Tensor) -> "_Travel":
        return _Travel(self._moves(x))

    def _moves(self, x: Tensor) -> Moves:
        for step in self.steps:
            group = self.mesh.get_group(step.axis if self.mesh.ndim > 1 else 0)
            x = yield from move(x, step, group)
        return x


class _Travel:
    """A tensor under way: its first exchange has been posted."""

    def __init__(self, moves: Moves) -> None:
        self._moves = moves
        self._work: Exchange | None = None
        self._arrived: Tensor | None = None
        self._go()

    def _go(self) -> None:
        try:
            self._work = next(self._moves)
        except StopIteration as end:
            self._work, self._arrived = None, end.value

    def wait(self) -> Tensor:
        while self._work is not None:
            self._work.wait()
            self._go()
        assert self._arrived is not None
        return self._arrived


class Moving:
    """A tensor on its way to another layout."""

    def __init__(self, x: Tensor, there: _Road, back: _Road) -> None:
        self._still = x if not there.steps and not back.steps else None
        self._there, self._back = there, back
        self.travel: _Travel | None = None
        self._token: Tensor | None = None
        if self._still is None:
            self._token = _Start.apply(x, self)

    def wait(self) -> Tensor:
        """The tensor in its new layout; to be called once."""
        if self._still is not None:
            return self._still
        if self._token is None:
            raise LayoutError("this tensor has been waited for already")
        out: Tensor = _Wait.apply(self._token, self)
        self._token = None  # The graph keeps this object: no circle.
        return out


class _Start(torch.autograd.Function):
    """Sets off; its backward waits for the gradient that ``_Wait``'s has sent off."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, moving: Moving) -> Tensor:
        ctx.moving = moving
        moving.travel = moving._there.start(x.detach())
        return x.new_empty(0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, token: Tensor) -> tuple[Tensor, None]:
        return _arrived(ctx.moving), None


class _Wait(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, token: Tensor, moving: Moving) -> Tensor:
        ctx.moving = moving
        return _arrived(moving)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        ctx.moving.travel = ctx.moving._back.start(grad)
        return grad.new_empty(0), None


def _arrived(moving: Moving) -> Tensor:
    travel, moving.travel = moving.travel, None
    assert travel is not None
    return travel.wait()


def _axes(mesh: DeviceMesh) -> dict[str, int]:
    names = mesh.mesh_dim_names or ("",)
    if len(names) != mesh.ndim:
        raise LayoutError("a mesh of several axes needs their names: mesh_dim_names=(…)")
    return {name: mesh.size(axis) for axis, name in enumerate(names)}


def _whole_shape(
    x: Tensor,
    src: Layout,
    dst: Layout,
    axes: Mapping[str, int],
    length: int | Mapping[int, int] | None,
    shape: Sequence[int] | None,
) -> tuple[int, ...]:
    if shape is not None:
        if len(shape) != x.ndim:
            raise LayoutError(f"shape has {len(shape)} dims, the tensor {x.ndim}")
        return tuple(shape)
    cut, to_cut = (
        {
            dim % max(x.ndim, 1)
            for axis in axes
            if (dim := getattr(layout.placements.get(axis), "dim", None)) is not None
        }
        for layout in (src, dst)
    )
    whole = list(x.shape)
    if isinstance(length, Mapping):
        lengths = {dim % max(x.ndim, 1): size for dim, size in length.items()}
        if not cut <= lengths.keys():
            raise LayoutError(
                f"dims {sorted(cut - lengths.keys())} are sharded: give their lengths"
            )
        return tuple(lengths[dim] if dim in cut else size for dim, size in enumerate(whole))
    if len(cut) > 1 or (cut and length is None):
        raise LayoutError(f"dims {sorted(cut)} are sharded: give the whole tensor's shape=")
    for dim in cut:
        whole[dim] = length or 0
    if not cut and length is not None and any(whole[dim] != length for dim in to_cut):
        dim = next(dim for dim in to_cut if whole[dim] != length)
        whole[dim] = length
        raise _misfit(x, tuple(whole))
    return tuple(whole)


def _misfit(x: Tensor, expected: tuple[int, ...]) -> LayoutError:
    for dim, (size, here) in enumerate(zip(expected, x.shape, strict=True)):
        if size != here:
            return LayoutError(f"dim {dim} should have {size} tokens here, it has {here}")
    raise AssertionError("the shapes are equal")
