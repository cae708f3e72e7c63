"""Runs a change of layout over a mesh, differentiable: the table is ``schedule/switch.py``'s.

On the way back the gradient takes the opposite road, and which one depends on what follows the
replicated tensor. Where every rank does the same with it, each has the whole gradient
(``Replicate``) and a gather's gradient is a slice. Where each rank goes its own way, each has a
part of the sum (``Partial``) and a gather's gradient is a reduce-scatter. So the replicated
side's gradient layout is named.

Every exchange is one all-to-all of the very elements that change their rank, so that uneven and
empty shards need no padding; sums are taken in the order of the ranks, in fp32 at least, so that
they are the same bits each time.
"""

from collections import deque
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from math import prod
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Partial, Replicate
from torch.distributed.tensor.placement_types import Placement

from longspan.errors import LayoutError
from longspan.layout import Layout, Run
from longspan.schedule.switch import Step, backward, local_shape, steps

__all__ = ["Moving", "redistribute", "redistribute_chunks", "start_redistribute"]


def redistribute(
    x: Tensor,
    src: Layout,
    dst: Layout,
    mesh: DeviceMesh,
    *,
    length: int | None = None,
    shape: Sequence[int] | None = None,
    grad: Placement | Mapping[str, Placement] | None = None,
) -> Tensor:
    """Bring ``x``, this rank's part of a tensor, from one layout to another over a mesh.

    ``length`` is the whole size of the dim that ``src`` shards (or ``dst``, where ``src`` shards
    none), divisible or not; ``shape`` instead is the whole tensor's, needed only where ``src``
    shards several dims. Neither is needed where it shards none. A layout's order holds for all
    its sharded dims. ``grad`` is the gradient's placement on a replicated side, ``Replicate()``
    (the default) or ``Partial()``, for all axes or by axis; on a sharded side it is the same
    Shard, on a partial one replicated. An axis that is replicated on both sides hands its
    gradient on whole. The dtype stays. All ranks of the mesh must call it in the same order.

    Raises LayoutError for a tensor of another size, or a layout that doesn't fit it or the mesh.
    """
    moving = start_redistribute(x, src, dst, mesh, length=length, shape=shape, grad=grad)
    return moving.wait()


def start_redistribute(
    x: Tensor,
    src: Layout,
    dst: Layout,
    mesh: DeviceMesh,
    *,
    length: int | None = None,
    shape: Sequence[int] | None = None,
    grad: Placement | Mapping[str, Placement] | None = None,
) -> "Moving":
    """``redistribute`` that has set off: what is computed until ``.wait()`` overlaps it.

    Only the first exchange of a chain sets off. The gradient is under way as long: from the
    backward of ``wait`` to that of this call. ``x`` must not be changed before ``wait``.
    """
    axes = _axes(mesh)
    at = tuple(mesh.get_local_rank(axis) for axis in range(mesh.ndim))
    whole = _whole_shape(x, src, dst, axes, length, shape)
    if (expected := local_shape(src, whole, axes, at)) != x.shape:
        raise _misfit(x, expected)
    named = grad if isinstance(grad, Mapping) else dict.fromkeys(axes, grad or Replicate())
    roads = [
        _Road(steps(here, there, whole, axes, at), mesh)
        for here, there in ((src, dst), backward(src, dst, named))
    ]
    return Moving(x, *roads)


def redistribute_chunks(
    chunks: Iterable[Tensor],
    src: Layout,
    dst: Layout,
    mesh: DeviceMesh,
    *,
    length: int | None = None,
    grad: Placement | Mapping[str, Placement] | None = None,
    ahead: int = 1,
) -> Iterator[Tensor]:
    """``redistribute`` of a tensor in chunks of a third dim: what computes them overlaps it.

    While ``ahead`` chunks are under way, the caller's loop works on the one before and the
    iterable makes the next: ``for y in redistribute_chunks((stage(c) for c in x.split(n, 0)),
    …): use(y)``. The gradients' exchanges overlap the stages' backward in the same way.
    """
    under_way: deque[Moving] = deque()
    for chunk in chunks:
        under_way.append(start_redistribute(chunk, src, dst, mesh, length=length, grad=grad))
        if len(under_way) > ahead:
            yield under_way.popleft().wait()
    while under_way:
        yield under_way.popleft().wait()


_Moves = Generator[dist.Work, None, Tensor]


class _Road:
    """Steps over the axes of a mesh."""

    def __init__(self, steps: tuple[Step, ...], mesh: DeviceMesh) -> None:
        self.steps, self.mesh = steps, mesh

    def start(self, x: Tensor) -> "_Travel":
        return _Travel(self._moves(x))

    def _moves(self, x: Tensor) -> _Moves:
        for step in self.steps:
            group = self.mesh.get_group(step.axis if self.mesh.ndim > 1 else 0)
            x = yield from _move(x, step, group)
        return x


