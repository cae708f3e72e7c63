"""Memory: parameters and activations against a real Llama, and its peak in a process of its own."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.peak import peak_bytes
from longspan.cluster.memory import Checkpointing, Transformer, longest, memory
from longspan.errors import ConfigError
from longspan.models.loss import chunked_loss

SIZES = Transformer(layers=3, hidden=64, heads=4, kv_heads=4, head_dim=16, ffn=176, vocab=512)


def llama(model: Transformer) -> LlamaForCausalLM:
    config = LlamaConfig(
        num_hidden_layers=model.layers,
        hidden_size=model.hidden,
        num_attention_heads=model.heads,
        num_key_value_heads=model.kv_heads,
        head_dim=model.head_dim,
        intermediate_size=model.ffn,
        vocab_size=model.vocab,
        tie_word_embeddings=model.tied,
        attn_implementation="sdpa",
        use_cache=False,
    )
    return LlamaForCausalLM(config)


@pytest.mark.parametrize("tied", [False, True])
def test_parameters_are_counted_exactly(tied: bool) -> None:
    sizes = Transformer(2, 64, 4, 2, 16, 176, 512, tied=tied)
    assert sizes.params == sum(p.numel() for p in llama(sizes).parameters())


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable`:FutureWarning")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("checkpointing", ["none", "full"])
def test_activations_are_what_autograd_keeps(
    dtype: torch.dtype, checkpointing: Checkpointing
) -> None:
    sizes = Transformer(3, 64, 4, 4, 16, 176, 512, dtype_bytes=dtype.itemsize)
    model, tokens = llama(sizes).to(dtype), 512
    if checkpointing == "full":
        model.gradient_checkpointing_enable()
    ids = torch.randint(0, sizes.vocab, (1, tokens))
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def keep(x: torch.Tensor) -> torch.Tensor:
        kept[x.untyped_storage().data_ptr()] = x
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        loss = model(input_ids=ids, labels=ids).loss
    total = sum(x.untyped_storage().nbytes() for key, x in kept.items() if key not in own)
    assert loss.isfinite()
    log_softmax = 4 * tokens * sizes.vocab
    expected = memory(sizes, tokens, checkpointing=checkpointing).activations + log_softmax
    assert total == pytest.approx(expected, rel=0.05)


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable`:FutureWarning")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("checkpointing", ["none", "full"])
@pytest.mark.parametrize("wide", [96, 352])
@pytest.mark.parametrize("vocab", [16, 1024])
def test_the_peak_of_a_step_is_foreseen_and_never_more(
    dtype: torch.dtype, checkpointing: Checkpointing, wide: int, vocab: int
) -> None:
    sizes = Transformer(3, 64, 4, 2, 16, wide, vocab, dtype_bytes=dtype.itemsize)
    model, tokens = llama(sizes).to(dtype), 512
    if checkpointing == "full":
        model.gradient_checkpointing_enable()

    def step() -> None:
        ids = torch.randint(0, sizes.vocab, (1, tokens))
        hidden = model.model(input_ids=ids).last_hidden_state
        chunked_loss(hidden, model.lm_head.weight, ids, chunk_tokens=256).backward()

    step()  # its gradients stay
    foreseen = memory(sizes, tokens, checkpointing=checkpointing, loss_tokens=256)
    expected = foreseen.activations + foreseen.working
    if checkpointing == "full":  # each layer's state of the generator of random numbers
        expected += sizes.layers * torch.get_rng_state().nbytes
    peak = peak_bytes(step)
    assert peak <= expected <= 1.1 * peak


def test_sharding_and_checkpointing_leave_less() -> None:
    whole, eighth = memory(SIZES, 1000), memory(SIZES, 1000, shards=8)
    assert eighth.parameters == -(-whole.parameters // 8) and eighth.gathered > whole.gathered > 0
    assert eighth.optimizer == 2 * eighth.gradients
    kept = [
        memory(SIZES, 1000, checkpointing=policy).activations
        for policy in ("full", "selective", "none")
    ]
    assert kept == sorted(kept)
    half = memory(SIZES, 1000, checkpointing="selective", attention_kept=0.5)
    assert kept[0] < half.activations < kept[1]
    with pytest.raises(ConfigError, match="0 shards"):
        memory(SIZES, 1, shards=0)


def test_the_longest_sequence_just_fits() -> None:
    limit = 200_000_000
    tokens = longest(SIZES, limit, shards=4, checkpointing="full")
    assert memory(SIZES, tokens, shards=4, checkpointing="full").total <= limit
    assert memory(SIZES, tokens + 2, shards=4, checkpointing="full").total > limit
    assert longest(SIZES, 1000) == 0
