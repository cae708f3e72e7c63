"""Ring attention as schedules of tasks, which can be priced and played.

A round's keys and values set off once the round before is computed and they are there. A round's
gradients set off once it is computed and those that came in for it are added. That is what
``attention.ring`` does; which kernels a round takes is a ``Kernels``' to say.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from longspan.errors import ConfigError
from longspan.layout import Order
from longspan.schedule.ops import Comm, Compute, Op, Task
from longspan.schedule.ring import Ring
from longspan.schedule.rounds import Round, Transfer, rounds

__all__ = ["CPU_TILE", "AttentionKernels", "Kernels", "Named", "ring_tasks", "tiled_pairs"]

Named = tuple[str, Compute]
CPU_TILE = 512  # torch's flash attention for CPUs computes so many columns together
_BACKWARD = 2.5  # five matrix products to forward's two
# Kernels, of views as well, that add a block's results up, forward and backward; forward's first
# round has nothing to add them to.
_ADDS, _FIRST = (16, 13), 8


def tiled_pairs(tokens: Any, tile: int) -> Any:
    """Query-key pairs that a kernel computes of causal documents; ``tokens`` may be an array.

    A row sees the tokens before it, in whole tiles: with ``tile`` 1 those that it has to.
    """
    whole, rest = tokens // tile, tokens % tile
    return tile * tile * (whole * (whole + 1) / 2) + rest * tokens


class Kernels(Protocol):
    """What a rank computes, as named ops one after another."""

    def begin(self, backward: bool) -> Sequence[Named]:
        """Before the first round of forward or backward."""

    def attend(self, turn: Round, first: bool, backward: bool) -> Sequence[Named]:
        """In a round, from the keys and values it holds."""

    def add(self, turn: Round, first: bool, received: Sequence[Transfer]) -> Sequence[Named]:
        """In a round of backward, from the gradients that came in for it."""

    def end(self, backward: bool, received: Sequence[Transfer]) -> Sequence[Named]:
        """After the last round, from the gradients that came home."""


@dataclass(frozen=True, slots=True)
class AttentionKernels:
    """What ``attention.ring`` computes: for each block a kernel, and a pass that adds its results.

    A query-key pair costs 4·``head_dim`` flops a head, and 2.5 times that in backward (Dao, arXiv
    2307.08691, section 4.1). A pass reads the results and the float32 sum, and writes the sum.
    ``tile``: of a causal block's columns a row computes all in whole tiles (``tiled_pairs``).
    """

    heads: int
    kv_heads: int
    head_dim: int
    dtype: str = "bfloat16"
    dtype_bytes: int = 2
    tile: int = 1

    def __post_init__(self) -> None:
        """Raises ConfigError for heads that can't be."""
        if min(self.heads, self.kv_heads, self.head_dim) < 1 or self.heads % self.kv_heads:
            raise ConfigError(
                f"{self.heads} heads and {self.kv_heads} KV heads of {self.head_dim}: all must be "
                "at least 1, and the heads a multiple of the KV heads"
            )

    def ring(
        self,
        length: int,
        world: int,
        order: Order | str,
        *,
        documents: Sequence[int] | None = None,
        causal: bool = True,
        window: int | None = None,
        node_ranks: int = 0,
        width: int = 1,
        parts: int | None = None,
    ) -> Ring:
        """The ring, by default causal over one document; gradients travel in float32 at least.

        ``parts``: ``Ring.in_parts``'s.
        """
        if length < 1 or world < 1:
            raise ConfigError(f"{length} tokens on {world} ranks: both must be at least 1")
        kv, q = 2 * self.kv_heads * self.head_dim, self.heads * self.head_dim
        wide = max(4, self.dtype_bytes)
        return Ring(
            length=length,
            world=world,
            order=Order.of(order),
            causal=causal,
            documents=(0, length) if documents is None else tuple(documents),
            kv_bytes=kv * self.dtype_bytes,
            grad_bytes=kv * wide,
            q_bytes=2 * (q * self.dtype_bytes + self.heads * wide),
            dq_bytes=q * wide,
            node_ranks=node_ranks,
            width=width,
            window=window,
        ).in_parts(self.kv_heads, parts)

    def begin(self, backward: bool) -> Sequence[Named]:
        """Nothing."""
        return ()

    def attend(self, turn: Round, first: bool, backward: bool) -> Sequence[Named]:
        """A kernel and a pass for each block, of the round's part of the heads."""
        name, kind, factor, kernels = "forward", "attention", 1.0, _FIRST if first else _ADDS[0]
        if backward:
            name, kind, factor, kernels = "backward", "attention backward", _BACKWARD, _ADDS[1]
        found: list[Named] = []
        heads, kv_heads = self.heads // turn.parts, self.kv_heads // turn.parts
        for block in turn.blocks:
            pairs = block.pairs
            if block.causal:
                pairs = round(float(tiled_pairs(block.q_stop - block.q_start, self.tile)))
            flops = factor * 4 * heads * self.head_dim * pairs
            numbers = heads * (block.q_stop - block.q_start)
            if backward:
                numbers += 2 * kv_heads * (block.kv_stop - block.kv_start)
            size = numbers * self.head_dim * (self.dtype_bytes + 8)
            found.append((name, Compute(f"{kind} {self.head_dim}", flops, dtype=self.dtype)))
            found.append(("add up", Compute("elementwise", 0, size, self.dtype, kernels)))
        return found

    def add(self, turn: Round, first: bool, received: Sequence[Transfer]) -> Sequence[Named]:
        """A pass over what was received."""
        sizes = [3 * way.bytes for way in received]
        return [("add up", Compute("elementwise", 0, size, self.dtype)) for size in sizes]

    def end(self, backward: bool, received: Sequence[Transfer]) -> Sequence[Named]:
        """A pass over the gradients that came home."""
        return [
            ("add up", Compute("elementwise", 0, 3 * way.bytes, self.dtype)) for way in received
        ]


