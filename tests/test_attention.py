"""Attention over a sharded sequence: values, gradients and bytes."""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
import torch.distributed as dist
from dense import dense_attention
from hypothesis import given, settings
from hypothesis import strategies as st
from ranks import Ranks
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

import longspan
from longspan.attention.hybrid import shares_of
from longspan.attention.kept import Kept
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
from longspan.layout import Order, local_length
from longspan.schedule.heads import HeadShares, exchange_op
from longspan.schedule.rounds import cheapest, comms

# Of the worst entry; of half precision the root mean square, relative to the tensor's.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 1e-2}


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
    grads_in: str = "float32"
    kv_documents: tuple[int, ...] | None = None
    sinks: bool = False
    cut: bool = False  # into parts of the heads, however small their messages
    parts: int | None = None

    @property
    def keys(self) -> tuple[int, ...]:
        """The keys' documents."""
        return self.documents if self.kv_documents is None else self.kv_documents


@st.composite
def _cases(draw: st.DrawFn) -> Case:
    length = st.one_of(st.integers(0, 3), st.integers(4, 40))
    lengths = draw(st.lists(length, min_size=1, max_size=6))
    causal, kv_heads = draw(st.booleans()), draw(st.sampled_from([1, 2, 3, 4]))
    kv_lengths = None
    if not causal and draw(st.booleans()):
        kv_lengths = draw(st.lists(length, min_size=len(lengths), max_size=len(lengths)))
    return Case(
        documents=(0, *accumulate(lengths)),
        causal=causal,
        window=draw(st.one_of(st.none(), st.integers(1, 50))) if causal else None,
        order=draw(st.sampled_from(list(Order))),
        q_heads=kv_heads * draw(st.sampled_from([1, 2, 4])),
        kv_heads=kv_heads,
        batch=draw(st.sampled_from([1, 2])),
        dtype=draw(st.sampled_from(list(TOLERANCE))),
        told=draw(st.booleans()) or len(lengths) != 1,
        scale=draw(st.sampled_from([8**-0.5, 0.2])),
        seed=draw(st.integers(0, 10**6)),
        travels=draw(st.sampled_from(["auto", "kv", "q"])),
        inside=draw(st.sampled_from(["ring", "heads"])),
        grads_in=draw(st.sampled_from(["float32", "compute"])),
        kv_documents=None if kv_lengths is None else (0, *accumulate(kv_lengths)),
        sinks=draw(st.booleans()),
        cut=draw(st.booleans()),
        parts=draw(st.sampled_from([None, None, 1, 2, 3])),
    )


cases = _cases()


def tensors(case: Case, head_dim: int = 8) -> list[torch.Tensor]:
    """q, k, v, sinks and the gradient of out, whole: in float64, of values that the dtype has."""
    generator = torch.Generator().manual_seed(case.seed)
    q, kv = (case.q_heads, case.documents[-1]), (case.kv_heads, case.keys[-1])
    shapes = [(case.batch, *sizes, head_dim) for sizes in (q, kv, kv)]
    shapes += [(case.q_heads,), (case.batch, *q, head_dim)]
    return [
        torch.randn(shape, dtype=torch.float64, generator=generator).to(case.dtype).double()
        for shape in shapes
    ]


def shares(mesh: DeviceMesh, case: Case) -> tuple[torch.Tensor, torch.Tensor]:
    """Positions of this rank's queries and keys."""
    here = (flat_group(mesh).rank(), mesh.size(), case.order)
    both = (case.documents, case.keys)
    return tuple(longspan.positions(ends[-1], *here, ends) for ends in both)


def ways(case: Case) -> dict[str, Any]:
    """What ``attend`` is told."""
    told = {"cu_seqlens": case.documents, "cu_seqlens_k": case.kv_documents} if case.told else {}
    names = ("causal", "window", "order", "scale", "travels", "inside", "grads_in", "parts")
    return told | {name: getattr(case, name) for name in names}


def messages_of(case: Case) -> AbstractContextManager[object]:
    """Where a case is cut, messages of any size are."""
    return patch("longspan.schedule.ring._MESSAGE_BYTES", 1) if case.cut else nullcontext()


