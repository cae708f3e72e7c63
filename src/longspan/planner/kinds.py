"""The kinds of layer: what each iterates over, and what it computes.

Each builder reads one node of torch.export's graph. Flops count a multiplication and an addition
as two. ``Given`` turns a node's arguments into operands and weights with named dims.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from types import MappingProxyType
from typing import Any

import torch
from torch import fx

from longspan.planner.graph import Dims, Layer, Operand, Weight
from longspan.schedule.splits import SPLITS

__all__ = ["BUILDERS", "Given", "group", "join", "made", "other"]


@dataclass(frozen=True, slots=True)
class Given:
    """A node's arguments: as a tensor that a layer is given, or as its parameter; None if not."""

    operand: Callable[[object, Sequence[str | None]], Operand | None]
    weight: Callable[[object, Sequence[str | None]], Weight | None]


def made(
    kind: str,
    rate: str,
    sizes: Mapping[str, int],
    inputs: Sequence[Operand | None],
    output: Operand,
    *,
    weights: Sequence[Weight | None] = (),
    flops: float = 0.0,
    moved: float | None = None,
    reduced: Mapping[str, float] | None = None,
    dtype: str = "float32",
) -> Layer:
    """A layer whose splits are those of its kind that its tensors allow.

    A dim can be split only if every tensor that has it names it so, and has more than one of it.
    """
    given = tuple(one for one in inputs if one is not None)
    held = tuple(one for one in weights if one is not None)
    splits = tuple(dim for dim in SPLITS[kind] if sizes.get(dim, 1) > 1)
    if moved is None:
        moved = sum(one.bytes for one in given) + output.bytes
        moved += sum(one.numel * one.itemsize for one in held)
    return Layer(
        name="",
        module="",
        node="",
        kind=kind,
        rate=rate,
        dtype=dtype,
        sizes=dict(sizes),
        flops=flops,
        bytes=moved,
        inputs=given,
        weights=held,
        output=output,
        splits=splits,
        reduced_bytes=dict(reduced or {}),
    )


def names(rank: int, last: str | None = "c") -> Dims:
    """Names of a tensor's dims: (b, c), (b, s, c) or (b, c, …); ``last`` for its last one."""
    if rank <= 1:
        return (last,) * rank if last != "c" else ("b",) * rank
    if rank == 2:
        return "b", last
    if rank == 3:
        return "b", "s", last
    return ("b", "c", *(None for _ in range(rank - 3)), last if last != "c" else None)


def _result(node: fx.Node) -> torch.Tensor:
    value = node.meta["val"]
    tensor = value[0] if isinstance(value, (list, tuple)) else value
    assert isinstance(tensor, torch.Tensor)
    return tensor


def _left(node: fx.Node, dims: Sequence[str | None]) -> Operand:
    tensor = _result(node)
    return Operand(tuple(tensor.shape), tuple(dims), tensor.element_size())


def _dtype(node: fx.Node) -> str:
    return str(_result(node).dtype).removeprefix("torch.")


def _sizes(*tensors: Operand | Weight | None) -> dict[str, int]:
    found: dict[str, int] = {}
    for one in tensors:
        for dim, size in zip(one.dims, one.shape, strict=True) if one else ():
            if dim is not None:
                found[dim] = size
    return found


def _shape(argument: Any) -> tuple[int, ...]:
    return tuple(argument.meta["val"].shape)


def _argument(node: fx.Node, place: int, name: str, default: Any = None) -> Any:
    return node.args[place] if len(node.args) > place else node.kwargs.get(name, default)


def _linear(node: fx.Node, given: Given) -> Layer | None:
    return _product(node, given, node.args[0], node.args[1], ("out", "in"), _argument(node, 2, "b"))


def _addmm(node: fx.Node, given: Given) -> Layer | None:
    return _product(node, given, node.args[1], node.args[2], ("in", "out"), node.args[0])


