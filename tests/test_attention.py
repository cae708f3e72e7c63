"""Attention over a sharded sequence: values, gradients and bytes."""

from dataclasses import dataclass

import pytest
import torch
from dense import dense_attention
from hypothesis import given, settings
from hypothesis import strategies as st
from ranks import Ranks
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

import longspan
from longspan.attention.kernels import (
    CpuFlash,
    CudaEfficient,
    CudaFlash,
    Flipped,
    Kernel,
    Padded,
    Reference,
    kernel_for,
)
from longspan.attention.merge import merge_
from longspan.attention.ring import ring_of
from longspan.comm.counting import CountBytes
from longspan.comm.mesh import flat_group
from longspan.errors import LayoutError
from longspan.layout import Order
from longspan.schedule.rounds import cheapest, comms

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5}


@dataclass(frozen=True)
class Case:
    """One attention: its documents, heads and layout."""

    documents: tuple[int, ...]
    causal: bool
    window: int | None
    order: Order
    q_heads: int
    kv_heads: int
    batch: int
    dtype: torch.dtype
    told: bool  # whether attend is told the documents, where there is only one
    scale: float
    seed: int
    travels: str = "auto"
    inside: str = "ring"


cases = st.builds(
    lambda lengths, causal, window, order, kv, group, batch, dtype, told, *others: Case(
        tuple(sum(lengths[:i]) for i in range(len(lengths) + 1)),
        causal,
        window if causal else None,
        order,
        kv * group,
        kv,
        batch,
        dtype,
        told or len(lengths) != 1,
        *others,
    ),
    st.lists(st.one_of(st.integers(0, 3), st.integers(4, 40)), min_size=1, max_size=6),
    st.booleans(),
    st.one_of(st.none(), st.integers(1, 50)),
    st.sampled_from(list(Order)),
    st.sampled_from([1, 2]),
    st.sampled_from([1, 2, 4]),
    st.sampled_from([1, 2]),
    st.sampled_from([torch.float64, torch.float32]),
    st.booleans(),
    st.sampled_from([8**-0.5, 0.2]),
    st.integers(0, 10**6),
    st.sampled_from(["auto", "kv", "q"]),
    st.sampled_from(["ring", "heads"]),
)


def tensors(case: Case, head_dim: int = 8) -> list[torch.Tensor]:
    """q, k, v and the gradient of out, whole, in float64."""
    generator = torch.Generator().manual_seed(case.seed)
    heads = (case.q_heads, case.kv_heads, case.kv_heads, case.q_heads)
    shape = (case.documents[-1], head_dim)
    return [
        torch.randn(case.batch, h, *shape, dtype=torch.float64, generator=generator) for h in heads
    ]


def worst_difference(mesh: DeviceMesh, case: Case) -> float:
    """Of out, dq, dk and dv on this rank, from dense attention in float64."""
    *inputs, dout = tensors(case)
    whole = [x.requires_grad_() for x in inputs]
    expected, _ = dense_attention(*whole, case.documents, case.causal, case.scale, case.window)
    expected.backward(dout)

    rank, documents = flat_group(mesh).rank(), case.documents
    own = longspan.positions(documents[-1], rank, mesh.size(), case.order, documents)
    q, k, v = (x.detach()[:, :, own].to(case.dtype).requires_grad_() for x in whole)
    out = longspan.attend(
        *(q, k, v),
        mesh=mesh,
        causal=case.causal,
        window=case.window,
        order=case.order,
        scale=case.scale,
        cu_seqlens=case.documents if case.told else None,
        travels=case.travels,
        inside=case.inside,
    )
    assert out.dtype == case.dtype
    out.backward(dout[:, :, own].to(case.dtype))
    found = [out, q.grad, k.grad, v.grad]
    dense = [expected, *(x.grad for x in whole)]
    return max(
        ((a.double() - b[:, :, own]).abs().max().item() for a, b in zip(found, dense, strict=True)),
        default=0.0,
    ) if len(own) else 0.0  # fmt: skip


@settings(max_examples=150)
@given(case=cases, world=st.integers(1, 4))
def test_attention_is_exact(ranks: Ranks, case: Case, world: int) -> None:
    assert max(ranks.run(worst_difference, case, world=world)) < TOLERANCE[case.dtype]


def on_two_axes(_: DeviceMesh, case: Case) -> float:
    return worst_difference(
        init_device_mesh("cpu", (2, 2), mesh_dim_names=("inter", "intra")), case
    )


@settings(max_examples=100)
@given(case=cases)
def test_two_axes_are_exact(ranks: Ranks, case: Case) -> None:
    """The double ring, and the hybrid of head exchange and ring."""
    assert max(ranks.run(on_two_axes, case)) < TOLERANCE[case.dtype]


