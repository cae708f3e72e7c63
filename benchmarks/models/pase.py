"""What PaSE measured: its models and their splits on Mesh-TensorFlow, as its released programs say.

The programs (github.com/baidu-research/PaSE, ``benchmarks/``) have data-parallelism and what the
search found written out for 4 to 64 devices: meshes of at most two axes, each of which a layer
gives to one of its dims. Their defaults are the sizes here. What Mesh-TensorFlow does in another
way than others is in ``as_run``.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import log2, prod
from typing import Any

import torch
from torch import nn

from benchmarks.models.inputs import build, tokens
from benchmarks.models.rnnlm import Rnnlm
from benchmarks.models.transformer import Transformer
from longspan.cluster.cost import seconds as op_seconds
from longspan.planner.choices import Choice, given_codes
from longspan.planner.graph import Graph, Layer
from longspan.planner.layer_wires import PARTIAL, REPLICATE
from longspan.planner.price import Prices
from longspan.schedule.ops import Compute

__all__ = ["DEVICES", "LENGTHS", "as_run", "data_parallel", "found", "program", "seconds"]

DEVICES = (4, 8, 16, 32, 64)
# Of sequences: RNNLM's in the graph that was searched (graph.py), and the program's default.
LENGTHS = {"rnnlm": 64, "transformer": 256}
_LSTM_LAYERS = 2
# The axes of the mesh of each, for 4, 8, 16, 32 and 64 devices.
_AXES = {
    "alexnet": ((4, 1), (4, 2), (8, 2), (8, 4), (8, 8)),
    "inception": ((4, 1), (4, 2), (8, 2), (16, 2), (32, 2)),
    "rnnlm": ((2, 2), (4, 2), (4, 4), (8, 4), (8, 8)),
    "transformer": ((4, 1), (8, 1), (8, 2), (16, 2), (16, 4)),
    "transformer's vocabulary": ((2, 2), (2, 4), (2, 8), (4, 8), (4, 16)),
}

Pair = tuple[str | None, str | None]  # the dims that the mesh's axes split
Rule = Callable[[Layer], Choice]


def program(name: str, length: int | None = None) -> tuple[nn.Module, Any]:
    """A model and its inputs, as the program of that name has them."""
    length = length or LENGTHS.get(name, 1)
    with torch.device("meta"):
        if name == "transformer":
            return Transformer(heads=8, length=length), tokens(3, 64, length)
        if name == "rnnlm":
            return Rnnlm(), tokens(2, 64, length)
    return build(name)


def as_run(graph: Graph) -> Graph:
    """The same graph, changed in place to what Mesh-TensorFlow computes and sends.

    An embedding is a product with one-hot vectors (``mtf.gather``). The programs' batch norm is a
    layer norm over the batch, whose statistics are of each place and channel by itself.
    """
    for layer in graph.layers:
        if layer.kind == "embedding":
            vocab, out = layer.sizes["vocab"], layer.output.bytes
            rows = prod(layer.output.shape[:-1])
            layer.rate, layer.flops = "matmul", 2.0 * prod(layer.output.shape) * vocab
            layer.bytes = out + layer.output.itemsize * (2.0 * rows * vocab)
        if layer.kind == "batch_norm":
            layer.reduced_bytes = {("b",): 2.0 * layer.output.bytes / layer.output.shape[0]}
    return graph


def data_parallel(devices: int) -> Rule:
    """Every layer splits the batch over all devices."""
    return lambda layer: _choice(layer, (devices, 1), ("b", None))


def found(name: str, devices: int) -> Rule:
    """What PaSE's search found, as its program has it."""
    place = DEVICES.index(devices)
    axes = _AXES[name][place] if name in _AXES else (devices, 1)

    def rule(layer: Layer) -> Choice:
        pair = _PAIRS[name](layer)
        if pair is None:
            return data_parallel(devices)(layer)
        wide = name == "transformer" and _of_vocabulary(layer)
        return _choice(layer, _AXES["transformer's vocabulary"][place] if wide else axes, pair)

    return rule


def _choice(layer: Layer, axes: tuple[int, int], pair: Pair) -> Choice:
    dims = [dim for dim, size in zip(pair, axes, strict=True) for _ in range(int(log2(size)))]
    return Choice(tuple(dim if dim in layer.splits else None for dim in dims))


