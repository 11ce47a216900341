"""What a warp of the forward, or for the gradient of queries, visits, in integers: for pictures and counts.

The kernels say the same in TIR.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from na_compiler.schedules.mma.backward.plan import SweepPlan
from na_compiler.schedules.mma.plan import Plan
from na_compiler.schedules.shared.visit import AxisBoxes, Visit

__all__ = ["visit", "visit_listed"]


def visit(plan: Plan, token: Sequence[int]) -> Visit:
    """Return the queries of the warp that has one, and the boxes of keys that it computes.

    Where all keys of a block are kept, a warp has one box of its own; else it meets some of the block's tiles.

    Parameters
    ----------
    plan
        Of the kernel.
    token
        The query's place along each axis of the layout.
    """
    found = [_along(plan, axis, place) for axis, place in enumerate(token)]
    return Visit(
        "warp", tuple(queries for queries, _ in found), tuple(itertools.product(*(boxes for _, boxes in found)))
    )


def _along(plan: Plan, axis: int, token: int) -> tuple[range, list[range]]:
    boxes = AxisBoxes(plan.problem, axis, token)
    first, stop, low, high = boxes.around(plan.warp_box[axis])
    queries = boxes.tokens(first, stop)
    if plan.is_resident:
        return queries, boxes.parts(low, low + plan.warp_union[axis])
    _, _, begin, end = boxes.around(plan.own_tile[axis])
    extent = plan.stream_tile[axis]
    tiles = [place for place in range(begin, end, extent) if place + extent > low and place < high]
    return queries, [part for place in tiles for part in boxes.parts(place, place + extent)]


def visit_listed(plan: SweepPlan, token: Sequence[int]) -> Visit:
    """Return the queries of the warp that has one, and the box of keys that it lists, which is what their windows are.

    Parameters
    ----------
    plan
        Of the kernel for the gradient of queries.
    token
        The query's place along each axis of the layout.
    """
    queries: list[range] = []
    keys: list[list[range]] = []
    for axis, place in enumerate(token):
        boxes = AxisBoxes(plan.problem, axis, place)
        first, stop, low, high = boxes.around(plan.warp_box[axis])
        queries.append(boxes.tokens(first, stop))
        keys.append(boxes.parts(low, high))
    return Visit("warp", tuple(queries), tuple(itertools.product(*keys)))