def _product(
    node: fx.Node, given: Given, x: Any, w: Any, order: tuple[str, str], bias: Any = None
) -> Layer | None:
    rank = len(_shape(x))
    if rank < 1 or len(_shape(w)) != 2:
        return None
    weight = given.weight(w, order)
    left = given.operand(x, names(rank, "in"))
    second = None if weight else given.operand(w, order)
    if left is None or (weight is None and (second is None or second.source is None)):
        return None
    out = _left(node, names(rank, "out"))
    held = [weight, given.weight(bias, ("out",)) if isinstance(bias, fx.Node) else None]
    sizes = _sizes(left, out)
    layer = made(
        "linear",
        "matmul",
        sizes,
        (left, second),
        out,
        weights=held,
        flops=2.0 * prod(out.shape) * sizes["in"],
        dtype=_dtype(node),
    )
    return _whole_weights(layer)


def _whole_weights(layer: Layer) -> Layer:
    """A part of a parameter can't be split further: its shards aren't the parameter's."""
    lost = {
        dim
        for dim in ("out", "in", "vocab")
        for weight in layer.weights
        if len(weight.shape) > 1 and dim in layer.sizes and dim not in weight.dims
    }
    layer.splits = tuple(dim for dim in layer.splits if dim not in lost)
    return layer


def _matmul(node: fx.Node, given: Given) -> Layer | None:
    x, w = node.args[-2:] if len(node.args) < 3 else node.args[1:3]
    layer = _product(node, given, x, w, ("in", "out"))
    if layer is not None:
        return layer
    out = _result(node)
    shapes = [_shape(x), _shape(w)]
    rank = out.ndim
    if rank < 3 or any(len(shape) != rank for shape in shapes):
        return None
    dims = ("b", "c") if rank > 3 else ("b",)
    dims = (*dims, *(None for _ in range(rank - len(dims))))

    def of(shape: tuple[int, ...]) -> list[str | None]:
        return [dim if shape[d] == out.shape[d] else None for d, dim in enumerate(dims)]

    inputs = [given.operand(x, of(shapes[0])), given.operand(w, of(shapes[1]))]
    left = _left(node, dims)
    flops = 2.0 * out.numel() * shapes[0][-1]
    return made("matmul", "matmul", _sizes(left), inputs, left, flops=flops, dtype=_dtype(node))


def _attention(node: fx.Node, given: Given) -> Layer | None:
    q, k, v = node.args[:3]
    shape, keys = _shape(q), _shape(k)
    if len(shape) != 4:
        return None
    dims = ("b", "heads", None, None)
    inputs = [given.operand(one, dims) for one in (q, k, v)]
    mask = _argument(node, 3, "attn_mask")
    if isinstance(mask, fx.Node):
        broadcast = _shape(mask)
        inside = [
            dim if at < len(dims) and size > 1 else None
            for at, (dim, size) in enumerate(
                zip(dims[4 - len(broadcast) :], broadcast, strict=True)
            )
        ]
        inputs.append(given.operand(mask, inside))
    causal = bool(_argument(node, 5, "is_causal", False))
    out = _left(node, dims)
    flops = 2.0 * prod(shape[:3]) * keys[2] * (shape[3] + out.shape[3])
    sizes = {"b": shape[0], "heads": min(shape[1], keys[1])}
    return made(
        "attention",
        "attention",
        sizes,
        inputs,
        out,
        flops=flops / 2 if causal else flops,
        dtype=_dtype(node),
    )


def _conv(node: fx.Node, given: Given) -> Layer | None:
    x, w = node.args[:2]
    rank = len(_shape(x))
    groups = int(_argument(node, 6, "groups", 1))
    space = (None,) * (rank - 2)
    kernel = _shape(w)
    each = groups == _shape(x)[1] > 1  # every channel by itself
    inner = "out" if each else "in"
    left = given.operand(x, ("b", inner, *space))
    weight = given.weight(w, ("out", None if groups > 1 else "in", *space))
    if left is None or weight is None:
        return None
    bias = _argument(node, 2, "bias")
    held = [weight, given.weight(bias, ("out",)) if isinstance(bias, fx.Node) else None]
    out = _left(node, ("b", "out", *space))
    layer = made(
        "conv",
        "conv",
        _sizes(left, out),
        (left,),
        out,
        weights=held,
        flops=2.0 * prod(out.shape) * prod(kernel[1:]),
        dtype=_dtype(node),
    )
    if groups > 1:
        keep = ("b", "out") if each else ("b",)
        layer.splits = tuple(dim for dim in layer.splits if dim in keep)
    return layer


