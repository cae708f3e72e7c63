"""How much memory a transformer's training takes on one device, in bytes.

Counted are the tensors that autograd keeps for a Llama of the transformers library (RMSNorm, rotary
embedding, gated MLP) whose attention keeps its output and log-sum-exp instead of the scores and
whose loss makes the logits of some tokens at a time, at the moments at which a step may hold most.
``benchmarks.whole_steps`` compares that with what torch's allocator hands out. A process takes more
than its tensors: on CPU glibc keeps much of what is freed, 1.1 to 2 times the sum, but for the
environment's MALLOC_MMAP_THRESHOLD_=262144. Sources: Korthikanti et al., arXiv 2205.05198, section
4, for what each layer keeps; Zhao et al., arXiv 2304.11277, for what sharding leaves on a device.
"""

from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from longspan.errors import ConfigError

__all__ = ["Checkpointing", "Memory", "Transformer", "longest", "memory", "transformer_of"]

Checkpointing = Literal["none", "selective", "full"]


@dataclass(frozen=True, slots=True)
class Transformer:
    """The sizes of a model that matter for its memory; ``dtype_bytes`` is its activations'."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    vocab: int
    tied: bool = False
    dtype_bytes: int = 4

    @property
    def layer_params(self) -> int:
        """Parameters of one layer: attention's and the gated MLP's matrices, two norms."""
        attention = 2 * self.hidden * self.head_dim * (self.heads + self.kv_heads)
        return attention + 3 * self.hidden * self.ffn + 2 * self.hidden

    @property
    def params(self) -> int:
        """Parameters of the whole model."""
        embeddings = self.vocab * self.hidden * (1 if self.tied else 2)
        return self.layers * self.layer_params + embeddings + self.hidden


def transformer_of(values: Mapping[str, Any], where: str, dtype_bytes: int = 2) -> Transformer:
    """The sizes in a model's config as transformers keeps them; ConfigError names what is missing.

    ``where``: what the config is called in that error.
    """
    try:
        heads, hidden = int(values["num_attention_heads"]), int(values["hidden_size"])
        return Transformer(
            layers=int(values["num_hidden_layers"]),
            hidden=hidden,
            heads=heads,
            kv_heads=int(values.get("num_key_value_heads") or heads),
            head_dim=int(values.get("head_dim") or hidden // heads),
            ffn=int(values.get("intermediate_size") or 4 * hidden),
            vocab=int(values["vocab_size"]),
            tied=bool(values.get("tie_word_embeddings")),
            dtype_bytes=dtype_bytes,
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ConfigError(f"{where}: its config lacks {error}") from None


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes on one device at the moment when they are most, by what they hold.

    ``gathered`` are the parameters and gradients of the parts that FSDP2 has whole at the moment,
    ``working`` what is needed only then: for the loss, a layer's gradients, the optimizer's step.
    """

    parameters: int
    gradients: int
    optimizer: int
    gathered: int
    activations: int
    working: int

    @property
    def total(self) -> int:
        """All of it."""
        state = self.parameters + self.gradients + self.optimizer + self.gathered
        return state + self.activations + self.working


