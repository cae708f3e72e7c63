"""Attention on up to eight ranks: every mesh and way, the bytes of real runs, the formulas."""

import math
from dataclasses import replace
from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ranks import Ranks
from test_attention import TOLERANCE, Case, cases, counted_bytes, worst_difference
from torch.distributed.device_mesh import DeviceMesh

from longspan.layout import Order

MESHES = [(2, 2), (2, 4), (4, 2), (2, 3), (3, 2), (1, 5), (4, 1), (5,), (7,), (8,)]
meshes = st.sampled_from(MESHES)


@cache
def mesh_of(sizes: tuple[int, ...]) -> DeviceMesh:
    """A mesh of the first ranks; all eight must ask for it."""
    ranks = torch.arange(math.prod(sizes)).view(sizes)
    mesh = DeviceMesh("cpu", ranks, mesh_dim_names=("inter", "intra")[-len(sizes) :])
    if mesh.ndim > 1:
        mesh._flatten()  # torch makes a group only if all processes make it
    return mesh


def difference_on(_: DeviceMesh, sizes: tuple[int, ...], case: Case) -> float:
    mesh = mesh_of(sizes)
    return 0.0 if mesh.get_coordinate() is None else worst_difference(mesh, case)


@settings(max_examples=60)
@given(case=cases, sizes=meshes)
def test_every_mesh_is_exact(eight_ranks: Ranks, case: Case, sizes: tuple[int, ...]) -> None:
    """Flat and double ring, head exchange, and the hybrid of it with a ring."""
    found = eight_ranks.run(difference_on, sizes, case, world=8)
    assert max(found) < TOLERANCE[case.dtype]


def bytes_on(_: DeviceMesh, sizes: tuple[int, ...], case: Case) -> list[tuple[int, int]]:
    mesh = mesh_of(sizes)
    return [] if mesh.get_coordinate() is None else list(counted_bytes(mesh, case))


@settings(max_examples=40)
@given(case=cases, sizes=meshes)
def test_bytes_are_the_schedules(eight_ranks: Ranks, case: Case, sizes: tuple[int, ...]) -> None:
    for halves in eight_ranks.run(bytes_on, sizes, case, world=8):
        assert all(promised == sent for promised, sent in halves)


def counted(_: DeviceMesh, case: Case, world: int) -> tuple[list[int], ...]:
    """For each way what this rank sends in forward and backward."""
    ways = [replace(case, travels=travels) for travels in ("kv", "q", "auto")]
    mesh = mesh_of((world,))
    if mesh.get_coordinate() is None:
        return ([0, 0],) * 3
    return tuple([sent for _, sent in counted_bytes(mesh, way)] for way in ways)


@pytest.mark.parametrize("world", [2, 4, 8])
@pytest.mark.parametrize("group", [1, 2, 4, 8])
@pytest.mark.parametrize(
    ("dtype", "grads_in", "causal"),
    [(torch.float32, "float32", False), (torch.bfloat16, "compute", True)],
)
def test_a_real_ring_sends_what_the_formulas_say(
    eight_ranks: Ranks, world: int, group: int, dtype: torch.dtype, grads_in: str, causal: bool
) -> None:
    """Over all ranks, in units of M, all queries; keys and values are M/group each.

    Forward 2(P-1)/group. Backward 4(P-1)/group, or 3(P-1) and two statistics a row: each a hop
    less than BurstAttention's (arXiv 2403.09347), as a rank's own share stays. "auto" is the less.
    Of a causal sequence the last piece's keys and the first one's queries stay, too.
    """
    heads, head_dim, length = 8, 8, 16 * world
    case = Case(
        *((0, length), causal, None, Order.ZIGZAG, heads, heads // group, 1, dtype, True, 0.3, 1),
        grads_in=grads_in,
    )
    found = eight_ranks.run(counted, case, world, world=8)
    total = torch.tensor(found).sum(0)
    travelling = length - causal * length // (2 * world)
    m, statistics = travelling * heads * head_dim * dtype.itemsize, 2 * travelling * heads * 4
    (forward, kv), (_, q), (_, auto) = total.tolist()
    assert forward == 2 * (world - 1) * m // group
    assert kv == 4 * (world - 1) * m // group
    assert q == (world - 1) * (3 * m + statistics)
    assert auto == min(kv, q)
