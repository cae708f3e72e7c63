"""Plans of the batches to come, made in a process of its own while earlier ones are trained on."""

import os
import signal
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import get_context, parent_process

from longspan.errors import PlanError
from longspan.plan import BatchPlan

__all__ = ["Ahead", "Planned", "Planner"]

Planner = Callable[[tuple[int, ...]], BatchPlan]

# How often the process may die over one batch before it's taken to be the batch's fault.
_TRIES = 3
# From a quarter of a processor that training keeps busy to what training leaves of it.
_NICE, _MOST_NICE, _NICER = 5, 19, 4


@dataclass(frozen=True, slots=True)
class Planned:
    """A plan, the seconds it took to make, and those that training waited for it.

    ``restarts``: how often the planner's process died and was started anew, so far.
    """

    plan: BatchPlan
    planning_s: float
    wait_s: float
    restarts: int


class Ahead:
    """Plans batch ``number`` and the ``ahead`` ones after it, in the background.

    ``plan`` and what it holds must be picklable; ``lengths(number)`` gives a batch's lengths. A
    planner that dies is started again.
    """

    def __init__(
        self,
        plan: Planner,
        lengths: Callable[[int], tuple[int, ...]],
        *,
        ahead: int,
        timeout_s: float,
    ) -> None:
        self._plan, self._lengths = plan, lengths
        self._ahead, self._timeout_s = ahead, timeout_s
        self._asked: dict[int, Future[tuple[BatchPlan, float]]] = {}
        self._restarts, self._nice = 0, _NICE
        self._pool = _pool()

    def take(self, number: int) -> Planned:
        """The plan of batch ``number``, waited for if it isn't there yet.

        Raises PlanError if its process dies again and again or is silent for ``timeout_s``, and
        whatever error planning ends with.
        """
        start = time.perf_counter()
        for _ in range(_TRIES):
            try:
                self.prepare(number)
                if self._asked[number].done():  # in time: it may give way more
                    self._nice = min(self._nice + _NICER, _MOST_NICE)
                plan, seconds = self._asked[number].result(self._timeout_s)
            except BrokenProcessPool:
                self._pool.shutdown(wait=False)
                self._pool, self._asked = _pool(), {}
                self._restarts += 1
            except TimeoutError:
                raise PlanError(
                    f"the planner has said nothing for {self._timeout_s:g} s: "
                    "plan smaller batches (train.global_batch), or raise train.timeout_s"
                ) from None
            else:
                self.prepare(number + 1)
                return Planned(plan, seconds, time.perf_counter() - start, self._restarts)
        raise PlanError(
            f"the planner's process died {_TRIES} times over batch {number}: something kills it, "
            "perhaps for want of memory; parallel.mode fixed needs no planner"
        )

    def prepare(self, number: int) -> None:
        """Start on batch ``number`` and those after it; what else was asked for is forgotten."""
        wanted = range(number, number + self._ahead + 1)
        self._asked = {n: future for n, future in self._asked.items() if n in wanted}
        for n in wanted:
            if n not in self._asked:
                asked = self._plan, self._lengths(n), self._nice
                self._asked[n] = self._pool.submit(_timed, *asked)

    def close(self) -> None:
        """End the process."""
        self._pool.shutdown(wait=False, cancel_futures=True)


def _pool() -> ProcessPoolExecutor:
    return ProcessPoolExecutor(1, mp_context=get_context("spawn"), initializer=_settle)


def _settle() -> None:
    """The planner's process leaves when its parent has, and not for a signal to all."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    threading.Thread(target=_leave_with_parent, daemon=True).start()


def _leave_with_parent() -> None:
    parent = parent_process()
    assert parent is not None, "this is a spawned process"
    parent.join()
    os._exit(0)


def _timed(plan: Planner, lengths: tuple[int, ...], nice: int) -> tuple[BatchPlan, float]:
    start = time.perf_counter()
    planned = plan(lengths)
    seconds = time.perf_counter() - start
    # Training waits for the first plan. Later ones are due only some steps later, and a rank that
    # waits for others or for a link leaves much of its processor.
    os.nice(max(0, nice - os.nice(0)))
    return planned, seconds
