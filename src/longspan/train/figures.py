"""What the ring schedules of a step promise: how even the work is, and how much is sent."""

from collections import Counter
from collections.abc import Iterable
from itertools import product

import torch
from transformers import PreTrainedConfig

from longspan.attention.ring import accumulation_dtype
from longspan.data.packing import PackedSequence
from longspan.layout import Order
from longspan.models.windows import layer_windows
from longspan.schedule.ring import Ring, imbalance, pairs, tokens
from longspan.schedule.rounds import comms

__all__ = ["ring_figures"]


def ring_figures(
    sequences: Iterable[PackedSequence],
    model: PreTrainedConfig,
    dtype: torch.dtype,
    world: int,
    order: Order,
) -> dict[str, float]:
    """Of the sequences of one sequence-parallel group, forward and backward, over all layers.

    ``attention_imbalance``: the busiest rank's query-key pairs over the mean (1 is even);
    ``token_imbalance``: its tokens, which all other work and memory grow with.
    ``ring_bytes``: bytes that its ranks send each other.
    """
    heads = getattr(model, "num_key_value_heads", None) or model.num_attention_heads
    head_dim = getattr(model, "head_dim", None) or model.hidden_size // model.num_attention_heads
    # Latent attention has other head dims for keys than for values.
    k_dim, v_dim = (getattr(model, name, None) for name in ("qk_head_dim", "v_head_dim"))
    numbers = heads * ((k_dim or head_dim) + (v_dim or head_dim))
    windows = Counter(layer_windows(model))
    work, held, sent = [0] * world, [0] * world, 0
    for sequence, (window, layers) in product(sequences, windows.items()):
        ring = Ring(
            length=len(sequence.tokens),
            world=world,
            order=order,
            causal=True,
            documents=tuple(sequence.cu_seqlens.tolist()),
            kv_bytes=numbers * dtype.itemsize,
            grad_bytes=numbers * accumulation_dtype(dtype).itemsize,
            window=window,
        )
        for rank in range(world):
            work[rank] += layers * pairs(ring, rank)
            held[rank] += layers * tokens(ring, rank)
            ops = (*comms(ring, rank), *comms(ring, rank, backward=True))
            sent += layers * sum(op.sent_bytes(rank) for op in ops)
    return {
        "attention_imbalance": imbalance(work),
        "token_imbalance": imbalance(held),
        "ring_bytes": float(sent),
    }
