"""What a query of the schedule for CUDA cores visits, in integers: for pictures and counts."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from na_compiler.schedules.shared.visit import Visit, window_of
from na_compiler.schedules.simt.plan import DirectPlan

__all__ = ["visit"]


def visit(plan: DirectPlan, token: Sequence[int]) -> Visit:
    """Return a query, which is alone here, and the chunks of its window.

    Parameters
    ----------
    plan
        Of the kernel.
    token
        The query's place along each axis of the layout.
    """
    problem = plan.problem
    chunks: list[list[range]] = []
    for axis, place in enumerate(token):
        extent = plan.keys[axis - problem.rank]
        window = window_of(problem, axis, place)
        if not isinstance(window, range):  # It wraps: a key at a time, since a chunk may pass the end.
            chunks.append([range(key, key + 1) for key in window])
            continue
        chunks.append([window[begin : begin + extent] for begin in range(0, len(window), extent)])
    return Visit("query", tuple(range(place, place + 1) for place in token), tuple(itertools.product(*chunks)))