def counted_bytes(mesh: DeviceMesh, case: Case) -> tuple[tuple[int, int], tuple[int, int]]:
    """(promised, sent) in forward and in backward."""
    rank = mesh.get_local_rank()
    own = longspan.positions(case.documents[-1], rank, mesh.size(), case.order, case.documents)
    *inputs, dout = (x[:, :, own].to(case.dtype) for x in tensors(case))
    q, k, v = (x.requires_grad_() for x in inputs)
    told = {"causal": case.causal, "window": case.window, "order": case.order}
    told["travels"] = case.travels
    with CountBytes() as forward:
        out = longspan.attend(q, k, v, mesh=mesh, cu_seqlens=case.documents, **told)
    with CountBytes() as backward:
        out.backward(dout)
    ring = ring_of(
        *(q, k, v, mesh.size(), case.order, case.causal, case.documents), window=case.window
    )
    way = cheapest(ring) if case.travels == "auto" else case.travels
    assert not forward.given and not backward.given
    return tuple(
        (sum(op.sent_bytes(rank) for op in comms(ring, rank, back, way)), count.total_sent)
        for back, count in ((False, forward), (True, backward))
    )


@settings(max_examples=40)
@given(case=cases, world=st.integers(1, 4))
def test_bytes_are_what_the_schedule_says(ranks: Ranks, case: Case, world: int) -> None:
    for forward, backward in ranks.run(counted_bytes, case, world=world):
        assert forward[0] == forward[1]
        assert backward[0] == backward[1]


def half_precision(mesh: DeviceMesh) -> float:
    case = Case((0, 40, 100), True, None, Order.ZIGZAG, 4, 2, 1, torch.bfloat16, True, 0.3, 1)
    return worst_difference(mesh, case)


def test_bfloat16(ranks: Ranks) -> None:
    assert max(ranks.run(half_precision)) < 5e-2


def strided(mesh: DeviceMesh) -> bool:
    """Tensors as models make them: heads and tokens swapped, not contiguous."""
    q = torch.randn(1, 10, 4, 8).transpose(1, 2).requires_grad_()
    k, v = (torch.randn(1, 10, 2, 8).transpose(1, 2) for _ in range(2))
    out = longspan.attend(q, k, v, mesh=mesh)
    out.sum().backward()
    plain = longspan.attend(q.contiguous(), k.contiguous(), v.contiguous(), mesh=mesh)
    return torch.equal(out, plain)


def test_strides_do_not_matter(ranks: Ranks) -> None:
    assert all(ranks.run(strided))


def refusals(mesh: DeviceMesh) -> list[str]:
    """The messages of calls that must be refused, each on every rank alike."""
    x = torch.randn(1, 2, 5, 8)
    uneven = torch.randn(1, 2, 5 + 2 * mesh.get_local_rank(), 8)
    ends = [0, 5 * mesh.size() + 99]
    cube = init_device_mesh("cpu", (1, 2, 2), mesh_dim_names=("dp", "inter", "intra"))
    calls = [
        lambda: longspan.attend(x, x, x, mesh=mesh, order="spiral"),
        lambda: longspan.attend(uneven, uneven, uneven, mesh=mesh),
        lambda: longspan.attend(x, x, x, mesh=mesh, cu_seqlens=ends),
        lambda: longspan.attend(x, x[:, :, 1:], x[:, :, 1:], mesh=mesh),
        lambda: longspan.attend(torch.cat([x, x[:, :1]], 1), x, x, mesh=mesh),
        lambda: longspan.attend(x.long(), x.long(), x.long(), mesh=mesh),
        lambda: longspan.attend(x, x, x, mesh=cube),
        lambda: longspan.attend(x, x, x, mesh=mesh, window=0),
        lambda: longspan.attend(x, x, x, mesh=mesh, window=3, causal=False),
    ]
    messages = []
    for call in calls:
        with pytest.raises(LayoutError) as caught:
            call()
        messages.append(str(caught.value))
    return messages


def test_what_is_refused(ranks: Ranks) -> None:
    for messages in ranks.run(refusals):
        expected = ("unknown order", "the ranks hold [5, 7, 9, 11]", "cut it with", "fit together",
                    "3 query heads", "floating dtype", "dp, inter, intra: pass",
                    "window of 0", "causal")  # fmt: skip
        assert len(messages) == len(expected)
        for message, part in zip(messages, expected, strict=True):
            assert part in message and "\n" not in message


def check_kernel(kernel: Kernel, device: str, dtype: torch.dtype, tolerance: float) -> None:
    generator = torch.Generator().manual_seed(0)
    for causal, (rows, columns) in ((True, (33, 33)), (False, (20, 33)), (False, (64, 1))):
        q, dout = (torch.randn(2, 4, rows, 16, generator=generator) for _ in range(2))
        k, v = (torch.randn(2, 2, columns, 16, generator=generator) for _ in range(2))
        inputs = [x.to(device, dtype) for x in (q, k, v)]
        exact = [x.double().cpu() for x in inputs]
        out, lse = kernel.forward(*inputs, causal=causal, scale=0.3)
        wide_out, wide_lse = Reference().forward(*exact, causal=causal, scale=0.3)
        assert (out.cpu() - wide_out).abs().max() < tolerance
        assert (lse.cpu() - wide_lse).abs().max() < tolerance
        # A block among others: out and lse are those of all keys that the query sees.
        out, lse = out * 0.6, lse + 0.5
        grads = kernel.backward(dout.to(out), *inputs, out, lse, causal=causal, scale=0.3)
        wide = Reference().backward(
            dout.double(), *exact, out.double().cpu(), lse.double().cpu(), causal=causal, scale=0.3
        )
        for found, expected in zip(grads, wide, strict=True):
            largest = max(1.0, expected.abs().max().item())
            assert (found.cpu() - expected).abs().max() < tolerance * largest


