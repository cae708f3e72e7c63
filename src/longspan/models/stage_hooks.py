"""The hooks that run a stage, and a whole model, in the layouts of a stage plan."""

import inspect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Partial, Replicate, Shard
from torch.utils.hooks import RemovableHandle

from longspan.comm.redistribute import Moving, redistribute, redistribute_chunks, start_redistribute
from longspan.errors import ModelError
from longspan.layout import Layout, local_length
from longspan.models.forms import Form
from longspan.models.mixing import SharedAttention
from longspan.plan import StageRow

__all__ = ["EndHooks", "Outside", "Sees", "StageHooks"]

_Sharded = tuple[str | None, ...]


@dataclass(frozen=True)
class Sees:
    """How a stage's module sees what it is called with; see ``Form``.

    ``tensor``: its first argument, and what it returns (or the first of what it returns).
    ``joins``: arguments by name that are other stages' results: where a stage comes after several,
    the first argument is the first one's, these are the next ones' in turn. ``along``: other
    arguments by name, which the model's own code makes from its shards; those of their dims that a
    stage shards are cut with it. ``attention``: the submodule whose
    ``scaled_dot_product_attention`` mixes the stage's dim, where it is sharded meanwhile.
    """

    tensor: str
    joins: Mapping[str, str] = field(default_factory=dict)
    along: Mapping[str, str] = field(default_factory=dict)
    attention: str = ""


@dataclass(frozen=True)
class Outside:
    """What the whole model is given and gives.

    ``inputs``: arguments by name that are whole on every rank, and are cut. ``state``: buffers and
    parameters by name that are cut while the model runs, as the tensor is outside the stages, or
    where ``after`` names a stage, as it is when it leaves that one. ``result``: what it returns, to
    be gathered; without it each rank keeps its share, and the loss is the sum over ranks.
    """

    inputs: Mapping[str, str] = field(default_factory=dict)
    state: Mapping[str, str] = field(default_factory=dict)
    after: Mapping[str, str] = field(default_factory=dict)
    result: str | None = None


