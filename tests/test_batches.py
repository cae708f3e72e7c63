"""Batches onto groups: optimal where that can be told, within memory, and exact about it."""

from functools import lru_cache
from itertools import combinations

import numpy as np
import pytest

from longspan.cluster.fabric import Link
from longspan.cluster.memory import Transformer
from longspan.cluster.spec import Cluster, Device, cluster_from, uniform
from longspan.errors import ConfigError, MemoryLimitError
from longspan.plan import BatchPlan
from longspan.planner.batches import plan_batch, plan_priced
from longspan.planner.prices import Prices
from longspan.planner.published import PUBLISHED, published_prices
from longspan.planner.workload import Workload

SMALL = Transformer(4, 256, 8, 4, 32, 512, 1000)


def slow_cluster(nodes: int = 2, devices: int = 2, memory: str = "1GiB") -> Cluster:
    device = Device(
        memory_bytes=memory,
        bytes_per_s=4e9,
        measured={"matmul": {"float32": 2e10}, "attention": {"float32": 1e10}},
        overhead_s=5e-6,
    )
    near, far = Link(latency_s=5e-5, bytes_per_s=1e9), Link(latency_s=2e-4, bytes_per_s=25e6)
    return uniform(device, devices=devices, nodes=nodes, link=near, network=far)


def optimum(prices: Prices, lengths: list[int]) -> float:
    """The least seconds of any partition into micro-batches, groups and sizes; one node."""
    (pool,) = prices.pools
    tokens = np.array(lengths)
    pairs = prices.pairs_of(tokens)
    world, whole = prices.world, (1 << len(lengths)) - 1

    @lru_cache(None)
    def group(subset: int, ranks: int) -> float:
        held = [i for i in range(len(lengths)) if subset >> i & 1]
        price = pool.prices[ranks - 1]
        if sum(lengths[i] for i in held) > price.most_tokens:
            return np.inf
        return price.seconds(int(tokens[held].sum()), float(pairs[held].sum()))

    def parts(subset: int):  # type: ignore[no-untyped-def]
        first = subset & -subset
        rest = subset ^ first
        part = rest
        while True:
            yield part | first
            if not part:
                return
            part = (part - 1) & rest

    @lru_cache(None)
    def shelf(subset: int, ranks: int) -> float:
        if not subset:
            return 0.0
        return min(
            (
                max(group(part, used), shelf(subset ^ part, ranks - used))
                for part in parts(subset)
                for used in range(1, ranks + 1)
            ),
            default=np.inf,
        )

    @lru_cache(None)
    def best(subset: int) -> float:
        if not subset:
            return 0.0
        return min(
            float(prices.whole_s(shelf(part, world))) + best(subset ^ part)
            for part in parts(subset)
        )

    return best(whole) + prices.batch_s


def check(plan: BatchPlan, prices: Prices, limit: int) -> None:
    """Every sequence once, no rank twice at a time, nothing over the limit, times as told."""
    every = [s for m in plan.micro_batches for g in m.groups for s in g.sequences]
    assert sorted(every) == list(range(len(plan.lengths)))
    for micro in plan.micro_batches:
        ranks = [rank for group in micro.groups for rank in group.ranks]
        assert len(set(ranks)) == len(ranks)
        assert set(ranks) <= set(range(prices.world))
        assert all(group.peak_bytes <= limit for group in micro.groups)
        assert micro.seconds == pytest.approx(
            float(prices.whole_s(max(group.seconds for group in micro.groups)))
        )
    total = sum(micro.seconds for micro in plan.micro_batches) + prices.batch_s
    assert plan.seconds == pytest.approx(total)
    assert plan.lower_bound_s <= plan.seconds * (1 + 1e-9)


def random_lengths(rng: np.random.Generator, count: int, most: int) -> list[int]:
    return np.minimum(rng.lognormal(np.log(most / 8), 1.2, count).astype(int) + 1, most).tolist()


def test_small_batches_are_near_the_optimum() -> None:
    rng = np.random.default_rng(0)
    apart = []
    for case in range(150):
        world, count = int(rng.integers(1, 5)), int(rng.integers(1, 8))
        if case % 2:
            prices = published_prices("7b", world, memory_limit=160 << 30, powers_of_two=False)
        else:
            prices = Workload(slow_cluster(1, world), SMALL, overlap=bool(case % 4)).prices("none")
        most = prices.pools[0].prices[-1].most_tokens
        lengths = random_lengths(rng, count, most)
        plan = plan_priced(lengths, prices)
        check(plan, prices, 160 << 30)
        least = optimum(prices, lengths)
        assert plan.lower_bound_s <= least * (1 + 1e-9)
        apart.append(plan.seconds / least - 1)
    assert min(apart) > -1e-9
    assert np.mean(apart) <= 0.02, np.mean(apart)
    assert max(apart) <= 0.1, max(apart)
