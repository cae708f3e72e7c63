"""Changes of layout on real ranks: values, gradients in either layout, bytes, chunks."""

from collections.abc import Iterator, Mapping
from functools import lru_cache
from math import prod
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from layouts import LAYOUT_ORDERS, deal, join, layouts, whole_numbers
from ranks import Ranks
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import Partial, Replicate, Shard
from torch.distributed.tensor.placement_types import Placement

from longspan.comm.counting import CountBytes
from longspan.comm.redistribute import redistribute, redistribute_chunks, start_redistribute
from longspan.errors import LayoutError
from longspan.layout import Layout, Order, positions
from longspan.schedule.switch import backward, head_placements, transition

WHOLE = Layout()


def split_and_gather(mesh: DeviceMesh, shape: tuple[int, ...], dim: int, order: Order) -> None:
    """Asserts on this rank; the weights differ by rank where the gradient is a partial sum."""
    rank, world, length = mesh.get_local_rank(), mesh.size(), shape[dim]
    sharded = Layout({"sp": Shard(dim)}, order)
    generator = torch.Generator().manual_seed(1)
    x, *weights = torch.randn(1 + world, *shape, dtype=torch.float64, generator=generator)
    own = positions(length, rank, world, order)

    # Split: each rank's share of the gradient, together or spread out as parts of a sum.
    for grad, expected in (
        (Replicate(), sum(_kept(weights[r], dim, length, r, world, order) for r in range(world))),
        (Partial(), _kept(weights[rank], dim, length, rank, world, order)),
    ):
        whole = x.clone().requires_grad_()
        shard = redistribute(whole, WHOLE, sharded, mesh, length=length, grad=grad)
        assert torch.equal(shard, x.index_select(dim, own))
        (shard * weights[rank].index_select(dim, own)).sum().backward()
        assert torch.equal(whole.grad, expected)

    # Gather: a slice of one gradient, or the sum of all ranks' gradients.
    for grad, told, expected in (
        (None, weights[0], weights[0]),
        (Partial(), weights[rank], sum(weights)),
    ):
        shard = x.index_select(dim, own).requires_grad_()
        with CountBytes() as count:
            whole = redistribute(shard, sharded, WHOLE, mesh, length=length, grad=grad)
        assert torch.equal(whole, x)
        # Around a ring each rank hands on all but what the next one had.
        behind = len(positions(length, (rank + 1) % world, world, order)) if world > 1 else length
        assert count.total_sent * length == x.nbytes * (length - behind)
        (whole * told).sum().backward()
        assert torch.allclose(shard.grad, expected.index_select(dim, own), atol=1e-15)


def _kept(
    x: torch.Tensor, dim: int, length: int, rank: int, world: int, order: Order
) -> torch.Tensor:
    """Zero but for the tokens that a rank holds."""
    mask = torch.zeros(length, dtype=x.dtype)
    mask[positions(length, rank, world, order)] = 1
    return x * mask.view([-1 if d == dim % x.ndim else 1 for d in range(x.ndim)])


@settings(max_examples=60)
@given(
    st.lists(st.integers(1, 4), max_size=2),
    st.integers(0, 11),
    st.lists(st.integers(1, 4), max_size=2),
    st.booleans(),
    st.sampled_from(LAYOUT_ORDERS),
    st.integers(1, 4),
)
def test_split_and_gather(
    ranks: Ranks,
    before: list[int],
    length: int,
    after: list[int],
    from_the_end: bool,
    order: Order,
    world: int,
) -> None:
    dim = -len(after) - 1 if from_the_end else len(before)
    ranks.run(split_and_gather, (*before, length, *after), dim, order, world=world)


def mesh_of(line: DeviceMesh, axes: Mapping[str, int]) -> DeviceMesh:
    return line if len(axes) == 1 else _grid(tuple(axes.values()))


@lru_cache(3)
def _grid(sizes: tuple[int, ...]) -> DeviceMesh:
    return init_device_mesh("cpu", sizes, mesh_dim_names=("a", "b"))


def there_and_back(
    line: DeviceMesh,
    axes: dict[str, int],
    shape: tuple[int, ...],
    src: Layout,
    dst: Layout,
    grad: dict[str, Placement],
    seed: int,
) -> tuple[Any, ...]:
    """A rank's result and gradient, and the bytes it sent for either."""
    rank = dist.get_rank()
    x = deal(whole_numbers(shape, seed), src, axes)[rank].requires_grad_()
    comes, _ = backward(src, dst, grad)
    weight = deal(whole_numbers(shape, seed + 1), comes, axes)[rank]
    with CountBytes() as forward:
        out = redistribute(x, src, dst, mesh_of(line, axes), shape=shape, grad=grad)
    assert out.is_contiguous() or out is x
    with CountBytes() as back:
        out.backward(weight)
    assert x.grad is not None
    return out.detach().numpy(), x.grad.numpy(), forward.total_sent, back.total_sent


