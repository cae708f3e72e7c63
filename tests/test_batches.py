"""Batches onto groups: optimal where that can be told, within memory, and exact about it."""

from collections.abc import Iterator
from dataclasses import replace
from functools import lru_cache
from itertools import product

import numpy as np
import pytest

from longspan.cluster.cost import demand
from longspan.cluster.fabric import Link
from longspan.cluster.memory import Transformer
from longspan.cluster.spec import Cluster, Device, cluster_from, uniform
from longspan.errors import ConfigError, MemoryLimitError
from longspan.plan import BatchPlan
from longspan.planner.alone import Batch
from longspan.planner.batches import plan_batch, plan_priced
from longspan.planner.cuts import shortest
from longspan.planner.prices import Price, Prices
from longspan.planner.published import PUBLISHED, published_prices
from longspan.planner.wires import Wires
from longspan.planner.workload import Rates, Workload
from longspan.schedule.ops import Comm

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


def uneven_cluster(slow: int, fast: int) -> Cluster:
    """A node of half the speed first, and one as in ``slow_cluster``."""
    values = slow_cluster().model_dump(mode="json")
    device = values["devices"]["device"]
    half = {kind: {"float32": rates["float32"] / 2} for kind, rates in device["measured"].items()}
    values["devices"]["slow"] = device | {
        "measured": half,
        "bytes_per_s": device["bytes_per_s"] / 2,
    }
    node = values["sites"][0]["nodes"][0]
    values["sites"][0]["nodes"] = [
        node | {"devices": {"slow": slow}, "count": 1},
        node | {"devices": {"device": fast}, "count": 1},
    ]
    return cluster_from(values, "uneven")


def rooms(prices: Prices) -> Iterator[tuple[Price, tuple[int, ...]]]:
    """Groups that may be, and the ranks they take of each node: of one, or all of all but one."""
    for pool in prices.pools:
        sizes = [len(ranks) if n in pool.nodes else 0 for n, ranks in enumerate(prices.nodes)]
        for price in pool.prices:
            for counts in product(*(range(size + 1) for size in sizes)):
                parts = sum(0 < count < size for count, size in zip(counts, sizes, strict=True))
                apart = sum(map(bool, counts)) > 1
                if sum(counts) != price.ranks or (apart and price.ranks <= max(sizes)):
                    continue
                if not apart or parts <= 1:
                    yield price, counts


def optimum(prices: Prices, lengths: list[int]) -> float:
    """The least seconds of any partition into micro-batches, groups, sizes and nodes.

    For so few ranks that no two groups are in several nodes at once.
    """
    tokens = np.array(lengths)
    pairs = prices.pairs_of(tokens)
    options = list(rooms(prices))

    @lru_cache(None)
    def group(subset: int, option: int) -> float:
        held = [i for i in range(len(lengths)) if subset >> i & 1]
        price = options[option][0]
        if sum(lengths[i] for i in held) > price.most_tokens:
            return np.inf
        return price.seconds(int(tokens[held].sum()), float(pairs[held].sum()))

    @lru_cache(None)
    def rests(free: tuple[int, ...]) -> list[tuple[int, tuple[int, ...]]]:
        found = {}
        for option, (price, counts) in enumerate(options):
            rest = tuple(a - b for a, b in zip(free, counts, strict=True))
            if min(rest) >= 0:
                found.setdefault((price, rest), (option, rest))
        return list(found.values())

    def parts(subset: int) -> Iterator[int]:
        first = subset & -subset
        rest = subset ^ first
        part = rest
        while True:
            yield part | first
            if not part:
                return
            part = (part - 1) & rest

    @lru_cache(None)
    def shelf(subset: int, free: tuple[int, ...]) -> float:
        if not subset:
            return 0.0
        return min(
            (
                max(group(part, option), shelf(subset ^ part, rest))
                for part in parts(subset)
                for option, rest in rests(free)
            ),
            default=np.inf,
        )

    @lru_cache(None)
    def best(subset: int) -> float:
        if not subset:
            return 0.0
        world = tuple(map(len, prices.nodes))
        return min(
            float(prices.whole_s(shelf(part, world))) + best(subset ^ part)
            for part in parts(subset)
        )

    return best((1 << len(lengths)) - 1) + prices.batch_s


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


