"""The score's two kinds of op: what a rank computes, and what ranks send each other.

A schedule is a rank's list of tasks: ops on lanes.

An op says *what*, in flops and bytes; what that costs on a cluster, and how it is run, are told
elsewhere.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

__all__ = ["Comm", "CommKind", "Compute", "Op", "Schedule", "Task"]

CommKind = Literal["send", "all_to_all", "all_gather", "reduce_scatter", "all_reduce", "broadcast"]


@dataclass(frozen=True, slots=True)
class Compute:
    """Work of one rank: ``flops`` floating point operations and ``bytes`` of memory traffic.

    ``kind`` names the rate it runs at ("matmul", "attention", …), ``dtype`` torch's name of the
    number format. ``kernels``: how many are launched for it.
    """

    kind: str
    flops: float
    bytes: float = 0.0
    dtype: str = "float32"
    kernels: int = 1


@dataclass(frozen=True, slots=True)
class Comm:
    """One communication among ``ranks``; ``sizes`` in bytes, by kind:

    ====================  =======================================================
    send                  ``ranks`` = (from, to); one size
    broadcast             ``ranks[0]`` has it; one size
    all_gather            what each rank contributes
    reduce_scatter        what each rank is left with
    all_reduce            one size: the whole tensor
    all_to_all            a row per sender, a column per receiver, flattened
    ====================  =======================================================
    """

    kind: CommKind
    ranks: tuple[int, ...]
    sizes: tuple[int, ...]

    def sent_bytes(self, rank: int) -> int:
        """Bytes that ``rank`` hands to others.

        In an all-gather and a reduce-scatter it hands on to the next rank of a ring all that this
        one lacks; an all-reduce is both, of equal shares (rounded up).
        """
        if rank not in self.ranks:
            return 0
        world, index = len(self.ranks), self.ranks.index(rank)
        match self.kind:
            case "send" | "broadcast":
                return self.sizes[0] * (world - 1) if index == 0 else 0
            case "all_gather":
                return sum(self.sizes) - self.sizes[(index + 1) % world]
            case "reduce_scatter":
                return sum(self.sizes) - self.sizes[index]
            case "all_reduce":
                return -(-2 * (world - 1) * self.sizes[0] // world)
            case "all_to_all":
                row = self.sizes[index * world : (index + 1) * world]
                return sum(row) - row[index]


Op = Compute | Comm


@dataclass(frozen=True, slots=True)
class Task:
    """An op in a rank's schedule, on one of the rank's lanes ("compute", "comm", …).

    A lane does one task at a time, in the order of the list; lanes run side by side. ``after``
    are the places in the same list of tasks of other lanes that must be done first. The n-th
    communication of a kind among the same ranks is one and the same on all of them.
    """

    op: Op
    lane: str = "compute"
    after: tuple[int, ...] = ()
    name: str = ""


Schedule = Sequence[Task]
