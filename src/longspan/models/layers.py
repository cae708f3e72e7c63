"""Runs a plan that splits every layer of a model in its own way, exactly (PaSE, arXiv 2407.04001).

The model runs as torch.export wrote it down, which is how it was planned: node by node on each
rank's shards. Before a layer its inputs are brought to where the plan wants them, after it partial
sums are summed; the gradients take the same ways back. What isn't a layer follows the shards.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.export.graph_signature import InputKind
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from longspan.errors import ModelError
from longspan.models.again import made_again
from longspan.models.follow import follow, quickly
from longspan.models.layer_ops import Row, run_call, run_group, run_layer
from longspan.models.pieces import Field, Piece
from longspan.models.placing import cut_of, place
from longspan.models.remake import Memory
from longspan.plan import LayerPlan
from longspan.schedule.exported import exported
from longspan.schedule.groups import calls_of, groups_of, members_of, outer_module
from longspan.schedule.limits import group_limits, limits, unrunnable
from longspan.schedule.splits import SPLITS

__all__ = ["parallelize_layers"]


def parallelize_layers(
    module: nn.Module,
    plan: LayerPlan,
    mesh: DeviceMesh | Field,
    example_inputs: Sequence[Any] | Mapping[str, Any] | torch.export.ExportedProgram,
    *,
    beside: bool = True,
) -> nn.Module:
    """Make ``module`` run as ``plan`` says, on a mesh with the plan's axes; returns it.

    ``example_inputs``, by place or by name, are those it was planned with, or of their shapes and
    dtypes, or what ``schedule.exported`` made of them; it can be called with no others. Its
    parameters become DTensors, cut as the plan has them, so that optimizers and clipping work as
    ever. It is called with the whole batch on every rank, or with DTensors on the mesh, and returns
    plain tensors where all ranks have the whole one (the loss), DTensors otherwise. Every rank must
    hold the same parameters before, and the mesh all ranks. ``beside``: gradients are summed beside
    ``.backward()``, and are there when it returns; else in it, where also autograd.grad sees them.
    Several models can share one Field, that is, a mesh and its process groups.

    Raises ModelError: the plan is another model's or mesh's, or something can't be run exactly:
    dropout and other random numbers, tensors that are changed in place through a view.
    """
    field = mesh if isinstance(mesh, Field) else Field(mesh, beside)
    if dict(field.axes) != dict(plan.axes):
        raise ModelError(f"the plan is for a mesh of {plan.axes}, this one is {dict(field.axes)}")
    program = example_inputs
    if not isinstance(program, torch.export.ExportedProgram):
        program = exported(module, _like(module, program))
    run = _Run(module, plan, field, program)
    place(module, plan, field)
    module.forward = run
    return module


def _like(module: nn.Module, example: Any) -> Any:
    """Inputs of these shapes where the module is."""
    device = next((p.device for p in module.parameters()), torch.device("cpu"))
    return tree_map(
        lambda leaf: torch.empty_like(leaf, device=device) if isinstance(leaf, Tensor) else leaf,
        dict(example) if isinstance(example, Mapping) else tuple(example),
    )


@dataclass(frozen=True, slots=True)
class _Input:
    """What a placeholder of the graph stands for."""

    kind: InputKind
    target: str | None
    value: Any  # of an input that isn't a tensor


class _Run:
    """The forward of a module that a plan splits."""

    def __init__(
        self,
        module: nn.Module,
        plan: LayerPlan,
        field: Field,
        program: torch.export.ExportedProgram,
    ) -> None:
        self._module, self._plan, self._field = module, plan, field
        self._training = module.training
        # Not the program: it holds the whole parameters.
        self._root, self._calls = program.graph_module, program.call_spec
        self._constants = dict(program.constants)
        self._inputs = {
            spec.arg.name: _Input(spec.kind, spec.target, getattr(spec.arg, "value", None))
            for spec in program.graph_signature.input_specs
        }
        self._nodes = nodes = {node.name: node for node in program.graph.nodes}
        self._rows: dict[str, Row] = {}
        for choice in plan.layers:
            node = nodes.get(choice.node)
            if node is None:
                raise ModelError(
                    f"layer {choice.name!r}: the model has no {choice.node}: "
                    "the plan is of another model, or of other inputs"
                )
            self._rows[choice.node] = Row(choice, node, field)
        for why in unrunnable(list(nodes.values())):
            raise ModelError(f"{type(module).__name__} can't be run on shards: {why}")
        self._called = calls_of(program)
        self._quick: dict[str, Callable[[Mapping[str, Any]], Piece]] = {}
        self._like: object = None
        self._groups = self._grouped(list(nodes.values()))
        self._remade = self._not_kept(list(nodes.values()))
        self._zero = {path for c in plan.layers if c.zero for path in c.weights}
        for row in self._rows.values():
            self._check(row)
        self._dead: dict[str, list[str]] = {}
        last: dict[str, str] = {}
        for node in program.graph.nodes:
            last |= {one.name: node.name for one in node.all_input_nodes}
            if node.name in self._groups:
                path = outer_module(node)[0]
                last |= dict.fromkeys(self._called.get(path, ()), node.name)
        for name, user in last.items():
            self._dead.setdefault(user, []).append(name)

    def _grouped(self, nodes: list[fx.Node]) -> dict[str, list[fx.Node]]:
        """Runs of nodes that are one layer, and are split, by their first node."""
        found = {}
        for group in map(members_of, groups_of(nodes).values()):
            layers = [at for at, node in enumerate(group) if node.name in self._rows]
            if len(layers) == 1 and layers[0] and self._rows[group[layers[0]].name].axes:
                found[group[0].name] = group[: layers[0] + 1]
        return found

    def _not_kept(self, nodes: list[fx.Node]) -> set[str]:
        """Nodes of layers that are recomputed, and those that follow them."""
        found: set[str] = set()
        for node in nodes:
            row = self._rows.get(node.name)
            if row is not None and node.op == "call_function":
                if row.choice.recompute:
                    found.add(node.name)
            elif any(one.name in found for one in node.all_input_nodes):
                found.add(node.name)
        return found

    def _check(self, row: Row) -> None:
        """Raise ModelError for a split that this layer can't do."""
        choice = row.choice
        group = next((g for g in self._groups.values() if g[-1] is row.node), None)
        known = set(SPLITS.get(choice.kind, ()))
        if group:
            given = self._called.get(outer_module(row.node)[0])
            nodes = [self._nodes[name] for name in given] if given else None
            barred = group_limits(group, choice.kind, nodes)
        else:
            barred = limits(row.node, choice.kind)
        for dim in choice.splits:
            if dim not in known or dim in barred:
                raise ModelError(
                    f"layer {choice.name!r} ({choice.kind}) can't be split by {dim}: "
                    f"{barred.get(dim, 'it has no such dim')}; plan it anew"
                )
        weights = {path: self._module.get_parameter(path).shape for path in choice.weights}
        batch = choice.splits.get("b", ())  # may be uneven
        left = {a: at for a, at in row.left.items() if at and a not in batch}
        shaped = [(left, row.shape)]
        shaped += [(cut_of(choice.weights[path]), tuple(shape)) for path, shape in weights.items()]
        for cut, shape in shaped:
            for at in cut.values():
                if shape[at] % (parts := self._field.parts(cut, at)):
                    raise ModelError(
                        f"layer {choice.name!r}: {shape[at]} can't be cut into {parts} equal "
                        "parts: the plan is of another model, or of other inputs"
                    )

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        module = self._module
        if module.training != self._training:
            raise ModelError(
                "the model was planned in another mode: call train() or eval() before planning"
            )
        given = self._given(args, kwargs)
        like = (
            torch.is_grad_enabled(),
            [x.placements if isinstance(x, DTensor) else None for x in given],
            [parameter.requires_grad for parameter in module.parameters()],
        )
        if like != self._like:
            self._quick, self._like = {}, like
        if self._field.later is not None:
            self._field.later.clear()
        self._field.memory = memory = Memory() if self._remade or self._zero else None
        if memory is None:
            return self._run(given)
        with torch.autograd.graph.saved_tensors_hooks(memory.pack, memory.unpack):
            try:
                return self._run(given)
            finally:
                self._field.memory = None
                memory.next()

    def _run(self, given: list[Any]) -> Any:
        module = self._module
        values: dict[str, Any] = {}
        for node in self._root.graph.nodes:
            if node.op == "placeholder":
                values[node.name] = self._placeholder(module, node, given)
            elif node.op == "get_attr":
                values[node.name] = self._attribute(node)
            elif node.op == "output":
                left = fx.node.map_arg(node.args[0], lambda one: values[one.name])
                return self._handed(left)
            else:
                self._function(node, values)
            for name in self._dead.get(node.name, ()):
                del values[name]
        raise AssertionError("a graph has an output")

    def _given(self, args: Any, kwargs: Any) -> list[Any]:
        spec = self._calls.in_spec
        assert spec is not None
        names = spec.children()[1].context or []
        if set(names) != set(kwargs):
            raise ModelError(f"the model was planned with inputs {', '.join(names) or 'by place'}")
        leaves, got = tree_flatten((tuple(args), {name: kwargs[name] for name in names}))
        if got != spec:
            raise ModelError("the model was planned with other inputs: plan it with these")
        return leaves

    def _placeholder(self, module: nn.Module, node: fx.Node, given: list[Any]) -> Any:
        """What a placeholder stands for; the inputs come in their order."""
        one = self._inputs[node.name]
        if one.kind is InputKind.USER_INPUT:
            value = given.pop(0)
            if not isinstance(value, Tensor):
                if value != one.value:
                    raise ModelError(
                        f"input {node.name} is {value!r}, planned was {one.value!r}: "
                        "plan it with this one"
                    )
                return value
            expected = node.meta["val"]
            if value.shape != expected.shape or value.dtype != expected.dtype:
                raise ModelError(
                    f"input {node.name} is {tuple(value.shape)} of {value.dtype}, planned was "
                    f"{tuple(expected.shape)} of {expected.dtype}: plan it with this one"
                )
            return self._field.given(value)
        assert one.target is not None
        if one.kind is InputKind.PARAMETER:
            piece = self._field.given(module.get_parameter(one.target))
            piece = replace(piece, gathered=one.target in self._zero)
            row = self._rows.get(node.name)
            if row is None:
                return piece
            # Several layers use it: it is gathered for all of them together.
            cut = row.left
            return Piece(self._field.take(piece, cut), piece.shape, cut)
        if one.kind is InputKind.BUFFER:
            return self._field.given(module.get_buffer(one.target))
        return self._field.given(self._constants[one.target])

    def _attribute(self, node: fx.Node) -> Any:
        value: Any = self._root
        for part in str(node.target).split("."):
            value = getattr(value, part)
        return self._field.given(value) if isinstance(value, Tensor) else value

    def _function(self, node: fx.Node, values: dict[str, Any]) -> None:
        if node.name in values or "val" not in node.meta or node.meta["val"] is None:
            values.setdefault(node.name, None)
            return
        row = self._rows.get(node.name)
        group = self._groups.get(node.name)
        if group is not None:
            values |= dict.fromkeys((one.name for one in group), None)
            leaf = group[-1]
            values[leaf.name] = self._group(group, self._rows[leaf.name], values)
            return
        quick = self._quick.get(node.name)
        if quick is not None:
            values[node.name] = self._made(node, quick, values)
            return
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda one: values[one.name])
        if row is not None:
            values[node.name] = self._made(node, lambda x: run_layer(row, *x), (args, kwargs))
        elif node.name in self._remade:
            values[node.name] = self._made(
                node, lambda x: follow(self._field, node, *x), (args, kwargs)
            )
        else:
            with self._field.noting() as moved:
                made = self._made(node, lambda x: follow(self._field, node, *x), (args, kwargs))
            if not any(x is not None for x in moved) and (quick := quickly(node, made)):
                self._quick[node.name] = quick
            values[node.name] = made

    def _group(self, group: list[fx.Node], row: Row, values: Mapping[str, Any]) -> Any:
        path = outer_module(row.node)[0]
        if path in self._called:
            module = self._module.get_submodule(path)
            given = [values[name] for name in self._called[path]]
            return self._made(row.node, lambda given: run_call(row, module, given), given)
        outside = dict.fromkeys(n for one in group for n in one.all_input_nodes)
        known = {n: values[n.name] for n in outside if n not in set(group)}
        return self._made(row.node, lambda given: run_group(row, group, given), known)

    def _made(self, node: fx.Node, make: Callable[[Any], Any], given: Any) -> Any:
        """What a node makes of what it is given; noted, if it is to be made again for backward."""
        memory = self._field.memory
        if memory is not None:
            memory.next()
            if node.name in self._remade:
                return made_again(self._field, memory, make, given)
        return make(given)

    def _handed(self, left: Any) -> Any:
        leaves = [self._field.handed(x) if isinstance(x, Piece) else x for x in left]
        spec = self._calls.out_spec
        assert spec is not None
        return tree_unflatten(leaves, spec)
