"""A language model's loss without its logits: head and cross-entropy, some tokens at a time.

Logits are a token times a vocabulary, often more than all the rest of a step. Here those of a few
tokens are made, turned into their part of the loss and of every gradient, and forgotten; gradients
are thus ready when forward ends, and nothing is computed twice. Source: BurstEngine
(arXiv 2509.19836, section 3.3); gradients in forward as in Liger Kernel (arXiv 2410.10989).
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from transformers import PreTrainedModel

from longspan.errors import ModelError

__all__ = ["CHUNK_TOKENS", "LazyLogits", "ModelLoss", "Step", "chunked_loss"]

# Enough for matrix products at full speed; for 128K words 512 MiB of logits in float32.
CHUNK_TOKENS = 1024

Step = Callable[[Tensor], Tensor]


def chunked_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    steps: Sequence[Step] = (),
    chunk_tokens: int = CHUNK_TOKENS,
) -> Tensor:
    """The summed cross-entropy of ``hidden @ weight.T + bias``, never more than a chunk of it.

    hidden ``(…, H)``, weight ``(V, H)``, bias ``(V,)``, targets ``(…)`` of any number of tokens;
    -100 is no target. ``steps`` are done to the logits before the loss, one after another: a scale,
    a softcap; they work token by token and have no parameters of their own. Returns a scalar in
    float32 (float64 for float64), in which gradients are summed over chunks, too. Raises ModelError
    if the shapes don't fit.
    """
    if hidden.shape[:-1] != targets.shape or hidden.shape[-1] != weight.shape[-1]:
        raise ModelError(
            f"hidden states {tuple(hidden.shape)}, head {tuple(weight.shape)} and targets "
            f"{tuple(targets.shape)} don't fit together"
        )
    loss: Tensor = _ChunkedLoss.apply(
        *(hidden.flatten(0, -2), weight, bias, targets.flatten()),
        *(tuple(steps), chunk_tokens, torch.is_grad_enabled()),
    )
    return loss


class _ChunkedLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        steps: tuple[Step, ...],
        chunk_tokens: int,
        training: bool,
    ) -> Tensor:
        wide = torch.promote_types(hidden.dtype, torch.float32)
        wanted = [training and wants for wants in ctx.needs_input_grad[:3]]
        dhidden = torch.zeros_like(hidden) if wanted[0] else None
        dweight = torch.zeros_like(weight, dtype=wide) if wanted[1] else None
        dbias = torch.zeros_like(bias, dtype=wide) if bias is not None and wanted[2] else None
        loss = hidden.new_zeros((), dtype=wide)
        for start in range(0, len(hidden), chunk_tokens):
            rows = slice(start, start + chunk_tokens)
            dlogits = _add_loss(
                *(loss, F.linear(hidden[rows], weight, bias), targets[rows]),
                *(steps, any(wanted)),
            )
            if dlogits is None:
                continue
            if dhidden is not None:
                dhidden[rows] = dlogits @ weight
            if dweight is not None:
                _add_product(dweight, dlogits.mT, hidden[rows])
            if dbias is not None:
                dbias += dlogits.sum(0, dtype=wide)
            del dlogits
        ctx.save_for_backward(dhidden, dweight, dbias)
        ctx.dtypes = (hidden.dtype, weight.dtype, None if bias is None else bias.dtype)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dloss: Tensor) -> tuple[Tensor | None, ...]:
        grads = (
            None if grad is None else (grad * dloss).to(dtype)
            for grad, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        )
        return (*grads, None, None, None, None)


def _add_loss(
    loss: Tensor, logits: Tensor, targets: Tensor, steps: tuple[Step, ...], training: bool
) -> Tensor | None:
    """Add a chunk's loss to ``loss``; the gradient of its logits, if training."""
    with torch.set_grad_enabled(training):
        stepped = logits.requires_grad_(training)
        for step in steps:
            stepped = step(stepped)
        part = F.cross_entropy(stepped.to(loss.dtype), targets, reduction="sum")
        loss += part.detach()
        return torch.autograd.grad(part, logits)[0] if training else None


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    if total.dtype == a.dtype == b.dtype:
        total.addmm_(a, b)
    else:
        total += a @ b