class _Travel:
    """A tensor under way: its first exchange has been posted."""

    def __init__(self, moves: _Moves) -> None:
        self._moves = moves
        self._work: dist.Work | None = None
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
        if self._still is None:
            self._token: Tensor = _Start.apply(x, self)

    def wait(self) -> Tensor:
        """The tensor in its new layout; to be called once."""
        if self._still is not None:
            return self._still
        if self.travel is None:
            raise LayoutError("this tensor has been waited for already")
        out: Tensor = _Wait.apply(self._token, self)
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
    length: int | None,
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


def _move(x: Tensor, step: Step, group: dist.ProcessGroup) -> _Moves:
    """One row of the table; yields what is to be waited for."""
    here = group.rank()
    before, after = step.before, step.after
    if before.dim is None and after.dim is None:
        if isinstance(before.placement, Partial):
            scatter, gather = step.halves
            share = yield from _exchange(x.reshape(-1), scatter, group)
            whole = yield from _exchange(share, gather, group)
            return whole.view(x.shape)
        return x.clone() if here == 0 else torch.zeros_like(x)
    if isinstance(before.placement, Replicate):
        assert after.dim is not None
        own = x.new_empty(step.shape(after, here))
        _pick(own, x, after.dim, after.runs(x.shape[after.dim], here, step.world))
        return own
    if isinstance(after.placement, Partial):
        assert before.dim is not None
        whole = x.new_zeros(step.whole)
        _put(whole, x, before.dim, step.takes(here, here))
        return whole
    return (yield from _exchange(x, step, group))


def _exchange(x: Tensor, step: Step, group: dist.ProcessGroup) -> _Moves:
    here, world = group.rank(), step.world
    near = _either(step.after.dim, step.before.dim)  # the dim that is cut up to be sent
    far = _either(step.before.dim, step.after.dim)  # the dim that is put together
    gives = [step.gives(here, peer) for peer in range(world)]
    takes = [step.takes(here, peer) for peer in range(world)]
    out_shape = torch.Size(step.shape(step.after, here))
    wide = torch.promote_types(x.dtype, torch.float32) if x.is_floating_point() else x.dtype

    # Where what is sent lies in memory as it is to be sent, it isn't copied; nor is what arrives
    # as it is to stay. This rank's own piece takes no part in the exchange otherwise.
    as_it_lies = x.is_contiguous() and _lined_up(gives, x.shape, near)
    as_it_comes = not step.sums and _lined_up(takes, out_shape, far)
    shapes_in = [_with(out_shape, far, runs) for runs in takes]
    shapes_out = [_with(x.shape, near, runs) for runs in gives]
    keep = here if not (as_it_lies or as_it_comes) else None
    sizes_in, sizes_out = (
        [prod(shape) if peer != keep else 0 for peer, shape in enumerate(shapes)]
        for shapes in (shapes_in, shapes_out)
    )
    if as_it_lies:
        outgoing = x.view(-1)
    else:
        outgoing = x.new_empty(sum(sizes_out))
        for peer, part in enumerate(outgoing.split(sizes_out)):
            if peer != keep:
                _pick(part.view(shapes_out[peer]), x, near, gives[peer])
    incoming = x.new_empty(sum(sizes_in))
    yield dist.all_to_all_single(
        incoming, outgoing, sizes_in, sizes_out, group=group, async_op=True
    )
    if as_it_comes:
        return incoming.view(out_shape)
    out = (
        torch.zeros(out_shape, dtype=wide, device=x.device) if step.sums else x.new_empty(out_shape)
    )
    for peer, part in enumerate(incoming.split(sizes_in)):
        if peer == keep:
            part = x.new_empty(shapes_in[peer])
            _pick(part, x, near, gives[peer])
        _put(out, part.view(shapes_in[peer]), far, takes[peer], add=step.sums)
    return out.to(x.dtype)


def _either(dim: int | None, other: int | None) -> int:
    found = other if dim is None else dim
    assert found is not None
    return found


def _with(shape: Sequence[int], dim: int, runs: Iterable[Run]) -> tuple[int, ...]:
    return (*shape[:dim], sum(run.count for run in runs), *shape[dim + 1 :])


def _lined_up(parts: Iterable[tuple[Run, ...]], shape: Sequence[int], dim: int) -> bool:
    """Whether the parts follow each other in a contiguous tensor and are all of it."""
    end = 0
    for run in (run for part in parts for run in part):
        if run.start != end or run.stride != 1:
            return False
        end += run.count
    return end == shape[dim] and prod(shape[:dim]) == 1


def _tokens(x: Tensor, dim: int, run: Run) -> Tensor:
    taken = slice(run.start, run.start + run.count * run.stride, run.stride)
    return x[(*(slice(None),) * dim, taken)]


def _pick(part: Tensor, x: Tensor, dim: int, runs: Iterable[Run]) -> None:
    for run in runs:
        part.narrow(dim, run.local, run.count).copy_(_tokens(x, dim, run))


def _put(x: Tensor, part: Tensor, dim: int, runs: Iterable[Run], add: bool = False) -> None:
    for run in runs:
        piece, place = part.narrow(dim, run.local, run.count), _tokens(x, dim, run)
        if add:
            place.add_(piece)
        else:
            place.copy_(piece)
