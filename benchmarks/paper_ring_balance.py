"""Causal balance of ring attention: the peers' published speeds beside what we simulate.

zhuzilin/ring-flash-attention's README gives, for 8×H800 and 8,192 tokens a device of Llama 3.1 8B's
attention, iterations a second of plain, zigzag and striped rings, and of flash attention on one
device with an eighth of the work: the ideal. Here the rounds of ``schedule.ring`` are played on
such a machine: kernels at the speed of that ideal, keys, values and their gradients over NVLink,
and the partial results joined as that library does it, one elementwise operation after another
through memory. A ratio to the ideal holds if it is within 10 % of the published one.

    python -m benchmarks.paper_ring_balance
"""

from collections.abc import Sequence

from benchmarks.record import conclude
from longspan.cluster.fabric import Link
from longspan.cluster.simulate import simulate
from longspan.cluster.spec import Cluster, Device, uniform
from longspan.layout import Order
from longspan.schedule.ops import Compute
from longspan.schedule.ring import Ring
from longspan.schedule.ring_tasks import Named, ring_tasks
from longspan.schedule.rounds import Round, Transfer

WORLD, TOKENS, HEADS, KV_HEADS, HEAD_DIM = 8, 8192, 32, 8, 128
QUERIES, KEYS = HEADS * HEAD_DIM, 2 * KV_HEADS * HEAD_DIM  # numbers a token
KV_BYTES = 2 * KEYS  # bf16; gradients travel in fp32

# Iterations a second, (forward, forward and backward), from the README's table.
ALONE = (591.5, 154.7)
PAPER = {
    Order.CONTIGUOUS: (38.5, 10.4),
    Order.ZIGZAG: (63.0, 17.4),
    Order.STRIPED: (55.0, 16.0),
}

# Bytes through memory for each number, kernel by kernel, as the library's code is written.
CAST = (6,)  # bf16 to fp32, or back
ADD = (10,)  # a gradient in bf16 to the one in fp32
JOIN = (6, 8, 8, 12)  # update_out_and_lse: the block to fp32, two products, their sum
COPY_BACK = (8,)  # where only a part of the output is updated
CONTIGUOUS = (4,)  # of keys and values, which come as one tensor
UNPACK = (4, 4, 6)  # its gradient: zeros and a copy for each of the two, and their sum
SMALL = 8  # kernels of update_out_and_lse on log-sum-exp, a number a head: they cost their launch


def machine() -> Cluster:
    """8×H800: NVLink of 400 GB/s, both ways together, and memory as H100's (datasheets).

    A short kernel in a stream takes 3.8 µs (NVIDIA, Getting Started with CUDA Graphs).
    """
    flops = 4 * QUERIES * TOKENS * (TOKENS + 1) / 2
    forward_s = 1 / ALONE[0]
    backward_s = 1 / ALONE[1] - forward_s
    device = Device(
        memory_bytes="80GB",
        bytes_per_s=3.35e12,
        overhead_s=3.8e-6,
        measured={
            "forward": {"bfloat16": flops / forward_s},
            "backward": {"bfloat16": 2.5 * flops / backward_s},
        },
    )
    return uniform(device, devices=WORLD, link=Link(latency_s=3.4e-6, bytes_per_s=200e9))


class PeerKernels:
    """The kernels of that library's rounds: flash attention's, then elementwise ones."""

    def begin(self, backward: bool) -> list[Named]:
        """Keys and values are made one tensor."""
        return [] if backward else memory(CONTIGUOUS, KEYS * TOKENS)

    def attend(self, turn: Round, first: bool, backward: bool) -> list[Named]:
        """A round's kernel, and the joining of the outputs or of the queries' gradients."""
        if not turn.blocks:
            return []
        kind, factor = ("backward", 2.5) if backward else ("forward", 1.0)
        flops = factor * 4 * QUERIES * sum(block.pairs for block in turn.blocks)
        found: list[Named] = [(kind, Compute(kind, flops, dtype="bfloat16"))]
        rows = max(b.q_stop for b in turn.blocks) - min(b.q_start for b in turn.blocks)
        if first or backward:
            return found + memory(CAST if first else ADD, QUERIES * rows)
        found += memory(JOIN + COPY_BACK * (rows < TOKENS), QUERIES * rows)
        return found + memory((0,) * SMALL, 0)

    def add(self, turn: Round, first: bool, received: Sequence[Transfer]) -> list[Named]:
        """The keys' gradients, joined with those received."""
        if not turn.blocks:
            return []
        keys = max(b.kv_stop for b in turn.blocks) - min(b.kv_start for b in turn.blocks)
        return memory(CAST if first else ADD, KEYS * keys)

    def end(self, backward: bool, received: Sequence[Transfer]) -> list[Named]:
        """Back to bf16, and keys and values apart again."""
        if not backward:
            return memory(CAST, QUERIES * TOKENS)
        return memory(CAST, (KEYS + QUERIES) * TOKENS) + memory(UNPACK, KEYS * TOKENS)


def memory(passes: tuple[int, ...], numbers: int) -> list[Named]:
    """Kernels that are bound by memory: bytes for each number, one after another."""
    ops = [Compute("elementwise", 0, size * numbers, "bfloat16") for size in passes]
    return [("elementwise", op) for op in ops]


def iterations_per_s(order: Order) -> tuple[float, float]:
    """Forward alone, and forward and backward, simulated."""
    length = WORLD * TOKENS
    ring = Ring(length, WORLD, order, True, (0, length), KV_BYTES, 2 * KV_BYTES)
    speeds = []
    for both in (False, True):
        kernels = PeerKernels()
        tasks = [ring_tasks(ring, rank, kernels, backward=both) for rank in range(WORLD)]
        speeds.append(1 / simulate(tasks, machine()).seconds)
    return speeds[0], speeds[1]


def main() -> None:
    """Print ratios to the ideal, published and ours."""
    figures: dict[str, float] = {}
    log = f"{'ratio to the ideal, paper / ours':36}{'forward':>16}{'with backward':>16}\n"
    off = []
    for order, paper in PAPER.items():
        ours = iterations_per_s(order)
        log += f"{order.name.lower():36}"
        for part, published, simulated, alone in zip(
            ("forward", "both"), paper, ours, ALONE, strict=True
        ):
            theirs, mine = published * WORLD / alone, simulated * WORLD / alone
            log += f"{f'{theirs:.3f} / {mine:.3f}':>16}"
            figures[f"{order.name.lower()}_{part}"] = round(mine / theirs - 1, 4)
            off += [mine / theirs - 1] * (part == "both")
        log += "\n"
    print(log, end="")
    conclude("paper_ring_balance", figures, {"both": 0.1}, max(map(abs, off)) <= 0.1, log)


if __name__ == "__main__":
    main()