@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 5e-2)],
)
def test_cpu_flash_is_the_reference(dtype: torch.dtype, tolerance: float) -> None:
    check_kernel(CpuFlash(), "cpu", dtype, tolerance)


def test_reference_is_dense_attention() -> None:
    case = Case((0, 30), True, None, Order.CONTIGUOUS, 4, 2, 2, torch.float64, True, 0.3, 5)
    *inputs, dout = tensors(case)
    q, k, v = (x.requires_grad_() for x in inputs)
    expected, expected_lse = dense_attention(q, k, v, (0, 30), True, 0.3)
    expected.backward(dout)
    with torch.no_grad():
        out, lse = Reference().forward(q, k, v, causal=True, scale=0.3)
        grads = Reference().backward(dout, q, k, v, out, lse, causal=True, scale=0.3)
    assert torch.allclose(out, expected, atol=1e-13)
    assert torch.allclose(lse, expected_lse, atol=1e-13)
    for found, x in zip(grads, (q, k, v), strict=True):
        assert torch.allclose(found, x.grad, atol=1e-12)


@pytest.mark.parametrize("dims", [(24, 16), (8, 20)])
def test_padded_is_the_reference(dims: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(1)
    wide = {"dtype": torch.float64, "generator": generator}
    q, k = torch.randn(1, 4, 9, dims[0], **wide), torch.randn(1, 2, 9, dims[0], **wide)
    v, dout = torch.randn(1, 2, 9, dims[1], **wide), torch.randn(1, 4, 9, dims[1], **wide)
    out, lse = Padded(CpuFlash()).forward(q, k, v, causal=True, scale=0.3)
    expected = Reference().forward(q, k, v, causal=True, scale=0.3)
    found = (
        out,
        lse,
        *Padded(CpuFlash()).backward(dout, q, k, v, out, lse, causal=True, scale=0.3),
    )
    expected += Reference().backward(dout, q, k, v, *expected, causal=True, scale=0.3)
    for a, b in zip(found, expected, strict=True):
        assert torch.allclose(a, b, atol=1e-12) and a.shape == b.shape


def test_flipped_sees_the_upper_triangle() -> None:
    q, k, v = torch.randn(3, 1, 2, 9, 8, dtype=torch.float64)
    out, lse = Flipped(CpuFlash()).forward(q, k, v, causal=True, scale=0.3)
    scores = (q @ k.mT * 0.3).masked_fill(torch.ones(9, 9).tril(-1).bool(), -torch.inf)
    assert torch.allclose(lse, scores.logsumexp(-1), atol=1e-13)
    assert torch.allclose(out, scores.softmax(-1) @ v, atol=1e-13)


def test_reference_attends_to_nothing() -> None:
    q, empty = torch.randn(1, 2, 3, 4), torch.randn(1, 2, 0, 4)
    out, lse = Reference().forward(q, empty, empty, causal=False, scale=1.0)
    assert not out.any() and (lse == -torch.inf).all()


def test_merge_joins_disjoint_keys() -> None:
    q = torch.randn(1, 2, 5, 8, dtype=torch.float64)
    k, v = (torch.randn(1, 2, 9, 8, dtype=torch.float64) for _ in range(2))
    whole, whole_lse = Reference().forward(q, k, v, causal=False, scale=1.0)
    out, lse = torch.zeros_like(whole), torch.full_like(whole_lse, -torch.inf)
    merge_(out, lse, torch.zeros_like(whole), torch.full_like(whole_lse, -torch.inf))
    assert not out.any() and (lse == -torch.inf).all()
    for part in (slice(0, 2), slice(2, 3), slice(3, 9)):
        merge_(
            out, lse, *Reference().forward(q, k[:, :, part], v[:, :, part], causal=False, scale=1.0)
        )
    assert torch.allclose(out, whole, atol=1e-14) and torch.allclose(lse, whole_lse, atol=1e-14)


def test_kernel_choice() -> None:
    q = torch.randn(1, 2, 3, 8)
    assert isinstance(kernel_for(q, q), CpuFlash)
    assert isinstance(kernel_for(q, q[..., :4]), Padded)
    assert isinstance(kernel_for(q.to("meta"), q.to("meta")), Reference)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize(
    ("kernel", "dtype", "tolerance"),
    [
        (CudaFlash(), torch.bfloat16, 5e-2),
        (CudaFlash(), torch.float16, 1e-2),
        (CudaEfficient(), torch.float32, 1e-4),
        (Reference(), torch.float64, 1e-12),
    ],
)
def test_cuda_kernels_are_the_reference(
    kernel: Kernel, dtype: torch.dtype, tolerance: float
) -> None:
    check_kernel(kernel, "cuda", dtype, tolerance)
