"""Ranks tell each other what went wrong, so that all of them stop for the same reason."""

import torch
import torch.distributed as dist

__all__ = ["first_words"]

_BYTES = 1024


def first_words(words: str) -> str:
    """The words of the first rank that has any, on every rank; cut to 1,024 bytes.

    All ranks must call it. Empty if no rank has words.
    """
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    own = words.encode()[:_BYTES].ljust(_BYTES, b"\0")
    line = torch.frombuffer(bytearray(own), dtype=torch.uint8).to(device)
    lines = [torch.empty_like(line) for _ in range(dist.get_world_size())]
    dist.all_gather(lines, line)
    texts = (bytes(line.tolist()).rstrip(b"\0").decode(errors="ignore") for line in lines)
    return next(filter(None, texts), "")
