"""Times ops on real ranks: the same ops that the cost model prices.

A timing is the time from a common start until the last rank is done. Ranks start together after a
barrier; ops that are timed together run at the same time.
"""

import math
import time
from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from longspan.comm.exchange import exchange
from longspan.comm.rings import ring_all_gather, ring_reduce_scatter
from longspan.schedule.ops import Comm

__all__ = ["Stopwatch"]

_PACE_S, _REPEATS = 0.3, 5
_WAITS, _PERIOD = 200, 8


class Stopwatch:
    """Runs and times communications on the ranks of the default group.

    All ranks must make the same calls in the same order.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        self._groups: dict[tuple[int, ...], dist.ProcessGroup] = {}

    def time(self, ops: Sequence[Comm], repeats: int = 5, inner: int = 1) -> list[float]:
        """Seconds that ``ops``, at the same time, take until all are done; one a repeat.

        Each repeat does them ``inner`` times over and counts the mean. A first, untimed round
        opens connections. The ranks of a collective are in ascending order, and no rank takes part
        in two of the ops.
        """
        for op in ops:
            self._group(op.ranks)
        own = next((op for op in ops if self.rank in op.ranks), None)
        work = self._work(own) if own else _nothing
        work()
        return [self._once(work, inner) for _ in range(repeats)]

    def ping(self, a: int, b: int, repeats: int = 5, inner: int = 20) -> list[float]:
        """Seconds that a message of one byte takes from rank to rank, one way; one a repeat."""
        group = self._group((a, b))
        byte = self._empty(1)

        def there_and_back() -> None:
            for source, target in ((a, b), (b, a)):
                if self.rank == source:
                    dist.send(byte, target, group=group)
                elif self.rank == target:
                    dist.recv(byte, source, group=group)

        work = there_and_back if self.rank in (a, b) else _nothing
        work()
        return [self._once(work, inner) / 2 for _ in range(repeats)]

    def compute(
        self, work: Callable[[], object], repeats: int = 5, least_s: float = 0.1
    ) -> list[float]:
        """Seconds that ``work`` takes on this rank while all ranks do the same; one a repeat.

        Each repeat does it over and over for about ``least_s``: a device that is a share of a
        core computes in bursts.
        """
        work()
        dist.barrier()
        inner = max(1, math.ceil(least_s / self._seconds(work, 1)))
        return [self._seconds(work, inner) for _ in range(repeats)]

    def handled(
        self, work: Callable[[], object], ring: Sequence[int], size: int, count: int
    ) -> list[float]:
        """Seconds of computing that ``count`` messages and as many received take; one a repeat.

        Each rank sends ``size`` bytes to the next of its ``ring``, receives as many, and waits for
        both, as training does. What counts is the time of its processors, those of sockets' threads
        and of the kernel for it, too, at the pace at which ``work`` goes here: a device that is a
        share of a core takes longer for the same.
        """
        both_ways = self._both_ways(ring, size)
        a_turn = self.compute(work, 1)[0]
        turns = math.ceil(_PACE_S / a_turn)
        dist.barrier()
        start, processor = time.perf_counter(), time.process_time()
        for _ in range(turns):
            work()
        pace = (time.perf_counter() - start) / (time.process_time() - processor)
        found = []
        for _ in range(_REPEATS):
            dist.barrier()
            processor = time.process_time()
            for _ in range(count):
                both_ways()
            found.append((time.process_time() - processor) * pace)
        return found

    def waited(self, work: Callable[[], object], ring: Sequence[int]) -> float:
        """Seconds that a small message to the next of a ring, and one from the last, take.

        On average, and while all ranks compute in between: as much as each other, now more and now
        less, so that it falls anywhere in the period of a device that is a share of a core.
        """
        both_ways, waited = self._both_ways(ring, 4), 0.0
        dist.barrier()
        for turn in range(-_PERIOD, _WAITS):
            for _ in range(1 + turn % _PERIOD):
                work()
            start = time.perf_counter()
            both_ways()
            waited += (time.perf_counter() - start) * (turn >= 0)
        return waited / _WAITS

    def _both_ways(self, ring: Sequence[int], size: int) -> Callable[[], None]:
        """Sends so much to the next of a ring and receives it from the last; done once already."""
        here = ring.index(self.rank)
        target, source = ring[(here + 1) % len(ring)], ring[here - 1]
        sent, received = self._empty(size), self._empty(size)

        def both_ways() -> None:
            for one in (dist.irecv(received, source), dist.isend(sent, target)):
                if one:
                    one.wait()

        both_ways()
        return both_ways

    def _seconds(self, work: Callable[[], object], inner: int) -> float:
        self._finish()
        start = time.perf_counter()
        for _ in range(inner):
            work()
        self._finish()
        return (time.perf_counter() - start) / inner

    def everyone(self, *values: float) -> list[list[float]]:
        """Each rank's values, on every rank."""
        own = torch.tensor(values, dtype=torch.float64, device=self.device)
        rows = [torch.empty_like(own) for _ in range(self.world)]
        dist.all_gather(rows, own)
        return [row.tolist() for row in rows]

    def _once(self, work: Callable[[], object], inner: int) -> float:
        dist.barrier()
        return max(row[0] for row in self.everyone(self._seconds(work, inner)))

    def _finish(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def _group(self, ranks: tuple[int, ...]) -> dist.ProcessGroup:
        """The group of these ranks; made once, by all ranks together."""
        members = tuple(sorted(ranks))
        if members not in self._groups:
            self._groups[members] = dist.new_group(list(members))
        return self._groups[members]

    def _empty(self, size: int) -> Tensor:
        """So many bytes, as the numbers that training reduces where they are whole ones."""
        dtype = torch.float32 if size % 4 == 0 else torch.uint8
        return torch.zeros(size // dtype.itemsize, dtype=dtype, device=self.device)

    def _work(self, op: Comm) -> Callable[[], object]:
        """What this rank does for ``op``, its buffers made beforehand."""
        group, world = self._group(op.ranks), len(op.ranks)
        place = group.rank()
        match op.kind:
            case "send":
                tensor = self._empty(op.sizes[0])
                if self.rank == op.ranks[0]:
                    return lambda: dist.send(tensor, op.ranks[1], group=group)
                return lambda: dist.recv(tensor, op.ranks[0], group=group)
            case "broadcast":
                tensor = self._empty(op.sizes[0])
                return lambda: dist.broadcast(tensor, op.ranks[0], group=group)
            case "all_reduce":
                tensor = self._empty(op.sizes[0])
                return lambda: dist.all_reduce(tensor, group=group)
            case "all_gather":
                parts = [self._empty(size) for size in op.sizes]
                return lambda: ring_all_gather(parts, group)
            case "reduce_scatter":
                whole = [self._empty(size) for size in op.sizes]
                return lambda: ring_reduce_scatter(whole, group)
            case "all_to_all":
                sent = op.sizes[place * world : (place + 1) * world]
                received = op.sizes[place::world]
                source, target = (
                    torch.zeros(sum(sizes), dtype=torch.uint8, device=self.device)
                    for sizes in (sent, received)
                )
                return lambda: exchange(target, source, received, sent, group).wait()


def _nothing() -> None:
    """What a rank does that takes no part."""
