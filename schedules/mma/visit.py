"""What a warp of the forward visits, in integers: for pictures and counts. The kernel says the same in TIR."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from na_compiler.schedules.mma.plan import Plan
from na_compiler.schedules.shared.visit import Visit
from na_compiler.window import group_length, window_bounds

__all__ = ["visit"]


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
    problem = plan.problem
    dilation = problem.dilation[axis]
    group, index = token % dilation, token // dilation
    length = group_length(problem.layout[axis], dilation, group)
    rule = (length, problem.kernel_size[axis], problem.stride[axis], problem.is_causal[axis])

    def needed(box: int) -> tuple[int, int, int, int]:
        """Return the queries of a box, and the keys that its windows come to."""
        first = index // box * box
        last = min(first + box, length) - 1
        return first, last + 1, window_bounds(first, *rule)[0], window_bounds(last, *rule)[1]

    def tokens(begin: int, stop: int) -> range:
        return range(group + begin * dilation, group + min(stop, length) * dilation, dilation)

    first, stop, low, high = needed(plan.warp_box[axis])
    if plan.is_resident:
        return tokens(first, stop), [tokens(low, low + plan.warp_union[axis])]
    _, _, begin, end = needed(plan.own_tile[axis])
    extent = plan.stream_tile[axis]
    tiles = [place for place in range(begin, end, extent) if place + extent > low and place < high]
    return tokens(first, stop), [tokens(place, place + extent) for place in tiles]
