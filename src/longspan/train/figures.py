"""What the schedules or the plan of a step promise: how even the work is, how much is sent."""

from collections import Counter
from collections.abc import Iterable
from itertools import product

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from longspan.attention.ring import ring_of
from longspan.data.packing import PackedSequence
from longspan.layout import Order, local_length
from longspan.models.windows import layer_windows
from longspan.schedule.heads import HeadShares, exchange_op
from longspan.schedule.ring import imbalance, pairs
from longspan.schedule.rounds import cheapest, comms
from longspan.train.ahead import Planned
from longspan.train.config import Parallel

__all__ = ["plan_figures", "ring_figures"]


def ring_figures(
    sequences: Iterable[PackedSequence],
    model: PreTrainedConfig,
    dtype: torch.dtype,
    world: int,
    ways: Parallel,
) -> dict[str, float]:
    """Of the sequences of one sequence-parallel group, forward and backward, over all layers.

    ``attention_imbalance``: the busiest rank's query-key pairs over the mean (1 is even);
    ``token_imbalance``: its tokens, which all other work and memory grow with.
    ``ring_bytes``: bytes that its ranks send each other.
    """
    q, k, v = like = _tensors(model, dtype)
    order, exchanged = Order.of(ways.order), ways.inside == "heads"
    windows = Counter(layer_windows(model))
    work, held, sent = [0] * world, [0] * world, 0
    for sequence, (window, layers) in product(sequences, windows.items()):
        documents = tuple(sequence.cu_seqlens.tolist())
        ring = ring_of(
            *(q, k, v, 1 if exchanged else world, order, True, documents),
            window=window,
            grads_in=ways.grads_in,
        )
        counts = [local_length(documents[-1], r, world, order, documents) for r in range(world)]
        held = [total + layers * count for total, count in zip(held, counts, strict=True)]
        if exchanged:
            shares = HeadShares(q.shape[1], k.shape[1], world)
            sent += layers * _exchanged(counts, shares, like)
        for rank in range(world):
            if exchanged:
                work[rank] += layers * pairs(ring, 0) * len(shares.q(rank))
                continue
            work[rank] += layers * pairs(ring, rank)
            ops = (*comms(ring, rank), *comms(ring, rank, True, cheapest(ring)))
            sent += layers * sum(op.sent_bytes(rank) for op in ops)
    return {
        "attention_imbalance": imbalance(work),
        "token_imbalance": imbalance(held),
        "ring_bytes": float(sent),
    }


def _tensors(model: PreTrainedConfig, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values of a layer, without tokens."""
    q_heads = model.num_attention_heads
    heads = getattr(model, "num_key_value_heads", None) or q_heads
    head_dim = getattr(model, "head_dim", None) or model.hidden_size // q_heads
    # Latent attention has other head dims for keys than for values.
    k_dim, v_dim = (getattr(model, name, None) for name in ("qk_head_dim", "v_head_dim"))
    sizes = (q_heads, k_dim or head_dim), (heads, k_dim or head_dim), (heads, v_dim or head_dim)
    q, k, v = (torch.empty(1, number, 0, dim, dtype=dtype) for number, dim in sizes)
    return q, k, v


def _exchanged(counts: list[int], shares: HeadShares, like: tuple[Tensor, Tensor, Tensor]) -> int:
    """Bytes of a layer's head exchanges: there and back, and their gradients the same way."""
    q, k, v = like
    ranks = range(shares.world)
    of_q, of_kv = ([of(rank) for rank in ranks] for of in (shares.q, shares.kv))
    dims = ((of_q, q), (of_q, v), (of_kv, k), (of_kv, v))  # the output has the values' head dim
    ops = [exchange_op(counts, of, x.shape[3] * x.element_size(), ranks) for of, x in dims]
    return 2 * sum(op.sent_bytes(rank) for op in ops for rank in ranks)


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