def small_prices(kind: str, case: int, rng: np.random.Generator) -> Prices:
    """Prices of at most four ranks."""
    if kind == "published":
        world = int(rng.integers(1, 5))
        return published_prices("7b", world, memory_limit=160 << 30, powers_of_two=False)
    one, other = int(rng.integers(1, 3)), int(rng.integers(1, 3))
    cluster = {
        "one node": lambda: slow_cluster(1, int(rng.integers(1, 5))),
        "two nodes": lambda: slow_cluster(2, one),
        "uneven": lambda: uneven_cluster(one, other),
    }[kind]()
    return Workload(cluster, SMALL, overlap=bool(case % 2)).prices("none")


@pytest.mark.parametrize("kind", ["published", "one node", "two nodes", "uneven"])
def test_small_batches_are_near_the_optimum(kind: str) -> None:
    rng = np.random.default_rng(0)
    apart = []
    for case in range(40):
        prices = small_prices(kind, case, rng)
        most = max(pool.prices[-1].most_tokens for pool in prices.pools)
        lengths = random_lengths(rng, int(rng.integers(1, 8)), most)
        plan = plan_priced(lengths, [prices])
        check(plan, prices, 160 << 30)
        least = optimum(prices, lengths)
        assert plan.lower_bound_s <= least * (1 + 1e-9)
        apart.append(plan.seconds / least - 1)
    assert min(apart) > -1e-9
    assert np.mean(apart) <= 0.02, np.mean(apart)
    assert max(apart) <= 0.1, max(apart)


def test_exact_mode_proves_the_optimum() -> None:
    rng = np.random.default_rng(1)
    for _ in range(4):
        prices = published_prices("7b", 4, memory_limit=160 << 30, powers_of_two=False)
        lengths = random_lengths(rng, 5, prices.pools[0].prices[-1].most_tokens)
        plan = plan_priced(lengths, [prices], exact_s=20)
        check(plan, prices, 160 << 30)
        least = optimum(prices, lengths)
        assert plan.seconds == pytest.approx(least, rel=1e-4)
        assert plan.lower_bound_s == pytest.approx(least, rel=1e-4)


