"""What follows from a problem and a config of the backward of five products. Pure Python."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from na_compiler.problem import Problem
from na_compiler.schedules.sm90.backward.config import Sweep
from na_compiler.schedules.sm90.backward.fused.limits import check_config, check_room
from na_compiler.schedules.sm90.backward.plan import SweepPlan
from na_compiler.schedules.sm90.plan import ROWS, Columns

if TYPE_CHECKING:
    from na_compiler.schedules.sm90.backward.fused.config import Sm90Fused

__all__ = ["FusedPlan"]

_PATTERN = 1024  # Bytes after which a swizzle's pattern begins again.


class FusedPlan(SweepPlan):
    """Extents and layout of the sweep over keys that also makes the gradients of queries.

    Parameters
    ----------
    problem
        What to compute.
    config
        The choices.

    Raises
    ------
    NotImplementedError
        If the form does not take the problem.
    ValueError
        If a choice is none, or there is not enough shared memory for all.
    """

    def __init__(self, problem: Problem, config: Sm90Fused) -> None:
        check_config(problem, config)
        sweep = Sweep(tuple(config.key_tile), tuple(config.query_tile), 2, config.stages)
        super().__init__(problem, sweep, "keys", ("grad_key", "grad_value"))
        self.fused = config
        axes = tuple(range(problem.rank))
        self.order, self.walk = tuple(config.order) or axes, tuple(config.walk) or axes
        self.slope_columns = Columns.of(ROWS)
        check_room(self)

    @property
    def strips(self) -> int:
        """None: this form takes no additional keys."""
        return 0

    @property
    def skips(self) -> bool:
        """Never: both warpgroups make a part of the gradients of queries, of all keys."""
        return False

    @property
    def few_blocks(self) -> bool:
        """Never: tiles come in the order in which they add to the gradients of queries."""
        return False

    @property
    def part_columns(self) -> int:
        """Columns of the gradients of queries that a warpgroup makes."""
        return self.problem.head_dim // 2

    # Workspace.

    @property
    def turns_shape(self) -> tuple[int, ...]:
        """A number for each tile of queries."""
        return (self.problem.heads, self.groups, math.prod(self.stream_tiles))

    @property
    def parts_shape(self) -> tuple[int, ...]:
        """The gradients of a tile of queries, as they lie in the registers of the warpgroups."""
        return (*self.turns_shape, self.part_bytes // 4)

    # Shared memory.

    @property
    def slope_bytes(self) -> int:
        """Bytes of a tile of gradients of scores, of one warpgroup."""
        return self.slope_columns.bytes(ROWS)

    @property
    def part_bytes(self) -> int:
        """Bytes of a part of the gradients of a tile of queries."""
        return ROWS * self.problem.head_dim * 4

    @property
    def slopes_offset(self) -> int:
        """Where gradients of scores begin."""
        return -(-super().barrier_offset // _PATTERN) * _PATTERN

    @property
    def parts_offset(self) -> int:
        """Where parts of the gradients of queries begin."""
        return self.slopes_offset + self.fused.slopes * self.config.warpgroups * self.slope_bytes

    @property
    def barrier_offset(self) -> int:
        """Where barriers begin."""
        return self.parts_offset + self.fused.parts * self.part_bytes

    @property
    def barriers(self) -> int:
        """Number of barriers, and one more place, for the number of the block's tile."""
        return super().barriers + 2 * self.fused.parts + 1
