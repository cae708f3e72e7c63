"""How modules see their tensors, in words: ``"(batch time) space channel"``."""

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

from torch import Tensor

from longspan.errors import ModelError

__all__ = ["Form"]


@dataclass(frozen=True)
class Form:
    """A tensor's dims by name; names in brackets are folded into one dim, the first outermost."""

    groups: tuple[tuple[str, ...], ...]

    @classmethod
    def of(cls, words: str) -> "Form":
        """From ``"(batch time) space channel"``; ModelError for brackets or names that can't be."""
        groups: list[tuple[str, ...]] = []
        open_group: list[str] | None = None
        for word in words.replace("(", " ( ").replace(")", " ) ").split():
            if word == "(" and open_group is None:
                open_group = []
            elif word == ")" and open_group:
                groups.append(tuple(open_group))
                open_group = None
            elif word in "()":
                raise ModelError(f"brackets in {words!r} don't match: write '(batch time) space'")
            elif open_group is not None:
                open_group.append(word)
            else:
                groups.append((word,))
        names = [name for group in groups for name in group]
        if open_group is not None or not names or len(set(names)) < len(names):
            raise ModelError(f"{words!r} is no form: it needs names, each of them once")
        return cls(tuple(groups))

    @property
    def names(self) -> tuple[str, ...]:
        """Of all dims, unfolded."""
        return tuple(name for group in self.groups for name in group)

    def unfold(
        self, x: Tensor, sizes: Mapping[str, int], what: str, empty: Mapping[str, int] | None = None
    ) -> Tensor:
        """The same with a dim for each name; ``sizes`` are those known here.

        ``empty``: sizes that are believed where a tensor without elements doesn't tell. Raises
        ModelError, which calls it ``what``, if the tensor hasn't such dims.
        """
        if x.ndim != len(self.groups):
            raise ModelError(f"{what} has {x.ndim} dims, not {self}")
        shape: list[int] = []
        for group, length in zip(self.groups, x.shape, strict=True):
            if not prod(sizes.get(name, 1) for name in group):
                sizes = {**(empty or {}), **sizes}
            known = prod(sizes[name] for name in group if name in sizes)
            unknown = [name for name in group if name not in sizes]
            if len(group) == 1:
                shape.append(length)
                continue
            if len(unknown) > 1 or (known and length % known) or (unknown and not known):
                raise ModelError(
                    f"{what} is {tuple(x.shape)}, which can't be {self}: "
                    f"known are {', '.join(f'{n} {s}' for n, s in sizes.items())}"
                )
            shape += [sizes.get(name, length // max(known, 1)) for name in group]
        if prod(shape) != x.numel():
            raise ModelError(f"{what} is {tuple(x.shape)}, which isn't {self} of {tuple(shape)}")
        return x.reshape(shape)

    def fold(self, x: Tensor) -> Tensor:
        """Back from a dim for each name."""
        if len(self.groups) == x.ndim:
            return x
        sizes = iter(x.shape)
        return x.reshape([prod(next(sizes) for _ in group) for group in self.groups])

    def __str__(self) -> str:
        words = (group[0] if len(group) == 1 else f"({' '.join(group)})" for group in self.groups)
        return " ".join(words)
