"""What a step of a setup takes on a cluster: seconds, tokens, memory.

Priced are real packs and batches of the documents, the first ones of the stream that training
reads. A packed step is its micro-batches, each as long as its slowest data-parallel rank, and the
reduction of gradients; a planned step is what its plan foretells.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate as sums
from statistics import mean

import numpy as np

from longspan.balance import balanced
from longspan.data.packing import Packer
from longspan.errors import MemoryLimitError
from longspan.layout import Order
from longspan.plan import Setup
from longspan.planner.attention import price_attention
from longspan.planner.batches import plan_priced, ways_of
from longspan.planner.workload import Rates, Workload
from longspan.schedule.ring_tasks import AttentionKernels

__all__ = ["Forecast", "Forecaster", "most_tokens"]

_MANY = 1024


@dataclass(frozen=True, slots=True)
class Forecast:
    """A step: its seconds, its tokens on all ranks, and what the fullest device holds."""

    step_s: float
    tokens: float
    memory_bytes: int

    @property
    def tokens_per_s(self) -> float:
        """Of all ranks together."""
        return self.tokens / self.step_s


@dataclass(frozen=True, eq=False)
class Forecaster:
    """A model's training on a cluster, fed by ``packer``; ``work`` says which and where.

    The ``checkpointing`` of ``work`` gives way to that of a setup. ``packs`` and ``batches``: how
    many are priced; one of the latter where it has so many documents that it tells enough.
    """

    work: Workload
    packer: Packer
    packs: int = 8
    batches: int = 2

    def of(self, setup: Setup) -> Forecast:
        """What a setup takes; raises MemoryLimitError if it doesn't fit."""
        work = replace(
            self.work, checkpointing=setup.checkpointing, attention_kept=setup.attention_kept
        )
        if setup.mode == "fixed":
            return self._fixed(work, setup)
        assert setup.global_batch, "a planned step has its documents counted"
        batches = 1 if setup.global_batch > _MANY else self.batches
        ways = ways_of(work, setup.sharding)
        plans = [
            plan_priced(
                self._batch(setup.global_batch, n), ways, mode=setup.mode, longest=max(self.lengths)
            )
            for n in range(batches)
        ]
        groups = [group for plan in plans for micro in plan.micro_batches for group in micro.groups]
        return Forecast(
            mean(plan.seconds for plan in plans),
            mean(sum(plan.lengths) for plan in plans),
            max(group.peak_bytes for group in groups),
        )

    def _batch(self, size: int, number: int) -> list[int]:
        return [self.packer.piece(n).length for n in range(number * size, (number + 1) * size)]

    @cached_property
    def lengths(self) -> list[int]:
        """Tokens of pieces of documents, of up to 65,536 of them."""
        seen = range(min(self.packer.pieces, 1 << 16))
        return [self.packer.piece(n).length for n in seen]

    @cached_property
    def documents(self) -> list[tuple[int, ...]]:
        """Where the documents of the first packs start, and the last one ends."""
        return [
            tuple(sums((piece.length for piece in self.packer.pack(n)), initial=0))
            for n in range(self.packs)
        ]

    @cached_property
    def pack_tokens(self) -> float:
        """Of a pack, on average over an epoch."""
        return self.packer.tokens / self.packer.epoch_packs(0)

    def _fixed(self, work: Workload, setup: Setup) -> Forecast:
        world, sp = work.cluster.ranks, setup.sp or work.cluster.ranks
        dp = world // sp
        state = work.state(setup.sharding, reduce_once=setup.accumulate > 1)
        held = min(self.packer.max_length, self.packer.tokens)
        if held > (most := self.most_tokens(setup)):
            raise MemoryLimitError(
                f"a sequence of {held:,} tokens doesn't fit {sp} ranks, which hold {most:,}: lower "
                "data.max_length, set train.checkpointing to full, or use more ranks"
            )
        group = tuple(range(sp))
        # Of several nodes the last group may be the one that crosses between them.
        across = tuple(range((dp - 1) * sp, world))
        times = [
            max(self._group_s(work, setup, ranks, ends) for ranks in {group, across})
            for ends in self.documents
        ]
        slowest = _expected_most(times, dp)
        gather_s = state.gather_s()
        micro_s = max(slowest, gather_s) if work.overlaps else slowest + gather_s
        step_s = setup.accumulate * micro_s + state.batch_s()
        tokens = setup.accumulate * dp * self.pack_tokens
        most = max(-(-held // sp), *(most_tokens(ends, sp, setup.order) for ends in self.documents))
        return Forecast(step_s, tokens, state.bytes_of(most, _exchanged(setup, sp)))

    def _group_s(
        self, work: Workload, setup: Setup, ranks: tuple[int, ...], ends: tuple[int, ...]
    ) -> float:
        """Forward and backward of one pack on ranks that share it."""
        kinds = {work.cluster.kinds[rank] for rank in ranks}
        rates = Rates.slowest([work.rates_of(kind) for kind in kinds])
        bounds = np.array(ends, dtype=np.int64)
        lengths = bounds[1:] - bounds[:-1]
        if len(ranks) == 1:
            pairs = float(work.pairs(lengths).sum())
            return rates.micro_batch_s + rates.token_s * ends[-1] + rates.pair_s * pairs
        key = (ranks, setup.order, setup.inside, ends)
        if key not in self._attention:
            self._attention[key] = self._attended(work, setup, ranks, ends)
        most, forward_s, backward_s = self._attention[key]
        again = 0.0 if work.checkpointing == "none" else 1.0
        kept = work.attention_kept if work.checkpointing == "selective" else 0.0
        attention_s = work.model.layers * (forward_s * (1 + again * (1 - kept)) + backward_s)
        return rates.micro_batch_s + rates.token_s * most + attention_s

    @cached_property
    def _attention(self) -> dict[tuple[object, ...], tuple[int, float, float]]:
        """The busiest rank's tokens, forward and backward of a layer, of what is priced already."""
        return {}

    def _attended(
        self, work: Workload, setup: Setup, ranks: tuple[int, ...], ends: tuple[int, ...]
    ) -> tuple[int, float, float]:
        model, order = work.model, Order.of(setup.order)
        most = most_tokens(ends, len(ranks), order)
        kernels = AttentionKernels(
            model.heads, model.kv_heads, model.head_dim, work.dtype, model.dtype_bytes
        )
        priced = price_attention(
            *(work.calibrated, kernels, ends),
            ranks=ranks,
            order=order,
            inside=setup.inside,
            window=work.window,
        )
        return most, priced.forward_s, priced.backward_s

    def most_tokens(self, setup: Setup) -> int:
        """The most tokens of a sequence that a setup's ranks hold together; 0: not even one."""
        work = replace(
            self.work, checkpointing=setup.checkpointing, attention_kept=setup.attention_kept
        )
        state = work.state(setup.sharding, reduce_once=setup.accumulate > 1)
        sp = setup.sp or self.work.cluster.ranks
        try:
            exchanged = _exchanged(setup, sp)
            return sp * min(
                state.most_tokens(kind, exchanged) for kind in set(self.work.cluster.kinds)
            )
        except MemoryLimitError:
            return 0


def most_tokens(ends: Sequence[int], ranks: int, order: Order | str) -> int:
    """The busiest rank's tokens of a pack; ``ends``: where documents start, and the last ends."""
    if Order.of(order) is not Order.BALANCED:
        return -(-ends[-1] // ranks)
    shares = balanced(ends, ranks)
    return max(sum(stop - start for start, stop in share) for share in shares)


def _exchanged(setup: Setup, ranks: int) -> bool:
    return setup.inside == "heads" and ranks > 1


def _expected_most(values: Sequence[float], draws: int) -> float:
    """The expected largest of some draws of these values."""
    chances = (np.arange(len(values) + 1) / len(values)) ** draws
    return float(np.sort(np.array(values)) @ np.diff(chances))
