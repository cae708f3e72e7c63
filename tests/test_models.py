"""Patched transformers models against the same models in one process; the leak probe."""

import copy
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from ranks import Ranks
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

import longspan
from longspan.comm.mesh import flat_group
from longspan.errors import LeakError, ModelError
from longspan.models.transformers import check_model

SMALL = {
    "vocab_size": 101,
    "bos_token_id": None,
    "eos_token_id": None,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "pad_token_id": None,
}
NO_DROPOUT = {"attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": SMALL,
    "qwen3": SMALL,
    "gpt2": {
        "vocab_size": 101, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 128,
        "bos_token_id": None, "eos_token_id": None,
    } | NO_DROPOUT,
}  # fmt: skip
DOCUMENTS = [0, 13, 14, 14, 50, 61]


def make(family: str, **changes: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **(FAMILIES.get(family, SMALL) | changes))
    return AutoModelForCausalLM.from_config(config)


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return tuple(torch.randint(101, (DOCUMENTS[-1],), generator=generator) for _ in range(2))


def by_documents(model: PreTrainedModel) -> torch.Tensor:
    """The loss of one process: each document alone, with stock attention."""
    tokens, targets = batch()
    spans = [(a, b) for a, b in pairwise(DOCUMENTS) if a < b]
    return sum(
        F.cross_entropy(model(input_ids=tokens[None, a:b]).logits[0], targets[a:b], reduction="sum")
        for a, b in spans
    ) / len(tokens)


def difference(
    mesh: DeviceMesh, family: str, order: str, checkpointing: bool, inside: str = "ring"
) -> float:
    """Of loss and every gradient, from one process."""
    model = make(family)
    reference = copy.deepcopy(model)
    longspan.patch(model, mesh=mesh, order=order, inside=inside)
    if checkpointing:
        model.gradient_checkpointing_enable()
    assert longspan.leak_probe(model, mesh=mesh, order=order).changed > 0
    tokens, targets = batch()
    own = longspan.positions(len(tokens), flat_group(mesh).rank(), mesh.size(), order)
    logits = model(input_ids=tokens[None, own], cu_seqlens=torch.tensor(DOCUMENTS)).logits[0]
    loss = F.cross_entropy(logits, targets[own], reduction="sum") / len(tokens)
    loss.backward()
    expected = by_documents(reference)
    expected.backward()
    found = [loss.detach(), *(p.grad for p in model.parameters())]
    for tensor in found:
        dist.all_reduce(tensor, group=flat_group(mesh))
    wanted = [expected.detach(), *(p.grad for p in reference.parameters())]
    return max((a - b).abs().max().item() for a, b in zip(found, wanted, strict=True))


@pytest.mark.parametrize("order", ["contiguous", "zigzag", "striped"])
@pytest.mark.parametrize("family", FAMILIES)
def test_loss_and_gradients_are_one_process(ranks: Ranks, family: str, order: str) -> None:
    assert max(ranks.run(difference, family, order, False)) < 1e-5


def test_with_activation_checkpointing(ranks: Ranks) -> None:
    assert max(ranks.run(difference, "llama", "zigzag", True)) < 1e-5


def on_two_axes(_: DeviceMesh, inside: str) -> float:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("sp_inter", "sp_intra"))
    return difference(mesh, "qwen3", "zigzag", False, inside)


@pytest.mark.parametrize("inside", ["ring", "heads"])
def test_on_two_axes(ranks: Ranks, inside: str) -> None:
    assert max(ranks.run(on_two_axes, inside)) < 1e-5


def one_document(mesh: DeviceMesh) -> float:
    """Without boundaries or positions the sequence is one document; the loss is transformers'."""
    model = make("llama")
    reference = copy.deepcopy(model)
    longspan.patch(model, mesh=mesh)
    tokens, targets = batch()
    own = longspan.positions(len(tokens), mesh.get_local_rank(), mesh.size(), "zigzag")
    loss = model(
        input_ids=tokens[None, own],
        labels=targets[None, own],
        shift_labels=targets[None, own],
        num_items_in_batch=len(tokens),
    ).loss.detach()
    dist.all_reduce(loss, group=mesh.get_group())
    expected = F.cross_entropy(reference(input_ids=tokens[None]).logits[0], targets)
    return (loss - expected).abs().item()


def test_one_document(ranks: Ranks) -> None:
    assert max(ranks.run(one_document, world=3)) < 1e-5


