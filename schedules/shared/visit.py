"""`Visit`: the queries that a kernel takes together, and the boxes of keys that it computes scores for."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from na_compiler.problem import Problem
from na_compiler.window import WRAP, group_length, window_bounds

__all__ = ["AxisBoxes", "Box", "Visit", "window_of"]

# Tokens along each axis: inside a dilation group, so that a range steps by the dilation.
Box = tuple[range, ...]


@dataclass(frozen=True)
class Visit:
    """What a kernel does at once: queries, and the keys whose scores it computes for all of them.

    Parameters
    ----------
    what
        What the queries are to the family, e.g. ``"tile"``.
    queries
        Tokens along each axis of the layout.
    keys
        Boxes of keys, each computed whole.

    Examples
    --------
    >>> visit = Visit("tile", (range(0, 4),), ((range(0, 6),),))
    >>> visit.pairs(), visit.needed(Problem(9, 1, 8, 3))
    (24, 12)
    """

    what: str
    queries: Box
    keys: tuple[Box, ...]

    def pairs(self) -> int:
        """Return the pairs of query and key whose scores are computed."""
        return math.prod(map(len, self.queries)) * sum(math.prod(map(len, box)) for box in self.keys)

    def needed(self, problem: Problem) -> int:
        """Return how many of these pairs are in a window."""
        return sum(self.seen(problem).values())

    def seen(self, problem: Problem) -> dict[tuple[int, ...], int]:
        """Return for each visited key how many of the queries see it."""
        counts: list[dict[int, list[int]]] = []
        for axis, queries in enumerate(self.queries):
            along: dict[int, list[int]] = {}
            for number, query in enumerate(queries):
                for key in window_of(problem, axis, query):
                    along.setdefault(key, []).append(number)
            counts.append(along)
        # Axes are independent: a key is seen by those queries that see it on every axis.
        return {
            key: math.prod(len(along.get(place, ())) for along, place in zip(counts, key, strict=True))
            for key in self.visited()
        }

    def visited(self) -> Iterator[tuple[int, ...]]:
        """Yield the visited keys."""
        for box in self.keys:
            yield from itertools.product(*box)


def window_of(problem: Problem, axis: int, token: int) -> Sequence[int]:
    """Return the keys that a query sees along one axis.

    Examples
    --------
    >>> window_of(Problem(10, 1, 8, 3, dilation=2), 0, 1)
    range(1, 7, 2)
    """
    dilation = problem.dilation[axis]
    group = token % dilation
    start, end = window_bounds(
        token // dilation,
        group_length(problem.layout[axis], dilation, group),
        problem.kernel_size[axis],
        problem.stride[axis],
        problem.is_causal[axis],
        problem.border[axis],
    )
    if problem.border[axis] == WRAP:
        return tuple((group + index * dilation) % problem.layout[axis] for index in range(start, end))
    return range(group + start * dilation, group + end * dilation, dilation)


class AxisBoxes:
    """Boxes along one axis that a query is in, whatever their extent, and what their windows come to.

    Parameters
    ----------
    problem, axis
        What is computed, and which axis.
    token
        The query's place along the axis.

    Examples
    --------
    >>> boxes = AxisBoxes(Problem(20, 1, 8, 3, dilation=2), 0, 7)
    >>> boxes.around(2), boxes.tokens(2, 6)
    ((2, 4, 1, 5), range(5, 13, 2))
    """

    def __init__(self, problem: Problem, axis: int, token: int) -> None:
        self._dilation = problem.dilation[axis]
        self._group, self._index = token % self._dilation, token // self._dilation
        self._length = group_length(problem.layout[axis], self._dilation, self._group)
        self._rule = (
            self._length,
            problem.kernel_size[axis],
            problem.stride[axis],
            problem.is_causal[axis],
            problem.border[axis],
        )

    def around(self, extent: int) -> tuple[int, int, int, int]:
        """Return where the query's box of an extent begins and ends, and the keys that its windows come to."""
        first = self._index // extent * extent
        last = min(first + extent, self._length) - 1
        return first, last + 1, window_bounds(first, *self._rule)[0], window_bounds(last, *self._rule)[1]

    def tokens(self, begin: int, stop: int) -> range:
        """Return the tokens of positions of the dilation group, those beyond its end left out."""
        dilation, group = self._dilation, self._group
        return range(group + begin * dilation, group + min(stop, self._length) * dilation, dilation)

    def parts(self, begin: int, stop: int) -> list[range]:
        """Return the same of keys, in parts within the axis: where windows wrap positions may lie beyond an end."""
        if self._rule[-1] != WRAP:
            return [self.tokens(begin, stop)]
        turns = [
            (max(begin, turn) - turn, min(stop, turn + self._length) - turn)
            for turn in (-self._length, 0, self._length)
        ]
        return [self.tokens(*turn) for turn in turns if turn[0] < turn[1]]
