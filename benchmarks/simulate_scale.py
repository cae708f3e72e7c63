"""How long 1,024 simulated ranks with 1,000 ops each take, and how much memory.

Three jobs on 128 nodes of 8 devices: an even cluster; one in which every fourth node computes a
third slower, so that hardly two things happen at once; and one in which all eight rings between
nodes contend for each node's network in every layer.

    python -m benchmarks.simulate_scale
"""

import resource
import time

from benchmarks.record import conclude
from longspan.cluster.fabric import Link
from longspan.cluster.simulate import simulate
from longspan.cluster.spec import Cluster, Device, Node, Site
from longspan.schedule.ops import Comm, Compute, Task

NODES, DEVICES, LAYERS = 128, 8, 250


def cluster(uneven: bool) -> Cluster:
    """128 nodes of 8 devices on 25 GB/s networks."""
    fast = Device(memory_bytes=80 * 10**9, bytes_per_s=2e12, peak={"matmul": {"float32": 3e14}})
    slow = fast.model_copy(update={"peak": {"matmul": {"float32": 2e14}}})

    def node(kind: str) -> Node:
        return Node(
            devices={kind: DEVICES},
            link=Link(latency_s=5e-6, bytes_per_s=2e11),
            network=Link(latency_s=2e-5, bytes_per_s=2.5e10),
        )

    nodes = tuple(node("slow" if uneven and i % 4 == 3 else "fast") for i in range(NODES))
    return Cluster(devices={"fast": fast, "slow": slow}, sites=(Site(nodes=nodes),))


def job(contending: bool) -> list[list[Task]]:
    """A rank's 1,000 ops: in each layer two computations and two communications."""
    ranks = range(NODES * DEVICES)
    matmul, attention = Compute("matmul", 4e11), Compute("attention", 2e11)
    inside = [
        Comm("all_to_all", tuple(ranks[i : i + DEVICES]), (4_000_000,) * DEVICES**2)
        for i in range(0, len(ranks), DEVICES)
    ]
    if contending:
        across = [
            Comm("reduce_scatter", tuple(ranks[i::DEVICES]), (500_000,) * NODES)
            for i in range(DEVICES)
        ]
    else:
        across = [
            Comm("all_reduce", (i, i + DEVICES), (20_000_000,))
            for start in range(0, len(ranks), 2 * DEVICES)
            for i in range(start, start + DEVICES)
        ]
    schedules = []
    for rank in ranks:
        group = inside[rank // DEVICES]
        other = across[rank % DEVICES] if contending else next_to(across, rank)
        tasks: list[Task] = []
        for layer in range(LAYERS):
            first = 4 * layer
            after = (first - 3, first - 1) if layer else ()
            tasks += [
                Task(matmul, "compute", after),
                Task(group, "comm", (first,)),
                Task(attention, "compute", (first + 1,)),
                Task(other, "comm-outer", (first + 2,)),
            ]
        schedules.append(tasks)
    return schedules


def next_to(pairs: list[Comm], rank: int) -> Comm:
    """The pair of nodes' all-reduce that ``rank`` takes part in."""
    return pairs[rank // (2 * DEVICES) * DEVICES + rank % DEVICES]


def main() -> None:
    """Play the three jobs and say what they took."""
    figures: dict[str, float] = {}
    for name, uneven, contending in (
        ("even", False, False),
        ("uneven", True, False),
        ("contending", False, True),
    ):
        schedules, where = job(contending), cluster(uneven)
        start = time.perf_counter()
        timeline = simulate(schedules, where)
        figures[f"{name}_s"] = time.perf_counter() - start
        ops = sum(map(len, schedules))
        print(
            f"{name}: {ops:,} ops, {timeline.seconds:.3f} simulated s, {figures[f'{name}_s']:.1f} s"
        )
        start = time.perf_counter()
        rows = len(timeline.spans())
        print(f"  {rows:,} spans in {time.perf_counter() - start:.1f} s")
        del timeline, schedules
    figures["peak_gib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    targets = {"even_s": 20.0, "uneven_s": 20.0, "contending_s": 20.0, "peak_gib": 2.0}
    conclude("simulate_scale", figures, targets, all(figures[k] < targets[k] for k in targets))


if __name__ == "__main__":
    main()