def worst_difference(mesh: DeviceMesh, case: Case, share: float = 1.0, calls: int = 1) -> float:
    """Of out, lse and all gradients on this rank, from dense attention in float64.

    Those of the last of so many calls, as when activations are recomputed and ``share`` is kept.
    """
    *inputs, dout = tensors(case)
    whole = [x.requires_grad_() for x in inputs]
    expected, expected_lse = dense_attention(
        *whole[:3],
        *(case.documents, case.causal, case.scale, case.window, case.kv_documents),
        sinks=whole[3] if case.sinks else None,
    )
    expected.backward(dout)

    own, keys = shares(mesh, case)
    cuts = (np.s_[:, :, own], np.s_[:, :, keys], np.s_[:, :, keys], np.s_[:])
    parts = [x.detach()[cut].to(case.dtype) for x, cut in zip(whole, cuts, strict=True)]
    q, k, v, sinks = (x.requires_grad_() for x in parts)
    kept = Kept(share)
    told = ways(case) | {"sinks": sinks if case.sinks else None, "kept": kept}
    with messages_of(case):
        for _ in range(calls):
            kept.rewind()
            out = longspan.attend(q, k, v, mesh=mesh, **told)
    assert out.dtype == case.dtype
    out.backward(dout[:, :, own].to(case.dtype))
    kept.rewind()
    lse = torch.cat([late.lse for late in iter(kept.recalled, None)], 1)  # of the heads' parts
    differences = [
        difference(out, expected[:, :, own], case),
        difference(lse, _lse_here(mesh, case, expected_lse), case) if share == 1 else 0.0,
        *(difference(p.grad, x.grad[cut], case)
          for p, x, cut in zip(parts[:3], whole[:3], cuts[:3], strict=True)),
    ]  # fmt: skip
    if case.sinks:  # as every parameter's, its gradient is the sum of all ranks'
        total = sinks.grad.double()
        dist.all_reduce(total, group=flat_group(mesh))
        differences.append(difference(total, whole[3].grad, case))
    return max(differences)


def difference(found: torch.Tensor, expected: torch.Tensor, case: Case) -> float:
    if not found.numel():
        return 0.0
    apart = (found.double() - expected).abs().masked_fill(found == expected, 0.0)
    apart = apart.nan_to_num(nan=torch.inf)
    if case.dtype.itemsize > 2:
        return apart.max().item()
    return apart.square().mean().sqrt().item() / max(1.0, expected.square().mean().sqrt().item())


def _lse_here(mesh: DeviceMesh, case: Case, lse: torch.Tensor) -> torch.Tensor:
    """The part of lse that this rank computes: of its tokens or, inside an exchange, its heads."""
    own, _ = shares(mesh, case)
    if case.inside == "ring":
        return lse[:, :, own]
    inner = mesh.get_group(mesh.ndim - 1)
    first = flat_group(mesh).rank() - inner.rank()
    dealt = torch.cat([
        longspan.positions(lse.shape[2], first + rank, mesh.size(), case.order, case.documents)
        for rank in range(inner.size())
    ])  # fmt: skip
    heads = HeadShares(case.q_heads, case.kv_heads, inner.size()).q(inner.rank())
    ascending = dealt if case.order is Order.STRIPED else dealt.sort().values
    return lse[:, heads.start : heads.stop, ascending]


@settings(max_examples=80)
@given(case=cases, world=st.integers(1, 4))
def test_attention_is_exact(ranks: Ranks, case: Case, world: int) -> None:
    assert max(ranks.run(worst_difference, case, world=world)) < TOLERANCE[case.dtype]


def counted_bytes(mesh: DeviceMesh, case: Case) -> tuple[tuple[int, int], tuple[int, int]]:
    """(promised, sent) in forward and in backward."""
    own, keys = shares(mesh, case)
    q, k, v, sinks, dout = (x.to(case.dtype) for x in tensors(case))
    q, k, v = (x.requires_grad_() for x in (q[:, :, own], k[:, :, keys], v[:, :, keys]))
    with messages_of(case):
        with CountBytes() as forward:
            told = ways(replace(case, told=True)) | {"sinks": sinks if case.sinks else None}
            out = longspan.attend(q, k, v, mesh=mesh, **told)
        with CountBytes() as backward:
            out.backward(dout[:, :, own])
        assert not forward.given and not backward.given
        promised = promised_bytes(mesh, case, q, k)
    return tuple(zip(promised, (forward.total_sent, backward.total_sent), strict=True))


