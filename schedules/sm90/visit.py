"""What a thread block of the forward visits, in integers: for pictures and counts. `work` says the same in TIR."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from na_compiler.schedules.shared.visit import Visit
from na_compiler.schedules.sm90.plan import Plan
from na_compiler.window import group_length, window_bounds

__all__ = ["visit"]


def visit(plan: Plan, token: Sequence[int]) -> Visit:
    """Return the queries of the warpgroup that has one, and the tiles of keys that it computes.

    Warpgroups of a thread block lie along axis 0, share its tiles of keys, and leave out those that only others need.

    Parameters
    ----------
    plan
        Of the kernel.
    token
        The query's place along each axis of the layout.
    """
    found = [_along(plan, axis, place) for axis, place in enumerate(token)]
    return Visit(
        "warpgroup", tuple(queries for queries, _ in found), tuple(itertools.product(*(tiles for _, tiles in found)))
    )


def _along(plan: Plan, axis: int, token: int) -> tuple[range, list[range]]:
    problem = plan.problem
    dilation = problem.dilation[axis]
    group, index = token % dilation, token // dilation
    length = group_length(problem.layout[axis], dilation, group)

    def needed(tile: int) -> tuple[int, int, int, int]:
        """Return a tile's queries, and the keys that its windows come to."""
        rule = (length, problem.kernel_size[axis], problem.stride[axis], problem.is_causal[axis])
        first = index // tile * tile
        last = min(first + tile, length) - 1
        return first, last + 1, window_bounds(first, *rule)[0], window_bounds(last, *rule)[1]

    def tokens(begin: int, stop: int) -> range:
        return range(group + begin * dilation, group + min(stop, length) * dilation, dilation)

    extent = plan.stream_tile[axis]
    _, _, begin, end = needed(plan.own_tile[axis])
    first, stop, low, high = needed(plan.own_box[axis])
    if not plan.skips:
        low, high = begin, end
    tiles = [place for place in range(begin, end, extent) if place + extent > low and place < high]
    return tokens(first, stop), [tokens(place, place + extent) for place in tiles]