def one_sequence(_: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
    return args, kwargs | {"cu_seqlens": (0, kwargs["cu_seqlens"][-1])}


def without_isolation(mesh: DeviceMesh) -> str:
    model = make("llama")
    model.register_forward_pre_hook(one_sequence, with_kwargs=True)
    longspan.patch(model, mesh=mesh)
    with pytest.raises(LeakError) as caught:
        longspan.leak_probe(model, mesh=mesh)
    return str(caught.value)


def test_the_probe_finds_documents_that_are_not_isolated(ranks: Ranks) -> None:
    for message in ranks.run(without_isolation):
        assert "changed outside the changed token's document" in message


def without_causality(mesh: DeviceMesh) -> str:
    model = make("llama")
    for module in model.modules():
        if hasattr(module, "is_causal"):
            module.is_causal = False
    longspan.patch(model, mesh=mesh)
    with pytest.raises(LeakError) as caught:
        longspan.leak_probe(model, mesh=mesh)
    return str(caught.value)


def test_the_probe_finds_a_view_of_the_future(ranks: Ranks) -> None:
    assert all("leaks" in message for message in ranks.run(without_causality, world=2))


class Deaf(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.zeros_like(x)


def deaf(mesh: DeviceMesh) -> str:
    model = make("llama")
    model.lm_head = Deaf()
    longspan.patch(model, mesh=mesh)
    with pytest.raises(LeakError) as caught:
        longspan.leak_probe(model, mesh=mesh)
    return str(caught.value)


def test_the_probe_wants_to_see_something_change(ranks: Ranks) -> None:
    assert all("no output at all" in message for message in ranks.run(deaf, world=2))


@pytest.mark.parametrize(
    ("family", "changes", "words"),
    [
        ("mistral", {"sliding_window": 32}, "sliding window of 32"),
        ("gemma2", {}, "sliding_attention"),
        ("gpt2", {"attn_pdrop": 0.1}, "attn_pdrop: 0.0"),
        ("llama", {"attention_dropout": 0.1}, "attention_dropout: 0.0"),
        ("gemma2", {"layer_types": ["full_attention"] * 2, "sliding_window": None}, "softcap"),
        ("gpt2", {"add_cross_attention": True}, "cross attention"),
        ("mamba", {}, "linear_attention"),
    ],
)
def test_what_is_refused_at_once(family: str, changes: dict[str, Any], words: str) -> None:
    with torch.device("meta"):
        model = make(family, **changes)
    with pytest.raises(ModelError, match=words) as caught:
        check_model(model)
    assert "\n" not in str(caught.value)


def refusals(mesh: DeviceMesh) -> None:
    model = longspan.patch(make("llama"), mesh=mesh)
    tokens = batch()[0][None]
    calls: list[tuple[dict[str, Any], str]] = [
        ({"attention_mask": torch.ones_like(tokens)}, "cu_seqlens"),
        ({"use_cache": True}, "use_cache=False"),
        ({"labels": tokens}, "shift_labels and num_items_in_batch"),
        ({"labels": tokens, "shift_labels": tokens}, "num_items_in_batch"),
    ]
    for arguments, words in calls:
        with pytest.raises(ModelError, match=words):
            model(input_ids=tokens, **arguments)
    with pytest.raises(ModelError, match="pass input_ids"):
        model(cu_seqlens=DOCUMENTS)
    model.model.layers[0].self_attn.forward = _without_keywords(model.model.layers[0].self_attn)
    with pytest.raises(ModelError, match="keyword arguments"):
        model(input_ids=tokens)


def _without_keywords(attention: Any) -> Any:
    forward = attention.forward

    def deaf_forward(hidden_states: Any, position_embeddings: Any, **_: Any) -> Any:
        return forward(hidden_states, position_embeddings, attention_mask=None)

    return deaf_forward


def test_what_is_refused_in_forward(ranks: Ranks) -> None:
    ranks.run(refusals, world=1)


def skipped_attention(mesh: DeviceMesh) -> None:
    model = longspan.patch(make("llama"), mesh=mesh)
    attention = model.model.layers[1].self_attn
    attention.forward = lambda hidden_states, **_: (hidden_states, None)
    with pytest.raises(ModelError, match="2 layers but 1 of them attended"):
        model(input_ids=batch()[0][None])


def test_layers_that_mix_by_other_means_are_noticed(ranks: Ranks) -> None:
    ranks.run(skipped_attention, world=1)
