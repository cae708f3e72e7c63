"""What the schedules or the plan of a step promise: how even the work is, how much is sent."""

from collections import Counter
from collections.abc import Iterable
from itertools import product

import torch
from transformers import PreTrainedConfig

from longspan.attention.ring import accumulation_dtype
from longspan.data.packing import PackedSequence
from longspan.layout import Order
from longspan.models.windows import layer_windows
from longspan.schedule.ring import Ring
from longspan.schedule.rounds import comms, rounds
from longspan.train.ahead import Planned

__all__ = ["plan_figures", "ring_figures"]


def ring_figures(
    sequences: Iterable[PackedSequence],
    model: PreTrainedConfig,
    dtype: torch.dtype,
    world: int,
    order: Order,
) -> dict[str, float]:
    """Of the sequences of one sequence-parallel group, forward and backward, over all layers.

    ``attention_imbalance``: the busiest rank's query-key pairs over the mean (1 is even).
    ``ring_bytes``: bytes that its ranks send each other.
    """
    heads = getattr(model, "num_key_value_heads", None) or model.num_attention_heads
    head_dim = getattr(model, "head_dim", None) or model.hidden_size // model.num_attention_heads
    # Latent attention has other head dims for keys than for values.
    k_dim, v_dim = (getattr(model, name, None) for name in ("qk_head_dim", "v_head_dim"))
    numbers = heads * ((k_dim or head_dim) + (v_dim or head_dim))
    windows = Counter(layer_windows(model))
    pairs, sent = [0] * world, 0
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
            turns = rounds(ring, rank)
            pairs[rank] += layers * sum(block.pairs for turn in turns for block in turn.blocks)
            ops = (*comms(ring, rank), *comms(ring, rank, backward=True))
            sent += layers * sum(op.sent_bytes(rank) for op in ops)
    imbalance = max(pairs) * world / max(1, sum(pairs))
    return {"attention_imbalance": imbalance, "ring_bytes": float(sent)}


def plan_figures(planned: Planned) -> dict[str, float]:
    """What a step's plan promised, and what planning took.

    ``planned_s``: the whole batch; ``plan_wait_s``: what the step waited for its plan.
    """
    groups = [group for batch in planned.plan.micro_batches for group in batch.groups]
    return {
        "planned_s": planned.plan.seconds,
        "micro_batches": float(len(planned.plan.micro_batches)),
        "groups": float(len(groups)),
        "largest_group": float(max(len(group.ranks) for group in groups)),
        "planning_s": planned.planning_s,
        "plan_wait_s": planned.wait_s,
        "planner_restarts": float(planned.restarts),
    }
