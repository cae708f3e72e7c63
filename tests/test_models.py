"""Patched transformers models against the same models in one process; the leak probe."""

import copy
from itertools import pairwise
from typing import Any

import numpy as np
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
from longspan.data.packing import PackedSequence
from longspan.errors import LeakError, ModelError
from longspan.layout import Order
from longspan.models.transformers import check_model
from longspan.train.figures import ring_figures

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
WINDOW = 8  # shorter than the longest document, longer than the shortest
MIXED = {"sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"]}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 32}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": SMALL,
    "qwen2": SMALL | {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1},
    "qwen3": SMALL,
    "mistral": SMALL | {"sliding_window": WINDOW},
    "gemma3_text": SMALL | MIXED | {"final_logit_softcapping": 30.0},
    "phi3": SMALL | {"sliding_window": WINDOW},
    "olmo2": SMALL,
    "gpt2": {
        "vocab_size": 101, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 128,
        "bos_token_id": None, "eos_token_id": None,
    } | NO_DROPOUT,
    "gpt_neox": SMALL,
    "granite": SMALL | {"attention_multiplier": 0.2, "residual_multiplier": 0.7},
    "cohere2": SMALL | MIXED,
    "qwen3_moe": SMALL | EXPERTS | {"num_experts": 32, "hidden_size": 256},
    "mixtral": SMALL | EXPERTS | {"num_local_experts": 4, "sliding_window": WINDOW},
    "deepseek_v3": SMALL | EXPERTS | {
        "head_dim": 8, "num_key_value_heads": 4,
        "n_routed_experts": 4, "n_group": 2, "topk_group": 1,
        "first_k_dense_replace": 1, "q_lora_rank": 24, "kv_lora_rank": 16,
        "qk_rope_head_dim": 8, "qk_nope_head_dim": 16, "v_head_dim": 12,
    },
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
    rank = flat_group(mesh).rank()
    own = longspan.positions(len(tokens), rank, mesh.size(), order, DOCUMENTS)
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


def cases() -> list[tuple[str, str]]:
    """Every family in one order; in all orders what differs by more than its layers."""
    orders = ["contiguous", "zigzag", "striped", "balanced"]
    every = {"llama", "gpt2", "mistral", "gemma3_text"}
    return [
        (family, order)
        for number, family in enumerate(FAMILIES)
        for order in (orders if family in every else [orders[number % 4]])
    ]


@pytest.mark.parametrize(("family", "order"), cases())
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


def beyond_its_window(mesh: DeviceMesh) -> tuple[str, str]:
    """A model that looks further back than its config says: by the check, and by the probe."""
    model = longspan.patch(make("mistral"), mesh=mesh)
    model.model.layers[1].self_attn.config = copy.copy(model.config)
    model.model.layers[1].self_attn.config.sliding_window = 2 * WINDOW
    with pytest.raises(ModelError) as noticed:
        model(input_ids=batch()[0][:10][None], cu_seqlens=[0, 10 * mesh.size()])
    model = longspan.patch(make("mistral", sliding_window=3 * WINDOW), mesh=mesh)
    config = copy.copy(model.config)
    config.sliding_window = WINDOW
    with pytest.raises(LeakError) as caught:
        longspan.leak_probe(Saying(model, config), mesh=mesh)  # type: ignore[arg-type]
    return str(noticed.value), str(caught.value)


class Saying(nn.Module):
    """A model with another config."""

    def __init__(self, model: nn.Module, config: Any) -> None:
        super().__init__()
        self.model, self.config = model, config

    def forward(self, **kwargs: Any) -> Any:
        return self.model(**kwargs)


def test_windows_other_than_the_configs_are_noticed(ranks: Ranks) -> None:
    for noticed, caught in ranks.run(beyond_its_window, world=2):
        assert "layer 1 of MistralForCausalLM attended in a window of 16" in noticed
        assert "leaks" in caught


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


def test_ring_figures_know_each_layers_window() -> None:
    tokens = np.zeros(256, np.int64)
    batch = [PackedSequence(tokens, tokens, np.array([0, 200, 256]))]

    def ring_bytes(*kinds: str) -> float:
        changes = {"layer_types": list(kinds), "num_hidden_layers": len(kinds)}
        config = AutoConfig.for_model("gemma3_text", **FAMILIES["gemma3_text"] | changes)
        figures = ring_figures(batch, config, torch.float32, 4, Order.CONTIGUOUS)
        return figures["ring_bytes"]

    full, near = ring_bytes("full_attention"), ring_bytes("sliding_attention")
    # Three neighbours: keys in forward, keys and their gradients in backward. They need the last 7
    # tokens of 64, and a token has 64 numbers of 4 bytes.
    assert near == 3 * 3 * 7 * 64 * 4
    assert full > near
    assert ring_bytes("sliding_attention", "full_attention", "full_attention") == near + 2 * full


def test_the_probe_wants_to_see_something_change(ranks: Ranks) -> None:
    assert all("no output at all" in message for message in ranks.run(deaf, world=2))


@pytest.mark.parametrize(
    ("family", "changes", "words"),
    [
        ("gpt2", {"attn_pdrop": 0.1}, "attn_pdrop: 0.0"),
        ("llama", {"attention_dropout": 0.1}, "attention_dropout: 0.0"),
        ("gemma2", {}, "softcap"),
        ("gpt2", {"add_cross_attention": True}, "cross attention"),
        ("mamba", {}, "linear_attention"),
        ("gpt_oss", {"num_local_experts": 2}, "attention sinks"),
        ("mixtral", {"num_local_experts": 2, "output_router_logits": True}, "output_router_logits"),
        (
            "llama",
            {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
            "rotary embedding .dynamic.",
        ),
        (
            "gemma3_text",
            {
                "rope_parameters": {
                    "full_attention": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0},
                    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
                }
            },
            "rotary embedding .dynamic.",
        ),
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
        ({"output_router_logits": True}, "output_router_logits=False"),
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
