"""Runs a layer as a plan splits it: its operation on shards, and the sums that belong to it.

What each dim is to a layer's tensors is said in ``schedule/splits.py``.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from longspan.models.follow import aligned, call_of, results, whole
from longspan.models.losses import loss
from longspan.models.pieces import Cut, Field, Piece
from longspan.models.placing import cut_of
from longspan.plan import LayerChoice
from longspan.schedule.splits import names
from longspan.schedule.views import base

__all__ = ["Row", "run_call", "run_group", "run_layer"]

Dims = Sequence[str | None]


@dataclass(frozen=True)
class Row:
    """A layer of a plan as it runs: ``cuts`` of its dims, and how its output is left."""

    choice: LayerChoice
    node: fx.Node
    field: Field

    @cached_property
    def axes(self) -> list[str]:
        """Those on which ranks do different things."""
        return [axis for axes in self.choice.splits.values() for axis in axes]

    def over(self, *dims: str) -> list[str]:
        """The axes that split these dims."""
        return [axis for dim in dims for axis in self.choice.splits.get(dim, ())]

    def cut(self, dims: Dims, shape: Sequence[int] | None = None) -> dict[str, int]:
        """How a tensor with these dims is cut; what it has only one of is not."""
        return {
            axis: at
            for at, dim in enumerate(dims)
            if dim is not None and (shape is None or shape[at] > 1)
            for axis in self.over(dim)
        }

    def take(self, piece: Piece | None, dims: Dims, together: bool = False) -> Any:
        """This rank's part of a tensor with these dims; ``together`` with others that take it."""
        if piece is None:
            return None
        take = self.field.taken if together else self.field.take
        return take(piece, self.cut(dims, piece.shape), self.axes)

    @cached_property
    def left(self) -> Cut:
        """How the plan leaves the output."""
        return cut_of(self.choice.output)

    @cached_property
    def shape(self) -> tuple[int, ...]:
        """Of the whole output, or of the first of several."""
        return tuple(_value(self.node).shape)

    def done(self, x: Tensor, dims: Dims, bias: Piece | None = None) -> Piece:
        """The output of what ranks hold of it; dims that it lacks are summed over."""
        shape, cut = self.shape, self.cut(dims)
        summed = [axis for axis in self.axes if axis not in cut]
        to = self.left
        piece = self.field.summed(x, shape, cut, summed, to)
        if bias is None:
            return piece
        at = list(dims).index("out")
        mine = {axis: 0 for axis, dim in to.items() if dim == at}
        added = self.field.take(bias, mine, to)
        added = added.reshape(-1, *(1 for _ in shape[at + 1 :]))
        return Piece(piece.local + added, shape, piece.cut)


def run_layer(row: Row, args: Any, kwargs: Any) -> Any:
    """A layer's output, from its node's arguments; its value, or several."""
    # A batch norm must not count what it has seen twice if it runs again.
    if not row.axes and row.choice.kind != "batch_norm":
        made = whole(row.field, row.node, args, kwargs)
    else:
        made = RUNNERS[row.choice.kind](row, args, kwargs)
    first = made[0] if isinstance(made, list) else made
    if isinstance(first, Piece) and first.cut != row.left:
        first = Piece(row.field.take(first, row.left), first.shape, row.left)
    return [first, *made[1:]] if isinstance(made, list) else first


def run_group(row: Row, nodes: Sequence[fx.Node], given: Mapping[fx.Node, Any]) -> Piece:
    """A norm that is written out in several operations, from what is given to all of them."""
    dims = (*names(len(_value(row.node).shape))[:-1], None)
    here: dict[fx.Node, Any] = {}
    for node, value in given.items():
        if isinstance(value, Piece):
            rank = len(value.shape)
            mine = dims[len(dims) - rank :] if rank == len(dims) else (None,) * rank
            value = row.take(value, mine)
        here[node] = value
    for node in nodes:
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda one: here[one])
        if node.meta.get("val") is not None:
            here[node] = call_of(node)(*args, **kwargs)
    return row.done(here[row.node], dims)


def run_call(row: Row, module: nn.Module, given: Sequence[Piece]) -> Piece:
    """A module that is one layer, called with this rank's items."""
    field = row.field
    weights = {
        path: row.take(
            replace(field.given(parameter), gathered=row.choice.zero), (None,) * parameter.ndim
        )
        for path, parameter in module.named_parameters()
    }
    mine = [row.take(piece, ("b", *(None for _ in piece.shape[1:]))) for piece in given]
    out = torch.func.functional_call(module, weights, tuple(mine))
    return row.done(out, ("b", *(None for _ in out.shape[1:])))


def _value(node: fx.Node) -> Tensor:
    value = node.meta["val"]
    return value[0] if isinstance(value, (list, tuple)) else value  # type: ignore[no-any-return]


def _at(args: Any, kwargs: Any, place: int, name: str, default: Any = None) -> Any:
    return args[place] if len(args) > place else kwargs.get(name, default)


