"""The loss without logits: against plain cross-entropy, and in the models of many families."""

import copy
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from ranks import Ranks
from test_models import DOCUMENTS, batch, by_documents, make
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedModel

import longspan
from longspan.errors import ModelError
from longspan.models.loss import LazyLogits, chunked_loss

FULL = {"layer_types": ["full_attention"] * 2, "use_sliding_window": False}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"tie_word_embeddings": True},
    "gpt2": {},
    "gpt_neox": {"use_parallel_residual": False},
    "phi": {"partial_rotary_factor": 0.5},  # its head has a bias
    "granite": {"logits_scaling": 7.0},
    "cohere": {"logit_scale": 0.3},
    "gemma2": FULL | {"attn_logit_softcapping": None, "final_logit_softcapping": 0.3},
    "nanochat": {},
    "mixtral": {"num_local_experts": 4, "sliding_window": None},
}


def softcap(logits: torch.Tensor) -> torch.Tensor:
    return 3 * torch.tanh(logits / 3)


@settings(max_examples=60, deadline=None)
@given(
    shape=st.sampled_from([(0,), (1,), (7,), (2, 5), (3, 0), (1, 33)]),
    chunk_tokens=st.sampled_from([1, 3, 8, 1000]),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16]),
    bias=st.booleans(),
    capped=st.booleans(),
    trained=st.tuples(st.booleans(), st.booleans(), st.booleans()),
    seed=st.integers(0, 1000),
)
def test_values_and_gradients_are_those_of_whole_logits(
    shape: tuple[int, ...],
    chunk_tokens: int,
    dtype: torch.dtype,
    bias: bool,
    capped: bool,
    trained: tuple[bool, bool, bool],
    seed: int,
) -> None:
    torch.manual_seed(seed)
    inputs = [torch.randn(*shape, 6), torch.randn(11, 6), torch.randn(11)]
    inputs = [x.to(dtype).requires_grad_(t) for x, t in zip(inputs, trained, strict=True)]
    targets = torch.randint(11, shape)
    targets[torch.rand(shape) < 0.3] = -100
    hidden, weight, offset = inputs if bias else (*inputs[:2], None)
    loss = chunked_loss(
        hidden,
        weight,
        targets,
        bias=offset,
        steps=[softcap] if capped else [],
        chunk_tokens=chunk_tokens,
    )
    wide = torch.promote_types(dtype, torch.float32)
    assert loss.dtype == wide and loss.shape == ()

    exact = [x.detach().double().requires_grad_(x.requires_grad) for x in inputs]
    logits = F.linear(*exact[:2], exact[2] if bias else None)
    logits = softcap(logits) if capped else logits
    expected = F.cross_entropy(logits.flatten(0, -2), targets.flatten(), reduction="sum")
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 3e-2}[dtype]
    close = {"rtol": tolerance, "atol": tolerance}
    torch.testing.assert_close(loss.double(), expected, **close)
    if loss.requires_grad:
        (loss * 0.5).backward()
        (expected * 0.5).backward()
        for found, true in zip(inputs, exact, strict=True):
            assert (found.grad is None) == (true.grad is None)
            if found.grad is not None:
                assert found.grad.dtype == dtype
                torch.testing.assert_close(found.grad.double(), true.grad, **close)


class Largest(TorchDispatchMode):
    """The most numbers that any tensor made meanwhile has."""

    numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for x in result if isinstance(result, tuple | list) else (result,):
            if isinstance(x, torch.Tensor):
                self.numel = max(self.numel, x.numel())
        return result


def test_only_a_chunk_of_logits_is_ever_made() -> None:
    hidden, weight = torch.randn(100, 4, requires_grad=True), torch.randn(50, 4, requires_grad=True)
    with Largest() as largest:
        chunked_loss(hidden, weight, torch.zeros(100, dtype=torch.long), chunk_tokens=10).backward()
    assert largest.numel == 10 * 50


def test_shapes_that_do_not_fit() -> None:
    hidden, weight = torch.randn(5, 4), torch.randn(7, 4)
    for targets, head in ((torch.zeros(4), weight), (torch.zeros(5), weight[:, 1:])):
        with pytest.raises(ModelError, match="don't fit together"):
            chunked_loss(hidden, head, targets.long())


