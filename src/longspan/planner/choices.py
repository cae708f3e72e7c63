"""The ways in which a layer can be split over a mesh."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations, pairwise, permutations
from math import prod

from longspan.planner.graph import Layer, Operand
from longspan.planner.layer_wires import PARTIAL, REPLICATE, Codes

__all__ = ["Choice", "choices", "codes_of", "given_codes", "mesh_of"]

_FIRST = ("b", "s")  # across the slowest links, as what they sum is least or can wait


@dataclass(frozen=True, slots=True)
class Choice:
    """``dims``: for each mesh axis the dim that it splits, or None where all do the same.

    ``to``: the dim of the output that partial sums are scattered over (None: all get the sum).
    """

    dims: tuple[str | None, ...]
    to: str | None = None

    def parts(self, sizes: Sequence[int]) -> dict[str, int]:
        """Into how many parts each dim is split."""
        found: dict[str, int] = {}
        for dim, size in zip(self.dims, sizes, strict=True):
            if dim is not None:
                found[dim] = found.get(dim, 1) * size
        return found


def mesh_of(world: int, levels: Sequence[int]) -> tuple[int, ...]:
    """Prime factors of ``world``: those of every level of the cluster together, outermost first.

    ``levels``: how many sites, nodes a site and devices a node there are; where they don't make
    up ``world``, its factors in descending order.
    """
    parts = list(levels) if prod(levels) == world else [world]
    return tuple(factor for level in parts for factor in _primes(level)) or (1,)


def _primes(number: int) -> list[int]:
    found, divisor = [], 2
    while number > 1:
        while number % divisor == 0:
            found.append(divisor)
            number //= divisor
        divisor += 1
    return sorted(found, reverse=True)


def codes_of(dims: Sequence[str | None], choice: Choice) -> Codes:
    """Where a tensor with these dims lies as the layer computes with it."""
    return tuple(
        dims.index(dim) if dim is not None and dim in dims else REPLICATE for dim in choice.dims
    )


def given_codes(
    operand: Operand, giver: Sequence[int], choice: Choice, sizes: Sequence[int]
) -> tuple[Codes, Codes]:
    """How a layer takes a tensor, in the dims of its giver's, and how it leaves the gradient.

    ``giver``: the shape that the tensor had when its giver left it. A dim that can't be followed
    to there is taken whole and cut; its gradient comes in pieces that are summed.
    """
    parts = choice.parts(sizes)
    taken, left = [], []
    for dim in choice.dims:
        if dim is None:
            code = grad = REPLICATE
        else:
            code, grad = REPLICATE, PARTIAL
            if dim in operand.dims:
                at = operand.dims.index(dim)
                was = operand.through[at]
                grain = operand.grain[at] if was is not None else 1
                same = was is not None and grain == giver[was] == operand.shape[at]
                if was is not None and (same or grain % parts[dim] == 0):
                    code = grad = was
        taken.append(code)
        left.append(grad)
    return tuple(taken), tuple(left)


def choices(layers: Sequence[Layer], sizes: Sequence[int], inside: int = 0) -> list[Choice]:
    """All choices that every one of ``layers`` can make, which are alike but for their outputs.

    Each dim has neighbouring axes: batch and sequence the outermost, then the other dims in any
    order, and before or behind all of them axes whose ranks do the same. A dim is split evenly,
    but for the batch. On more than four axes those whose ranks do the same are all that are within
    a node (the last ``inside``, or half of the axes), or all others. Partial sums go to all ranks,
    or are scattered over the batch, or over the sequence where the batch has too few for it.
    """
    layer = layers[0]
    splits = [dim for dim in layer.splits if all(dim in one.splits for one in layers)]
    found: dict[Choice, None] = {}
    for dims in _assignments(splits, len(sizes), inside):
        choice = Choice(dims)
        parts = choice.parts(sizes)
        if not all(_divides(one.sizes, parts) for one in layers):
            continue
        found[choice] = None
        summed = {dim for dim in dims if dim in layer.summed}
        for to in ("b", "s") if summed and layer.output.shape else ():
            if to in layer.output.dims:
                whole = parts.get(to, 1) * prod(parts[dim] for dim in summed if dim)
                if _divides({to: layer.output.shape[layer.output.dims.index(to)]}, {to: whole}):
                    found[Choice(dims, to)] = None
                    break
    return list(found)


def _divides(sizes: Mapping[str, int], parts: Mapping[str, int]) -> bool:
    return all(
        parts_of <= sizes[dim] and (dim == "b" or sizes[dim] % parts_of == 0)
        for dim, parts_of in parts.items()
    )


_FEW = 4  # axes for which every number of idle ones is tried


def _assignments(splits: Sequence[str], axes: int, inside: int) -> Iterator[tuple[str | None, ...]]:
    first = [dim for dim in _FIRST if dim in splits]
    rest = [dim for dim in splits if dim not in _FIRST]
    orders: dict[tuple[str | None, ...], None] = {}
    for count in range(len(rest) + 1):
        for some in permutations(rest, count):
            for many in range(len(first) + 1):
                for outer in combinations(first, many):
                    whole = (*outer, *some)
                    orders[whole] = None
                    orders[(None, *whole)] = orders[(*whole, None)] = None
    inside = inside if 0 < inside < axes else axes // 2
    for order in orders:
        if not 0 < len(order) <= axes:
            continue
        for cuts in combinations(range(1, axes), len(order) - 1):
            bounds = (0, *cuts, axes)
            lengths = [end - start for start, end in pairwise(bounds)]
            idle = sum(n for dim, n in zip(order, lengths, strict=True) if dim is None)
            level = inside if order[-1] is None else axes - inside
            if axes > _FEW and idle not in (0, level, axes):
                continue
            yield tuple(dim for dim, n in zip(order, lengths, strict=True) for _ in range(n))
