"""What follows from a problem and a config: extents, layout of shared memory, limits. Pure Python."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from na_compiler.problem import Problem
from na_compiler.window import group_length

if TYPE_CHECKING:
    from na_compiler.schedules.sm90.config import Sm90

__all__ = [
    "MAX_ELEMENT_STRIDE",
    "MAX_RANK_WITH_HEADS",
    "ROWS",
    "SHARED_MEMORY",
    "Columns",
    "Plan",
    "box_of_rows",
    "pieces_of",
]

# Rows of one warpgroup's product, fixed by the instruction.
ROWS = 64
# A box of TMA may step by at most 8 elements, and span at most 256 (CUDA driver API, cuTensorMapEncodeTiled).
MAX_ELEMENT_STRIDE = 8
MAX_BOX = 256
MAX_RANK = 5
# Axes of a layout that leave one for heads.
MAX_RANK_WITH_HEADS = 2
# Bytes of shared memory that a block can have (CUDA's programming guide, compute capability 9.0).
SHARED_MEMORY = 227 * 1024
_BARRIER_BYTES = 8
# Registers of a thread beside accumulators, scores and weights: addresses, the mask, the softmax. Found by compiling.
_BESIDE = 40


@functools.lru_cache(maxsize=4096)
def pieces_of(tile: tuple[int, ...], dilation: tuple[int, ...]) -> int | None:
    """Return how many boxes of TMA a tile takes, cut along axis 0; ``None`` if it can be cut into none.

    A box spans at most 256 elements an axis, those that it steps over included, and begins where a swizzle's pattern
    of 8 rows does.
    """
    if any(extent * step > MAX_BOX for extent, step in zip(tile[1:], dilation[1:], strict=True)):
        return None
    rows = math.prod(tile[1:])
    for pieces in range(1, tile[0] + 1):
        extent = tile[0] // pieces
        if tile[0] % pieces == 0 and extent * dilation[0] <= MAX_BOX and (pieces == 1 or extent * rows % 8 == 0):
            return pieces
    return None


@functools.lru_cache(maxsize=4096)
def box_of_rows(box: tuple[int, ...], rows: int) -> tuple[int, ...] | None:
    """Return the box that a box's first rows are, and every as many more; ``None`` if they are none."""
    extents = [1] * len(box)
    for axis in reversed(range(len(box))):
        extents[axis] = min(box[axis], rows)
        if rows % extents[axis] or box[axis] % extents[axis]:
            return None
        rows //= extents[axis]
    return tuple(extents) if rows == 1 else None


@dataclass(frozen=True)
class Columns:
    """How the columns of a tile (head_dim) lie in shared memory: boxes of ``width`` columns, each swizzled.

    A row of a box is as long as the swizzle's span: 128, 64 or 32 bytes.

    Parameters
    ----------
    extent
        Columns that matter.
    width
        Columns of a box.
    """

    extent: int
    width: int

    @classmethod
    @functools.cache
    def of(cls, extent: int) -> Columns:
        """Choose the widest boxes that waste no columns, or else the widest."""
        for width in (64, 32):
            if extent % width == 0:
                return cls(extent, width)
        return cls(extent, 64 if extent > 32 else 32 if extent > 16 else 16)

    @property
    def boxes(self) -> int:
        """Number of boxes."""
        return -(-self.extent // self.width)

    @property
    def swizzle(self) -> int:
        """TMA's and wgmma's number of the swizzle: 1, 2, 3 for 32, 64, 128 bytes."""
        return {16: 1, 32: 2, 64: 3}[self.width]

    def box_bytes(self, rows: int) -> int:
        """Bytes of one box."""
        return rows * self.width * 2

    def bytes(self, rows: int) -> int:
        """Bytes of all boxes."""
        return self.boxes * self.box_bytes(rows)


class Plan:
    """Extents and layout of one kernel.

    Parameters
    ----------
    problem
        What to compute.
    config
        The choices.
    """

    def __init__(self, problem: Problem, config: Sm90) -> None:
        self.problem, self.config = problem, config
        self.rank = problem.rank
        # A thread block owns queries, one box a warpgroup; tiles of keys stream by.
        self.own_box = tuple(config.query_tile)
        self.own_tile = (self.own_box[0] * config.warpgroups, *self.own_box[1:])
        self.stream_tile = tuple(config.key_tile)
        self.streamed = math.prod(self.stream_tile)
        self.columns, self.columns_v = Columns.of(problem.head_dim), Columns.of(problem.head_dim_v)
        # The longest dilation group of each axis.
        self.lengths = tuple(group_length(x, d) for x, d in zip(problem.layout, problem.dilation, strict=True))
        self.tiles = tuple(-(-length // tile) for length, tile in zip(self.lengths, self.own_tile, strict=True))
        self.groups = math.prod(problem.dilation)
        # Of one head of one batch entry.
        self.items = math.prod(self.tiles) * self.groups

    @property
    def has_head_axis(self) -> bool:
        """Whether tensor maps have an axis for heads: columns beyond head_dim are zeros then, and not the next head's.

        TMA has five axes. Three axes of layout leave one for heads and head_dim.
        """
        return self.rank <= MAX_RANK_WITH_HEADS

    @property
    def warp_box(self) -> tuple[int, ...] | None:
        """The box of queries that one warp's 16 rows are, if they are one."""
        return box_of_rows(self.own_box, 16)

    @property
    def stores_by_tma(self) -> bool:
        """Whether outputs leave by TMA, which knows no dilation here, and must not touch the next head's columns."""
        whole = self.has_head_axis or self.columns_v.extent % self.columns_v.width == 0
        return whole and all(dilation == 1 for dilation in self.problem.dilation)

    @property
    def skips(self) -> bool:
        """Whether warpgroups leave out tiles of keys that only others' windows need."""
        return not self.problem.additional_kv

    @functools.cached_property
    def query_bytes(self) -> int:
        """Bytes of one warpgroup's queries, where its outputs are gathered later."""
        return max(self.columns.bytes(ROWS), self.columns_v.bytes(ROWS))

    @property
    def key_bytes(self) -> int:
        """Bytes of a tile of keys."""
        return self.columns.bytes(self.streamed)

    @property
    def value_bytes(self) -> int:
        """Bytes of a tile of values."""
        return self.columns_v.bytes(self.streamed)

    @property
    def key_offset(self) -> int:
        """Where keys begin in shared memory."""
        return self.config.warpgroups * self.query_bytes

    @property
    def value_offset(self) -> int:
        """Where values begin in shared memory."""
        return self.key_offset + self.config.stages * self.key_bytes

    @property
    def barrier_offset(self) -> int:
        """Where barriers begin in shared memory."""
        return self.value_offset + self.config.stages * self.value_bytes

    @property
    def barriers(self) -> int:
        """Number of barriers: two for queries, and for each stage full and empty, of keys and of values."""
        return 2 + 4 * self.config.stages

    @property
    def shared_bytes(self) -> int:
        """Bytes of shared memory."""
        return self.barrier_offset + _BARRIER_BYTES * self.barriers

    @property
    def threads(self) -> int:
        """Threads of a block."""
        return 128 * (1 + self.config.warpgroups)

    @property
    def registers(self) -> tuple[int, int]:
        """Registers of a thread that loads, and of one that computes: of 65536 for all, in setmaxnreg's steps of 8."""
        return (24, 240) if self.config.warpgroups == 2 else (32, 160)

    @property
    def needed_registers(self) -> int:
        """About how many registers a computing thread needs: accumulators, scores, weights, and what is beside them."""
        return self.problem.head_dim_v // 2 + self.streamed // 2 + self.streamed // 4 + _BESIDE
