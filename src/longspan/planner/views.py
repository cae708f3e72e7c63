"""What single operations do to a tensor: look at it in another way, change its numbers, or more."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from longspan.planner.follow import Through, narrowed, permuted, reshaped, then
from longspan.planner.graph import Operand

__all__ = [
    "COPIES", "ELEMENTWISE", "FREE", "KEEPS_NONE", "KEEPS_OUT", "PICKS", "Value", "Way", "base",
    "bytes_of", "looked_at", "of_node", "of_tensor", "users_of",
]  # fmt: skip

PICKS = {
    "slice",
    "narrow",
    "select",
    "split",
    "split_with_sizes",
    "chunk",
    "unbind",
    "tensor_split",
}
MOVES = {"transpose", "permute", "t", "numpy_T", "swapaxes", "movedim", "expand", "expand_as"}
COPIES = {"contiguous", "clone", "_to_copy", "repeat", "cat", "stack", "pad", "constant_pad_nd"}
VIEWS = {"view", "reshape", "_unsafe_view", "flatten", "unflatten", "squeeze", "unsqueeze"}
FREE = PICKS | MOVES | VIEWS | {"to", "detach", "alias", "view_as", "lift_fresh_copy"}
# Number by number: what comes out has the shape of what goes in (broadcast together).
KEEPS_NONE = {"add", "sub", "rsub", "neg", "dropout", "clone", "contiguous", "_to_copy", "cat"}
KEEPS_OUT = {
    "relu",
    "sigmoid",
    "tanh",
    "exp",
    "sqrt",
    "rsqrt",
    "softmax",
    "leaky_relu",
    "hardtanh",
}
ELEMENTWISE = KEEPS_NONE | KEEPS_OUT | {
    "mul", "div", "pow", "gelu", "silu", "mish", "elu", "selu", "softplus", "log", "log1p", "abs",
    "sin", "cos", "clamp", "clamp_min", "clamp_max", "where", "masked_fill", "maximum", "minimum",
    "hardswish", "hardsigmoid", "square", "reciprocal", "erf", "bernoulli", "type_as", "addcmul",
    "logsigmoid", "relu6", "celu", "glu", "zeros_like", "ones_like", "full_like", "sign", "tril",
    "triu", "lerp", "feature_dropout", "alpha_dropout", "float_power", "logical_not", "floor",
    "softcap", "nan_to_num", "round", "copy", "eq", "ne", "lt", "le", "gt", "ge", "expm1",
}  # fmt: skip


Way = tuple[Through, tuple[int, ...]]


@dataclass(frozen=True, slots=True)
class Value:
    """What a node of torch's graph is: a layer's output looked at in some way, or a parameter.

    ``source`` None: neither, so it costs nothing wherever it is. ``root``: the node whose numbers
    these are, the same for all its views.
    """

    shape: tuple[int, ...]
    itemsize: int
    source: int | None = None
    through: Through = ()
    grain: tuple[int, ...] = ()
    path: str | None = None
    root: fx.Node | None = None

    def operand(self, dims: Sequence[str | None]) -> Operand:
        return Operand(
            self.shape, tuple(dims), self.itemsize, self.source, self.through, self.grain
        )


def looked_at(node: fx.Node, name: str, value: Value) -> Way | None:
    """The giver's dims that the output's are, or None if it is more than another look."""
    result = node.meta["val"]
    one = result[0] if isinstance(result, (list, tuple)) else result
    after = tuple(one.shape)
    before, args = value.shape, node.args
    step: Through
    if name in PICKS:
        dim = _dim(node, name, len(before))
        kept = [d for d in range(len(before)) if d != dim or name not in ("select", "unbind")]
        step = tuple(d if d != dim or before[d] == after[kept.index(d)] else None for d in kept)
    elif name in ("transpose", "swapaxes"):
        order = list(range(len(before)))
        a, b = int(args[1]), int(args[2])  # type: ignore[arg-type]
        order[a], order[b] = order[b], order[a]
        step = tuple(order)
    elif name in ("t", "numpy_T"):
        step = tuple(reversed(range(len(before))))
    elif name == "permute":
        step = permuted(args[1])  # type: ignore[arg-type]
    elif name in ("cat", "stack"):
        dim = int(node.args[1]) if len(node.args) > 1 else 0  # type: ignore[arg-type]
        if name == "stack":
            dim %= len(after)
            step = (*range(dim), None, *range(dim, len(before)))
        else:
            dim %= len(after)
            step = tuple(None if d == dim else d for d in range(len(after)))
    elif name in VIEWS:
        step = reshaped(before, after)
    elif name in ("expand", "expand_as", "repeat") or name in ELEMENTWISE or name in (
        "to", "detach", "alias", "view_as", "type_as", "lift_fresh_copy", "pad",
        "constant_pad_nd", "clone", "contiguous", "_to_copy",
    ):  # fmt: skip
        extra = len(after) - len(before)
        step = (None,) * extra + tuple(
            d if size == after[d + extra] else None for d, size in enumerate(before)
        )
        if name in ("tril", "triu"):
            step = (*step[:-2], None, None)
    else:
        return None
    return then(value.through, step), narrowed(value.grain, step, after)


def base(node: fx.Node) -> str:
    """The operation's name, without overload; in place or not is the same."""
    target = node.target
    name = getattr(target, "_opname", None) or getattr(target, "__name__", str(target))
    return str(name).rstrip("_") if not str(name).startswith("__") else str(name)


def of_tensor(tensor: Any) -> Value:
    if not isinstance(tensor, torch.Tensor):
        return Value((), 0)
    return Value(tuple(int(size) for size in tensor.shape), tensor.element_size())


def of_node(node: fx.Node) -> Value:
    value = node.meta.get("val")
    if isinstance(value, (list, tuple)):
        value = value[0] if value else None
    return of_tensor(value)


def bytes_of(value: Any) -> int:
    if isinstance(value, (list, tuple)):
        return sum(map(bytes_of, value))
    return value.numel() * value.element_size() if isinstance(value, torch.Tensor) else 0


def _dim(node: fx.Node, name: str, dims: int) -> int:
    """The dim that a pick picks from."""
    place = {"split": 2, "split_with_sizes": 2, "chunk": 2, "tensor_split": 2}.get(name, 1)
    dim = node.kwargs.get("dim", node.args[place] if len(node.args) > place else 0)
    return int(dim) % dims  # type: ignore[arg-type]


def users_of(node: fx.Node) -> list[fx.Node]:
    """The operations that use a parameter, through its views."""
    found = []
    for user in node.users:
        if user.op == "call_function" and base(user) in FREE | {"getitem"}:
            found += users_of(user)[:1] if base(user) in PICKS | {"getitem"} else users_of(user)
        elif user.op == "call_function":
            found.append(user)
    return found
