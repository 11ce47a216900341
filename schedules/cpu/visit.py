"""What a CPU kernel's tile visits, in integers: for pictures and counts. `places` says the same in TensorIR."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from na_compiler.schedules.cpu.plan import AxisTiling, TilingPlan
from na_compiler.schedules.shared.visit import Visit
from na_compiler.window import WRAP, group_length, window_end, window_start

__all__ = ["visit"]


def visit(plan: TilingPlan, token: Sequence[int]) -> Visit:
    """Return the tile that has a query, and the keys that it visits.

    Parameters
    ----------
    plan
        Of the kernel.
    token
        The query's place along each axis of the layout.
    """
    axes = plan.axes[-plan.problem.rank :]
    found = [_along(axis, place) for axis, place in zip(axes, token, strict=True)]
    return Visit(
        "tile", tuple(queries for queries, _ in found), tuple(itertools.product(*(boxes for _, boxes in found)))
    )


def _along(axis: AxisTiling, token: int) -> tuple[range, list[range]]:
    """Return the tile's queries along an axis, and the stretches of keys that are visited one after another."""
    group, index = token % axis.dilation, token // axis.dilation
    length = group_length(axis.layout, axis.dilation, group)
    rule = (length, axis.kernel_size, axis.stride, axis.is_causal, axis.border)
    first = index // axis.tile * axis.tile
    last = min(first + axis.tile, length) - 1
    start, end = window_start(first, *rule), window_end(last, *rule)
    box = _box(axis, window_start(index // axis.strip * axis.strip, *rule), length)
    if axis.chunks == 1:
        offset = min(start - box, axis.strip_box - axis.tile_box)
        boxes = [(box + offset, axis.visited)]
    else:
        firsts = (box + chunk * axis.chunk for chunk in range(axis.chunks))
        boxes = [(begin, axis.chunk) for begin in firsts if begin < end and begin + axis.chunk > start]

    def tokens(begin: int, stop: int) -> range:
        return range(group + begin * axis.dilation, group + min(stop, length) * axis.dilation, axis.dilation)

    if axis.border == WRAP:
        # A box that passes an end is in parts, each within the axis; what it holds twice is computed twice.
        turns = [(b, b + extent, turn) for b, extent in boxes for turn in range(-length, b + extent, length)]
        parts = [(max(begin, turn) - turn, min(end, turn + length) - turn) for begin, end, turn in turns]
        return tokens(first, last + 1), [tokens(begin, end) for begin, end in parts if begin < end]
    return tokens(first, last + 1), [tokens(begin, begin + extent) for begin, extent in boxes]


def _box(axis: AxisTiling, start: int, length: int) -> int:
    """Return the first key of a strip's box, moved left where the box would pass the end."""
    if axis.border == WRAP:
        return start
    return 0 if axis.strip_box >= axis.longest else max(min(start, length - axis.strip_box), 0)