def _of_vocabulary(layer: Layer) -> bool:
    return layer.kind in ("embedding", "loss") or layer.name == "output"


def _alexnet(layer: Layer) -> Pair | None:
    known: Mapping[str, Pair] = {
        "classifier.0": ("in", "out"),
        "classifier.2": ("out", "in"),
        "classifier.4": ("in", "out"),
    }
    return (None, "vocab") if layer.kind == "loss" else known.get(layer.name)


def _inception(layer: Layer) -> Pair | None:
    if layer.name == "output":
        return "in", "out"
    if layer.kind == "loss":
        return None, "vocab"
    if layer.name.startswith(("mixed.9.", "mixed.10.")):
        return "b", {"conv": "out", "batch_norm": "c"}.get(layer.kind)
    return None


def _rnnlm(layer: Layer) -> Pair | None:
    if layer.kind == "recurrent":  # in a way of its own: ``_recurrent``
        return None, None
    if layer.kind == "embedding":
        return "vocab", "out"
    return ("vocab", "vocab") if layer.kind == "loss" else ("out", "out")


def _transformer(layer: Layer) -> Pair | None:
    if layer.kind == "embedding":
        return "s", "vocab"
    if _of_vocabulary(layer):
        # The program splits the sequence. Here the loss is of tokens in a row, of which only the
        # batch can be split: that moves as many bytes.
        return "b", "out" if layer.kind == "linear" else "vocab"
    if layer.kind == "attention":
        return "b", "heads"
    if layer.kind == "linear":
        return "b", "in" if layer.name.endswith((".out", ".feed.2")) else "out"
    return "b", None


_PAIRS: Mapping[str, Callable[[Layer], Pair | None]] = {
    "alexnet": _alexnet,
    "inception": _inception,
    "rnnlm": _rnnlm,
    "transformer": _transformer,
}


def _recurrent(layer: Layer, prices: Prices) -> float:
    """Seconds of RNNLM's LSTM, whose gates the first axes split and whose inputs the others.

    Both layers do so at every time step: their gates are summed, and the new state is gathered;
    the gradients go the same way back.
    """
    devices = prod(prices.sizes)
    gates, inputs = (int(log2(n)) for n in _AXES["rnnlm"][DEVICES.index(devices)])
    flops, moved = layer.flops / devices, layer.bytes / devices
    computing = sum(
        op_seconds(Compute(layer.rate, times * flops, times * moved, layer.dtype), prices.cluster)
        for times in (1, 2)
    )
    batch, length, units = layer.output.shape
    state = batch * units * layer.output.itemsize
    cut, whole = (1,) * gates + (REPLICATE,) * inputs, (REPLICATE,) * (gates + inputs)
    sums, sums_each = prices.moves.price((1,) * gates + (PARTIAL,) * inputs, cut)
    gathers, gathers_each = prices.moves.price(cut, whole)
    step = sums + 4 * state * sums_each + gathers + state * gathers_each
    return computing + 2 * _LSTM_LAYERS * length * step


@dataclass(frozen=True)
class _Move:
    source: int
    layouts: tuple[object, ...]


def seconds(graph: Graph, prices: Prices, rule: Rule) -> float:
    """Of a step in which every layer is split by ``rule``; nothing is overlapped."""
    made = [rule(layer) for layer in graph.layers]
    total, moved = 0.0, set()
    for layer, choice in zip(graph.layers, made, strict=True):
        if layer.kind == "recurrent" and not any(choice.dims):
            total += _recurrent(layer, prices)
        else:
            now, later, _ = prices.layer(layer, choice)
            total += float(now[0]) + float(later[0])
        for operand in layer.inputs:
            if operand.source is None:
                continue
            giver = graph.layers[operand.source]
            left = prices.output(giver, made[operand.source])
            given = given_codes(operand, giver.output.shape, choice, prices.sizes)
            move = _Move(operand.source, (*given, operand.shape))
            if move in moved:  # it is there already
                continue
            moved.add(move)
            once, each = prices.edge_price(left, *given)
            part = min(1.0, prod(operand.shape) / max(1, prod(giver.output.shape)))
            total += once + each * giver.output.bytes * part
    return total
