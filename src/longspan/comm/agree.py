"""Ranks tell each other in words: what went wrong, so that all stop for the same reason."""

import torch
import torch.distributed as dist

__all__ = ["all_words", "first_words", "leaders_words"]

_BYTES = 1024


def first_words(words: str, group: dist.ProcessGroup | None = None) -> str:
    """The words of the first rank that has any, on every rank of the group; empty if none has.

    All ranks must call it.
    """
    return next(filter(None, all_words(words, group)), "")


def all_words(words: str, group: dist.ProcessGroup | None = None) -> list[str]:
    """Each rank's words, cut to 1,024 bytes, on every rank of the group. All must call it."""
    device = _device(group)
    own = words.encode()[:_BYTES].ljust(_BYTES, b"\0")
    line = torch.frombuffer(bytearray(own), dtype=torch.uint8).to(device)
    lines = [torch.empty_like(line) for _ in range(dist.get_world_size(group))]
    dist.all_gather(lines, line, group=group)
    return [bytes(line.tolist()).rstrip(b"\0").decode(errors="ignore") for line in lines]


def leaders_words(words: str) -> str:
    """Rank 0's words, of any length, on every rank. All ranks must call it."""
    line = torch.frombuffer(bytearray(words.encode()), dtype=torch.uint8) if words else None
    size = torch.tensor(0 if line is None else len(line), device=_device())
    dist.broadcast(size, 0)
    if dist.get_rank() or line is None:
        line = torch.empty(int(size), dtype=torch.uint8)
    line = line.to(_device())
    dist.broadcast(line, 0)
    return bytes(line.tolist()).decode()


def _device(group: dist.ProcessGroup | None = None) -> str:
    return "cuda" if dist.get_backend(group) == "nccl" else "cpu"
