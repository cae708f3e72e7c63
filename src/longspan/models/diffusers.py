"""Space-time transformers of diffusers, as they are."""

from typing import Any

from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from longspan.errors import LayoutError, ModelError
from longspan.layout import local_length
from longspan.models.stages import Outside, Parallelized, Sees, parallelize_stages
from longspan.plan import StagePlan

__all__ = ["parallelize_latte"]

_SEES = {
    "transformer_blocks.*": Sees(
        "(batch time) space channel",
        along={
            "encoder_hidden_states": "(batch time) words channel",
            "timestep": "(batch time) scales",
        },
        attention="attn1",
    ),
    "temporal_transformer_blocks.*": Sees(
        "(batch space) time channel", along={"timestep": "(batch space) scales"}, attention="attn1"
    ),
}
_OUTSIDE = Outside(
    inputs={"hidden_states": "batch colour time height width"},
    state={"temp_pos_embed": "one time channel"},
    after={"temp_pos_embed": "transformer_blocks.0"},
    result="batch colour time height width",
)


def parallelize_latte(
    model: nn.Module, plan: StagePlan, mesh: DeviceMesh, *, chunks: int = 1
) -> Parallelized:
    """``parallelize_stages`` for a ``LatteTransformer3DModel`` (diffusers), unmodified.

    Its stages are its ``transformer_blocks`` (dims batch, time, space, channel; mixes space) and
    ``temporal_transformer_blocks`` (mixes time) in turn; outside them at most time is sharded.
    Every rank gives the whole input and is given the whole result. Hooks follow its reshapes, but
    for two things: it adds no positions where it sees a single frame, so on such a rank they are
    added for it; and it can't reshape what is empty.

    Raises LayoutError if a rank would have no frame: plan with ``empty=False``. Else as
    ``parallelize_stages``.
    """
    positions = dict(model.named_buffers()).get("temp_pos_embed")
    if positions is None or not set(plan.outside) <= {"time", None}:
        raise ModelError("a Latte model, and a plan that shards time outside the stages, is needed")
    frames = here = positions.shape[1]
    for axis, dim in enumerate(plan.outside):
        if dim:
            here = local_length(here, mesh.get_local_rank(axis), mesh.size(axis), "contiguous")
            fewest = local_length(frames, mesh.size(axis) - 1, mesh.size(axis), "contiguous")
            if not fewest:
                raise LayoutError(
                    f"{frames} frames on {mesh.size(axis)} ranks: one would have none, which "
                    "Latte can't reshape; plan with empty=False, outside=['time']"
                )

    def add_positions(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        x, *others = args
        return (x + model.get_buffer("temp_pos_embed").to(x.dtype), *others)

    hooked = parallelize_stages(model, plan, mesh, _SEES, outside=_OUTSIDE, chunks=chunks)
    if here == 1 < frames:
        first = model.get_submodule("temporal_transformer_blocks.0")
        hooked.handles.append(first.register_forward_pre_hook(add_positions, prepend=True))
    return hooked
