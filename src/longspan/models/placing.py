"""Cuts a module's parameters as a plan of its layers has them."""

from collections.abc import Mapping

from torch import nn
from torch.distributed.tensor import Shard

from longspan.layout import layout_of
from longspan.models.pieces import Field, Piece
from longspan.plan import LayerChoice, LayerPlan
from longspan.schedule.keeping import kept_dim

__all__ = ["cut_of", "place"]


def place(module: nn.Module, plan: LayerPlan, field: Field) -> None:
    """Turn all parameters, the same on every rank, into DTensors on the field's mesh.

    A parameter is kept as its layer uses it, with ZeRO in shards of another dim too; one that no
    layer has is kept whole, and one under several names stays one.
    """
    homes: dict[str, LayerChoice] = {}
    for choice in plan.layers:
        for path in choice.weights:
            homes.setdefault(path, choice)
    every = list(module.named_parameters(remove_duplicate=False))
    home_of = {id(p): path for path, p in every if path in homes}  # one of a shared one's
    made: dict[int, nn.Parameter] = {}
    for path, parameter in every:
        owner, _, name = path.rpartition(".")
        if id(parameter) not in made:
            home, shape = home_of.get(id(parameter)), tuple(parameter.shape)
            cut = _cut(homes[home], home, shape, field) if home else {}
            local = field.take(Piece(parameter.detach(), shape, {}), cut).clone()
            spread = field.spread(local, shape, cut)
            made[id(parameter)] = nn.Parameter(spread, parameter.requires_grad)
        module.get_submodule(owner).register_parameter(name, made[id(parameter)])


def cut_of(words: Mapping[str, str]) -> dict[str, int]:
    """The dim that each mesh axis shards, of placements as a plan writes them."""
    placements = layout_of(words).placements
    return {axis: p.dim for axis, p in placements.items() if isinstance(p, Shard)}


def _cut(choice: LayerChoice, path: str, shape: tuple[int, ...], field: Field) -> dict[str, int]:
    cut = cut_of(choice.weights[path])
    if choice.zero:
        names = list(field.axes)
        used = [axis for axes in choice.splits.values() for axis in axes]
        apart = [names.index(axis) for axis in used if axis not in cut]
        own = {names.index(axis): dim for axis, dim in cut.items()}
        dim = kept_dim(shape, own, apart, list(field.axes.values()))
        if dim is not None:
            cut |= {names[axis]: dim for axis in apart}
    return cut
