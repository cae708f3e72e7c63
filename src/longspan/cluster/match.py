"""Matches the communications of several ranks' schedules to each other, and prices all tasks."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from longspan.cluster.cost import Demand, computing, demand, seconds
from longspan.cluster.spec import Cluster
from longspan.errors import ScheduleError
from longspan.schedule.ops import Comm, Compute, Op, Schedule

__all__ = ["Transfer", "describe", "match"]


@dataclass(slots=True, eq=False)
class Transfer:
    """One communication, and how far it is: shared by all its ``ranks``.

    Or a computation, of one rank whose sends take from its computing.

    Once ``under_way``, ``left`` of it was left at ``since``, when the whole would take
    ``whole_s``.
    """

    op: Op
    ranks: tuple[int, ...]
    demand: Demand
    pipes: tuple[int, ...]
    start: float = 0.0
    under_way: bool = False
    since: float = 0.0
    left: float = 1.0
    whole_s: float = 0.0
    version: int = 0


@dataclass(slots=True, eq=False)
class _Channel:
    """All communications of one kind among the same ranks, in their order."""

    members: frozenset[int]
    transfers: list[Transfer] = field(default_factory=list)


def match(schedules: Sequence[Schedule], cluster: Cluster) -> list[list[float | Transfer]]:
    """For every task of every rank its seconds, or the transfer that it is a part of.

    The n-th communication of a kind among the same ranks is the same one on each of them.
    Raises ScheduleError if its sizes differ, or a task doesn't fit its schedule; ClusterError if
    an op asks for what the cluster hasn't got.
    """
    matcher = _Matcher(cluster)
    return [matcher.rank(rank, schedule) for rank, schedule in enumerate(schedules)]


class _Matcher:
    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster
        self.channels: dict[tuple[str, tuple[int, ...]], _Channel] = {}
        self.demands: dict[Comm, tuple[Demand, tuple[int, ...]]] = {}
        # By identity: schedules share their ops, and hashing long ones again and again is slow.
        self.known: dict[int, tuple[_Channel, Demand, tuple[int, ...]]] = {}
        self.computes: dict[str, dict[int, float]] = {}

    def rank(self, rank: int, schedule: Schedule) -> list[float | Transfer]:
        """The work of one rank's schedule."""
        computes = self.computes.setdefault(self.cluster.kinds[rank], {})
        where = self.cluster
        busy = where.message_s[rank] + where.byte_s[rank] + where.far_byte_s[rank] > 0
        asks: dict[int, Demand] = {}
        counts: dict[_Channel, int] = {}
        work: list[float | Transfer] = []
        for place, task in enumerate(schedule):
            op = task.op
            for other in task.after:
                if not 0 <= other < len(schedule) or other == place:
                    raise ScheduleError(
                        f"rank {rank}, task {place}: it can't come after task {other} "
                        f"in a schedule of {len(schedule)}"
                    )
            if isinstance(op, Compute) and busy:
                if id(op) not in asks:
                    asks[id(op)] = computing(op, self.cluster, rank)
                asked = asks[id(op)]
                pipes = tuple(asked.pipes.tolist())
                work.append(Transfer(op, (rank,), asked, pipes))
                continue
            if isinstance(op, Compute):
                if id(op) not in computes:
                    computes[id(op)] = seconds(op, self.cluster, (rank,))
                work.append(computes[id(op)])
                continue
            if id(op) not in self.known:
                self.known[id(op)] = self._learn(op)
            channel, asked, pipes = self.known[id(op)]
            count = counts.get(channel, 0)
            counts[channel] = count + 1
            if rank not in channel.members:
                raise ScheduleError(f"rank {rank}, task {place}: {describe(op)} is not its own")
            if count == len(channel.transfers):
                channel.transfers.append(Transfer(op, op.ranks, asked, pipes))
            transfer = channel.transfers[count]
            if transfer.op is not op and transfer.op != op:
                raise ScheduleError(
                    f"rank {rank}, task {place}: {describe(op)} has other sizes than on rank "
                    f"{min(channel.members - {rank})}"
                )
            work.append(transfer)
        return work

    def _learn(self, op: Comm) -> tuple[_Channel, Demand, tuple[int, ...]]:
        if op not in self.demands:
            asked = demand(op, self.cluster)
            self.demands[op] = (asked, tuple(asked.pipes.tolist()))
        channel = self.channels.setdefault((op.kind, op.ranks), _Channel(frozenset(op.ranks)))
        return channel, *self.demands[op]


def describe(op: Op) -> str:
    """An op in a few words."""
    if isinstance(op, Compute):
        return op.kind
    named = ", ".join(map(str, op.ranks[:4])) + (", …" if len(op.ranks) > 4 else "")
    return f"{op.kind} among {named}"