def _embedding(node: fx.Node, given: Given) -> Layer | None:
    table, ids = node.args[:2]
    weight = given.weight(table, ("vocab", "out"))
    shared = None if weight else given.operand(table, ("vocab", "out"))
    rank = len(_shape(ids))
    out = _left(node, names(rank + 1, "out"))
    indices = given.operand(ids, out.dims[:-1])
    sizes = _sizes(out) | {"vocab": _shape(table)[0]}
    # A gather reads and writes what it takes, not the table.
    layer = made(
        "embedding",
        "gather",
        sizes,
        (indices, shared),
        out,
        weights=(weight,),
        moved=2.0 * out.bytes,
        dtype=_dtype(node),
    )
    return _whole_weights(layer)


def _normalised(node: fx.Node, given: Given, last: int, scales: Sequence[Any]) -> Layer:
    x = node.args[0]
    rank = len(_shape(x))
    kept = names(rank)[: rank - last]
    dims = (*kept, *(None for _ in range(last)))
    inputs = [given.operand(x, dims)]
    out = _left(node, dims)
    held = [given.weight(w, (None,) * len(_shape(w))) for w in scales if isinstance(w, fx.Node)]
    return made("norm", "elementwise", _sizes(out), inputs, out, weights=held, dtype=_dtype(node))


def _layer_norm(node: fx.Node, given: Given) -> Layer:
    shape = node.args[1]
    scales = [_argument(node, 2, "weight"), _argument(node, 3, "bias")]
    return _normalised(node, given, len(shape), scales)  # type: ignore[arg-type]


def _group_norm(node: fx.Node, given: Given) -> Layer:
    scales = [_argument(node, 2, "weight"), _argument(node, 3, "bias")]
    return _normalised(node, given, len(_shape(node.args[0])) - 1, scales)


def _batch_norm(node: fx.Node, given: Given) -> Layer:
    x = node.args[0]
    rank = len(_shape(x))
    dims = ("b", "c", *(None for _ in range(rank - 2)))
    scales = [w for w in node.args[1:3] if isinstance(w, fx.Node)]
    out = _left(node, dims)
    return made(
        "batch_norm",
        "elementwise",
        _sizes(out),
        [given.operand(x, dims)],
        out,
        weights=[given.weight(w, ("c",)) for w in scales],
        reduced={"b": 2.0 * out.shape[1] * out.itemsize},
        dtype=_dtype(node),
    )


def _pool(node: fx.Node, given: Given) -> Layer | None:
    x = node.args[0]
    before, after = _shape(x), tuple(_result(node).shape)
    rank = len(before)
    if rank < 3 or len(after) < 2 or after[:2] != before[:2]:
        return None
    left = given.operand(x, ("b", "c", *(None for _ in range(rank - 2))))
    out = _left(node, ("b", "c", *(None for _ in range(len(after) - 2))))
    return made("pool", "elementwise", _sizes(out), [left], out, dtype=_dtype(node))


def _softmax(node: fx.Node, given: Given) -> Layer:
    x = node.args[0]
    rank = len(_shape(x))
    gone = int(node.args[1]) % rank  # type: ignore[arg-type]
    dims = tuple(None if d == gone else dim for d, dim in enumerate(names(rank)))
    out = _left(node, dims)
    return made(
        "softmax", "elementwise", _sizes(out), [given.operand(x, dims)], out, dtype=_dtype(node)
    )


