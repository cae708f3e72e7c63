"""Whether the longest sequence fits the devices that are there."""

import os
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig

from longspan.cluster.memory import Transformer, longest, memory
from longspan.errors import MemoryLimitError
from longspan.models.loss import CHUNK_TOKENS
from longspan.train.config import Config

__all__ = ["check_memory", "device_memory_bytes", "transformer_sizes"]

_CGROUP_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


def device_memory_bytes(local_ranks: int) -> int:
    """What one rank may use: its GPU's memory, or its share of what the machine has free.

    In the lab a rank is a device of its own, which says how large it is.
    """
    if given := os.environ.get("LONGSPAN_DEVICE_BYTES"):
        return int(given)
    if torch.cuda.is_available():
        return min(
            torch.cuda.get_device_properties(i).total_memory
            for i in range(torch.cuda.device_count())
        )
    lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    available = next(int(line.split()[1]) * 1024 for line in lines if "MemAvailable" in line)
    for limit in map(Path, _CGROUP_LIMITS):
        if limit.is_file() and (text := limit.read_text(encoding="ascii").strip()).isdigit():
            available = min(available, int(text))
    return available // local_ranks


def check_memory(
    config: Config,
    model: PreTrainedConfig,
    tokens: int,
    world: int,
    device_bytes: int,
    outer_bytes: int = 0,
) -> None:
    """Raise MemoryLimitError if a sequence of ``tokens`` can't be trained on ``world`` ranks.

    ``outer_bytes``: of each rank's memory, what keeping sites together takes.
    """
    sp = config.parallel.sp or world
    sizes = transformer_sizes(config, model)
    how: dict[str, Any] = {
        "shards": world,
        "checkpointing": config.train.checkpointing,
        "attention_kept": config.train.attention_kept,
        "exchanged": config.parallel.inside == "heads" and sp > 1,
        "whole_gradients": config.train.accumulate > 1,
        "loss_tokens": CHUNK_TOKENS,
    }
    own = -(-tokens // sp)
    needed = memory(sizes, own, **how).total + outer_bytes
    if needed <= device_bytes:
        return
    left = device_bytes - outer_bytes
    fits = longest(sizes, left, **how) * sp
    mend = f"lower data.max_length to {fits}" if fits > 0 else "take a smaller model"
    if memory(sizes, own, **how | {"checkpointing": "full"}).total <= left:
        mend = f"set train.checkpointing to full, {mend}"
    told = f" ({outer_bytes / 2**30:.1f} of them for outer)" if outer_bytes else ""
    raise MemoryLimitError(
        f"a sequence of {tokens} tokens needs about {needed / 2**30:.1f} GiB{told} on each of its "
        f"{sp} ranks, which have {device_bytes / 2**30:.1f} GiB: {mend}, or use more ranks"
    )


def transformer_sizes(config: Config, model: PreTrainedConfig) -> Transformer:
    """The sizes of a model that its memory and its time depend on."""
    heads = model.num_attention_heads
    return Transformer(
        layers=model.num_hidden_layers,
        hidden=model.hidden_size,
        heads=heads,
        kv_heads=getattr(model, "num_key_value_heads", None) or heads,
        head_dim=getattr(model, "head_dim", None) or model.hidden_size // heads,
        ffn=getattr(model, "intermediate_size", None) or 4 * model.hidden_size,
        vocab=model.vocab_size,
        tied=bool(model.tie_word_embeddings),
        dtype_bytes=getattr(torch, config.train.dtype).itemsize,
    )