def _linear(row: Row, args: Any, kwargs: Any) -> Piece:
    name = base(row.node)
    bias = None
    if name == "linear":
        x, w, bias, order = args[0], args[1], _at(args, kwargs, 2, "bias"), ("out", "in")
    elif name == "addmm":
        bias, x, w = args[:3]
        order = ("in", "out")
    else:
        x, w, order = args[0], args[1], ("in", "out")
    rank = len(x.shape)
    # Products of one tensor choose together, and it is moved once.
    mine, weight = row.take(x, names(rank, "in"), together=True), row.take(w, order)
    out = names(rank, "out")
    if name != "linear":
        weight = weight.t()
    if bias is not None and not row.over("in"):
        return row.done(F.linear(mine, weight, row.take(bias, ("out",))), out)
    return row.done(F.linear(mine, weight), out, bias)


def _matmul(row: Row, args: Any, kwargs: Any) -> Piece:
    out = _value(row.node).shape
    dims = ("b", "c") if len(out) > 3 else ("b",)
    dims = (*dims, *(None for _ in range(len(out) - len(dims))))
    return row.done(torch.matmul(*(row.take(x, dims) for x in args)), dims)


def _conv(row: Row, args: Any, kwargs: Any) -> Piece:
    x, w, bias = args[0], args[1], _at(args, kwargs, 2, "bias")
    settings = list(args[3:])
    groups = _at(args, kwargs, 6, "groups", 1)
    each = groups == x.shape[1] > 1
    space = (None,) * (len(x.shape) - 2)
    mine = row.take(x, ("b", "out" if each else "in", *space))
    weight = row.take(w, ("out", None if groups > 1 else "in", *space))
    if each and row.over("out"):
        settings[3] = groups // row.field.split(row.over("out"))[0]
    out = ("b", "out", *space)
    inner = bias is not None and not row.over("in")
    y = row.node.target(mine, weight, row.take(bias, ("out",)) if inner else None, *settings)  # type: ignore[operator]
    return row.done(y, out, None if inner else bias)


def _embedding(row: Row, args: Any, kwargs: Any) -> Piece:
    table, ids = args[:2]
    pad = _at(args, kwargs, 2, "padding_idx", -1)
    out = names(len(ids.shape) + 1, "out")
    weight, tokens = row.take(table, ("vocab", "out")), row.take(ids, out[:-1])
    pad = pad if pad is not None and pad >= 0 else None
    if not row.over("vocab"):
        return row.done(F.embedding(tokens, weight, pad), out)
    rows = weight.shape[0]
    start = row.field.split(row.over("vocab"))[1] * rows
    inside = (tokens >= start) & (tokens < start + rows)
    pad = pad - start if pad is not None and start <= pad < start + rows else None
    found = F.embedding((tokens - start).clamp(0, rows - 1), weight, pad)
    return row.done(found.masked_fill(~inside.unsqueeze(-1), 0), out)


def _attention(row: Row, args: Any, kwargs: Any) -> Piece:
    dims = ("b", "heads", None, None)
    q, k, v = (row.take(x, dims) for x in args[:3])
    mask = _at(args, kwargs, 3, "attn_mask")
    if mask is not None:
        mask = row.take(mask, dims[4 - len(mask.shape) :])
    rest = {n: x for n, x in kwargs.items() if n != "attn_mask"}
    y = F.scaled_dot_product_attention(q, k, v, mask, *args[4:6], **rest)
    return row.done(y, dims)


def _norm(row: Row, args: Any, kwargs: Any) -> Any:
    name, rank = base(row.node), len(_value(row.node).shape)
    last = rank - 1 if name == "group_norm" else len(args[1])
    dims = (*names(rank)[: rank - last], *(None for _ in range(last)))
    x = row.take(args[0], dims)
    rest = [row.take(a, (None,) * len(a.shape)) if isinstance(a, Piece) else a for a in args[1:]]
    more = {n: row.take(a, (None,)) if isinstance(a, Piece) else a for n, a in kwargs.items()}
    return row.done(row.node.target(x, *rest, **more), dims)  # type: ignore[operator]


