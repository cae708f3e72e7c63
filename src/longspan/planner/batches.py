"""A batch of uneven sequences onto groups of ranks of different sizes (FlexSP, arXiv 2412.01523).

Three modes, one search: "flexible" gives every sequence the group that suits it; "uniform" has one
size of group a batch, the best; "static" one for the whole run, the smallest that can hold the
longest sequence there may be.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import product
from typing import Literal

import numpy as np

from longspan.cluster.memory import Checkpointing, Transformer
from longspan.cluster.spec import Cluster
from longspan.errors import ConfigError, MemoryLimitError
from longspan.plan import BatchPlan, Group, MicroBatch
from longspan.planner.alone import Batch
from longspan.planner.bound import lower_bound
from longspan.planner.prices import Ints, Prices, Sharding
from longspan.planner.search import search, total_s
from longspan.planner.teams import Shelf, Team, place
from longspan.planner.workload import Rates, Workload, shardings

__all__ = ["Mode", "plan_batch", "plan_priced", "ways_of"]

Mode = Literal["flexible", "uniform", "static"]


def plan_batch(
    lengths: Sequence[int],
    *,
    cluster: Cluster,
    model: Transformer,
    memory_limit: int | None = None,
    mode: Mode = "flexible",
    longest: int | None = None,
    sharding: Sharding | None = None,
    reduce_once: bool | None = None,
    checkpointing: Checkpointing = "none",
    attention_kept: float = 1.0,
    window: int | None = None,
    powers_of_two: bool = False,
    exact_s: float = 0.0,
    rates: Mapping[str, Rates] | None = None,
) -> BatchPlan:
    """Plan one batch of sequences with so many tokens each onto all ranks of ``cluster``.

    ``memory_limit``: bytes of a device that may be used, all by default. ``longest``: tokens of the
    longest sequence of the run, on which a static plan depends. ``sharding`` of the parameters, and
    whether gradients are reduced once a batch instead of once a micro-batch: by default what is
    best for this batch. ``rates``: what devices were measured to take. With ``exact_s`` a flexible
    plan of a small batch is also sought, and its bound proven, by integer programs of at most so
    many seconds. The same arguments give the same plan. Raises MemoryLimitError if a sequence fits
    no group, ConfigError for lengths that can't be.
    """
    work = Workload(
        *(cluster, model, memory_limit, checkpointing, attention_kept, window, powers_of_two),
        rates=rates,
    )
    ways = ways_of(work, sharding, reduce_once)
    return plan_priced(lengths, ways, mode=mode, longest=longest, exact_s=exact_s)


def ways_of(
    work: Workload, sharding: Sharding | None = None, reduce_once: bool | None = None
) -> tuple[Prices, ...]:
    """The prices of each way to spread the parameters and to reduce gradients that fits.

    They are the same for all batches. Raises MemoryLimitError if the model alone fits in no way.
    """
    ways, errors = [], []
    spreads = (sharding,) if sharding else shardings(work.cluster)
    # Over all ranks, and gradients reduced at once, takes least memory: its error tells most.
    for spread, once in product(spreads, (False, True) if reduce_once is None else (reduce_once,)):
        if reduce_once is None and spread == "none" and not once:
            continue  # gradients are whole anyway
        try:
            ways.append(work.prices(spread, reduce_once=once))
        except MemoryLimitError as error:
            errors.append(error)
    if not ways:
        raise errors[0]
    return tuple(ways)


def plan_priced(
    lengths: Sequence[int],
    ways: Sequence[Prices],
    *,
    mode: Mode = "flexible",
    longest: int | None = None,
    exact_s: float = 0.0,
) -> BatchPlan:
    """Plan one batch in the best of these ways; what is raised is ``plan_batch``'s."""
    priced, errors = [], []
    for prices in ways:
        try:
            priced.append(_bounded(lengths, prices))
        except MemoryLimitError as error:
            errors.append(error)
    best: BatchPlan | None = None
    for batch, order, bound in sorted(priced, key=lambda one: one[2]):
        under = best.seconds if best else np.inf
        try:
            plan = _best(batch, order, bound, lengths, mode, longest, exact_s, under)
        except MemoryLimitError as error:
            errors.append(error)
            continue
        if plan and plan.seconds < under:
            best = plan
    if best is None:
        raise errors[0]
    return best


def _bounded(lengths: Sequence[int], prices: Prices) -> tuple[Batch, Ints, float]:
    """The batch longest first, which sequence each of its places is, and its lower bound."""
    if not len(lengths) or min(lengths) < 1:
        raise ConfigError("a batch to plan needs sequences of at least 1 token each")
    given = np.array(lengths, dtype=np.int64)
    order = np.argsort(-given, kind="stable")
    batch = Batch(prices, given[order], prices.pairs_of(given[order]))
    if not np.isfinite(batch.quickest[0]):
        raise MemoryLimitError(_too_long(int(order[0]), int(given[order[0]]), prices))
    return batch, order, lower_bound(batch)


