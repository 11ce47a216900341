"""What a thread block of the forward, or for the gradient of queries, visits: for pictures and counts, in integers.

`work` says the same in TIR.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from na_compiler.schedules.shared.visit import AxisBoxes, Visit
from na_compiler.schedules.sm90.backward.plan import SweepPlan
from na_compiler.schedules.sm90.plan import Plan

__all__ = ["visit"]


def visit(plan: Plan | SweepPlan, token: Sequence[int]) -> Visit:
    """Return the queries of the warpgroup that has one, and the tiles of keys that it computes.

    Warpgroups of a thread block lie along axis 0, share its tiles of keys, and leave out those that only others need.

    Parameters
    ----------
    plan
        Of the kernel: of the forward, or of a sweep that owns queries.
    token
        The query's place along each axis of the layout.
    """
    found = [_along(plan, axis, place) for axis, place in enumerate(token)]
    return Visit(
        "warpgroup", tuple(queries for queries, _ in found), tuple(itertools.product(*(tiles for _, tiles in found)))
    )


def _along(plan: Plan | SweepPlan, axis: int, token: int) -> tuple[range, list[range]]:
    boxes = AxisBoxes(plan.problem, axis, token)
    extent = plan.stream_tile[axis]
    _, _, begin, end = boxes.around(plan.own_tile[axis])
    first, stop, low, high = boxes.around(plan.own_box[axis])
    if not plan.skips:
        low, high = begin, end
    tiles = [place for place in range(begin, end, extent) if place + extent > low and place < high]
    return boxes.tokens(first, stop), [boxes.tokens(place, place + extent) for place in tiles]
