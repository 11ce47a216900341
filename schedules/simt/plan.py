"""`DirectPlan`: the static extents that the direct descriptions are written with.

A direct description takes one query, or one key, at a time and visits exactly the keys of its window, or the queries
that see it: no boxes of keys that several queries share, and next to no masks. A few threads (*lanes*) share the
elements of its rows. Keys, or queries, are visited a small *chunk* at a time, whose scores are at hand together.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

from na_compiler.counting import group_lengths, most_queries
from na_compiler.problem import Problem
from na_compiler.tensorir.axes import AXES, Extents, round_up
from na_compiler.window import CUT, SHIFT, border_kind

__all__ = ["DirectAxis", "DirectPlan"]

# Parts of the gradient of biases that a head leaves, where there are more than places.
_PARTS = 1 << 16


@dataclass(frozen=True)
class DirectAxis:
    """One axis of a `DirectPlan`.

    Parameters
    ----------
    layout, kernel_size, stride, dilation, is_causal, border
        As in the problem; an axis of one token where it has none.
    keys
        Keys of a chunk.
    queries
        Queries of a chunk.
    """

    layout: int
    kernel_size: int
    stride: int
    dilation: int
    is_causal: bool
    border: str
    keys: int
    queries: int

    @property
    def key_chunks(self) -> int:
        """Chunks of a window."""
        return -(-self.most_keys // self.keys)

    @property
    def query_chunks(self) -> int:
        """Chunks of the queries that see a key, at most."""
        return -(-self.most_queries // self.queries)

    @property
    def masks_keys(self) -> bool:
        """Whether a chunk may hold keys that are not in the window."""
        return self.is_causal or border_kind(self.border) == CUT or self.kernel_size % self.keys != 0

    @property
    def most_keys(self) -> int:
        """Keys that a query sees, at most: fewer than kernel_size where windows are cut on both sides."""
        return min(self.kernel_size, max(group_lengths(self.layout, self.dilation)))

    @property
    def most_queries(self) -> int:
        """Queries that see one key, at most: more than kernel_size near a border, where windows are shifted."""
        rule = (self.kernel_size, self.stride, self.is_causal, self.border)
        return max(most_queries(length, *rule) for length in group_lengths(self.layout, self.dilation))


@dataclass(frozen=True)
class DirectPlan:
    """A problem and how its direct description is cut.

    Parameters
    ----------
    problem
        What to compute.
    lanes
        Threads that share the elements of a row.
    rows
        Queries, or keys, of a block.
    keys, queries
        Keys of the window, and queries that see a key, of a chunk, per axis.
    vector
        Elements of a row that are read together, and lie together in a lane; divides head_dim and head_dim_v.
    strip
        Tokens whose part of the gradients of additional keys is summed first.
    thread
        What the loop over lanes is bound to where a block changes a buffer in place, which schedules cannot bind;
        empty for a plain loop.

    Examples
    --------
    >>> plan = DirectPlan(Problem((56, 56), 4, 32, 7), lanes=8, rows=16, keys=(1, 1, 7), queries=(1, 1, 5))
    >>> plan.blocks, [axis.key_chunks for axis in plan.axes], [axis.query_chunks for axis in plan.axes]
    (196, [1, 7, 1], [1, 10, 2])
    """

    problem: Problem
    lanes: int = 1
    rows: int = 1
    keys: Extents = (1, 1, 1)
    queries: Extents = (1, 1, 1)
    vector: int = 1
    strip: int = 1
    thread: str = ""

    @functools.cached_property
    def axes(self) -> tuple[DirectAxis, DirectAxis, DirectAxis]:
        """The three axes; those that the problem does not have come first."""
        problem = self.problem
        missing = AXES - problem.rank
        parameters = zip(
            (1,) * missing + problem.layout,
            (1,) * missing + problem.kernel_size,
            (1,) * missing + problem.stride,
            (1,) * missing + problem.dilation,
            (False,) * missing + problem.is_causal,
            (SHIFT,) * missing + problem.border,
            self.keys,
            self.queries,
            strict=True,
        )
        first, second, third = (DirectAxis(*axis) for axis in parameters)
        return first, second, third

    @property
    def blocks(self) -> int:
        """Blocks of a head's tokens."""
        return -(-self.problem.tokens // self.rows)

    @property
    def strips(self) -> int:
        """Strips of a head's tokens."""
        return -(-self.problem.tokens // self.strip)

    @property
    def offsets(self) -> int:
        """Places of a table of biases by relative position."""
        return math.prod(2 * axis.kernel_size - 1 for axis in self.axes)

    @property
    def bias_strips(self) -> int:
        """Strips of a head's tokens whose parts of the gradient of biases are summed first: few where they are many."""
        return max(1, min(-(-self.problem.tokens // self.strip), _PARTS // self.offsets))

    @property
    def bias_strip(self) -> int:
        """Tokens of one."""
        return -(-self.problem.tokens // self.bias_strips)

    @property
    def key_count(self) -> int:
        """Keys of a chunk."""
        return math.prod(self.keys)

    @property
    def query_count(self) -> int:
        """Queries of a chunk."""
        return math.prod(self.queries)

    @property
    def head_dim(self) -> int:
        """head_dim, rounded up so that lanes have equal parts."""
        return self.padded(self.problem.head_dim)

    @property
    def head_dim_v(self) -> int:
        """head_dim_v, rounded up so that lanes have equal parts."""
        return self.padded(self.problem.head_dim_v)

    def padded(self, width: int) -> int:
        """Return a row's width, rounded up so that lanes have equal parts."""
        return round_up(width, self.lanes * self.vector)
