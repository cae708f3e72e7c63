"""What one ring attention, forward and backward, takes on a cluster."""

from collections import Counter, defaultdict
from dataclasses import dataclass
from functools import cached_property

from longspan.cluster.cost import traffic
from longspan.cluster.simulate import Timeline, simulate
from longspan.cluster.spec import Cluster
from longspan.errors import ClusterError
from longspan.layout import Order
from longspan.schedule.ops import Comm
from longspan.schedule.ring import Ring, imbalance, pairs
from longspan.schedule.ring_tasks import AttentionKernels, ring_tasks

__all__ = ["RingPrediction", "predict_ring"]


@dataclass(frozen=True, eq=False)
class RingPrediction:
    """One attention over a sequence in one order, played on the first ranks of a cluster."""

    ring: Ring
    cluster: Cluster
    timeline: Timeline

    @property
    def seconds(self) -> float:
        """Forward and backward together."""
        return self.timeline.seconds

    @cached_property
    def _sends(self) -> list[Comm]:
        return [
            task.op
            for rank, schedule in enumerate(self.timeline.schedules)
            for task in schedule
            if isinstance(task.op, Comm) and task.op.ranks[0] == rank
        ]

    @property
    def sent_bytes(self) -> int:
        """Bytes that all ranks send."""
        return sum(op.sizes[0] for op in self._sends)

    @property
    def between_nodes_bytes(self) -> int:
        """Those of them that leave a node."""
        node = self.cluster.fabric.node
        return sum(op.sizes[0] for op in self._sends if node[op.ranks[0]] != node[op.ranks[1]])

    @cached_property
    def imbalance(self) -> float:
        """The busiest rank's query-key pairs over the mean; 1 is even."""
        return imbalance([pairs(self.ring, rank) for rank in range(self.ring.world)])

    @cached_property
    def utilisation(self) -> list[float]:
        """For each rank the share of the time in which it computes."""
        return [self.timeline.busy_s(r) / self.seconds for r in range(self.ring.world)]

    @cached_property
    def busiest_pipe(self) -> tuple[str, float]:
        """The most loaded direction of a link, and its share of the time at full rate.

        ("", 0.0) where nothing is sent.
        """
        fabric = self.cluster.fabric
        rates = dict(zip(fabric.names, fabric.capacity.tolist(), strict=True))
        busy: defaultdict[str, float] = defaultdict(float)
        for op, times in Counter(self._sends).items():
            for name, size in traffic([op], self.cluster).items():
                busy[name] += times * size / rates[name] / self.seconds
        return max(busy.items(), key=lambda item: item[1], default=("", 0.0))


def predict_ring(
    cluster: Cluster,
    kernels: AttentionKernels,
    length: int,
    order: Order | str,
    ranks: int | None = None,
    parts: int | None = None,
) -> RingPrediction:
    """Play causal attention over ``length`` tokens on the first ``ranks`` (by default all).

    ``parts``: of the heads, in which it goes around (``Ring.in_parts``). Raises ClusterError if
    there are fewer, ConfigError or LayoutError for sizes or an order that can't be.
    """
    world = cluster.ranks if ranks is None else ranks
    if not 1 <= world <= cluster.ranks:
        raise ClusterError(f"{world} ranks on a cluster of {cluster.ranks}: give 1 to all of them")
    ring = kernels.ring(length, world, order, parts=parts)
    tasks = [ring_tasks(ring, rank, kernels) for rank in range(world)]
    return RingPrediction(ring, cluster, simulate(tasks, cluster))
