"""Planning in a process of its own: ahead of time, and through its death."""

import os
import signal
import time
from dataclasses import replace

import pytest

from longspan.errors import PlanError
from longspan.plan import BatchPlan, Group, MicroBatch
from longspan.train.ahead import Ahead


def one_each(lengths: tuple[int, ...]) -> BatchPlan:
    groups = tuple(Group((i,), (i,), "ring", 0.0, 0, 0) for i in range(len(lengths)))
    return BatchPlan(lengths, (MicroBatch(groups, 0.0),), "world", float(os.getpid()), 0.0)


def deadly(lengths: tuple[int, ...]) -> BatchPlan:
    if lengths[0] == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return one_each(lengths)


def unplannable(lengths: tuple[int, ...]) -> BatchPlan:
    raise PlanError(f"a sequence of {lengths[0]} tokens fits nowhere")


def batch_lengths(number: int) -> tuple[int, ...]:
    return (number, 7)


def test_a_planner_that_is_killed_is_started_again() -> None:
    ahead = Ahead(one_each, batch_lengths, ahead=2, timeout_s=60)
    first = ahead.take(0)
    assert first.plan.lengths == (0, 7) and first.restarts == 0
    time.sleep(0.5)
    assert ahead.take(1).wait_s < 0.1, "it was planned ahead"
    pid = int(first.plan.seconds)
    os.kill(pid, signal.SIGKILL)
    plans = [ahead.take(number) for number in (2, 3, 4, 9)]
    assert [p.plan.lengths[0] for p in plans] == [2, 3, 4, 9]
    assert plans[-1].restarts == 1 and plans[-1].plan.seconds != pid
    ahead.close()


def its_nice(lengths: tuple[int, ...]) -> BatchPlan:
    return replace(one_each(lengths), lower_bound_s=os.nice(0))


def test_a_planner_whose_plans_come_in_time_gives_way_more() -> None:
    ahead = Ahead(its_nice, batch_lengths, ahead=1, timeout_s=60)
    found = []
    for number in range(8):
        found.append(ahead.take(number).plan.lower_bound_s)
        time.sleep(0.2)
    ahead.close()
    assert found == sorted(found)
    assert found[0] < found[1] < found[-1] <= 19


def test_a_planner_that_fails_says_so() -> None:
    ahead = Ahead(unplannable, batch_lengths, ahead=1, timeout_s=60)
    with pytest.raises(PlanError, match="a sequence of 5 tokens fits nowhere"):
        ahead.take(5)
    ahead.close()
    ahead = Ahead(deadly, batch_lengths, ahead=0, timeout_s=60)
    assert ahead.take(2).plan.lengths == (2, 7)
    with pytest.raises(PlanError, match="died 3 times over batch 3"):
        ahead.take(3)
    ahead.close()