def assert_exact(
    ranks: Ranks,
    axes: dict[str, int],
    shape: tuple[int, ...],
    src: Layout,
    dst: Layout,
    grad: dict[str, Placement],
) -> None:
    world = prod(axes.values())
    found = ranks.run(there_and_back, axes, shape, src, dst, grad, 7, world=world)
    outs, grads = ([torch.from_numpy(result[i]) for result in found] for i in (0, 1))
    comes, leaves = backward(src, dst, grad)
    assert torch.equal(join(outs, shape, dst, axes), whole_numbers(shape, 7))
    assert torch.equal(join(grads, shape, leaves, axes), whole_numbers(shape, 8))
    ways = (src, dst), (comes, leaves)
    for way, sent in zip(ways, ([r[2] for r in found], [r[3] for r in found]), strict=True):
        comms = transition(*way, shape, torch.float64, axes)
        assert sent == [sum(comm.sent_bytes(rank) for comm in comms) for rank in range(world)]


shapes = st.lists(st.integers(0, 9), min_size=1, max_size=4).map(tuple)
placements = st.sampled_from([Replicate(), Partial()])


@settings(max_examples=150)
@given(st.data(), shapes, st.integers(1, 4), placements)
def test_every_row(
    ranks: Ranks, data: st.DataObject, shape: tuple[int, ...], world: int, grad: Placement
) -> None:
    src, dst = (data.draw(layouts(len(shape), ["sp"])) for _ in range(2))
    assert_exact(ranks, {"sp": world}, shape, src, dst, {"sp": grad})


@settings(max_examples=80)
@given(st.data(), shapes, placements, placements)
def test_two_axes(
    ranks: Ranks, data: st.DataObject, shape: tuple[int, ...], first: Placement, second: Placement
) -> None:
    src, dst = (data.draw(layouts(len(shape), "ab")) for _ in range(2))
    assert_exact(ranks, {"a": 2, "b": 2}, shape, src, dst, {"a": first, "b": second})


@pytest.fixture(scope="module")
def eight() -> Iterator[Ranks]:
    started = Ranks(8)
    yield started
    started.stop()


@settings(max_examples=30)
@given(st.data(), shapes, st.sampled_from([(5,), (6,), (7,), (8,), (2, 4), (4, 2)]), placements)
def test_up_to_eight_ranks(
    eight: Ranks,
    data: st.DataObject,
    shape: tuple[int, ...],
    sizes: tuple[int, ...],
    grad: Placement,
) -> None:
    axes = dict(zip(("sp",) if len(sizes) == 1 else ("a", "b"), sizes, strict=True))
    src, dst = (data.draw(layouts(len(shape), list(axes))) for _ in range(2))
    assert_exact(eight, axes, shape, src, dst, dict.fromkeys(axes, grad))


