"""Bytes that torch's allocator hands out while something runs, workspaces of kernels included."""

from __future__ import annotations

from collections.abc import Callable

from torch.profiler import ProfilerActivity, profile


def allocated_peak(work: Callable[[], object]) -> int:
    """Run something, and return how far the bytes in use rose above those at its beginning.

    What is not from torch's allocator is not in it: the interpreter, numpy, the code itself, and
    what a library of kernels allocates past it.

    Args:
        work: What to run; it should have run once before, since a first call may set up caches.
    """
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
    results = profiler.profiler
    assert results is not None
    assert results.kineto_results is not None
    events = [event for event in results.kineto_results.events() if event.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak
