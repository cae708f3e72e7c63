"""Runs a model as its stage plan says, by hooks: the model's own code stays as it is.

Before a stage its tensor is brought to the stage's layout, after the last one back to the layout
that the rest of the model works in; what the model does in between sees a tensor that is smaller
in one dim. Every rank computes a part, so every rank has a part of each parameter's gradient: their
sum is the gradient (``sum_gradients``, or what the data-parallel wrapper sums).
"""

import inspect
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.utils.hooks import RemovableHandle

from longspan.comm.mesh import flat_group
from longspan.errors import LayoutError, ModelError
from longspan.models.stage_hooks import EndHooks, Outside, Sees, StageHooks
from longspan.plan import StagePlan, StageRow

__all__ = ["Outside", "Parallelized", "Sees", "parallelize_stages", "sum_gradients"]


@dataclass
class Parallelized:
    """A model that runs by a plan, until ``remove()``."""

    handles: list[RemovableHandle]

    def remove(self) -> None:
        """Take the hooks away: the model is as it was."""
        for handle in self.handles:
            handle.remove()


def parallelize_stages(
    model: nn.Module,
    plan: StagePlan,
    mesh: DeviceMesh,
    sees: Mapping[str, Sees],
    *,
    outside: Outside | None = None,
    chunks: int = 1,
    chunked: str = "batch",
) -> Parallelized:
    """Let ``model`` run its stages, which are modules by their names in it, as ``plan`` says.

    ``sees``: for module names (with ``*``), how they see their tensors. With ``chunks`` a stage
    runs in so many pieces of the dim ``chunked``, and while one is computed the next ones' switches
    are under way. The mesh's axes are the plan's. Tensors have the plan's sizes, but for dims that
    are never sharded. Where ``outside`` names a result, every rank's loss is of all of it; else
    divide it by the ranks that hold the same, if there are any.

    A stage that comes after several takes each one's result as an argument (``Sees.joins``).

    Raises ModelError if a stage is no module, none of ``sees`` fits it, or it takes what isn't
    there; LayoutError if the mesh isn't the plan's.
    """
    axes = {name: mesh.size(axis) for axis, name in enumerate(mesh.mesh_dim_names or ())}
    if axes != plan.axes:
        raise LayoutError(f"the plan is for a mesh of {plan.axes}, this one has {axes}")
    if chunks < 1:
        raise ModelError(f"{chunks} chunks: use 1 or more")
    modules = dict(model.named_modules())
    sequence = {dim for row in plan.stages for dim in (*row.mixes, *row.sharded) if dim}
    sequence |= {dim for dim in plan.outside if dim}
    sizes = {dim: size for row in plan.stages for dim, size in row.sizes.items() if dim in sequence}
    taken = {name for row in plan.stages for name in row.after}
    made: dict[str, tuple[str | None, ...]] = {}  # the layouts of the stages' results
    hooked = Parallelized([])
    try:
        for row in plan.stages:
            told = _told(row, made, modules, sees)
            stage = StageHooks(
                row=row,
                mesh=mesh,
                home=plan.outside,
                sources=[made[name] for name in row.after] or [plan.outside],
                leaves=row.name not in taken,
                told=told,
                signature=inspect.signature(modules[row.name].forward),
                sequence=frozenset(sequence),
                chunks=chunks,
                chunked=chunked,
            )
            hooked.handles += stage.attach(modules[row.name])
            made[row.name] = row.sharded
        ends = EndHooks(
            mesh=mesh,
            home=plan.outside,
            sizes=sizes,
            told=outside or Outside(),
            signature=inspect.signature(model.forward),
            leaves={name: made[name] for name in taken},
        )
        hooked.handles += ends.attach(model)
    except ModelError:
        hooked.remove()
        raise
    return hooked


def _told(
    row: StageRow,
    made: Iterable[str],
    modules: Mapping[str, nn.Module],
    sees: Mapping[str, Sees],
) -> Sees:
    if missing := [name for name in row.after if name not in made]:
        raise ModelError(f"stage {row.name!r} takes {missing[0]!r}'s result, which isn't before it")
    if row.name not in modules:
        raise ModelError(f"the model has no module {row.name!r}, which is a stage of the plan")
    told = next((one for name, one in sees.items() if fnmatchcase(row.name, name)), None)
    if told is None:
        raise ModelError(f"nothing says how stage {row.name!r} sees its tensor")
    return told


def sum_gradients(model: nn.Module, mesh: DeviceMesh) -> None:
    """Add up the parameters' gradients over the ranks of ``mesh``, which must all call it."""
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    if mesh.size() == 1 or not grads:
        return
    for dtype in dict.fromkeys(grad.dtype for grad in grads):
        some = [grad for grad in grads if grad.dtype is dtype]
        flat = torch.cat([grad.reshape(-1) for grad in some])
        dist.all_reduce(flat, group=flat_group(mesh))
        for grad, part in zip(some, flat.split([grad.numel() for grad in some]), strict=True):
            grad.copy_(part.view_as(grad))
