"""Timing on noisy machines: what is to be compared runs in turn, and medians are compared."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any, TypeVar

__all__ = ["Run", "interleave", "repeated"]

Run = Callable[[], Any]
# What runs are known by.
_Name = TypeVar("_Name")

# In seconds: what is quicker runs several times in a round, so that there are enough samples for a median where a
# competitor takes a second.
_QUICK = 0.02
_TIMES_A_ROUND = 3


def interleave(runs: dict[_Name, Run], seconds: float, rest: float = 0.0) -> dict[_Name, float]:
    """Run everything in turn until the time is up; returns medians in seconds.

    Each has a run that is not timed before those that are, so that it finds its own data in the caches, as after the
    layer that made them, and not what another one left there. What takes longer than a tenth of the time runs in the
    first three rounds only.

    Parameters
    ----------
    runs
        What to run, by name.
    seconds
        Time for all of them.
    rest
        Seconds to wait before each, for what has threads of its own, which spin for a while after their work.
    """
    times: dict[_Name, list[float]] = {name: [] for name in runs}
    until = time.perf_counter() + seconds
    rounds = 0
    while time.perf_counter() < until or rounds < 3:
        for name, run in runs.items():
            latest = times[name][-1] if times[name] else seconds
            if rounds >= 3 and latest > 0.1 * seconds:
                continue
            time.sleep(rest)
            run()
            for _ in range(_TIMES_A_ROUND if latest < _QUICK else 1):
                start = time.perf_counter()
                run()
                times[name].append(time.perf_counter() - start)
        rounds += 1
    return {name: statistics.median(values) for name, values in times.items()}


def repeated(run: Run, count: int = 200) -> float:
    """Return the seconds that one of many runs takes."""
    start = time.perf_counter()
    for _ in range(count):
        run()
    return (time.perf_counter() - start) / count