class LazyLogits:
    """Stands for logits inside a model's forward; what is done to them is only written down.

    It goes into the head as its input and comes out as its output. Scales and softcaps, whatever
    family they belong to, are honoured; anything else raises ModelError.
    """

    def __init__(
        self,
        hidden: Tensor,
        head: tuple[Tensor, Tensor | None] | None = None,
        steps: tuple[Step, ...] = (),
    ) -> None:
        self._hidden, self._head, self._steps = hidden, head, steps

    def loss(self, targets: Tensor) -> Tensor:
        """The summed cross-entropy against ``targets``, as ``chunked_loss``."""
        weight, bias = self._head or (None, None)
        if weight is None:
            raise ModelError("the model's logits don't come from its output embedding")
        if weight.untyped_storage().size() == 0:
            raise ModelError(
                "the output embedding is sharded by itself, so it is gone when the loss is "
                "computed: shard it together with the whole model"
            )
        return chunked_loss(self._hidden, weight, targets, bias=bias, steps=self._steps)

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> "LazyLogits":
        logits = args[0]
        if isinstance(logits, cls) and not kwargs:
            if func is F.linear and logits._head is None:
                return cls(logits._hidden, (args[1], args[2] if len(args) > 2 else None))
            if func is torch.tanh and logits._head is not None:
                return logits._then(torch.tanh)
        raise ModelError(f"the model's logits go through {func.__name__}: pass no targets")

    def _then(self, step: Step) -> "LazyLogits":
        return LazyLogits(self._hidden, self._head, (*self._steps, step))

    def __mul__(self, scale: float) -> "LazyLogits":
        return self._then(partial(torch.mul, other=_number(scale)))

    __rmul__ = __mul__

    def __truediv__(self, scale: float) -> "LazyLogits":
        return self._then(partial(torch.div, other=_number(scale)))

    def float(self) -> "LazyLogits":
        """As Tensor.float."""
        return self._then(torch.Tensor.float)

    def contiguous(self) -> "LazyLogits":
        """As Tensor.contiguous: chunks are."""
        return self

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        raise ModelError(f"the model's forward uses its logits' {name}: pass no targets")

    def __getitem__(self, _: Any) -> Any:
        raise ModelError("the model's forward cuts its logits: pass no targets")

    def __add__(self, _: Any) -> Any:
        raise ModelError("the model's forward adds to its logits: pass no targets")

    __radd__ = __sub__ = __add__


def _number(scale: Any) -> Any:
    if not isinstance(scale, int | float):
        raise ModelError(f"the model scales its logits by a {type(scale).__name__}, not a number")
    return scale


class ModelLoss:
    """Makes a model return the summed loss of its ``targets``, where a call gives it any.

    The model's own forward is left to do all it does: its output embedding gets and gives
    LazyLogits, and its ``loss_function``, which it calls while its weights are whole, makes them
    the loss. ``asked`` and ``given`` are to be called before and after its forward.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self._wanted = False
        self._made: tuple[Tensor, int] | None = None
        self._own_loss = model.loss_function
        self._head = model.get_output_embeddings()
        model.loss_function = self._loss
        if self._head is not None:
            self._head.register_forward_pre_hook(self._lazily)

    def __deepcopy__(self, _: Any) -> "ModelLoss":
        return self  # a copied model's hooks are the model's own: they must share what is wanted

    def asked(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Forward's arguments without ``targets``, but so that it computes their loss."""
        targets = kwargs.pop("targets", None)
        self._wanted, self._made = targets is not None, None
        if targets is None:
            return kwargs
        if self._head is None:
            raise ModelError("the model has no output embedding: pass no targets")
        if kwargs.get("labels") is not None or kwargs.get("shift_labels") is not None:
            raise ModelError("pass either targets or labels")
        return kwargs | {"labels": targets, "return_dict": True}

    def given(self, output: Any) -> Any:
        """Forward's output, without logits where there was a loss to compute."""
        if not self._wanted:
            return output
        made, self._made = self._made, None
        if made is None or output.loss is not made[0] or output.loss._version != made[1]:
            raise ModelError(
                f"the {type(output).__name__}'s loss isn't the cross-entropy of its targets alone "
                "(a router's loss, perhaps): pass no targets"
            )
        return type(output)(**{key: x for key, x in output.items() if key != "logits"})

    def _lazily(self, _: Any, args: tuple[Any, ...]) -> Any:
        return LazyLogits(*args) if self._wanted else None

    def _loss(self, logits: Any, labels: Any, *args: Any, **kwargs: Any) -> Any:
        if not self._wanted:
            return self._own_loss(logits, labels, *args, **kwargs)
        if not isinstance(logits, LazyLogits):
            raise ModelError("the model's logits don't come from its output embedding")
        loss = logits.loss(labels)
        self._made = loss, loss._version
        return loss