def heads_there_and_back(mesh: DeviceMesh, heads: int, kv_heads: int, order: Order) -> None:
    """Keys of each head that the rank's query heads read; the copies' gradients are summed."""
    rank, world, length = mesh.get_local_rank(), mesh.size(), 11
    _, kv = head_placements(1, heads, kv_heads, world)
    tokens, by_heads = Layout({"sp": Shard(-2)}, order), Layout({"sp": kv})
    whole = whole_numbers((2, kv_heads, length, 3), 3)
    x = whole.index_select(2, positions(length, rank, world, order)).requires_grad_()
    with CountBytes() as count:
        out = redistribute(x, tokens, by_heads, mesh, length=length)
    comms = transition(tokens, by_heads, whole.shape, x.dtype, {"sp": world})
    assert count.total_sent == sum(comm.sent_bytes(rank) for comm in comms)
    read = [
        sorted({h * kv_heads // heads for h in positions(heads, r, world, "contiguous").tolist()})
        for r in range(world)
    ]
    assert torch.equal(out, whole[:, read[rank]])
    weights = [whole_numbers((2, len(held), length, 3), 4 + r) for r, held in enumerate(read)]
    out.backward(weights[rank])
    expected = torch.zeros_like(whole)
    for held, weight in zip(read, weights, strict=True):
        expected[:, held] += weight
    assert torch.equal(x.grad, expected.index_select(2, positions(length, rank, world, order)))


@settings(max_examples=30)
@given(st.integers(1, 5), st.integers(1, 4), st.integers(1, 4), st.sampled_from(LAYOUT_ORDERS))
def test_head_exchange(ranks: Ranks, kv_heads: int, group: int, world: int, order: Order) -> None:
    ranks.run(heads_there_and_back, kv_heads * group, kv_heads, order, world=world)


def in_chunks(mesh: DeviceMesh) -> None:
    """A stage, a switch and a stage, whole and in chunks with two under way."""
    rank, world, shape = mesh.get_local_rank(), mesh.size(), (5, 7, 6)
    frames, rows = Layout({"sp": Shard(1)}), Layout({"sp": Shard(2)})
    x = deal(whole_numbers(shape, 1), frames, {"sp": world})[rank].requires_grad_()
    weight = deal(whole_numbers(shape, 2), rows, {"sp": world})[rank]
    whole = redistribute(x * 3, frames, rows, mesh, length=7).square() * weight
    (expected,) = torch.autograd.grad(whole.sum(), x)
    chunks = redistribute_chunks(
        (chunk * 3 for chunk in x.split(2)), frames, rows, mesh, length=7, ahead=2
    )
    out = torch.cat([chunk.square() for chunk in chunks]) * weight
    (found,) = torch.autograd.grad(out.sum(), x)
    assert torch.equal(out, whole)
    assert torch.equal(found, expected)


def test_chunks(ranks: Ranks) -> None:
    ranks.run(in_chunks)


def under_way(mesh: DeviceMesh) -> None:
    """Two on their way at once, waited for in the other order; dtypes stay."""
    rank, world = mesh.get_local_rank(), mesh.size()
    frames, rows, axes = Layout({"sp": Shard(0)}), Layout({"sp": Shard(1)}), {"sp": world}
    wholes = [whole_numbers((7, 5), 1).to(dtype) for dtype in (torch.bfloat16, torch.int32)]
    parts = [deal(whole, frames, axes)[rank] for whole in wholes]
    moving = [start_redistribute(part, frames, rows, mesh, length=7) for part in parts]
    for one, whole in reversed(list(zip(moving, wholes, strict=True))):
        found = one.wait()
        assert found.dtype == whole.dtype
        assert torch.equal(found, deal(whole, rows, axes)[rank])
        with pytest.raises(LayoutError, match="waited for already"):
            one.wait()


def test_start_and_wait(ranks: Ranks) -> None:
    ranks.run(under_way)


def sums(mesh: DeviceMesh) -> tuple[Any, Any]:
    """Sums of random bf16 and fp32 parts, on this rank."""
    generator = torch.Generator().manual_seed(mesh.get_local_rank())
    x = torch.randn(33, generator=generator)
    half, full = (
        redistribute(part, Layout({"sp": Partial()}), WHOLE, mesh) for part in (x.bfloat16(), x)
    )
    assert half.dtype is torch.bfloat16
    return half.float().numpy(), full.numpy()


def test_sums_are_taken_in_the_order_of_the_ring(ranks: Ranks) -> None:
    parts = [torch.randn(33, generator=torch.Generator().manual_seed(rank)) for rank in range(4)]
    for found in ranks.run(sums):
        for got, dtype in zip(found, (torch.bfloat16, torch.float32), strict=True):
            shards = torch.stack([part.to(dtype) for part in parts]).tensor_split(4, 1)
            # 33 are 9, 8, 8 and 8; rank i's are summed from i+1 on.
            total = []
            for rank, shard in enumerate(shards):
                one, two, three, own = (shard[(rank + hop) % 4] for hop in range(1, 5))
                total.append(((one + two) + three) + own)
            assert torch.equal(torch.from_numpy(got), torch.cat(total).float())


def refusals(mesh: DeviceMesh) -> None:
    x, sharded = torch.zeros(4, 2), Layout({"sp": Shard(0)})
    for tensor, src, dst, options, match in (
        (x, WHOLE, sharded, {"length": 5}, "should have 5 tokens here, it has 4"),
        (x, sharded, WHOLE, {"length": 12}, "should have 6 tokens here, it has 4"),
        (x, sharded, WHOLE, {}, "give the whole tensor's shape"),
        (x, sharded, WHOLE, {"shape": (8,)}, "shape has 1 dims, the tensor 2"),
        (x, Layout({"ps": Shard(0)}), WHOLE, {"shape": (8, 2)}, "axis 'ps' changes"),
        (x, WHOLE, sharded, {"grad": Shard(0)}, "grad must be"),
    ):
        with pytest.raises(LayoutError, match=match):
            redistribute(tensor, src, dst, mesh, **options)
    assert redistribute(x, sharded, sharded, mesh, length=8) is x


def test_what_is_refused(ranks: Ranks) -> None:
    ranks.run(refusals, world=2)
