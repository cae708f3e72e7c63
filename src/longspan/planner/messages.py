"""What a message takes from training, told from a pass over a document that ranks share."""

from dataclasses import replace
from itertools import product

from longspan.layout import Order
from longspan.planner.attention import price_attention
from longspan.planner.workload import Rates, Workload
from longspan.schedule.ring_tasks import AttentionKernels
from longspan.schedule.rounds import cheapest, rounds

__all__ = ["price_message"]


def price_message(
    work: Workload, took_s: float, tokens: int, ranks: int, order: Order | str
) -> float:
    """Seconds of a message, if the first ``ranks`` take ``took_s`` for a document in a ring.

    That is what the pass takes beyond its computing and its bytes. A probe's messages wait for
    nothing else; those of training find their rank at work, its caches cold, its thread asleep.
    """
    model, documents = work.model, (0, tokens)
    kernels = AttentionKernels(
        model.heads, model.kv_heads, model.head_dim, work.dtype, model.dtype_bytes
    )
    silent = {
        kind: device.model_copy(update={"message_s": 0.0})
        for kind, device in work.cluster.devices.items()
    }
    work = replace(work, cluster=work.cluster.model_copy(update={"devices": silent}))
    group = range(ranks)
    priced = price_attention(
        *(work.calibrated, kernels, documents),
        ranks=group,
        order=order,
        inside="ring",
        window=work.window,
    )
    again = 1 if work.checkpointing != "none" else 0
    rates = Rates.slowest([work.rates_of(kind) for kind in set(work.cluster.kinds)])
    told_s = rates.micro_batch_s + rates.token_s * -(-tokens // ranks)
    told_s += model.layers * ((1 + again) * priced.forward_s + priced.backward_s)
    ring = kernels.ring(tokens, ranks, order, window=work.window)
    ways = [(False, "kv")] * (1 + again) + [(True, cheapest(ring))]
    messages = [0] * ranks
    for rank, (backward, travels) in product(group, ways):
        turns = rounds(ring, rank, backward, travels)
        messages[rank] += sum(len(turn.payload) + len(turn.grads) for turn in turns)
    return max(0.0, took_s - told_s) / (model.layers * max(messages))
