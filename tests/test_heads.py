"""Which heads a rank gets and when, and the bytes of the exchange."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ranks import Ranks
from torch.distributed.device_mesh import DeviceMesh
from torch.utils.checkpoint import checkpoint

import longspan
from longspan.attention.heads import Dealt, HeadExchange
from longspan.comm.counting import CountBytes
from longspan.layout import Order
from longspan.schedule.heads import HeadShares, gathered, trips

some_parts = st.integers(1, 5)


@given(st.integers(1, 8), st.integers(1, 8), st.integers(1, 9), some_parts)
def test_every_query_head_is_somewhere_with_its_kv_head(
    kv: int, group: int, world: int, parts: int
) -> None:
    shares = HeadShares(kv * group, kv, world, parts)
    assert [h for rank in range(world) for h in shares.q(rank)] == list(range(kv * group))
    for rank in range(world):
        brought = []
        for part in (None, *range(parts)):
            mine = shares.kv(rank, part)
            of_q = [mine[i] for i in shares.kv_of_q(rank, part)]
            assert of_q == [h // group for h in shares.q(rank, part)]
            assert {h // group for h in shares.q(rank, part)} == set(mine)
            if part is not None:
                brought += shares.brought(rank, part)
                assert set(mine) <= set(brought)
        assert [h for part in range(parts) for h in shares.q(rank, part)] == list(shares.q(rank))
        assert brought == list(shares.kv(rank))
    if kv % world == 0:
        assert all(shares.even(rank) for rank in range(world))


@given(st.integers(1, 16), st.integers(1, 8), st.integers(2, 9), st.integers(0, 1 << 16))
def test_parts_pay(kv: int, group: int, world: int, tokens: int) -> None:
    """Alike ones, of messages that aren't small; one at least."""
    shares = HeadShares(kv * group, kv, world)
    cuts = shares.cuts(tokens, 256, 512, 5)
    assert cuts[0] == 1 and cuts[-1] <= 8
    for parts in cuts[1:]:
        cut = HeadShares(kv * group, kv, world, parts)
        assert len({len(cut.q(0, part)) for part in range(parts)}) == 1
        message = tokens * (len(cut.q(0)) * 256 + len(cut.kv(0)) * 512)
        assert message // parts >= 1 << 17
        assert tokens * world * len(cut.q(0, 0)) >= 5
        if shares.even(0):
            assert all(cut.even(0, part) for part in range(parts))


@given(
    st.lists(st.integers(0, 9), min_size=1, max_size=4),
    *(st.integers(1, 3), st.integers(1, 3), st.sampled_from(list(Order))),
)
def test_gathered_tokens_are_in_order(
    lengths: list[int], places: int, width: int, order: Order
) -> None:
    ends, world = tuple(sum(lengths[:i]) for i in range(len(lengths) + 1)), places * width
    for place in range(places):
        ranks = range(place * width, (place + 1) * width)
        held = [longspan.positions(ends[-1], r, world, order, ends) for r in ranks]
        whole = torch.full((sum(map(len, held)),), -1)
        for own, laid in zip(held, gathered(ends[-1], ranks, world, order, ends), strict=True):
            for run in laid:
                to = slice(run.start, run.start + run.count)
                whole[to] = own[run.local : run.local + run.count]
        expected = torch.cat(held)
        assert whole.tolist() == (expected if order == "striped" else expected.sort()[0]).tolist()


def there_and_back(mesh: DeviceMesh, length: int, heads: int, kv: int, parts: int) -> None:
    """Whole tensors of heads in order, each part in the messages of the schedule."""
    group, dim, wide = mesh.get_group(), 3, torch.float64
    here, world = group.rank(), group.size()
    shares = HeadShares(heads, kv, world, parts)
    tokens = gathered(length, range(world), world, Order.ZIGZAG, (0, length))
    torch.manual_seed(0)
    deal = [
        Dealt(n, tuple(tuple(of(r, p) for r in range(world)) for p in range(parts)), tokens)
        for n, of in ((heads, shares.q), (kv, shares.brought))
    ]
    whole = [torch.randn(2, n, length, dim, dtype=wide) for n in (heads, kv, kv, heads)]
    own = longspan.positions(length, here, world, "zigzag")
    *mine, dout = (x[:, :, own] for x in whole)
    mine = [x.requires_grad_() for x in mine]

    size = 2 * dim * 8
    counts = deal[0].counts
    ways = (counts, size, 2 * size, range(world))
    (there, home), (back, end) = (
        [[op.sent_bytes(here) for op in ops] for ops in zip(*trips(shares, *ways, b), strict=True)]
        for b in (False, True)
    )
    exchange = HeadExchange(*deal, group)
    with CountBytes() as count:
        exchange.set_off(*mine)
    assert count.total_sent == sum(there)
    for part in range(parts):
        found = exchange.take(part)
        kinds = (shares.q, shares.brought, shares.brought)
        for x, every, of in zip(found, whole[:3], kinds, strict=True):
            ids = of(here, part)
            assert torch.equal(x, every[:, ids.start : ids.stop])
        q, k, v = found
        with CountBytes() as count:
            exchange.give(part, q + (k.sum() + v.sum()) * 0)
        assert count.total_sent == home[part]
    out = exchange.join()
    assert torch.equal(out, mine[0])
    with CountBytes() as count:
        out.backward(dout)
    assert count.total_sent == sum(back) + sum(end)
    assert torch.equal(mine[0].grad, dout)
    assert not mine[1].grad.any()


