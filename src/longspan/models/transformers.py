"""Makes a transformers model run on sequences that are sharded over a mesh axis.

Nothing in the model is rewritten: its attention goes through transformers' own attention
interface to ``longspan.attend``; everything else in it works token by token. What can't be
honoured exactly is refused, never ignored.
"""

import inspect
from collections.abc import Sequence
from typing import Any, Literal, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from longspan.attention.attend import attend, global_length
from longspan.attention.kept import Kept
from longspan.comm.mesh import flat_group
from longspan.errors import ModelError
from longspan.layout import Order, positions
from longspan.models.loss import ModelLoss
from longspan.models.windows import layer_windows

__all__ = ["check_model", "patch"]

Model = TypeVar("Model", bound=PreTrainedModel)

_NAME = "longspan"
# Arguments of attention functions that change nothing here.
_HARMLESS = {
    "cache_position",
    "num_items_in_batch",
    "output_attentions",
    "position_ids",
    "return_dict",
    "shift_labels",
    "use_cache",
}
_LAYERS = ("full_attention", "sliding_attention")
_DROPOUTS = ("attention_dropout", "attn_pdrop", "attention_probs_dropout_prob")


class _Sharding:
    """What a forward pass tells its attention layers, and the windows they attended in.

    No dataclass: FSDP2 copies those when it casts a module's inputs, and windows would be lost.
    """

    def __init__(
        self,
        mesh: DeviceMesh,
        order: Order,
        inside: Literal["ring", "heads"],
        documents: tuple[int, ...],
    ) -> None:
        self.mesh, self.order, self.inside, self.documents = mesh, order, inside, documents
        self.windows: list[int | None] = []


