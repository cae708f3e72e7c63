"""Runs one row of the table of layout changes (``schedule/step.py``) on a process group.

Only the very elements that change their rank are sent, so that uneven and empty shards need no
padding. What goes from shard to shard is one all-to-all, under way at once. What is gathered or
reduced goes around a ring, which loads a node's link once each way and is what ``cluster/cost.py``
prices; it sets off when it is waited for, since its hops would meet those of another ring. Sums
are taken in the order of ranks or of the ring, so that they are the same bits each time.
"""

from collections.abc import Generator, Iterable, Sequence
from math import prod

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import Partial, Replicate

from longspan.comm.exchange import Exchange, exchange
from longspan.comm.rings import ring_all_gather, ring_reduce_scatter
from longspan.layout import Run
from longspan.schedule.step import Step

__all__ = ["Moves", "move"]

Moves = Generator[Exchange, None, Tensor]


def move(x: Tensor, step: Step, group: dist.ProcessGroup) -> Moves:
    """One row of the table; yields what is to be waited for."""
    here = group.rank()
    before, after = step.before, step.after
    if before.dim is None and after.dim is None:
        if isinstance(before.placement, Partial):
            scatter, gather = step.halves
            yield Exchange(())
            share = _reduce_scatter(x.reshape(-1), scatter, group)
            whole = _all_gather(share, gather, group)
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
    if before.dim is None or after.dim is None:
        yield Exchange(())
        return (_reduce_scatter if before.dim is None else _all_gather)(x, step, group)
    return (yield from _exchange(x, step, group))


def _all_gather(x: Tensor, step: Step, group: dist.ProcessGroup) -> Tensor:
    here, dim = group.rank(), step.before.dim
    assert dim is not None
    takes = [step.takes(here, peer) for peer in range(step.world)]
    shapes = [_with(step.whole, dim, runs) for runs in takes]
    out = x.new_empty(step.whole)
    as_it_comes = _lined_up(takes, step.whole, dim)
    flat = out.view(-1) if as_it_comes else x.new_empty(out.numel())
    parts = list(flat.split([prod(shape) for shape in shapes]))
    parts[here].view(shapes[here]).copy_(x)
    ring_all_gather(parts, group)
    if not as_it_comes:
        for part, shape, runs in zip(parts, shapes, takes, strict=True):
            _put(out, part.view(shape), dim, runs)
    return out


def _reduce_scatter(x: Tensor, step: Step, group: dist.ProcessGroup) -> Tensor:
    here, dim = group.rank(), step.after.dim
    assert dim is not None
    gives = [step.gives(here, peer) for peer in range(step.world)]
    shapes = [_with(step.whole, dim, runs) for runs in gives]
    as_it_lies = x.is_contiguous() and _lined_up(gives, step.whole, dim)
    flat = x.view(-1) if as_it_lies else x.new_empty(x.numel())
    parts = list(flat.split([prod(shape) for shape in shapes]))
    if not as_it_lies:
        for part, shape, runs in zip(parts, shapes, gives, strict=True):
            _pick(part.view(shape), x, dim, runs)
    return ring_reduce_scatter(parts, group).view(shapes[here])


def _exchange(x: Tensor, step: Step, group: dist.ProcessGroup) -> Moves:
    here, world = group.rank(), step.world
    near, far = step.after.dim, step.before.dim  # the dim that is cut up, and put together again
    assert near is not None and far is not None
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
    yield exchange(incoming, outgoing, sizes_in, sizes_out, group)
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