def promised_bytes(
    mesh: DeviceMesh, case: Case, q: torch.Tensor, k: torch.Tensor
) -> tuple[int, int]:
    """What the schedule says that this rank sends in forward and in backward."""
    rank, width = flat_group(mesh).rank(), mesh.size(mesh.ndim - 1)
    out, back, world = 0, 0, mesh.size()
    sizes = {"node_ranks": width} if mesh.ndim == 2 else {}
    split = [(q, k)]
    if case.inside == "heads":
        shares = shares_of(q, k, k, width, world // width, case.keys, case.parts)
        place, inner = divmod(rank, width)
        ranks = range(place * width, rank - inner + width)
        token = case.batch * q.shape[3] * case.dtype.itemsize
        for of, ends, back_too in (
            (shares.q, case.documents, True),
            *[(shares.kv, case.keys, False)] * 2,
        ):
            counts = [local_length(ends[-1], r, world, case.order, ends) for r in ranks]
            heads = [of(r) for r in range(width)]
            there = exchange_op(counts, heads, token, ranks).sent_bytes(rank)
            # The way back is the transpose: what came is sent.
            home = sum(counts[r] * len(heads[inner]) * token for r in range(width) if r != inner)
            out, back = out + there + back_too * home, back + home + back_too * there
        split = []
        for part in range(shares.parts):
            own, kv = shares.q(inner, part), shares.kv(inner, part)
            queries = q[:, own.start : own.stop]
            even = shares.even(inner, part)
            split.append((queries, k[:, kv.start : kv.stop] if even else queries))
        world, rank, sizes = world // width, place, {"width": width}
    for queries, keys in split:
        ring = ring_of(
            *(queries, keys, keys, world, case.order, case.causal, case.documents),
            window=case.window,
            kv_documents=case.kv_documents,
            grads_in=case.grads_in,
            **sizes,
        )
        way = cheapest(ring) if case.travels == "auto" else case.travels
        out += sum(op.sent_bytes(rank) for op in comms(ring, rank))
        back += sum(op.sent_bytes(rank) for op in comms(ring, rank, True, way))
    return out, back


@settings(max_examples=40)
@given(case=cases, world=st.integers(1, 4))
def test_bytes_are_what_the_schedule_says(ranks: Ranks, case: Case, world: int) -> None:
    for forward, backward in ranks.run(counted_bytes, case, world=world):
        assert forward[0] == forward[1]
        assert backward[0] == backward[1]


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
    ends, own = [0, 5 * mesh.size() + 99], [0, 5 * mesh.size()]
    longer = torch.randn(1, 2, 7, 8)
    cube = init_device_mesh("cpu", (1, 2, 2), mesh_dim_names=("dp", "inter", "intra"))
    calls = [
        lambda: longspan.attend(x, x, x, mesh=mesh, order="spiral"),
        lambda: longspan.attend(uneven, uneven, uneven, mesh=mesh),
        lambda: longspan.attend(x, x, x, mesh=mesh, cu_seqlens=ends),
        lambda: longspan.attend(x, x, x[:, :, 1:], mesh=mesh),
        lambda: longspan.attend(torch.cat([x, x[:, :1]], 1), x, x, mesh=mesh),
        lambda: longspan.attend(x.long(), x.long(), x.long(), mesh=mesh),
        lambda: longspan.attend(x, x, x, mesh=cube),
        lambda: longspan.attend(x, x, x, mesh=mesh, window=0),
        lambda: longspan.attend(x, x, x, mesh=mesh, window=3, causal=False),
        lambda: longspan.attend(x, longer, longer, mesh=mesh),
        lambda: longspan.attend(x, x, x, mesh=mesh, cu_seqlens_k=own),
        lambda: longspan.attend(x, x, x, mesh=mesh, cu_seqlens=[]),
        lambda: longspan.attend(x, longer, longer, mesh=mesh, cu_seqlens=own, causal=False),
        lambda: longspan.attend(
            x, x, x, mesh=mesh, causal=False, cu_seqlens=own, cu_seqlens_k=[0, 1, own[1]]
        ),
        lambda: longspan.attend(
            x,
            x,
            x,
            mesh=mesh,
            causal=False,
            cu_seqlens=[0, 1, own[1]],
            cu_seqlens_k=[0, 30, own[1]],
        ),
        lambda: longspan.attend(x, x, x, mesh=mesh, sinks=torch.zeros(3)),
        lambda: longspan.attend(x, x, x, mesh=mesh, inside="rings"),
        lambda: longspan.attend(x, x, x, mesh=mesh, travels="k"),
        lambda: longspan.attend(x, x, x, mesh=mesh, grads_in="bfloat16"),
        lambda: longspan.attend(x, x, x, mesh=mesh, inside="heads", parts=0),
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
                    "window of 0", "causal", "need causal=False", "pass both", "is empty",
                    "but k has 7", "queries have 1 documents and keys 2", "not descend",
                    "2 query heads need a sink each", "inside 'rings'", "travels 'k'",
                    "grads_in 'bfloat16'", "in 0 parts")  # fmt: skip
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
    q, k, v, _, dout = (x.requires_grad_() for x in tensors(case))
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
