"""Layers computed again: the same gradients, the bytes and the memory that are promised."""

import copy
import gc
from dataclasses import replace
from typing import Any
from weakref import WeakSet

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ranks import Ranks
from test_attention import TOLERANCE, Case, cases, worst_difference
from test_models import DOCUMENTS, batch, make
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from transformers import PreTrainedModel

import longspan
from longspan.attention.kept import Kept
from longspan.attention.ring import ring_of
from longspan.cluster.memory import Transformer, memory
from longspan.comm.counting import CountBytes
from longspan.errors import LayoutError, ModelError
from longspan.layout import Order
from longspan.models.checkpointing import checkpoint_layers
from longspan.schedule.ring import Ring, tokens
from longspan.schedule.rounds import comms, rounds

SHARES = (0.0, 0.25, 0.5, 1.0)


@settings(max_examples=50)
@given(case=cases, world=st.integers(1, 4), share=st.floats(0, 1))
def test_attention_recalled_is_exact(ranks: Ranks, case: Case, world: int, share: float) -> None:
    found = ranks.run(worst_difference, case, share, 2, world=world)
    assert max(found) < TOLERANCE[case.dtype]


def on_two_axes(_: DeviceMesh, case: Case, share: float) -> float:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("sp_inter", "sp_intra"))
    return worst_difference(mesh, replace(case, inside="heads"), share, 2)


@settings(max_examples=20)
@given(case=cases, share=st.sampled_from(SHARES))
def test_also_after_a_head_exchange(ranks: Ranks, case: Case, share: float) -> None:
    assert max(ranks.run(on_two_axes, case, share)) < TOLERANCE[case.dtype]


def pairs(ring: Ring) -> list[int]:
    """Query-key pairs of each rank."""
    return [
        sum(block.pairs for turn in rounds(ring, rank) for block in turn.blocks)
        for rank in range(ring.world)
    ]


