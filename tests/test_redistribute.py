"""Split and gather of a sharded dim: values, gradients in either layout, bytes."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ranks import Ranks
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Partial, Replicate, Shard

from longspan.comm.counting import CountBytes
from longspan.comm.redistribute import redistribute
from longspan.errors import LayoutError
from longspan.layout import Layout, Order, positions

WHOLE = Layout()


def split_and_gather(mesh: DeviceMesh, shape: tuple[int, ...], dim: int, order: Order) -> None:
    """Asserts on this rank; the weights differ by rank where the gradient is a partial sum."""
    rank, world, length = mesh.get_local_rank(), mesh.size(), shape[dim]
    sharded = Layout({"sp": Shard(dim)}, order)
    x = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    own = positions(length, rank, world, order)
    weights = [torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2 + r))
               for r in range(world)]  # fmt: skip

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
        assert count.total_sent == (world - 1) * shard.nbytes
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
    st.sampled_from(list(Order)),
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


def refusals(mesh: DeviceMesh) -> None:
    x, sharded = torch.zeros(4, 2), Layout({"sp": Shard(0)})
    with pytest.raises(LayoutError, match="should have 5 tokens here, it has 4"):
        redistribute(x, WHOLE, sharded, mesh, length=5)
    with pytest.raises(LayoutError, match="no way from"):
        redistribute(x, sharded, Layout({"sp": Shard(1)}), mesh, length=4)
    with pytest.raises(LayoutError, match="grad must be"):
        redistribute(x, WHOLE, sharded, mesh, length=4, grad=Shard(0))
    assert redistribute(x, sharded, sharded, mesh, length=4) is x


def test_what_is_refused(ranks: Ranks) -> None:
    ranks.run(refusals, world=2)
