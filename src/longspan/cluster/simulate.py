"""Plays the schedules of all ranks on a cluster, and says when everything happens.

Each lane of a rank does one task after another. A computation takes what ``cost`` says. A
communication starts when all its ranks have come to it, waits its latency, and then moves its
bytes through pipes that it shares fairly with whatever else is under way (``share``); alone it
takes exactly what ``cost`` says. Where a device computes for what it sends, its
computing is such a pipe, too, and computations are slower while transfers go on.
"""

import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from longspan.cluster.match import Transfer, describe, match
from longspan.cluster.share import fair_rates
from longspan.cluster.spec import Cluster
from longspan.errors import ScheduleError
from longspan.schedule.ops import Comm, Compute, Schedule, Task
from longspan.trace import Span

__all__ = ["Timeline", "concurrent_seconds", "simulate"]

_UNKNOWN = -1.0


@dataclass(frozen=True, eq=False)
class Timeline:
    """When each task of each rank was done: ``starts_s[rank][place in its schedule]``."""

    schedules: Sequence[Schedule]
    starts_s: list[list[float]]
    ends_s: list[list[float]]

    @property
    def seconds(self) -> float:
        """When the last task ended."""
        return max((max(ends, default=0.0) for ends in self.ends_s), default=0.0)

    def busy_s(self, rank: int, lane: str = "compute") -> float:
        """Seconds that a lane of a rank was at work."""
        return sum(
            end - start
            for task, start, end in zip(
                self.schedules[rank], self.starts_s[rank], self.ends_s[rank], strict=True
            )
            if task.lane == lane
        )

    def spans(self) -> list[Span]:
        """The rows of a trace, rank by rank in the order of the schedules.

        A communication's span starts when all its ranks are there; its bytes are what the rank
        sends, as ``Comm.sent_bytes`` counts them.
        """
        sent: dict[int, dict[int, int]] = {}
        rows = []
        for rank, schedule in enumerate(self.schedules):
            starts, ends = self.starts_s[rank], self.ends_s[rank]
            for task, start, end in zip(schedule, starts, ends, strict=True):
                op, size = task.op, 0
                if isinstance(op, Comm):
                    if id(op) not in sent:
                        sent[id(op)] = {member: op.sent_bytes(member) for member in op.ranks}
                    size = sent[id(op)][rank]
                rows.append(Span(task.name or op.kind, rank, task.lane, start, end - start, size))
        return rows


def simulate(schedules: Sequence[Schedule] | Mapping[int, Schedule], cluster: Cluster) -> Timeline:
    """Play one schedule a rank (those that a mapping leaves out have nothing to do).

    Raises ScheduleError if ranks wait for each other for ever, with two of them and their ops;
    ClusterError if an op asks for what the cluster hasn't got.
    """
    if isinstance(schedules, Mapping):
        schedules = [schedules.get(rank, ()) for rank in range(max(schedules, default=-1) + 1)]
    if len(schedules) > cluster.ranks:
        raise ScheduleError(f"{len(schedules)} schedules for a cluster of {cluster.ranks} ranks")
    player = _Player(schedules, cluster)
    player.play()
    return Timeline(schedules, player.starts, player.ends)


def concurrent_seconds(ops: Sequence[Comm | Compute], cluster: Cluster) -> list[float]:
    """How long each of ``ops`` takes when all start at once; computations run on rank 0.

    Raises ClusterError if an op asks for what the cluster hasn't got.
    """
    schedules: dict[int, list[Task]] = {}
    places: list[tuple[int, int]] = []
    for index, op in enumerate(ops):
        ranks = op.ranks if isinstance(op, Comm) else (0,)
        for rank in ranks:
            schedules.setdefault(rank, []).append(Task(op, lane=str(index)))
        places.append((ranks[0], len(schedules[ranks[0]]) - 1))
    timeline = simulate(schedules, cluster)
    return [timeline.ends_s[rank][place] for rank, place in places]


