"""Measures a real cluster: what ``longspan probe`` runs on every rank.

Rows of the trace it returns, all times in seconds:

=========  =======================================================================
place      of each rank: its node, site, kind of device and free memory
ping       a byte one way between two ranks
timing     ``ops`` at the same time, one duration a repeat
compute    one rank's duration of an op, while all ranks do the same
handled    seconds that one rank computes for ``messages`` that it sends or receives, ``far`` ones
           between nodes
wait       seconds of one rank's small message there and another back, while ranks compute
=========  =======================================================================
"""

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from functools import partial
from itertools import permutations, zip_longest
from statistics import median

import torch
import torch.nn.functional as F

from longspan.comm.agree import all_words
from longspan.comm.measure import Stopwatch
from longspan.schedule.ops import Comm, CommKind, Compute
from longspan.trace import Note

__all__ = ["probe"]

_TARGET_S = 0.12  # long enough that a scheduler's or a barrier's milliseconds don't count
_FIRST_BYTES = 1 << 16
_MOST_BYTES = 1 << 27
# Sizes of messages, and how many; few between nodes, where links may be slow.
_HANDLED, _FAR = ((1 << 10, 100), (1 << 18, 50)), ((1 << 10, 10), (1 << 17, 4))
_ALL_PAIRS = 4  # among more nodes than this, only neighbours are timed
_COLLECTIVES: tuple[CommKind, ...] = ("all_to_all", "all_gather", "reduce_scatter", "all_reduce")


def probe(device: torch.device, memory_bytes: int, site: str) -> list[Note]:
    """Measure links and devices on all ranks together; every rank gets all rows.

    ``memory_bytes`` is what this rank may use, ``site`` the name of where it is.
    """
    watch = Stopwatch(device)
    place = _places(watch, memory_bytes, site)
    nodes = _members(place["node"])
    rows = [Note("place", place)]
    for a, b in _pairs(nodes):
        rows.append(Note("ping", {"ranks": [a, b], "seconds": watch.ping(a, b)}))
        rows += _grown(watch, partial(_sends, ((a, b),)))
        rows += _grown(watch, partial(_sends, ((b, a),)))
    for one, other in _node_pairs(nodes):
        if min(len(one), len(other)) > 1:
            rows += _grown(watch, partial(_sends, tuple(zip(one, other, strict=False))))
    groups = [ranks for ranks in nodes if len(ranks) > 1]
    if watch.world > 1:
        groups += [tuple(range(watch.world))] if len(nodes) > 1 else []
    for ranks in groups:
        for kind in _COLLECTIVES:
            rows += _grown(watch, partial(_collective, kind, ranks))
    return [*rows, *_computing(watch), *_handled(watch, nodes)]


def _places(watch: Stopwatch, memory_bytes: int, site: str) -> dict[str, list[object]]:
    node = int(os.environ.get("GROUP_RANK") or 0)
    numbers = watch.everyone(node, memory_bytes)
    cuda = watch.device.type == "cuda"
    kind = torch.cuda.get_device_name(watch.device) if cuda else "cpu"
    return {
        "node": [int(row[0]) for row in numbers],
        "memory_bytes": [int(row[1]) for row in numbers],
        "site": list(all_words(site)),
        "kind": list(all_words(kind)),
    }


def _members(node: Sequence[object]) -> list[tuple[int, ...]]:
    """The ranks of each node."""
    return [tuple(r for r, n in enumerate(node) if n == name) for name in dict.fromkeys(node)]