def _loss(node: fx.Node, given: Given) -> Layer | None:
    x = node.args[0]
    shape = _shape(x)
    out = _result(node)
    classes = len(shape) > 1 and _names_loss(node) in ("cross_entropy_loss", "nll_loss_nd")
    dims: list[str | None] = list(names(len(shape)))
    if len(shape) == 1:
        dims = ["b"]
    if classes:
        dims = ["b", "vocab", *(None for _ in shape[2:])]
    whole = out.ndim == 0
    left = given.operand(x, dims)
    if left is None or not whole:
        return None
    target = given.operand(node.args[1], ("b", *(None for _ in _shape(node.args[1])[1:])))
    sizes = _sizes(left)
    tokens = 4.0 * prod(shape) / shape[1] if classes else 0.0
    layer = made(
        "loss",
        "elementwise",
        sizes,
        (left, target),
        _left(node, ()),
        moved=3.0 * left.bytes if left.source is not None else 0.0,
        reduced={"b": 8.0, "s": 8.0, "vocab": 3.0 * tokens},
        dtype=_dtype(node),
    )
    if not classes or _names_loss(node) != "cross_entropy_loss":
        layer.splits = tuple(dim for dim in layer.splits if dim != "vocab")
    return layer


def _names_loss(node: fx.Node) -> str:
    return str(getattr(node.target, "_opname", node.target))


def _sum(node: fx.Node, given: Given) -> Layer | None:
    """A sum or mean: over all it is a loss, over other dims a pooling of those that stay."""
    x = node.args[0]
    shape, out = _shape(x), _result(node)
    left = given.operand(x, names(len(shape)))
    if left is None or left.source is None:
        return None
    if out.ndim == 0:
        sums = {dim: 8.0 for dim in ("b", "s")}
        kept = [dim if dim in sums else None for dim in left.dims]
        left = given.operand(x, kept)
        done = _left(node, ())
        return made("loss", "elementwise", _sizes(left), [left], done, reduced=sums)
    dims = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", ())
    listed = (dims,) if isinstance(dims, int) else tuple(dims or ())  # type: ignore[arg-type]
    gone = {int(dim) % len(shape) for dim in listed}
    kept = [None if d in gone else dim for d, dim in enumerate(left.dims)]
    keepdim = out.ndim == len(shape)
    stay = [dim for d, dim in enumerate(kept) if keepdim or d not in gone]
    done = _left(node, stay)
    inputs = [given.operand(x, kept)]
    return made("reduce", "elementwise", _sizes(done), inputs, done, dtype=_dtype(node))


def _recurrent(node: fx.Node, given: Given) -> Layer | None:
    x, _, params = node.args[:3]
    first = bool(node.args[8]) if len(node.args) > 8 else False
    shape = _shape(x)
    if len(shape) != 3:
        return None
    dims = ("b", None, None) if first else (None, "b", None)
    held = [given.weight(w, (None,) * len(_shape(w))) for w in params]  # type: ignore[union-attr]
    tokens = shape[0] * shape[1]
    numbers = sum(w.numel for w in held if w and len(w.shape) > 1)
    out = _left(node, dims)
    return made(
        "recurrent",
        "matmul",
        _sizes(out),
        [given.operand(x, dims)],
        out,
        weights=held,
        flops=2.0 * tokens * numbers,
        dtype=_dtype(node),
    )


def join(node: fx.Node, given: Given) -> Layer:
    """Several layers' outputs, number by number, or one behind the other."""
    out = _result(node)
    dims: list[str | None] = list(names(out.ndim))
    if getattr(node.target, "_opname", "") in ("cat", "stack"):
        along = int(node.args[1]) if len(node.args) > 1 else 0  # type: ignore[arg-type]
        dims[along % out.ndim] = None
    inputs, held = [], []
    for one in node.all_input_nodes:
        shape = _shape(one)
        extra = out.ndim - len(shape)
        inside = [
            dims[d + extra] if 0 <= d + extra and size == out.shape[d + extra] else None
            for d, size in enumerate(shape)
        ]
        inputs.append(given.operand(one, inside))
        held.append(given.weight(one, inside))
    done = _left(node, dims)
    return made("join", "elementwise", _sizes(done), inputs, done, weights=held, dtype=_dtype(node))


# Operations that never mix the first dim, for all of their arguments or by the dim they name.
_BY_ITEM = ("upsample", "pixel_", "pad", "grid_", "adaptive", "reflection", "replication", "glu")
_BY_DIM = ("topk", "sort", "cumsum", "flip", "roll", "argmax", "amax", "amin", "max", "logsumexp")