@pytest.mark.parametrize("sharding", ["world", "node", "none"])
@pytest.mark.parametrize("mode", ["flexible", "uniform", "static"])
def test_plans_keep_to_memory_and_topology(mode: str, sharding: str) -> None:
    rng = np.random.default_rng(2)
    cluster, limit = slow_cluster(3, 4), 60 << 20
    prices = Workload(cluster, SMALL, limit).prices(sharding, reduce_once=False)  # type: ignore[arg-type]
    for count in (1, 7, 60):
        lengths = random_lengths(rng, count, prices.capacity // 2)
        plan = plan_priced(lengths, [prices], mode=mode, longest=prices.capacity // 2)  # type: ignore[arg-type]
        check(plan, prices, limit)
        sizes = {len(g.ranks) for m in plan.micro_batches for g in m.groups}
        if mode != "flexible":
            assert len(sizes) == 1 and prices.world % sizes.pop() == 0
        for micro in plan.micro_batches:
            for group in micro.groups:
                nodes = {rank // 4 for rank in group.ranks}
                assert len(nodes) == -(-len(group.ranks) // 4)


def test_flexible_beats_one_degree() -> None:
    lengths = [6000, *[300] * 40]
    took = {
        mode: plan_batch(
            lengths,
            cluster=slow_cluster(),
            model=SMALL,
            memory_limit=200 << 20,
            mode=mode,  # type: ignore[arg-type]
            longest=8000,
        ).seconds
        for mode in ("flexible", "uniform", "static")
    }
    assert took["flexible"] < took["uniform"] <= took["static"]


def test_a_slow_node_gets_less() -> None:
    plan = plan_batch([400] * 60, cluster=uneven_cluster(2, 2), model=SMALL, sharding="none")
    held = [0] * 4
    for micro in plan.micro_batches:
        for group in micro.groups:
            for rank in group.ranks:
                held[rank] += sum(plan.lengths[i] for i in group.sequences) // len(group.ranks)
    assert 1.6 < sum(held[2:]) / sum(held[:2]) < 2.4


def test_short_sequences_are_planned_where_messages_are_dear() -> None:
    """What they add to a group is less than heads' messages cost beyond a ring's."""
    where = slow_cluster()
    dear = {
        kind: device.model_copy(update={"message_s": 0.05})
        for kind, device in where.devices.items()
    }
    cluster = where.with_devices(dear)
    plan = plan_batch([50] * 24, cluster=cluster, model=SMALL, sharding="none")
    assert {len(group.ranks) for micro in plan.micro_batches for group in micro.groups} == {1}
    rates = {"device": Rates(0.03, 1e-4, 1e-9)}
    prices = Workload(cluster, SMALL, rates=rates).prices("none", reduce_once=True)
    tokens = np.full(24, 50)
    cut = shortest(Batch(prices, tokens, prices.pairs_of(tokens)))
    assert len(cut.limits_s) == 1  # more than one would be more micro-batches' costs


def test_same_arguments_same_plan() -> None:
    lengths = random_lengths(np.random.default_rng(3), 200, 50_000)
    prices = published_prices("7b", 64)
    assert plan_priced(lengths, [prices]) == plan_priced(lengths, [prices])


@pytest.mark.parametrize("name", sorted(PUBLISHED))
def test_published_models(name: str) -> None:
    prices = published_prices(name, 64)
    lengths = random_lengths(np.random.default_rng(4), 100, 100_000)
    check(plan_priced(lengths, [prices]), prices, 28 << 30)


@pytest.mark.parametrize("name", sorted(PUBLISHED))
def test_any_size_is_no_worse_than_powers_of_two(name: str) -> None:
    rng = np.random.default_rng(5)
    powers, free = (published_prices(name, 32, powers_of_two=only) for only in (True, False))
    heavy = rng.lognormal(np.log(2000), 1.5, 120).astype(int)
    for lengths in (heavy, np.full(120, 4096), np.append(np.full(100, 600), powers.capacity - 1)):
        cut = np.clip(lengths, 1, powers.capacity - 1).tolist()
        some, every = plan_priced(cut, [powers]), plan_priced(cut, [free])
        check(every, free, 28 << 30)
        assert every.seconds <= some.seconds * (1 + 1e-9)


def test_memory_is_filled() -> None:
    """One rank holds one such sequence, eight hold eleven."""
    lengths, prices = [4096] * 512, published_prices("7b", 64)
    assert prices.pools[0].prices[0].most_tokens < 2 * 4096
    assert len(plan_priced(lengths, [prices]).micro_batches) == 6


def test_a_long_tail_is_near_the_bound() -> None:
    lengths = np.random.default_rng(6).lognormal(np.log(2000), 1.5, 512).astype(int)
    plan = plan_priced(lengths.tolist(), [published_prices("7b", 64, powers_of_two=False)])
    assert plan.seconds <= 1.1 * plan.lower_bound_s


def test_too_long_a_sequence_is_named() -> None:
    prices = published_prices("7b", 8)
    with pytest.raises(MemoryLimitError, match=r"sequence 1 has 900,000 tokens.*such devices"):
        plan_priced([100, 900_000], [prices])
    with pytest.raises(MemoryLimitError, match="900,000"):
        plan_priced([100], [prices], mode="static", longest=900_000)
    with pytest.raises(MemoryLimitError, match="GiB on each rank"):
        plan_batch([10], cluster=slow_cluster(memory="8MiB"), model=SMALL)


def test_what_cannot_be_planned() -> None:
    prices = published_prices("7b", 8)
    for lengths in ([], [0, 3]):
        with pytest.raises(ConfigError, match="at least 1"):
            plan_priced(lengths, [prices])
    with pytest.raises(ConfigError, match="published"):
        published_prices("8b")
    with pytest.raises(ConfigError, match="1 to 64"):
        published_prices("7b", 65)


@pytest.mark.parametrize("size", [2, 3, 4, 5, 6])
def test_exchange_costs_what_the_cluster_says(size: int) -> None:
    """The closed form of an exchange is the price of its messages, one by one."""
    cluster = slow_cluster(2, 3)
    wires = Wires.of(cluster, [cluster.ranks_of_node(0), cluster.ranks_of_node(1)])
    tokens, weight = 360, 720
    counts = wires.counts(size)
    ranks = tuple(
        rank
        for node, count in enumerate(counts.tolist())
        for rank in cluster.ranks_of_node(node)[:count]
    )
    each = tokens * weight // size**2
    asked = demand(Comm("all_to_all", ranks, (each,) * size**2), cluster)
    took, sent = wires.all_to_all(counts, weight)
    assert took * tokens == pytest.approx(asked.transfer_s)
    assert wires.latency(counts) == pytest.approx(asked.latency_s)
    assert sent * tokens == pytest.approx((size - 1) * each)


def test_a_document_and_a_plan_take_what_they_were_measured_to_take() -> None:
    rates = Rates(0.01, 1e-4, 1e-8)
    cluster = slow_cluster(1, 1)

    def seconds(rates: Rates) -> float:
        return plan_batch([100] * 8, cluster=cluster, model=SMALL, rates={"device": rates}).seconds

    more = replace(rates, document_s=0.02, plan_s=0.3)
    assert seconds(more) - seconds(rates) == pytest.approx(8 * 0.02 + 0.3)