@dataclass(slots=True, eq=False)
class _Lane:
    rank: int
    queue: list[int]
    at: int = 0
    free: float = 0.0

    @property
    def place(self) -> int:
        """Place in the schedule of the task it is at."""
        return self.queue[self.at]


class _Player:
    def __init__(self, schedules: Sequence[Schedule], cluster: Cluster) -> None:
        self.schedules = schedules
        self.work = match(schedules, cluster)
        self.starts = [[_UNKNOWN] * len(schedule) for schedule in schedules]
        self.ends = [[_UNKNOWN] * len(schedule) for schedule in schedules]
        self.lanes: list[_Lane] = []
        # Lanes that wait for another task of their rank, by that task's place.
        self.waiting: list[dict[int, list[_Lane]]] = [{} for _ in schedules]
        # Lanes that have come to a communication and wait for its other ranks, or for its end.
        self.there: dict[Transfer, list[_Lane]] = {}
        # Events are (time, order of arrival, version, transfer); a later version overrules.
        self.events: list[tuple[float, int, int, Transfer]] = []
        self.pushed = 0
        self.capacity = cluster.capacity
        # Dicts stand for sets here, as they keep their order and so make every run alike.
        self.users: list[dict[Transfer, None]] = [{} for _ in self.capacity]
        for rank, schedule in enumerate(schedules):
            queues: dict[str, list[int]] = {}
            for place, task in enumerate(schedule):
                queues.setdefault(task.lane, []).append(place)
            self.lanes += [_Lane(rank, queue) for queue in queues.values()]

    def play(self) -> None:
        self._advance(self.lanes[::-1])
        events = self.events
        while events:
            # What happens at one moment is shared out once, after all of it has happened.
            moment = events[0][0]
            limit = moment * (1 + 1e-12)
            disturbed: dict[Transfer, None] = {}
            while events and events[0][0] <= limit:
                now, _, version, transfer = heapq.heappop(events)
                if version != transfer.version:
                    continue
                if not transfer.under_way and transfer.demand.transfer_s > 0:
                    self._begin(transfer, now, disturbed)
                else:
                    self._finish(transfer, now, disturbed)
            if disturbed:
                self._share(disturbed, moment)
        if any(lane.at < len(lane.queue) for lane in self.lanes):
            raise ScheduleError(self._deadlock())

    def _advance(self, lanes: list[_Lane]) -> None:
        """Let lanes do all that can be known by now; ends may lie in the future."""
        while lanes:
            lane = lanes.pop()
            rank, queue = lane.rank, lane.queue
            schedule, work = self.schedules[rank], self.work[rank]
            starts, ends, waiting = self.starts[rank], self.ends[rank], self.waiting[rank]
            while lane.at < len(queue):
                place = queue[lane.at]
                start = lane.free
                for other in schedule[place].after:
                    if ends[other] < 0:
                        waiting.setdefault(other, []).append(lane)
                        break
                    if ends[other] > start:
                        start = ends[other]
                else:
                    item = work[place]
                    if isinstance(item, Transfer):
                        self._arrive(item, lane, start)
                        break
                    starts[place] = start
                    ends[place] = lane.free = start + item
                    lane.at += 1
                    if place in waiting:
                        lanes += waiting.pop(place)
                    continue
                break

    def _arrive(self, transfer: Transfer, lane: _Lane, ready: float) -> None:
        there = self.there.setdefault(transfer, [])
        there.append(lane)
        transfer.start = max(transfer.start, ready)
        if len(there) == len(transfer.ranks):
            self._push(transfer.start + transfer.demand.latency_s, transfer)

    def _push(self, time: float, transfer: Transfer) -> None:
        self.pushed += 1
        heapq.heappush(self.events, (time, self.pushed, transfer.version, transfer))

    def _begin(self, transfer: Transfer, now: float, disturbed: dict[Transfer, None]) -> None:
        transfer.under_way = True
        transfer.since = now
        for pipe in transfer.pipes:
            self.users[pipe][transfer] = None
        disturbed[transfer] = None

    def _finish(self, transfer: Transfer, now: float, disturbed: dict[Transfer, None]) -> None:
        if transfer.under_way:
            for pipe in transfer.pipes:
                users = self.users[pipe]
                del users[transfer]
                disturbed |= users
            disturbed.pop(transfer, None)
        woken = []
        for lane in self.there.pop(transfer):
            place = lane.queue[lane.at]
            self.starts[lane.rank][place] = transfer.start
            self.ends[lane.rank][place] = lane.free = now
            lane.at += 1
            woken.append(lane)
            if place in self.waiting[lane.rank]:
                woken += self.waiting[lane.rank].pop(place)
        self._advance(woken)

    def _share(self, disturbed: dict[Transfer, None], now: float) -> None:
        """Give all that these touch, directly or through others, their fair rates."""
        crowd: list[Transfer] = []
        seen: set[Transfer] = set()
        for first in disturbed:
            if first in seen:
                continue
            seen.add(first)
            group = [first]
            for transfer in group:
                for pipe in transfer.pipes:
                    if len(self.users[pipe]) > 1:
                        new = [other for other in self.users[pipe] if other not in seen]
                        seen.update(new)
                        group += new
            if len(group) == 1:
                self._pace(first, first.demand.transfer_s, now)
            else:
                crowd += group
        if crowd:
            rates = fair_rates([transfer.demand for transfer in crowd], self.capacity)
            for transfer, rate in zip(crowd, rates.tolist(), strict=True):
                self._pace(transfer, 1 / rate, now)

    def _pace(self, transfer: Transfer, whole_s: float, now: float) -> None:
        """From now on the whole of ``transfer`` would take ``whole_s``."""
        if abs(whole_s - transfer.whole_s) <= 1e-12 * whole_s:
            return
        now = max(now, transfer.since)
        if transfer.whole_s:
            transfer.left = max(0.0, transfer.left - (now - transfer.since) / transfer.whole_s)
        transfer.since, transfer.whole_s = now, whole_s
        transfer.version += 1
        self._push(now + transfer.left * whole_s, transfer)

    def _deadlock(self) -> str:
        """A rank that waits in a communication, the rank it waits for, and where that one is."""
        for transfer, lanes in self.there.items():
            rank = lanes[0].rank
            here = f"rank {rank} waits in {describe(transfer.op)} (task {lanes[0].place})"
            present = {lane.rank for lane in lanes}
            absent = next(other for other in transfer.ranks if other not in present)
            work = self.work[absent] if absent < len(self.work) else []
            if transfer not in work:
                return f"deadlock: {here} for rank {absent}, whose schedule lacks it"
            place = self._head(absent, work.index(transfer))
            held = work[place]
            assert isinstance(held, Transfer)
            there = {lane.rank for lane in self.there.get(held, ())}
            if absent not in there:
                return f"deadlock: {here} for rank {absent}, whose task {place} waits for itself"
            others = [other for other in held.ranks if other not in there]
            return (
                f"deadlock: {here} for rank {absent}, which waits in {describe(held.op)} "
                f"(task {place}) for rank {others[0]}"
            )
        lane = next(lane for lane in self.lanes if lane.at < len(lane.queue))
        return f"deadlock: rank {lane.rank}, task {lane.place} waits for itself"

    def _head(self, rank: int, place: int) -> int:
        """The task that keeps ``place`` from being reached, through lanes and ``after``."""
        heads = {
            behind: lane.place
            for lane in self.lanes
            if lane.rank == rank
            for behind in lane.queue[lane.at :]
        }
        seen = set()
        while place not in seen:
            seen.add(place)
            place = heads[place]
            after = self.schedules[rank][place].after
            place = next((other for other in after if self.ends[rank][other] < 0), place)
        return heads[place]
