"""longspan trains transformers on long and uneven sequences over few, slow or uneven links."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from longspan.attention.attend import attend
    from longspan.comm.redistribute import redistribute
    from longspan.layout import Layout, Order, positions
    from longspan.models.leak import leak_probe
    from longspan.models.transformers import patch

__all__ = ["Layout", "Order", "attend", "leak_probe", "patch", "positions", "redistribute"]

# Exported lazily, so that `longspan --help` need not import torch.
_HOMES = {
    "Layout": "longspan.layout",
    "Order": "longspan.layout",
    "attend": "longspan.attention.attend",
    "leak_probe": "longspan.models.leak",
    "patch": "longspan.models.transformers",
    "positions": "longspan.layout",
    "redistribute": "longspan.comm.redistribute",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'longspan' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
