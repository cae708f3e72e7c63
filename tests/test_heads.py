"""Which heads a rank gets, and the bytes of the exchange."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ranks import Ranks
from torch.distributed.device_mesh import DeviceMesh

from longspan.attention.heads import Dealt, to_heads, to_tokens
from longspan.comm.counting import CountBytes
from longspan.schedule.heads import HeadShares, exchange_op


@given(st.integers(1, 8), st.integers(1, 8), st.integers(1, 9))
def test_every_query_head_is_somewhere_with_its_kv_head(kv: int, group: int, world: int) -> None:
    shares = HeadShares(kv * group, kv, world)
    assert [h for rank in range(world) for h in shares.q(rank)] == list(range(kv * group))
    for rank in range(world):
        mine = shares.kv(rank)
        assert [mine[i] for i in shares.kv_of_q(rank)] == [h // group for h in shares.q(rank)]
        assert {h // group for h in shares.q(rank)} == set(mine)
    if kv % world == 0:
        assert all(shares.even(rank) for rank in range(world))


def there_and_back(mesh: DeviceMesh, counts: list[int], heads: int, kv: int) -> None:
    group = mesh.get_group()
    here, world = group.rank(), group.size()
    counts = counts[:world]
    shares = HeadShares(heads, kv, world)
    for of, number in ((shares.q, heads), (shares.kv, kv)):
        ranges = tuple(of(rank) for rank in range(world))
        dealt = Dealt(number, tuple(counts), ranges)
        whole = torch.randn(2, number, sum(counts), 3, dtype=torch.float64,
                            generator=torch.Generator().manual_seed(0))  # fmt: skip
        start = sum(counts[:here])
        mine = whole[:, :, start : start + counts[here]].clone().requires_grad_()
        with CountBytes() as count:
            (out,) = to_heads((mine,), (dealt,), group)
        assert torch.equal(out, whole[:, ranges[here].start : ranges[here].stop])
        op = exchange_op(counts, ranges, 2 * 3 * 8, range(world))
        assert count.total_sent == op.sent_bytes(here)
        out.sum().backward()
        copies = torch.tensor([float(sum(h in r for r in ranges)) for h in range(number)])
        assert torch.equal(mine.grad, copies.double().view(1, -1, 1, 1).expand_as(mine))
        if of == shares.q:
            back = to_tokens(out.detach().requires_grad_(), dealt, group)
            assert torch.equal(back, mine)


@settings(max_examples=30)
@given(st.lists(st.integers(0, 5), min_size=4, max_size=4), st.integers(1, 3), st.integers(1, 3),
       st.integers(1, 4))  # fmt: skip
def test_exchange(ranks: Ranks, counts: list[int], kv: int, group: int, world: int) -> None:
    ranks.run(there_and_back, counts, kv * group, kv, world=world)
