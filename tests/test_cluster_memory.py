"""Memory: parameters and activations against a real Llama, and its peak in a process of its own."""

import json
import os
import subprocess
import sys

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from longspan.cluster.memory import Checkpointing, Transformer, longest, memory
from longspan.errors import ConfigError

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


PEAK = """
import json, resource, sys, torch
from longspan.models.loss import chunked_loss
from tests.test_cluster_memory import llama, Transformer
torch.set_num_threads(1)
sizes, tokens, full = Transformer(*json.loads(sys.argv[1])), int(sys.argv[2]), sys.argv[3] == "full"
small = llama(Transformer(1, 16, 1, 1, 16, 16, 16))
ids = torch.zeros(1, 8, dtype=torch.long)
small(input_ids=ids, labels=ids).loss.backward()
torch.optim.AdamW(small.parameters()).step()
before = int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()
model = llama(sizes)
if full:
    model.gradient_checkpointing_enable()
adam = torch.optim.AdamW(model.parameters())
ids = torch.randint(0, sizes.vocab, (1, tokens))
for _ in range(2):
    hidden = model.model(input_ids=ids).last_hidden_state
    chunked_loss(hidden, model.lm_head.weight, ids, chunk_tokens=256).backward()
    del hidden
    adam.step()
# Not ru_maxrss, which a process has from the one that started it, too.
status = open("/proc/self/status").read()
print(int(status.split("VmHWM:")[1].split()[0]) * 1024 - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize(
    ("sizes", "tokens", "checkpointing"),
    [((4, 256, 8, 8, 32, 688, 2048), 2048, "none"), ((2, 256, 8, 4, 32, 688, 8192), 1536, "full")],
)
def test_the_peak_of_real_steps_is_foreseen(
    sizes: tuple[int, ...], tokens: int, checkpointing: Checkpointing
) -> None:
    settings = {"MALLOC_MMAP_THRESHOLD_": "262144", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", PEAK, json.dumps(sizes), str(tokens), checkpointing],
        env={**os.environ, **settings, "PYTHONPATH": os.pathsep.join([".", *sys.path])},
        capture_output=True,
        text=True,
        check=True,
    )
    peak = int(done.stdout.split()[-1])
    how = {"checkpointing": checkpointing, "loss_tokens": 256}
    expected = memory(Transformer(*sizes), tokens, **how).total
    assert expected == pytest.approx(peak, rel=0.2)


def test_sharding_and_checkpointing_leave_less() -> None:
    whole, eighth = memory(SIZES, 1000), memory(SIZES, 1000, shards=8)
    assert eighth.parameters == -(-whole.parameters // 8) and whole.gathered == 0
    assert eighth.optimizer == 2 * eighth.gradients and eighth.gathered > 0
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