def _node_pairs(nodes: list[tuple[int, ...]]) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Nodes to time against each other, in both directions."""
    if len(nodes) <= _ALL_PAIRS:
        yield from permutations(nodes, 2)
    else:
        for index, node in enumerate(nodes):
            yield node, nodes[index - 1]
            yield nodes[index - 1], node


def _pairs(nodes: list[tuple[int, ...]]) -> Iterator[tuple[int, int]]:
    """Pairs of ranks to time, each once: inside every node, and the first ranks of two nodes."""
    yield from ((ranks[0], ranks[1]) for ranks in nodes if len(ranks) > 1)
    yield from dict.fromkeys(
        (min(one[0], other[0]), max(one[0], other[0])) for one, other in _node_pairs(nodes)
    )


def _grown(watch: Stopwatch, make: Callable[[int], list[Comm]]) -> Iterator[Note]:
    """Time ops of growing size until they take long enough to tell; the first one is not kept."""
    size, seconds = _FIRST_BYTES, 0.0
    while True:
        ops = make(size)
        repeats = watch.time(ops, repeats=3 if seconds < _TARGET_S / 2 else 5)
        seconds = median(repeats)
        if size > _FIRST_BYTES:
            yield Note("timing", {"ops": [asdict(op) for op in ops], "seconds": repeats})
        if seconds >= _TARGET_S / 2 or size >= _MOST_BYTES:
            return
        growth = min(32.0, max(2.0, _TARGET_S / seconds))
        size = min(_MOST_BYTES, int(size * growth) // 1024 * 1024)


def _sends(pairs: Sequence[tuple[int, int]], size: int) -> list[Comm]:
    return [Comm("send", pair, (size,)) for pair in pairs]


def _collective(kind: CommKind, ranks: tuple[int, ...], size: int) -> list[Comm]:
    """A collective over a tensor of about ``size`` bytes on each rank."""
    n, share = len(ranks), size // len(ranks) // 4 * 4
    sizes = {"all_reduce": (share * n,), "all_to_all": (share,) * (n * n)}
    return [Comm(kind, ranks, sizes.get(kind, (share,) * n))]


def _computing(watch: Stopwatch) -> Iterator[Note]:
    """Matrix products, attention forward and backward, and copies on all ranks at once."""
    for op, work in _works(watch.device):
        for rank, seconds in enumerate(watch.everyone(*watch.compute(work))):
            yield Note("compute", {"rank": rank, "op": asdict(op), "seconds": seconds})


def _handled(watch: Stopwatch, nodes: list[tuple[int, ...]]) -> Iterator[Note]:
    """What a processor has to do for messages, and how long they wait; a GPU sends by itself.

    Inside nodes where all have several ranks, since there much can be sent in a moment; then, less
    of it, between nodes.
    """
    if watch.world == 1 or watch.device.type == "cuda":
        return
    a, b = (torch.randn(128, 128) for _ in range(2))
    ring = next(ranks for ranks in nodes if watch.rank in ranks)
    if min(map(len, nodes)) == 1:
        ring = tuple(range(watch.world))
    sizes = [(False, ring, *one) for one in _HANDLED]
    if len(nodes) > 1 < min(map(len, nodes)):
        across = tuple(r for ranks in zip_longest(*nodes) for r in ranks if r is not None)
        sizes += [(True, across, *one) for one in _FAR]
    for far, way, size, count in sizes:
        took = watch.handled(partial(torch.matmul, a, b), way, size, count)
        for rank, row in enumerate(watch.everyone(*took)):
            about = {"rank": rank, "messages": 2 * count, "bytes": 2 * count * size, "far": far}
            yield Note("handled", about | {"seconds": row})
    for rank, row in enumerate(watch.everyone(watch.waited(partial(torch.matmul, a, b), ring))):
        yield Note("wait", {"rank": rank, "seconds": row})


def _works(device: torch.device) -> Iterator[tuple[Compute, Callable[[], object]]]:
    cuda = device.type == "cuda"
    for dtype in (torch.float32, torch.bfloat16):
        name = str(dtype).removeprefix("torch.")
        n, tokens = (8192, 8192) if cuda else (512, 512)
        a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
        yield Compute("matmul", 2.0 * n**3, dtype=name), partial(torch.matmul, a, b)
        for heads, words in ((64, ""), (16, " 16")):
            q = torch.randn(1, 8, tokens, heads, device=device).to(dtype)
            flops = 4.0 * 8 * tokens**2 * heads
            yield (
                Compute("attention" + words, flops, dtype=name),
                partial(F.scaled_dot_product_attention, q, q, q),
            )
            inputs = [q.clone().requires_grad_() for _ in range(3)]
            out = F.scaled_dot_product_attention(inputs[0], inputs[1], inputs[2])
            yield (
                Compute("attention backward" + words, 2.5 * flops, dtype=name),
                partial(torch.autograd.grad, out, inputs, q, retain_graph=True),
            )
    x = torch.zeros(1 << (30 if cuda else 25), dtype=torch.uint8, device=device)
    y = torch.empty_like(x)
    yield Compute("copy", 0.0, bytes=2.0 * x.nbytes), partial(y.copy_, x)
    one = torch.zeros(1, device=device)
    yield Compute("nothing", 0.0), partial(one.add_, 1)