def _best(
    batch: Batch,
    order: Ints,
    bound: float,
    lengths: Sequence[int],
    mode: Mode,
    longest: int | None,
    exact_s: float,
    under_s: float = np.inf,
) -> BatchPlan | None:
    """The best plan found; None if there is no hope that it takes less than ``under_s``."""
    prices = batch.prices
    if bound >= under_s:
        return None
    held = max(longest if longest and mode == "static" else 0, int(batch.tokens[0]))
    sizes = _degrees(prices, held) if mode != "flexible" or batch.small else []
    if mode == "static":
        sizes = sizes[:1]
    if mode != "flexible" and not sizes:
        raise MemoryLimitError(_too_long(None, held, prices))
    # Powers of two where not all sizes are, and one degree in a small batch, are tried as well: no
    # choice of sizes is better than any, and no mode than flexible.
    tried = []
    if mode == "flexible":
        powers = replace(batch, powers=True)
        tried += [powers] * (batch.any_size and bool(np.isfinite(powers.quickest[0]))) + [batch]
    tried += [replace(batch, only=size) for size in sizes]
    shelves: list[Shelf] = []
    under = under_s - prices.batch_s
    for one in tried:
        if found := search(one, under):
            took = total_s(batch, found)
            shelves, under = (found, took) if took < under else (shelves, under)
    if not shelves:
        return None
    if exact_s and mode == "flexible":
        from longspan.planner.exact import solve_exactly

        shelves, proven = solve_exactly(batch, shelves, limit_s=exact_s)
        bound = max(bound, proven + prices.batch_s)
    return _plan(batch, shelves, tuple(int(length) for length in lengths), order, bound)


def _degrees(prices: Prices, tokens: int) -> list[int]:
    """Sizes of which groups fill the cluster, that can hold so many tokens, ascending."""
    found = []
    for pool in prices.pools[::-1]:
        for price in pool.prices:
            if price.ranks in found or price.most_tokens < tokens:
                continue
            free = [len(node) for node in prices.nodes]
            while any(free):
                taken = next(
                    (
                        taken
                        for other in prices.pools
                        if any(one.ranks == price.ranks for one in other.prices)
                        and (taken := place(price.ranks, other.nodes, free, prices))
                    ),
                    None,
                )
                if taken is None:
                    break
                for node, count in taken.items():
                    free[node] -= count
            else:
                found.append(price.ranks)
    return sorted(found)


def _too_long(index: int | None, tokens: int, prices: Prices) -> str:
    most = max(price.most_tokens for pool in prices.pools for price in pool.prices)
    one = max(pool.prices[0].most_tokens // pool.prices[0].ranks for pool in prices.pools)
    needed = prices.bytes_of(-(-tokens // prices.world), prices.world > 1)
    what = (
        f"a sequence of {tokens:,} tokens"
        if index is None
        else (f"sequence {index} has {tokens:,} tokens")
    )
    return (
        f"{what}, and all {prices.world} ranks together hold {most:,}: it takes "
        f"{needed / 2**30:.2f} GiB on each of them, or {-(-tokens // one):,} such devices"
    )


def _plan(
    batch: Batch, shelves: list[Shelf], lengths: tuple[int, ...], order: Ints, bound: float
) -> BatchPlan:
    prices = batch.prices
    micro_batches = []
    for shelf in sorted(shelves, key=lambda shelf: -shelf.seconds):
        teams = [team for team in shelf.teams if team.items]
        teams.sort(key=lambda team: (-team.price.ranks, -team.seconds, team.items[0]))
        taken = [0] * len(prices.nodes)
        groups = tuple(_group(team, prices, order, taken) for team in teams)
        micro_batches.append(MicroBatch(groups, float(prices.whole_s(shelf.seconds))))
    seconds = sum(one.seconds for one in micro_batches) + prices.batch_s
    bound = min(bound, seconds)
    return BatchPlan(
        lengths, tuple(micro_batches), prices.sharding, seconds, bound, prices.reduce_once
    )


def _group(team: Team, prices: Prices, order: Ints, taken: list[int]) -> Group:
    ranks: list[int] = []
    for node, count in sorted(team.ranks.items()):
        ranks += prices.nodes[node][taken[node] : taken[node] + count]
        taken[node] += count
    inside, sent, waits = team.price.inside(team.tokens, team.pairs, team.share)
    return Group(
        ranks=tuple(sorted(ranks)),
        sequences=tuple(int(order[item]) for item in sorted(team.items)),
        inside=inside,
        seconds=team.seconds,
        sent_bytes=sent,
        peak_bytes=prices.bytes_of(
            -(-team.tokens // len(ranks)), inside == "heads" and len(ranks) > 1
        ),
        sent_s=waits,
    )
