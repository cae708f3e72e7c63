"""The most memory that torch's allocator for CPUs hands out, counted allocation by allocation."""

from collections.abc import Callable
from itertools import accumulate

__all__ = ["peak_bytes"]


def peak_bytes(work: Callable[[], object]) -> int:
    """The most bytes of tensors at once while ``work`` runs, beyond those before it."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as found:
        work()
    assert found.profiler and found.profiler.kineto_results
    events = found.profiler.kineto_results.events()
    changes = [(one.start_ns(), one.nbytes()) for one in events if one.name() == "[memory]"]
    changes.sort(key=lambda change: change[0])
    return max(accumulate(size for _, size in changes), default=0)