@dataclass
class StageHooks:
    """A stage's hooks; ``sources`` are the layouts that its arguments come in.

    ``leaves``: no other stage takes its result, which goes back to the layout outside.
    """

    row: StageRow
    mesh: DeviceMesh
    home: _Sharded
    sources: Sequence[_Sharded]
    leaves: bool
    told: Sees
    signature: inspect.Signature
    sequence: frozenset[str]
    chunks: int
    chunked: str
    held: dict[str, int] = field(default_factory=dict)
    done: list[Tensor | Moving] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.form = Form.of(self.told.tensor)
        self.along = {name: Form.of(words) for name, words in self.told.along.items()}
        joins = {name: Form.of(words) for name, words in self.told.joins.items()}
        self.takes = {next(iter(self.signature.parameters), ""): self.form} | joins
        if len(self.takes) != len(self.sources):
            raise ModelError(
                f"stage {self.row.name!r} takes {len(self.sources)} results, and its first "
                f"argument and joins are {len(self.takes)}"
            )
        for name in (*joins, *self.along):
            if name not in self.signature.parameters:
                raise ModelError(f"stage {self.row.name!r} has no argument {name!r}")

    def attach(self, module: nn.Module) -> list[RemovableHandle]:
        """Put the hooks on."""
        handles: list[RemovableHandle] = []
        if self.row.inside != "nothing":
            (axis,) = (at for at, dim in enumerate(self.row.sharded) if dim in self.row.mixes)
            names = self.mesh.mesh_dim_names or ()
            line = self.mesh if self.mesh.ndim == 1 else self.mesh[names[axis]]
            length = self.row.sizes[self.row.sharded[axis] or ""]
            shared = SharedAttention(line, length, self.row.inside, self.row.name)
            handles += shared.attach(module, self.told.attention)  # first, as it may refuse
        handles.append(module.register_forward_pre_hook(self.enter, with_kwargs=True))
        handles.append(module.register_forward_hook(self.leave))
        return handles

    def enter(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Bring the arguments to the stage's layout; run all chunks but the last."""
        self.done.clear()
        bound = self.signature.bind(*args, **kwargs)
        self.held = {}
        given, taken = bound.arguments, []
        for (name, form), source in zip(self.takes.items(), self.sources, strict=True):
            x = self._unfold(form, given[name], source, f"its {name}")
            self.held = dict(zip(form.names, x.shape, strict=True)) | self.held
            taken.append((form, x, source))
        others = {
            name: self._cut(name, form, given[name])
            for name, form in self.along.items()
            if isinstance(given.get(name), Tensor)
        }
        count = 1
        if all(self.chunked in form.names for form in self.takes.values()):
            count = max(1, min(self.chunks, self.held[self.chunked]))
        arriving = zip(*(self._moved(count, *one) for one in taken), strict=True)
        for number, pieces in enumerate(arriving):
            self.held = dict(zip(self.form.names, pieces[0].shape, strict=True))
            for (name, form), piece in zip(self.takes.items(), pieces, strict=True):
                given[name] = form.fold(piece)
            for name, other in others.items():
                form = self.along[name]
                given[name] = form.fold(self._pieces(form, other, count)[number])
            if number < count - 1:
                self._finish(module.forward(*bound.args, **bound.kwargs))
        return bound.args, bound.kwargs

    def leave(self, module: nn.Module, args: Any, out: Any) -> Any:
        """Join the chunks; bring what no other stage takes back."""
        self._finish(out)
        parts = [one.wait() if isinstance(one, Moving) else one for one in self.done]
        self.done.clear()
        if len(parts) == 1 and not self.leaves:
            return out
        at = self.form.names.index(self.chunked) if len(parts) > 1 else 0
        whole = self.form.fold(torch.cat(parts, at) if len(parts) > 1 else parts[0])
        return _with_first(out, whole)

    def _finish(self, out: Any) -> None:
        y = _first(out)
        y = self.form.unfold(y, self.held, f"stage {self.row.name!r}: its result")
        if not self.leaves:
            self.done.append(y)
            return
        here, home = self._of(self.form, self.row.sharded), self._of(self.form, self.home)
        lengths = self._lengths(self.form)
        moving = start_redistribute(
            y, here, home, self.mesh, length=lengths, grad=Partial(), sums=False
        )
        self.done.append(moving)

    def _moved(self, count: int, form: Form, x: Tensor, source: _Sharded) -> Iterator[Tensor]:
        """A result in the stage's layout, in pieces, which all set off at once."""
        return redistribute_chunks(
            self._pieces(form, x, count),
            self._of(form, source),
            self._of(form, self.row.sharded),
            self.mesh,
            length=self._lengths(form, source),
            grad=Partial(),
            sums=False,
            ahead=count,
        )

    def _cut(self, name: str, form: Form, x: Tensor) -> Tensor:
        """An argument that comes along, unfolded in the stage's layout."""
        x = self._unfold(form, x, self.home, f"its {name}")
        src, dst = self._of(form, self.home), self._of(form, self.row.sharded)
        return redistribute(
            x, src, dst, self.mesh, length=self._lengths(form), grad=Partial(), sums=False
        )

    def _pieces(self, form: Form, x: Tensor, count: int) -> Sequence[Tensor]:
        """Of the chunked dim; a tensor without it is whole in each."""
        if count == 1 or self.chunked not in form.names:
            return [x] * count
        at = form.names.index(self.chunked)
        size, more = divmod(x.shape[at], count)
        pieces: Sequence[Tensor] = x.split([size + (number < more) for number in range(count)], at)
        return pieces

    def _of(self, form: Form, sharded: _Sharded) -> Layout:
        return _layout(self.mesh, sharded, form.names)

    def _lengths(self, form: Form, *sources: _Sharded) -> dict[int, int]:
        sharded = {name for one in (self.home, self.row.sharded, *sources) for name in one}
        return {
            at: self.row.sizes[name]
            for at, name in enumerate(form.names)
            if name in self.row.sizes and name in sharded
        }

    def _unfold(self, form: Form, x: Tensor, sharded: _Sharded, what: str) -> Tensor:
        """By what the plan says of dims that are sharded, and the stage's own tensor of others."""
        whole = {name: size for name, size in self.row.sizes.items() if name in self.sequence}
        others = {name: size for name, size in self.held.items() if name not in self.sequence}
        known = others | whole | _local(self.mesh, sharded, whole)
        return form.unfold(x, known, f"stage {self.row.name!r}: {what}", self.row.sizes)


@dataclass
class EndHooks:
    """The whole model's hooks."""

    mesh: DeviceMesh
    home: _Sharded
    sizes: Mapping[str, int]
    told: Outside
    signature: inspect.Signature
    leaves: Mapping[str, _Sharded]
    state: dict[str, Tensor] = field(default_factory=dict)

    def attach(self, model: nn.Module) -> list[RemovableHandle]:
        """Put the hooks on."""
        for name in self.told.inputs:
            if name not in self.signature.parameters:
                raise ModelError(f"the model has no argument {name!r}")
        known = {name for name, _ in (*model.named_parameters(), *model.named_buffers())}
        if missing := self.told.state.keys() - known:
            raise ModelError(f"the model has no parameter or buffer {min(missing)!r}")
        return [
            model.register_forward_pre_hook(self.enter, with_kwargs=True),
            model.register_forward_hook(self.leave),
            model.register_forward_hook(self.restore, always_call=True),
        ]

    def enter(
        self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Cut what is whole."""
        bound = self.signature.bind(*args, **kwargs)
        for name, words in self.told.inputs.items():
            if isinstance(bound.arguments.get(name), Tensor):
                bound.arguments[name] = self._cut(bound.arguments[name], words, name, self.home)
        for name, words in self.told.state.items():
            tensors, key = _place(model, name)
            whole = tensors[key]
            assert whole is not None
            self.state[name] = whole
            sharded = self.leaves.get(self.told.after.get(name, ""), self.home)
            tensors[key] = self._cut(whole, words, name, sharded)
        return bound.args, bound.kwargs

    def restore(self, model: nn.Module, args: Any, out: Any) -> None:
        """Give the model back what it has of its own."""
        for name, whole in self.state.items():
            tensors, key = _place(model, name)
            tensors[key] = whole
        self.state.clear()

    def leave(self, model: nn.Module, args: Any, out: Any) -> Any:
        """Gather the result, whose gradient is whole on every rank then."""
        if self.told.result is None:
            return out
        y = _first(out)
        form = Form.of(self.told.result)
        known = dict(self.sizes) | _local(self.mesh, self.home, self.sizes)
        y = form.unfold(y, known, "the model's result")
        src = _layout(self.mesh, self.home, form.names)
        y = redistribute(y, src, Layout(), self.mesh, length=self._lengths(form), grad=Replicate())
        alike = [
            self.mesh.size(axis)
            for axis, name in enumerate(self.mesh.mesh_dim_names or ())
            if name not in src.placements
        ]
        # Ranks that hold the same all have its gradient: each has a share of the sum.
        if prod(alike) > 1 and y.requires_grad:
            y = y.view_as(y)
            y.register_hook(lambda grad: grad / prod(alike))
        return _with_first(out, form.fold(y))

    def _cut(self, x: Tensor, words: str, name: str, sharded: _Sharded) -> Tensor:
        form = Form.of(words)
        y = form.unfold(x, self.sizes, name)
        dst = _layout(self.mesh, sharded, form.names)
        return form.fold(redistribute(y, Layout(), dst, self.mesh, grad=Partial(), sums=False))

    def _lengths(self, form: Form) -> dict[int, int]:
        return {at: self.sizes[name] for at, name in enumerate(form.names) if name in self.sizes}


def _layout(mesh: DeviceMesh, sharded: _Sharded, names: Sequence[str]) -> Layout:
    """That layout of a tensor with these dims; those it hasn't got are whole."""
    axes = mesh.mesh_dim_names or ()
    return Layout(
        {
            axis: Shard(names.index(dim))
            for axis, dim in zip(axes, sharded, strict=True)
            if dim in names
        }
    )


def _local(mesh: DeviceMesh, sharded: _Sharded, sizes: Mapping[str, int]) -> dict[str, int]:
    """How long sharded dims are on this rank."""
    found: dict[str, int] = {}
    for axis, dim in enumerate(sharded):
        if dim is not None and dim in sizes:
            length = found.get(dim, sizes[dim])
            found[dim] = local_length(
                length, mesh.get_local_rank(axis), mesh.size(axis), "contiguous"
            )
    return found


def _place(model: nn.Module, name: str) -> tuple[dict[str, Tensor | None], str]:
    """Where a module keeps a parameter or buffer."""
    path, _, key = name.rpartition(".")
    module = model.get_submodule(path)
    kept = module._parameters if key in module._parameters else module._buffers
    return cast(dict[str, Tensor | None], kept), key


def _first(out: Any) -> Tensor:
    """The tensor that a module returns, alone or as the first of several."""
    y = out if isinstance(out, Tensor) else out[0]
    assert isinstance(y, Tensor)
    return y


def _with_first(out: Any, y: Tensor) -> Any:
    if isinstance(out, Tensor):
        return y
    if isinstance(out, tuple):
        return (y, *out[1:])
    key = next(iter(out))
    return type(out)(**{**out, key: y})