def of_logits(mesh: DeviceMesh, family: str) -> float:
    """The difference of the loss and all gradients from those of the same model's logits."""
    model = longspan.patch(make(family, **FAMILIES[family]), mesh=mesh)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    tokens, targets = batch()
    own = longspan.positions(len(tokens), mesh.get_local_rank(), mesh.size(), "zigzag")
    targets[5:9] = -100
    results = []
    for lazily in (True, False):
        model.zero_grad()
        if lazily:
            call = {"targets": targets[None, own]}
            output = model(input_ids=tokens[None, own], cu_seqlens=DOCUMENTS, **call)
            assert output.get("logits") is None
            loss = output.loss
        else:
            logits = model(input_ids=tokens[None, own], cu_seqlens=DOCUMENTS).logits[0]
            loss = F.cross_entropy(logits.float(), targets[own], reduction="sum")
        (loss / len(tokens)).backward()
        results.append([loss.detach(), *(p.grad.clone() for p in model.parameters())])
    return max(
        (a - b).abs().max().item() / b.abs().max().item() for a, b in zip(*results, strict=True)
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_what_a_family_does_to_its_logits_is_honoured(ranks: Ranks, family: str) -> None:
    assert max(ranks.run(of_logits, family, world=2)) < 1e-4


def sharded(mesh: DeviceMesh, tied: bool, dtype: torch.dtype) -> float:
    """With FSDP2, from one process by documents."""
    model = make("llama", tie_word_embeddings=tied)
    reference = copy.deepcopy(model)
    longspan.patch(model, mesh=mesh)
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    for module in (*model.model.layers, model):
        fully_shard(module, mesh=mesh, mp_policy=policy)
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)
    tokens, targets = batch()
    own = longspan.positions(len(tokens), mesh.get_local_rank(), mesh.size(), "zigzag")
    total = torch.zeros(())
    for last in (False, True):  # two micro-batches
        model.set_requires_gradient_sync(last)
        loss = model(
            input_ids=tokens[None, own], targets=targets[None, own], cu_seqlens=DOCUMENTS
        ).loss / len(tokens)
        loss.backward()
        total += loss.detach() / 2
    dist.all_reduce(total, group=mesh.get_group())
    expected = by_documents(reference)
    (2 * expected).backward()
    found = [total, *(p.grad.full_tensor() for p in model.parameters())]
    assert isinstance(next(model.parameters()), DTensor)
    wanted = [expected.detach(), *(p.grad for p in reference.parameters())]
    return max(
        (a - b).abs().max().item() / b.abs().max().item()
        for a, b in zip(found, wanted, strict=True)
    )


@pytest.mark.parametrize("tied", [False, True])
def test_sharded_it_is_one_process(ranks: Ranks, tied: bool) -> None:
    assert max(ranks.run(sharded, tied, torch.float32)) < 1e-4
    assert max(ranks.run(sharded, tied, torch.bfloat16, world=2)) < 1e-1


def head_by_itself(mesh: DeviceMesh) -> None:
    model = longspan.patch(make("llama"), mesh=mesh)
    fully_shard(model.lm_head, mesh=mesh)
    fully_shard(model, mesh=mesh)
    tokens, targets = batch()
    with pytest.raises(ModelError, match="sharded by itself"):
        model(input_ids=tokens[None, :30], targets=targets[None, :30], cu_seqlens=(0, 60))


def test_a_head_that_is_gone_is_noticed(ranks: Ranks) -> None:
    ranks.run(head_by_itself, world=2)


class Odd(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight) + 1


class Own(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.softmax(F.linear(x, self.weight), -1)


def with_another_loss(forward: Any) -> Any:
    def forward_and_add(**kwargs: Any) -> Any:
        output = forward(**kwargs)
        if output.loss is not None:
            output.loss += 1.0
        return output

    return forward_and_add


def refusals(mesh: DeviceMesh) -> None:
    tokens, targets = (x[None] for x in batch())

    def refused(model: PreTrainedModel, words: str, **call: Any) -> None:
        with pytest.raises(ModelError, match=words) as caught:
            model(input_ids=tokens, **{"targets": targets} | call)
        assert "\n" not in str(caught.value)
        assert model(input_ids=tokens).logits.shape == (*tokens.shape, 101)

    model = longspan.patch(make("llama"), mesh=mesh)
    refused(model, "either targets or labels", shift_labels=targets)
    refused(model, "don't fit together", targets=targets[:, 1:])
    for head, words in ((Odd, "adds"), (Own, "softmax")):
        odd = make("llama")
        odd.lm_head = head(64, 101, bias=False)
        refused(longspan.patch(odd, mesh=mesh), words)
    added = longspan.patch(make("llama"), mesh=mesh)
    added.forward = with_another_loss(added.forward)
    refused(added, "a router's loss")


def test_what_is_refused(ranks: Ranks) -> None:
    ranks.run(refusals, world=1)


def copied(mesh: DeviceMesh) -> None:
    model = longspan.patch(make("llama"), mesh=mesh)
    twin = copy.deepcopy(model)
    tokens, targets = (x[None] for x in batch())
    losses = [m(input_ids=tokens, targets=targets).loss for m in (model, twin, model)]
    assert losses[0] == losses[1] == losses[2]
    losses[1].backward()
    assert model.lm_head.weight.grad is None and twin.lm_head.weight.grad is not None


def test_a_copied_model_computes_its_own_loss(ranks: Ranks) -> None:
    ranks.run(copied, world=1)


@pytest.mark.parametrize(
    "use",
    [
        lambda x: x[..., 0],
        lambda x: x.argmax(-1),
        lambda x: x + 1,
        lambda x: x * torch.ones(3),
        lambda x: torch.exp(x),
        lambda x: torch.tanh(x),  # before the head
        lambda x: F.linear(F.linear(x, torch.ones(3, 4)), torch.ones(3, 3)),
    ],
)
def test_anything_else_is_refused(use: Any) -> None:
    with pytest.raises(ModelError):
        use(LazyLogits(torch.ones(2, 4)))


def test_conversions_before_the_loss() -> None:
    hidden, weight = torch.randn(5, 4), torch.randn(3, 4)
    targets = torch.tensor([0, 1, 2, 0, -100])
    logits = F.linear(LazyLogits(hidden), weight).contiguous().float()  # type: ignore[arg-type]
    expected = F.cross_entropy(hidden @ weight.T * 0.5, targets, reduction="sum")
    torch.testing.assert_close((0.5 * logits).loss(targets), expected)