def ring_tasks(ring: Ring, rank: int, kernels: Kernels, *, backward: bool = True) -> list[Task]:
    """The schedule of ``rank``: forward and, unless it is left out, backward right after it.

    Lanes: "compute", and one each way for keys and values ("kv-out", "kv-in") and for gradients
    ("grad-out", "grad-in").
    """
    score = _Score([])
    for half in (False, True)[: 1 + backward]:
        payload, grads = _Came(), _Came()
        score.compute(kernels.begin(half), ())
        for index, turn in enumerate(rounds(ring, rank, half)):
            _, held = payload.take(turn.source, turn.part)
            received, came = grads.take(turn.source, turn.part) if turn.source != rank else ((), ())
            ready = (*score.last("compute"), *held)
            for way in turn.payload:
                out = way.sender == rank
                place = score.append(
                    _send(way), "kv-out" if out else "kv-in", ready, "keys and values"
                )
                if not out:
                    payload.note(way, place)
            score.compute(kernels.attend(turn, not index, half), held)
            if half:
                score.compute(kernels.add(turn, not index, received), came)
            computed = tuple(sorted({*score.last("compute"), *held, *came}))
            for way in turn.grads:
                out = way.sender == rank
                lane, after = ("grad-out", computed) if out else ("grad-in", ())
                place = score.append(_send(way), lane, after, "gradients")
                if not out:
                    grads.note(way, place)
        home = [grads.take(rank, part) for part in range(ring.parts)]
        ways, places = ([x for one in both for x in one] for both in zip(*home, strict=True))
        score.compute(kernels.end(half, ways), tuple(places))
    return score.tasks


class _Came:
    """What a rank receives, by whose it is and which part, and the places of its tasks."""

    def __init__(self) -> None:
        self._found: dict[tuple[int, int], list[tuple[Transfer, int]]] = {}

    def note(self, way: Transfer, place: int) -> None:
        """This comes in by the task at this place."""
        self._found.setdefault((way.source, way.part), []).append((way, place))

    def take(self, source: int, part: int) -> tuple[tuple[Transfer, ...], tuple[int, ...]]:
        """All that comes of one part, and its places."""
        found = self._found.pop((source, part), [])
        return tuple(way for way, _ in found), tuple(place for _, place in found)


@dataclass(frozen=True, slots=True)
class _Score:
    tasks: list[Task]

    def append(self, op: Op, lane: str, after: tuple[int, ...], name: str) -> int:
        """The task's place."""
        self.tasks.append(Task(op, lane, after, name))
        return len(self.tasks) - 1

    def compute(self, named: Sequence[Named], after: tuple[int, ...]) -> None:
        for name, op in named:
            self.append(op, "compute", after, name)

    def last(self, *lanes: str) -> tuple[int, ...]:
        """The last place of each of these lanes that has one."""
        places = {task.lane: place for place, task in enumerate(self.tasks) if task.lane in lanes}
        return tuple(sorted(places.values()))


def _send(way: Transfer) -> Comm:
    return Comm("send", (way.sender, way.receiver), (way.bytes,))
