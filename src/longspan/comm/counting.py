"""Counts the bytes that this rank really hands to torch.distributed for other ranks."""

from collections import Counter
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["CountBytes"]


class CountBytes(TorchDispatchMode):
    """``with CountBytes() as count: …``: ``count.sent`` maps each c10d op to bytes sent.

    Sends and all-to-alls are counted exactly, less what a rank keeps; other collectives as the
    bytes of the tensors given to them (``count.given``), since their algorithm decides the rest.
    """

    def __init__(self) -> None:
        super().__init__()
        self.sent: Counter[str] = Counter()
        self.given: Counter[str] = Counter()

    @property
    def total_sent(self) -> int:
        """Bytes of all sends and all-to-alls."""
        return sum(self.sent.values())

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func.namespace == "c10d":
            name = func._schema.name.removeprefix("c10d::").rstrip("_")
            if name == "send":
                self.sent[name] += _bytes(args[0])
            elif name == "alltoall_base":
                self.sent[name] += _sent_to_others(args[1], args[2], args[4])
            elif not name.startswith("recv"):
                self.given[name] += _bytes(args)
        return func(*args, **(kwargs or {}))


def _bytes(value: Any) -> int:
    if isinstance(value, Tensor):
        return value.nbytes
    return sum(map(_bytes, value)) if isinstance(value, list | tuple) else 0


def _sent_to_others(tensor: Tensor, group: Any, splits: list[int]) -> int:
    ranks = dist.ProcessGroup.unbox(group)
    rows = splits or [tensor.shape[0] // ranks.size()] * ranks.size()
    kept = rows[ranks.rank()]
    share = tensor[:1].nbytes if tensor.shape[0] else 0
    return int(sum(rows) - kept) * share