@pytest.mark.parametrize("order", list(Order))
def test_the_first_half_is_a_quarter_of_the_work(order: Order) -> None:
    length = 4096
    ring = Ring(length, 4, order, True, (0, length), 1, 1)
    half = replace(ring, stop=length // 2)
    assert sum(pairs(half)) / sum(pairs(ring)) == pytest.approx(0.25, rel=1e-3)
    assert sum(tokens(half, rank) for rank in range(4)) == length // 2
    sent = [sum(op.sent_bytes(r) for r in range(4) for op in comms(x, r)) for x in (half, ring)]
    assert sent[0] <= sent[1] / 2
    if order is Order.ZIGZAG:
        assert {tokens(half, rank) for rank in range(4)} == {length // 8}


def test_stripes_of_several_ranks_have_no_first_tokens() -> None:
    with pytest.raises(LayoutError, match="stripes"):
        Ring(8, 2, Order.STRIPED, True, (0, 8), 1, 1, width=2, stop=3)


def step(
    model: PreTrainedModel, mesh: DeviceMesh, order: str = "zigzag"
) -> tuple[list[torch.Tensor], int, int]:
    """Loss and gradients, and the bytes sent in forward and in backward."""
    tokens, targets = batch()
    own = longspan.positions(len(tokens), mesh.get_local_rank(), mesh.size(), order)
    with CountBytes() as forward:
        loss = model(
            input_ids=tokens[None, own], targets=targets[None, own], cu_seqlens=DOCUMENTS
        ).loss
    with CountBytes() as backward:
        (loss / len(tokens)).backward()
    results = [loss.detach(), *(p.grad for p in model.parameters())]
    return results, forward.total_sent, backward.total_sent


def checkpointed(mesh: DeviceMesh, family: str, order: str) -> None:
    plain = longspan.patch(make(family), mesh=mesh, order=order)
    expected, sent, sent_back = step(plain, mesh, order)
    config = plain.config
    heads = getattr(config, "num_key_value_heads", config.num_attention_heads)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    q, kv = (torch.empty(1, h, 0, head_dim) for h in (config.num_attention_heads, heads))
    ring = ring_of(q, kv, kv, mesh.size(), order, True, DOCUMENTS)
    rank, layers = mesh.get_local_rank(), config.num_hidden_layers
    for share in SHARES:
        model = longspan.patch(make(family), mesh=mesh, order=order)
        checkpoint_layers(model, attention_kept=share)
        found, forward, backward = step(model, mesh, order)
        part = replace(ring, stop=ring.length - int(share * ring.length))
        again = layers * sum(op.sent_bytes(rank) for op in comms(part, rank))
        assert (forward, backward) == (sent, sent_back + again)
        if share == 0:
            assert again == sent
        if share == 1:
            assert again == 0
        if share in (0, 1):
            assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
        else:  # early rows in blocks of other sizes round differently
            for a, b in zip(found, expected, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
        again_step, *_ = step(model, mesh, order)  # a second step adds the same gradients
        assert torch.equal(again_step[0], found[0])


@pytest.mark.parametrize("order", ["zigzag", "striped", "contiguous"])
def test_the_same_gradients_and_the_bytes_promised(ranks: Ranks, order: str) -> None:
    ranks.run(checkpointed, "llama", order)


@pytest.mark.parametrize("family", ["qwen3", "gpt2"])
def test_in_other_families(ranks: Ranks, family: str) -> None:
    ranks.run(checkpointed, family, "zigzag", world=3)


SIZES = Transformer(layers=3, hidden=64, heads=4, kv_heads=4, head_dim=16, ffn=176, vocab=512)


class Saved:
    """What autograd holds instead of a tensor."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor


def held(model: PreTrainedModel, tokens: int) -> tuple[int, int]:
    """Bytes that autograd, and what attention kept, hold between forward and backward."""
    ids = torch.randint(0, SIZES.vocab, (1, tokens))
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    saved: WeakSet[Saved] = WeakSet()

    def keep(x: torch.Tensor) -> Saved:
        packed = Saved(x.detach())  # an output would hold its own graph
        saved.add(packed)
        return packed

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda packed: packed.tensor):
        loss = model(input_ids=ids, targets=ids, cu_seqlens=(0, tokens)).loss
    storages = [packed.tensor.untyped_storage() for packed in saved]
    sizes = {x.data_ptr(): x.nbytes() for x in storages if x.data_ptr() not in own}
    kept = sum(x.nbytes for x in gc.get_objects() if type(x) is Kept)
    assert loss.requires_grad
    head_gradient = 4 * SIZES.vocab * SIZES.hidden  # ready, and no activation
    return sum(sizes.values()) - head_gradient, kept


def memory_held(mesh: DeviceMesh) -> None:
    tokens = 512
    config: dict[str, Any] = {
        "num_hidden_layers": SIZES.layers, "hidden_size": SIZES.hidden,
        "num_attention_heads": SIZES.heads, "num_key_value_heads": SIZES.kv_heads,
        "head_dim": SIZES.head_dim, "intermediate_size": SIZES.ffn, "vocab_size": SIZES.vocab,
    }  # fmt: skip
    plain = longspan.patch(make("llama", **config), mesh=mesh)
    amounts = {}
    for share in (None, *SHARES):
        model = copy.deepcopy(plain)
        if share is not None:
            checkpoint_layers(model, attention_kept=share)
        gc.collect()
        amounts[share] = held(model, tokens)
        policy = {None: "none", 0.0: "full"}.get(share, "selective")
        promised = memory(SIZES, tokens, checkpointing=policy, attention_kept=share or 0.0)
        # Callers hold token numbers, and where layers are computed again their rotary embedding.
        beside = tokens * (4 * 8 + (share is not None) * 2 * SIZES.head_dim * 4)
        assert sum(amounts[share]) + beside == pytest.approx(promised.activations, rel=0.01)
    whole = SIZES.layers * tokens * 4 * (SIZES.heads * SIZES.head_dim + SIZES.heads)
    assert [kept for _, kept in amounts.values()] == [0, *(int(s * whole) for s in SHARES)]


def test_memory_is_what_is_promised(ranks: Ranks) -> None:
    ranks.run(memory_held, world=1)


def refusals(mesh: DeviceMesh) -> None:
    model = longspan.patch(make("llama"), mesh=mesh)
    with pytest.raises(ModelError, match="from 0 to 1"):
        checkpoint_layers(model, attention_kept=1.5)
    model.model.layers = nn.ModuleList()
    with pytest.raises(ModelError, match="no layers that can be checkpointed"):
        checkpoint_layers(model)


def test_what_is_refused(ranks: Ranks) -> None:
    ranks.run(refusals, world=1)


def without_gradients(mesh: DeviceMesh) -> None:
    model = longspan.patch(make("llama"), mesh=mesh)
    checkpoint_layers(model, attention_kept=0.5)
    assert longspan.leak_probe(model, mesh=mesh).changed > 0
    assert not [x for x in gc.get_objects() if type(x) is Kept and x.nbytes]


def test_nothing_is_kept_without_gradients(ranks: Ranks) -> None:
    ranks.run(without_gradients, world=2)
