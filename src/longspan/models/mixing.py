"""Attention of an unchanged module over a sharded dim: by a head exchange or a ring."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle

from longspan.attention.attend import attend
from longspan.errors import ModelError

__all__ = ["SharedAttention"]


@dataclass
class SharedAttention:
    """Lets the ``scaled_dot_product_attention`` of a module go over ``length`` sharded tokens.

    They are in contiguous order on a mesh of one axis. Only calls inside the module are meant.
    """

    mesh: DeviceMesh
    length: int
    inside: Literal["heads", "ring"]
    stage: str
    modes: list["_Mode"] = field(default_factory=list)

    def attach(self, module: nn.Module, name: str) -> list[RemovableHandle]:
        """Put the hooks on submodule ``name``; ModelError if there is no such one."""
        if not name:
            raise ModelError(f"stage {self.stage!r} mixes a sharded dim: say which module attends")
        found = dict(module.named_modules()).get(name)
        if found is None:
            raise ModelError(f"stage {self.stage!r} has no module {name!r}, which is to attend")
        return [
            found.register_forward_pre_hook(self._enter),
            found.register_forward_hook(self._leave, always_call=True),
        ]

    def _enter(self, module: nn.Module, args: Any) -> None:
        mode = _Mode(self)
        mode.__enter__()
        self.modes.append(mode)

    def _leave(self, module: nn.Module, args: Any, out: Any) -> None:
        self.modes.pop().__exit__(None, None, None)

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        """As ``scaled_dot_product_attention``; ModelError for a mask or dropout."""
        if attn_mask is not None or dropout_p:
            raise ModelError(f"stage {self.stage!r} has sharded attention with a mask or dropout")
        return attend(
            *(query, key, value),
            mesh=self.mesh,
            causal=is_causal,
            order="contiguous",
            scale=scale,
            cu_seqlens=(0, self.length),
            inside=self.inside,
        )


class _Mode(TorchFunctionMode):
    def __init__(self, shared: SharedAttention) -> None:
        super().__init__()
        self.shared = shared

    def __torch_function__(
        self, func: Any, types: Sequence[type], args: Any = (), kwargs: Any = None
    ) -> Any:
        if func is F.scaled_dot_product_attention:
            return self.shared.attend(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))