@settings(max_examples=30)
@given(st.integers(0, 20), st.integers(1, 3), st.integers(1, 3), some_parts, st.integers(1, 4))
def test_exchange(ranks: Ranks, length: int, kv: int, group: int, parts: int, world: int) -> None:
    ranks.run(there_and_back, length, kv * group, kv, parts, world=world)


def copies_are_added_up(mesh: DeviceMesh) -> None:
    """A KV head that several ranks have: its gradients, in half precision, are summed wide."""
    group = mesh.get_group()
    shares = HeadShares(4, 1, 4)
    tokens = gathered(8, range(4), 4, Order.CONTIGUOUS, (0, 8))
    q, kv = (
        Dealt(n, (tuple(of(r) for r in range(4)),), tokens)
        for n, of in ((4, shares.q), (1, shares.kv))
    )
    one, two, three = (
        torch.ones(1, n, 2, 1, dtype=torch.bfloat16, requires_grad=True) for n in (4, 1, 1)
    )
    exchange = HeadExchange(q, kv, group)
    exchange.set_off(one, two, three)
    here, k, v = exchange.take(0)
    exchange.give(0, here * k + v)
    exchange.join().sum().backward()
    assert torch.equal(two.grad, torch.full_like(two, 4.0))
    assert torch.equal(three.grad, torch.full_like(three, 4.0))


def test_copies_are_added_up(ranks: Ranks) -> None:
    ranks.run(copies_are_added_up)


def recomputed(mesh: DeviceMesh) -> float:
    """Nothing is left on its way where recomputing stops early: what comes next is right, too."""
    torch.manual_seed(0)
    own = longspan.positions(16, mesh.get_local_rank(), 4, "zigzag")
    whole = [torch.randn(1, 8, 16, 4, dtype=torch.float64) for _ in range(3)]
    told = {"mesh": mesh, "inside": "heads", "cu_seqlens": (0, 16)}
    grads = []
    for parts in (1, 2):
        for _ in range(2):
            own_x = [x[:, :, own].requires_grad_() for x in whole]
            if parts == 1:
                longspan.attend(*own_x, parts=1, **told).sum().backward()
            else:
                out = checkpoint(
                    lambda *x: longspan.attend(*x, parts=2, **told), *own_x, use_reentrant=False
                )
                out.sum().backward()
            grads.append(torch.cat([x.grad.flatten() for x in own_x]))
    return max((one - grads[0]).abs().max().item() for one in grads)


def test_recomputing_leaves_nothing_on_its_way(ranks: Ranks) -> None:
    assert max(ranks.run(recomputed)) < 1e-12


def only_sinks(mesh: DeviceMesh) -> bool:
    """A gradient that needs no way home: none is announced."""
    x = torch.randn(1, 8, 4, 4)
    sinks = torch.zeros(8, requires_grad=True)
    told = {"mesh": mesh, "inside": "heads", "cu_seqlens": (0, 16), "sinks": sinks, "parts": 2}
    q = x.clone().requires_grad_()
    grads = []
    for _ in range(2):
        out = longspan.attend(q, x, x, **told)
        grads += [torch.autograd.grad(out.sum(), sinks)[0]]
    longspan.attend(q, x, x, **told).sum().backward()
    return torch.equal(*grads) and bool(q.grad.any())


def test_a_gradient_of_sinks_alone(ranks: Ranks) -> None:
    assert all(ranks.run(only_sinks))