def patch(
    model: Model,
    *,
    mesh: DeviceMesh,
    order: Order | str = Order.ZIGZAG,
    inside: Literal["ring", "heads"] = "ring",
) -> Model:
    """Make ``model`` take this rank's share of a sequence that is sharded over ``mesh``.

    ``mesh``, ``order`` and ``inside`` are those of ``longspan.attend``.

    Call the model with ``input_ids (B, S_local)``, this rank's tokens in ``order`` (by
    ``longspan.positions``), and ``cu_seqlens``, the *global* document boundaries (none: one
    document). Position ids are set from them where they aren't given. It returns the logits of the
    local tokens.

    With ``targets (B, S_local)``, what each local token should be followed by (-100: nothing), it
    returns instead the *sum* of their cross-entropies as ``loss``, in float32, and never makes the
    logits: divide by the global count of targets and add up the ranks' losses. transformers' own
    loss needs labels that are already shifted, over that count: ``labels``, ``shift_labels`` and
    ``num_items_in_batch``.

    Sliding windows are honoured layer by layer. Returns the same model. Raises ModelError, here
    or in forward, for what can't be honoured exactly: softcaps, sinks, attention dropout, masks,
    caches, losses of routers, rotary embeddings that depend on the batch, layers that mix tokens
    by other means.
    """
    order = Order.of(order)
    flat_group(mesh)
    check_model(model)
    AttentionInterface.register(_NAME, _attention)
    AttentionMaskInterface.register(_NAME, _no_mask)
    model.set_attn_implementation(_NAME)
    model.config.use_cache = False
    losses = ModelLoss(model)

    def before(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        return args, losses.asked(_sharded_arguments(args, kwargs, mesh, order, inside))

    def after(module: Any, _: Any, kwargs: dict[str, Any], output: Any) -> Any:
        found, expected = kwargs[_NAME].windows, layer_windows(module.config)
        if len(found) != len(expected):
            raise ModelError(
                f"{_name(module)} has {len(expected)} layers but {len(found)} of them attended "
                "through longspan: the others may mix tokens in a way that can't be sharded"
            )
        for layer, (window, told) in enumerate(zip(found, expected, strict=True)):
            if window != told:
                raise ModelError(
                    f"layer {layer} of {_name(module)} attended in a window of {window}, but its "
                    f"config says {told}: one of them is wrong"
                )
        return losses.given(output)

    model.register_forward_pre_hook(before, with_kwargs=True)
    model.register_forward_hook(after, with_kwargs=True)
    return model


def _name(model: Any) -> str:
    return type(model).__name__


def check_model(model: PreTrainedModel) -> None:
    """Raise ModelError if the model can't be sharded exactly; it may be on the meta device."""
    config = model.config
    parameters = inspect.signature(model.forward).parameters.values()
    if not any(p.kind is p.VAR_KEYWORD for p in parameters):
        raise ModelError(f"{_name(model)}.forward takes no keyword arguments for its layers")
    if not model._can_set_attn_implementation():
        raise ModelError(f"{_name(model)} doesn't use transformers' attention interface")
    if getattr(config, "is_encoder_decoder", False) or getattr(
        config, "add_cross_attention", False
    ):
        raise ModelError(f"{_name(model)} has cross attention, which can't be sharded yet")
    for layer_type in getattr(config, "layer_types", None) or ():
        if layer_type not in _LAYERS:
            raise ModelError(
                f"{_name(model)} has layers of type {layer_type}; only {' and '.join(_LAYERS)} "
                "are exact here"
            )
    if not any(p.name == "position_ids" for p in parameters):
        raise ModelError(
            f"{_name(model)}.forward takes no position_ids: each rank would count anew"
        )
    if getattr(config, "attn_logit_softcapping", None):
        raise ModelError(f"{_name(model)} caps attention logits; set attn_logit_softcapping: null")
    if any(name.endswith(".sinks") for name, _ in model.named_parameters()):
        raise ModelError(f"{_name(model)} has attention sinks, which can't be honoured exactly")
    if getattr(config, "output_router_logits", False):
        raise ModelError(
            f"{_name(model)} balances its experts by a loss over the whole batch, which a shard "
            "doesn't see; set output_router_logits: false"
        )
    for rope in _rope_types(config):
        if "dynamic" in rope or rope == "longrope":
            raise ModelError(
                f"{_name(model)} stretches its rotary embedding ({rope}) by the longest position "
                "in a batch, which differs on every rank; set rope_type: default or yarn"
            )
    for dropout in _DROPOUTS:
        if getattr(config, dropout, None):
            raise ModelError(
                f"{_name(model)} has attention dropout, which differs on every rank; "
                f"set {dropout}: 0.0"
            )


def _rope_types(config: Any) -> set[str]:
    """Of all layers: a config holds one set of rotary parameters, or one for each layer type."""
    given = getattr(config, "rope_parameters", None) or {}
    sets = [given, *(x for x in given.values() if isinstance(x, dict))]
    return {str(x["rope_type"]) for x in sets if "rope_type" in x}


def _sharded_arguments(
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    mesh: DeviceMesh,
    order: Order,
    inside: Literal["ring", "heads"],
) -> dict[str, Any]:
    """The model's arguments, with positions and boundaries filled in and the rest checked."""
    group = flat_group(mesh)
    cu_seqlens = kwargs.pop("cu_seqlens", None)
    tokens = next((x for x in (*args[:1], kwargs.get("input_ids"), kwargs.get("inputs_embeds"))
                   if x is not None), None)  # fmt: skip
    if tokens is None:
        raise ModelError("pass input_ids or inputs_embeds")
    if kwargs.get("attention_mask") is not None:
        raise ModelError("attention_mask can't be sharded: leave padding out, pass cu_seqlens")
    if kwargs.get("past_key_values") is not None or kwargs.get("use_cache"):
        raise ModelError("a key-value cache can't be sharded: pass use_cache=False")
    if kwargs.get("output_router_logits"):
        raise ModelError("the routers' loss needs the whole batch: pass output_router_logits=False")
    if kwargs.get("labels") is not None and (
        kwargs.get("shift_labels") is None or kwargs.get("num_items_in_batch") is None
    ):
        raise ModelError(
            "labels would be shifted and averaged inside a shard: pass shift_labels and "
            "num_items_in_batch (the global count of targets) with them"
        )
    if cu_seqlens is None:
        documents: tuple[int, ...] = (0, global_length(tokens.shape[1], group, order))
    else:
        documents = tuple(int(end) for end in cu_seqlens)
    sharding = _Sharding(mesh, order, inside, documents)
    if kwargs.get("position_ids") is None:
        own = _positions_in_documents(documents, group, order)
        kwargs["position_ids"] = own.to(tokens.device).expand(tokens.shape[0], -1)
    return kwargs | {"use_cache": False, _NAME: sharding}


def _positions_in_documents(
    documents: Sequence[int], group: dist.ProcessGroup, order: Order
) -> Tensor:
    own = positions(documents[-1], group.rank(), group.size(), order, documents)
    ends = torch.tensor(documents)
    return own - ends[torch.bucketize(own, ends, right=True) - 1]


def _attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    longspan: _Sharding | None = None,
    longspan_kept: Kept | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    if longspan is None:
        raise ModelError(
            f"{_name(module)} isn't given its model's keyword arguments: it can't be sharded"
        )
    if attention_mask is not None:
        raise ModelError(f"{_name(module)} attends under a mask of its own")
    if dropout:
        raise ModelError(f"{_name(module)} has attention dropout {dropout}: set it to 0.0")
    for name, value_given in others.items():
        if name not in _HARMLESS and value_given is not None and value_given is not False:
            raise ModelError(f"{_name(module)} asks for {name}, which can't be honoured exactly")
    window = sliding_window or None
    longspan.windows.append(window)
    out = attend(
        query,
        key,
        value,
        mesh=longspan.mesh,
        causal=getattr(module, "is_causal", True) if is_causal is None else is_causal,
        order=longspan.order,
        inside=longspan.inside,
        scale=scaling,
        window=window,
        cu_seqlens=longspan.documents,
        kept=longspan_kept,
    )
    return out.transpose(1, 2).contiguous(), None


def _no_mask(*, attention_mask: Tensor | None = None, use_vmap: bool = False, **_: Any) -> None:
    """Attention knows documents and windows; a mask beyond them is refused."""
    if attention_mask is not None or use_vmap:
        raise ModelError("this model or batch needs an attention mask, which can't be sharded")