def _batch_norm(row: Row, args: Any, kwargs: Any) -> Piece:
    x, w, b, mean, var, training, momentum, eps = args[:8]
    shape = x.shape
    dims = ("b", "c", *(None for _ in shape[2:]))
    mine = row.take(x, dims)
    weight, bias = row.take(w, ("c",)), row.take(b, ("c",))
    if not training:
        mean, var = (row.take(one, ("c",)) for one in (mean, var))
        return row.done(F.batch_norm(mine, mean, var, weight, bias, False, momentum, eps), dims)
    over = [d for d in range(len(shape)) if d != 1]
    count = x.local.new_empty(()).new_tensor(float(torch.Size(shape).numel() // shape[1]))
    view = (1, -1, *(1 for _ in shape[2:]))
    axes = row.over("b")
    here = row.field.reduce(mine.sum(over), axes, axes) / count
    centred = mine - here.view(view)
    spread = row.field.reduce(centred.square().sum(over), axes, axes) / count
    y = centred * torch.rsqrt(spread + eps).view(view)
    y = y if weight is None else y * weight.view(view)
    y = y if bias is None else y + bias.view(view)
    if mean is not None and not row.field.is_again:
        with torch.no_grad():
            cut = dict.fromkeys(row.over("c"), 0)
            unbiased = spread.detach() * (count / (count - 1))
            for buffer, now in ((mean, here.detach()), (var, unbiased)):
                found = row.field.take(Piece(now, buffer.shape, cut), {})
                buffer.local.lerp_(found.to(buffer.local.dtype), momentum)
    return row.done(y, dims)


def _plain(row: Row, args: Any, kwargs: Any) -> Piece:
    """An operation whose shards are those of its first argument."""
    x, out = args[0], _value(row.node)
    rank = len(x.shape)
    kind = row.choice.kind
    dims: list[str | None] = list(names(rank))
    if kind == "pool":
        dims = ["b", "c", *(None for _ in range(rank - 2))]
    gone: set[int] = set()
    keepdim = out.ndim == rank
    if kind == "softmax":
        dims[int(args[1]) % rank] = None
    elif kind == "reduce":
        listed = _at(args, kwargs, 1, "dim", ())
        gone = {int(d) % rank for d in ((listed,) if isinstance(listed, int) else listed)}
        dims = [None if d in gone else dim for d, dim in enumerate(dims)]
    mine = row.take(x, dims)
    left = [dim for d, dim in enumerate(dims) if keepdim or d not in gone]
    left = left[: out.ndim]
    y = row.node.target(mine, *args[1:], **kwargs)  # type: ignore[operator]
    return row.done(y, left)


def _other(row: Row, args: Any, kwargs: Any) -> Any:
    x = args[0]
    mine = row.take(x, ("b", *(None for _ in x.shape[1:])))
    made = row.node.target(mine, *args[1:], **kwargs)  # type: ignore[operator]
    return results(row.node, made, dict.fromkeys(row.over("b"), 0))


def _recurrent(row: Row, args: Any, kwargs: Any) -> list[Piece]:
    x, hidden, weights = args[:3]
    first = bool(args[8]) if len(args) > 8 else False
    dims = ("b", None, None) if first else (None, "b", None)
    many = isinstance(hidden, (list, tuple))
    states = [row.take(h, (None, "b", None)) for h in (hidden if many else [hidden])]
    held = [row.take(w, (None,) * len(w.shape)) for w in weights]
    made = row.node.target(row.take(x, dims), states if many else states[0], held, *args[3:])  # type: ignore[operator]
    out, *after = results(row.node, list(made), {})
    out = Piece(out.local, out.shape, row.cut(dims))
    return [out, *(Piece(one.local, one.shape, row.cut((None, "b", None))) for one in after)]


def _join(row: Row, args: Any, kwargs: Any) -> Piece:
    out = _value(row.node)
    dims: list[str | None] = list(names(out.ndim))
    if base(row.node) in ("cat", "stack"):
        dims[int(_at(args, kwargs, 1, "dim", 0)) % out.ndim] = None
    cut = row.cut(dims)
    args, kwargs = aligned(row.field, row.node, args, kwargs, cut, cut)
    return row.done(call_of(row.node)(*args, **kwargs), dims)


def _loss(row: Row, args: Any, kwargs: Any) -> Piece:
    name = base(row.node)
    if name in ("mean", "sum"):
        x = args[0]
        dims = [dim if dim in ("b", "s") else None for dim in names(len(x.shape))]
        y = row.field.reduce(row.take(x, dims).sum().double(), row.axes)
        y = y / torch.Size(x.shape).numel() if name == "mean" else y
        return Piece(y.to(_value(row.node).dtype), (), {})
    x, target = args[:2]
    dims = list(names(len(x.shape)))
    if name in ("cross_entropy_loss", "nll_loss_nd"):
        dims = ["b", "vocab", *(None for _ in x.shape[2:])]
    if len(target.shape) == len(x.shape):
        goal = row.take(target, dims)
    else:
        goal = row.take(target, [dim for dim in dims if dim != "vocab"])
    mine = row.take(x, dims)
    y = loss(row.field, row.node, mine, goal, args, kwargs, row.over("b", "s"), row.over("vocab"))
    return Piece(y, (), {})


RUNNERS: Mapping[str, Callable[[Row, Any, Any], Any]] = MappingProxyType(
    {
        "linear": _linear,
        "matmul": _matmul,
        "conv": _conv,
        "embedding": _embedding,
        "attention": _attention,
        "norm": _norm,
        "batch_norm": _batch_norm,
        "recurrent": _recurrent,
        "join": _join,
        "loss": _loss,
        "other": _other,
        **dict.fromkeys(("pool", "softmax", "reduce"), _plain),
    }
)
