"""When fragments are sent and merged, against the paper's loop; what a replica does, in tasks."""

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from longspan.cluster.bandwidth import paper_grid, required_bits_per_s, utilisation
from longspan.cluster.fabric import Link
from longspan.cluster.simulate import simulate
from longspan.cluster.spec import Device, uniform
from longspan.errors import ConfigError
from longspan.schedule.ops import Comm, Compute, Task
from longspan.schedule.outer import Merge, OuterJob, Send, fragments, outer_schedule, strided


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_fragments_follow_the_papers_loop(data: st.DataObject) -> None:
    every = data.draw(st.integers(1, 40))
    count = data.draw(st.integers(1, 50))
    delay = data.draw(st.integers(0, every))
    flying: dict[int, int] = {}
    for step in range(1, 4 * every + 1):
        sent = {
            k for k in range(count) if step >= every and (step - k * every // count) % every == 0
        }
        merged = {k for k, when in flying.items() if when == step - delay}
        if not delay:
            merged = sent
        events = fragments(step, count, every, delay)
        assert {e.fragment for e in events if isinstance(e, Send)} == sent
        assert {e.fragment for e in events if isinstance(e, Merge)} == merged
        assert all(e.sent == step - delay for e in events if isinstance(e, Merge))
        # A fragment is never sent while it is still away.
        for event in events:
            if isinstance(event, Merge):
                flying.pop(event.fragment, None)
            else:
                assert event.fragment not in flying
                flying[event.fragment] = step


def test_special_cases() -> None:
    assert fragments(7, 1, 1) == [Send(0), Merge(0, 7)]  # data-parallel: all of it, every step
    assert [step for step in range(1, 301) if fragments(step, 1, 100)] == [100, 200, 300]  # DiLoCo
    assert fragments(101, 100, 100, 1) == [Merge(0, 100), Send(1)]
    assert strided(7, 3) == ((0, 3, 6), (1, 4), (2, 5))
    job = OuterJob(1e9, 24, 0.1, every=50, delay=3)
    assert job.by("streaming") is job
    assert (job.by("diloco").every, job.by("diloco").delay, job.by("diloco").fragment_layers) == (
        50,
        0,
        24,
    )
    assert job.by("data-parallel").every == 1


def test_impossible_settings_are_refused() -> None:
    with pytest.raises(ConfigError, match="must be back before it is sent again"):
        fragments(1, 4, 10, 11)
    with pytest.raises(ConfigError, match="at least 1"):
        fragments(1, 0, 10)
    with pytest.raises(ConfigError, match="layers must be more than 0"):
        OuterJob(1e9, 0, 0.1)
    with pytest.raises(ConfigError, match="between 0 and 1, not at 1"):
        required_bits_per_s(OuterJob(1e9, 2, 0.1), [1.0])


def recurrence(job: OuterJob, steps: int, bits_per_s: float) -> float:
    """When the last of ``steps`` ends: node by node, with one FIFO link."""
    count = -(-job.layers // job.fragment_layers)
    node = job.step_s / (3 * job.layers - 1)
    message = job.params * job.bits / job.layers / bits_per_s
    now = link = 0.0
    back: dict[tuple[int, int], float] = {}
    for step in range(1, steps + 1):
        for layer in range(job.layers):
            now = max(
                [now]
                + [t for (s, x), t in back.items() if x == layer and s + job.delay + 1 == step]
            )
            now += node
        for layer in reversed(range(job.layers)):
            now += node * (2 if layer else 1)
            offset = layer % count * job.every // count
            if step >= job.every and (step - offset) % job.every == 0:
                link = max(link, now) + message
                back[step, layer] = link
    return now


@settings(max_examples=40, deadline=None)
@given(
    layers=st.integers(1, 7),
    per_fragment=st.integers(1, 8),
    every=st.integers(1, 9),
    delay=st.integers(0, 9),
    bits_per_s=st.floats(1e3, 1e7),
)
def test_the_simulator_plays_it_as_the_recurrence_does(
    layers: int, per_fragment: int, every: int, delay: int, bits_per_s: float
) -> None:
    job = OuterJob(
        8e4 * layers, layers, 1.5, every, min(delay, every), bits=4, fragment_layers=per_fragment
    )
    tasks, ends = outer_schedule(job, 4)
    device = Device(memory_bytes=1, bytes_per_s=1, peak={"matmul": {"float32": 1 / job.step_s}})
    sites = uniform(device, sites=2, uplink=Link(latency_s=0, bytes_per_s=bits_per_s / 8))
    timeline = simulate([tasks, tasks], sites)
    for period, place in enumerate(ends, 1):
        expected = recurrence(job, period * every, bits_per_s)
        assert timeline.ends_s[0][place] == pytest.approx(expected)


def test_a_schedule_does_all_the_work_and_sends_all_the_bytes() -> None:
    job = OuterJob(12e6, 12, 0.1, every=10, delay=2, bits=8, fragment_layers=3)
    tasks, ends = outer_schedule(job, 5)

    def flops(part: list[Task]) -> float:
        return sum(task.op.flops for task in part if isinstance(task.op, Compute))

    assert flops(tasks) == pytest.approx(50)
    for before, after in pairwise([-1, *ends]):
        assert flops(tasks[before + 1 : after + 1]) == pytest.approx(10)
    sent = sum(task.op.sizes[0] for task in tasks if isinstance(task.op, Comm))
    assert sent == 4 * 12e6 + 3e6  # step 50 sends the first fragment for the fifth time


def test_utilisation_grows_with_bandwidth_and_shrinks_with_bits() -> None:
    job = OuterJob(1e9, 12, 0.1, every=20, delay=1)
    grid = paper_grid()[::7]
    rising = [utilisation(job, rate) for rate in grid]
    assert rising == sorted(rising) and 0 < rising[0] < rising[-1] <= 1 + 1e-9
    wide, narrow = (
        required_bits_per_s(OuterJob(1e9, 12, 0.1, 20, 1, bits), [0.5, 0.9]) for bits in (16, 4)
    )
    assert all(a > b for a, b in zip(wide, narrow, strict=True))
    assert required_bits_per_s(job, [0.5], grid=[1e14, 1e15]) == [1e14]
    assert required_bits_per_s(job, [0.5], grid=[1, 2]) == [2]
