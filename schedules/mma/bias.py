"""The bias by relative position: scores are scaled, and each gets its place's of the table, which the caches hold."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from na_compiler.problem import Problem
from na_compiler.schedules.mma.packing import HeadsWork
from na_compiler.schedules.mma.products import RowTile
from na_compiler.schedules.mma.rows import Rows
from na_compiler.schedules.shared.trace import I, T, let, put, register
from na_compiler.tensorir.arithmetic import LOG2_E

__all__ = ["Bias", "steps_of"]

Expr = Any


def steps_of(problem: Problem) -> list[int]:
    """Return by how much a step along each axis changes a place in a head's table.

    Examples
    --------
    >>> steps_of(Problem((56, 56), 4, 32, 7))
    [13, 1]
    """
    places = [2 * extent - 1 for extent in problem.kernel_size]
    return [math.prod(places[axis + 1 :]) for axis in range(problem.rank)]


class Bias:
    """Emits scores in units of ``log2(e)``, with their biases: what the softmax takes as it is.

    Parameters
    ----------
    tile, rows
        Scores, and the two queries whose they are in a thread.
    work
        The block's tile of queries.
    table
        ``[heads, 2 kernel_size - 1, ...]``.
    scale
        Of the scores.
    """

    def __init__(self, tile: RowTile, rows: Rows, work: HeadsWork, table: Any, scale: Expr) -> None:
        self.plan, self.scores = tile.plan, tile.scores
        problem = self.plan.problem
        count = math.prod(2 * extent - 1 for extent in problem.kernel_size)
        self._steps = steps_of(problem)
        self._flat = I.decl_buffer([problem.heads * count], "float32", data=table.data, scope="global")
        self._unit = register(scale * T.float32(LOG2_E), "float32")
        self._pair = let(T.bitwise_and(rows.lane, 3) * 2)
        # Places of each row's head's part. What lies beyond is of keys that are masked; it only has to be some that is
        # there.
        heads = [work.first_head + rows.head(row) for row in rows.rows]
        self._low = [register(head * count) for head in heads]
        self._high = [register(head * count + (count - 1)) for head in heads]
        # Of each row, the place of the key at 0.
        self._rows = [
            register(
                sum(
                    (
                        step * (extent - 1 - query)
                        for step, extent, query in self._along(rows.position(row, work.first))
                    ),
                    low,
                )
            )
            for row, low in zip(rows.rows, self._low, strict=True)
        ]

    def _along(self, position: list[Expr]) -> Any:
        return zip(self._steps, self.plan.problem.kernel_size, position, strict=True)

    def add(self, box: Sequence[int], low: Sequence[Expr], first: int, count: int) -> None:
        """Emit it for some scores: those of keys of a box, which begins at ``low``, counted in it from ``first`` on."""
        origin: Expr = 0
        for start, step in zip(low, self._steps, strict=True):
            origin = origin + start * step
        bases = [register(row + origin) for row in self._rows]
        for number in range(0, count, 8):
            for e in (0, 1):
                place = register(self._place(box, first + number, e))
                for row, base in enumerate(bases):
                    at = T.max(T.min(base + place, self._high[row]), self._low[row])
                    self._put(number // 2 + 2 * row + e, self._flat[at] * T.float32(LOG2_E))

    def _place(self, box: Sequence[int], number: int, e: int) -> Expr:
        """Return how much further in the table the key is than the box's first."""
        place: Expr = 0
        # Eight keys of one row of the box begin at a place that is known.
        is_whole = len(box) == 1 or box[-1] % 8 == 0
        rest: Expr = number if is_whole else number + self._pair + e
        for axis in reversed(range(len(box))):
            along, rest = (rest, 0) if axis == 0 else (rest % box[axis], rest // box[axis])
            place = place + along * self._steps[axis]
        return place + self._pair + e if is_whole else place

    def scale(self, count: int) -> None:
        """Emit it for some scores of additional keys, which have no biases."""
        for element in range(count // 2):
            self._put(element, None)

    def _put(self, element: int, bias: Expr | None) -> None:
        score = self.scores[element] * self._unit
        put(self.scores, element, score if bias is None else score + bias)
