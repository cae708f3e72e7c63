"""A stage of a model: its tensor, which dims of it it mixes, and what it computes."""

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from math import prod

import torch
from torch.distributed.tensor import Shard

from longspan.errors import ConfigError
from longspan.layout import Layout

__all__ = ["Sharded", "Stage", "transformer_block"]

Sharded = tuple[str | None, ...]  # for each mesh axis the dim that it shards, or None


@dataclass(frozen=True)
class Stage:
    """What a part of a model does with the tensor that it is given.

    ``sizes``: the dims of its tensor by name, in their order; ``mixes``: those whose places it
    brings together. ``flops``: forward, of the whole tensor, ``attention_flops`` not among them.
    Where ``heads`` is given, attention mixes the dim, with heads of ``head_dim`` numbers in place
    of the dim ``channel``, and can do so while the dim is sharded. ``parts``: how often
    Megatron-style parallelism gathers and scatters in it. ``after``: the stages whose results it
    takes, the one before if not said. Raises ConfigError where these don't fit together.
    """

    name: str
    sizes: Mapping[str, int]
    mixes: tuple[str, ...]
    flops: float = 0.0
    attention_flops: float = 0.0
    heads: int = 0
    kv_heads: int = 0
    head_dim: int = 0
    causal: bool = False
    channel: str = "channel"
    dtype: str = "bfloat16"
    parts: int = 2
    after: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        if unknown := [dim for dim in self.mixes if dim not in self.sizes]:
            raise ConfigError(
                f"stage {self.name!r} mixes {unknown[0]!r}, its tensor has {', '.join(self.sizes)}"
            )
        if min(self.sizes.values(), default=1) < 0 or min(self.flops, self.attention_flops) < 0:
            raise ConfigError(f"stage {self.name!r}: sizes and flops can't be below zero")
        kv_heads = self.kv_heads or self.heads
        if self.heads and self.channel not in self.sizes:
            raise ConfigError(f"stage {self.name!r} has heads, but no dim {self.channel!r}")
        if self.heads and (min(self.heads, kv_heads, self.head_dim) < 1 or self.heads % kv_heads):
            raise ConfigError(
                f"stage {self.name!r}: {self.heads} heads and {kv_heads} KV heads of "
                f"{self.head_dim}: the heads must be a multiple of the KV heads"
            )
        if not isinstance(getattr(torch, self.dtype, None), torch.dtype):
            raise ConfigError(f"stage {self.name!r}: torch has no dtype {self.dtype!r}")

    @property
    def torch_dtype(self) -> torch.dtype:
        """Its tensor's."""
        found: torch.dtype = getattr(torch, self.dtype)
        return found

    @property
    def kind(self) -> tuple[object, ...]:
        """All but its name and place: stages of a kind cost the same."""
        told = asdict(self) | {"sizes": tuple(self.sizes.items()), "name": "", "after": None}
        return tuple(told.values())

    @property
    def shape(self) -> tuple[int, ...]:
        """Its whole tensor's."""
        return tuple(self.sizes.values())

    @property
    def heads_shape(self) -> tuple[int, ...]:
        """Of its queries: heads in place of channels, and what a head has as the last dim."""
        sizes = dict(self.sizes) | {self.channel: self.heads}
        return (*sizes.values(), self.head_dim)

    def layout(self, axes: Iterable[str], sharded: Sharded) -> Layout:
        """That layout of its tensor; a dim that the tensor hasn't got is not sharded."""
        places = {name: place for place, name in enumerate(self.sizes)}
        return Layout(
            {
                axis: Shard(places[dim])
                for axis, dim in zip(axes, sharded, strict=True)
                if dim in places
            }
        )


def transformer_block(
    name: str,
    sizes: Mapping[str, int],
    mixes: str | tuple[str, ...],
    heads: int,
    *,
    kv_heads: int | None = None,
    channel: str = "channel",
    mlp: float = 4.0,
    causal: bool = False,
    dtype: str = "bfloat16",
    after: tuple[str, ...] | None = None,
) -> Stage:
    """Attention over ``mixes``, and a perceptron ``mlp`` times as wide, with the usual flops.

    2 flops a weight and token, 4·width a pair of tokens that see each other. Raises ConfigError
    if ``channel`` is no dim, or no multiple of the heads.
    """
    mixes = (mixes,) if isinstance(mixes, str) else mixes
    width = sizes.get(channel, 0)
    if not width or heads < 1 or width % heads:
        raise ConfigError(f"stage {name!r}: {channel} is {width}, no multiple of {heads} heads")
    kv_heads = kv_heads or heads
    tokens = prod(sizes.values()) // width
    pairs = tokens * prod(sizes.get(dim, 1) for dim in mixes) / (2 if causal else 1)
    weights = width * width * (2 + 2 * kv_heads / heads + 2 * mlp)
    return Stage(
        name,
        dict(sizes),
        mixes,
        flops=2.0 * tokens * weights,
        attention_flops=4.0 * pairs * width,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=width // heads,
        causal=causal,
        channel=channel,
        dtype=dtype,
        after=after,
    )