def memory(
    model: Transformer,
    tokens: int,
    *,
    shards: int = 1,
    checkpointing: Checkpointing = "none",
    attention_kept: float = 1.0,
    exchanged: bool = False,
    whole_gradients: bool = False,
    loss_tokens: int = 1024,
    param_bytes: int = 4,
    optimizer_bytes: int = 8,
) -> Memory:
    """What training ``model`` takes on a device that has ``tokens`` tokens of a micro-batch.

    FSDP2 leaves one of ``shards`` of parameters, gradients (``param_bytes`` each) and optimizer
    state (``optimizer_bytes`` a parameter: 8 for Adam in fp32) on a device; it gathers, in the
    activations' dtype, the embedding, the head and a layer with the next one. Gradients are counted
    throughout, as they are there from the second micro-batch on: whole ones with
    ``whole_gradients``, where they are reduced in the last micro-batch only.

    ``checkpointing`` "none" keeps all activations; "full" a layer's input only; "selective" also
    attention's output and log-sum-exp, for the ``attention_kept`` share of the tokens. After a head
    exchange (``exchanged``) attention's output is kept twice, with its heads and with its tokens.
    The loss makes the logits of ``loss_tokens`` at a time. Raises ConfigError if a number can't be.
    """
    if tokens < 0 or shards < 1 or not 0 <= attention_kept <= 1:
        raise ConfigError(
            f"{tokens} tokens, {shards} shards, {attention_kept} of attention kept: "
            "these must be at least 0, at least 1, and from 0 to 1"
        )
    # Each shard of the embedding has as many rows; other dims are mostly multiples.
    padded = (-(-model.vocab // shards) * shards - model.vocab) * model.hidden
    outside = model.params - model.layers * model.layer_params + padded * (2 - model.tied)
    params = -(-(model.layers * model.layer_params + outside) // shards)
    gradients = params * shards if whole_gradients else params
    state = (params * param_bytes, gradients * param_bytes, params * optimizer_bytes)
    width, wide = model.hidden, model.ffn
    q, kv = model.heads * model.head_dim, model.kv_heads * model.head_dim
    size = model.dtype_bytes
    # RMSNorm computes in fp32 and keeps its input so, the root of its mean square, and its normed
    # output; what follows keeps its own input. Then q, k, v and the output; the MLP's gate, its
    # activation, up, and product.
    norm = (4 + 2 * size) * width + 4
    attention = size * (q + 2 * kv)
    kept = size * q + 4 * model.heads
    whole_layer = 2 * norm + attention + kept + size * 4 * wide + size * q * exchanged
    match checkpointing:
        case "none":
            a_layer, again = float(whole_layer), 0
        case "full":
            a_layer, again = float(size * width), whole_layer - size * width
        case "selective":
            a_layer = size * width + attention_kept * kept
            again = whole_layer - size * width
    # Beside the layers': rotary embedding's cosines and sines; tokens, targets and positions.
    held = int(tokens * (model.layers * a_layer + norm + 2 * model.head_dim * size + 4 * 8))
    head = 4 * model.vocab * (width + 1)
    # Cross entropy is done in fp32: logits in their own dtype, log-softmax, its gradient and
    # theirs, beside the gradients of the head and of what goes into it.
    logits = (12 + size) * model.vocab * min(tokens, loss_tokens)
    loss = logits + head + tokens * size * width
    # In backward of the last norm that all is kept for: numbers in fp32, and what comes in. In the
    # last MLP's, which is before a layer's own norm's: gradients of two of its tensors, of what
    # goes by, and of two matrices, before they are added; the norm's are gone.
    in_norm = 16 * width + (size * width if size < 4 else 0)
    in_norm += max(0, again - 4 * size * wide)
    backward = tokens * max(in_norm, again + 2 * size * (wide + width) - norm)
    backward += 2 * size * wide * width
    # What FSDP2 has whole are copies, also of one shard; of more, in the buffer they came in, too.
    whole = outside * size + (model.layer_params * size if shards > 1 else 0)
    layer = model.layer_params * (size + param_bytes)
    moments = [
        Memory(*state, whole, held, loss),
        Memory(*state, whole + layer, held, head + backward),
        Memory(*state[:1], params * param_bytes, state[2], 0, 0, params * param_bytes),
    ]
    return max(moments, key=lambda one: one.total)


def longest(model: Transformer, memory_bytes: int, **how: Any) -> int:
    """The most tokens that fit a device of ``memory_bytes``; 0 if not even the model does.

    ``how``: as ``memory``'s.
    """

    def total(tokens: int) -> int:
        return memory(model, tokens, **how).total

    return max(0, bisect_right(range(1 << 40), memory_bytes, key=total) - 1)
