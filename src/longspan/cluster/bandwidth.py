"""The bandwidth that a training job over two sites needs to keep its devices at work."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from pydantic import ByteSize

from longspan.cluster.fabric import Floats, Link
from longspan.cluster.simulate import Timeline, simulate
from longspan.cluster.spec import Device, uniform
from longspan.errors import ConfigError
from longspan.schedule.outer import OuterJob, outer_schedule
from longspan.trace import Span

__all__ = ["paper_grid", "required_bits_per_s", "settled_spans", "utilisation"]


def paper_grid() -> Floats:
    """The bandwidths that Streaming DiLoCo's tables are drawn from: 0.1 to 1,000 Gbit/s."""
    return np.logspace(-1, 3, 50) * 1e9


def utilisation(job: OuterJob, bits_per_s: float) -> float:
    """Share of the time that the devices compute, once the job has settled down.

    Two sites of one device, joined by ``bits_per_s`` each way without latency, play the job's
    schedule; what they do until everything that can be in flight has been, is left out.
    """
    _, begin_s, end_s, periods = _settled(job, bits_per_s)
    return periods * job.every * job.step_s / (end_s - begin_s)


def settled_spans(job: OuterJob, bits_per_s: float) -> list[Span]:
    """What both sites do once the job has settled down, for two periods or more.

    Seconds count from there; a fragment's layers go under one name.
    """
    played, begin_s, end_s, _ = _settled(job, bits_per_s)
    shown = (span for span in played.spans() if begin_s <= span.start_s < end_s)
    return [
        replace(
            span,
            name="inner steps" if span.lane == "compute" else "fragments under way",
            start_s=span.start_s - begin_s,
        )
        for span in shown
    ]


def _settled(job: OuterJob, bits_per_s: float) -> tuple[Timeline, float, float, int]:
    """The job played, and from when to when, and how many periods, it had settled down."""
    settling = 2 * job.every + max(20, 4 * job.delay)
    warm = -(-settling // job.every)
    periods = warm + max(2, -(-2 * max(20, job.delay) // job.every))
    tasks, ends = outer_schedule(job, periods)
    device = Device(
        memory_bytes=ByteSize(1), bytes_per_s=1.0, peak={"matmul": {"float32": 1 / job.step_s}}
    )
    sites = uniform(device, sites=2, uplink=Link(latency_s=0.0, bytes_per_s=bits_per_s / 8))
    played = simulate([tasks, tasks], sites)
    done = played.ends_s[0]
    return played, done[ends[warm - 1]], done[ends[-1]], periods - warm


def required_bits_per_s(
    job: OuterJob, utilisations: Sequence[float], grid: Sequence[float] | Floats | None = None
) -> list[float]:
    """The bandwidth at which each of ``utilisations`` is about to be reached, in bits a second.

    As in the paper's Table 4 that is the last point of ``grid`` (ascending; by default the
    paper's) *below* the utilisation: the next point reaches it. Where the first point reaches
    it, or the last doesn't, it is that point. Raises ConfigError if a utilisation isn't between
    0 and 1.
    """
    for wanted in utilisations:
        if not 0 < wanted < 1:
            raise ConfigError(f"a utilisation lies between 0 and 1, not at {wanted}")
    points = paper_grid() if grid is None else np.asarray(grid, dtype=np.float64)
    known: dict[int, float] = {}
    result = []
    for wanted in utilisations:
        low, high = 0, len(points)  # the first point that reaches it, or none, is in between
        while low < high:
            middle = (low + high) // 2
            if middle not in known:
                known[middle] = utilisation(job, float(points[middle]))
            if known[middle] < wanted:
                low = middle + 1
            else:
                high = middle
        result.append(float(points[max(low - 1, 0)]))
    return result