def other(node: fx.Node, inputs: Sequence[Operand]) -> Layer:
    """An operation that isn't known: split by the batch at most."""
    name = str(getattr(node.target, "_opname", node.target))
    safe = name.startswith(_BY_ITEM)
    if name in _BY_DIM:
        dim = next((a for a in reversed(node.args) if isinstance(a, int)), -1)
        dim = -1 if name == "topk" and len(node.args) < 3 else dim
        safe = int(node.kwargs.get("dim", dim)) % max(1, len(inputs[0].shape)) != 0  # type: ignore[arg-type]
    return _by_batch(node, inputs, (), safe)


def _by_batch(
    node: fx.Node, inputs: Sequence[Operand], weights: Sequence[Weight], safe: bool
) -> Layer:
    value = node.meta["val"]
    tensor = value[0] if isinstance(value, (list, tuple)) else value
    if not isinstance(tensor, torch.Tensor):
        done = Operand((), (), 0)
    else:
        dims = ["b" if d == 0 else None for d in range(tensor.ndim)]
        done = Operand(tuple(tensor.shape), tuple(dims), tensor.element_size())
    layer = made("other", "elementwise", _sizes(done), inputs, done, weights=weights)
    if not safe or not all(one.dims[:1] == ("b",) for one in inputs):
        layer.splits = ()
    return layer


def group(
    leaf: fx.Node,
    nodes: Sequence[fx.Node],
    given: Sequence[Operand],
    weights: tuple[Weight, ...],
    norm: bool,
) -> Layer:
    """A module that is one layer: a norm over the last dim, or a mixture's experts."""
    if norm and len(given) == 1 and given[0].shape == tuple(_result(leaf).shape):
        rank = len(given[0].shape)
        dims = (*names(rank)[: rank - 1], None)
        x = given[0]
        left = Operand(x.shape, dims, x.itemsize, x.source, x.through, x.grain)
        out = _left(leaf, dims)
        return made(
            "norm", "elementwise", _sizes(out), [left], out, weights=weights, dtype=_dtype(leaf)
        )
    layer = _by_batch(leaf, given, weights, safe=True)
    layer.rate, layer.dtype = "matmul", _dtype(leaf)
    for node in nodes:
        name = str(getattr(node.target, "_opname", node.target))
        if "mm" in name.split("_") or name in ("matmul", "bmm", "linear", "grouped_mm_fallback"):
            layer.flops += 2.0 * _result(node).numel() * _shape(node.args[0])[-1]
        if isinstance(value := node.meta.get("val"), torch.Tensor):
            layer.bytes += value.numel() * value.element_size()
    return layer


BUILDERS: Mapping[str, Callable[[fx.Node, Given], Layer | None]] = MappingProxyType(
    {
        "linear": _linear,
        "addmm": _addmm,
        "mm": _matmul,
        "matmul": _matmul,
        "bmm": _matmul,
        "baddbmm": _matmul,
        "scaled_dot_product_attention": _attention,
        **{f"conv{n}d": _conv for n in (1, 2, 3)},
        "embedding": _embedding,
        "layer_norm": _layer_norm,
        "rms_norm": _layer_norm,
        "group_norm": _group_norm,
        "batch_norm": _batch_norm,
        **{
            f"{kind}_pool{n}d": _pool
            for kind in ("max", "avg", "adaptive_avg", "adaptive_max")
            for n in (1, 2, 3)
        },
        "softmax": _softmax,
        "_softmax": _softmax,
        "log_softmax": _softmax,
        **{
            name: _loss
            for name in ("cross_entropy_loss", "nll_loss_nd", "mse_loss", "l1_loss",
                         "binary_cross_entropy_with_logits", "huber_loss", "smooth_l1_loss")
        },
        "mean": _sum,
        "sum": _sum,
        "lstm": _recurrent,
        "gru": _recurrent,
        "rnn_tanh": _recurrent,
        "rnn_relu": _recurrent,
    }
)  # fmt: skip
