"""How parameters are kept beyond what a layer computes with (ZeRO), and gradients summed."""

from collections.abc import Mapping, Sequence
from math import prod

__all__ = ["BUCKET_BYTES", "kept_dim"]

BUCKET_BYTES = 4e6  # so many of gradients are summed together and share a latency


def kept_dim(
    shape: Sequence[int], own: Mapping[int, int], apart: Sequence[int], sizes: Sequence[int]
) -> int | None:
    """The dim of a parameter that the axes in ``apart`` shard besides, or None if none can.

    ``own``: the dim that each mesh axis shards as the layer computes; ``sizes``: the axes'. The
    largest dim that no other axis shards and that these divide is taken.
    """
    ways = prod(sizes[axis] for axis in apart)
    free = [dim for dim, size in enumerate(shape) if dim not in own.values() and size % ways == 0]
    return max(free, key=lambda dim: shape[dim], default=None)
