"""What follows from a problem and a config: extents, layout of shared memory. Pure Python."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from na_compiler.operands import KEY_MASK, RELATIVE_POSITION_BIAS
from na_compiler.problem import Problem
from na_compiler.schedules.mma.boxes import largest_unions
from na_compiler.tensorir.axes import round_up
from na_compiler.window import SHIFT, group_length

if TYPE_CHECKING:
    from na_compiler.schedules.mma.config import Mma

__all__ = ["CHUNK", "CHUNK_BYTES", "GROUP", "ROWS", "Plan", "Tile"]

# Rows of one product, fixed by the instruction. Keys of a group: its depth, and two of its widths.
ROWS = 16
GROUP = 16
# Bytes of a chunk: what one copy moves, and what shared memory exchanges by the swizzle. And how many elements of 16
# bits, or columns of an accumulator, that is.
CHUNK_BYTES = 16
CHUNK = 8
# Bytes: a line of all banks of shared memory.
_ALIGNMENT = 128
# Registers of a thread: for queries, sums and scores together, beyond which queries are read again; and beside those,
# for addresses, the mask and the softmax. Assumed: the two are three quarters of what a thread can have.
_KEPT, _BESIDE = 144, 48
# And for the mask and the softmax of another 16 rows. Assumed.
_ANOTHER = 16
# And for places in a table of biases, and for bits of a key mask. Assumed.
_BIAS, _KEY_MASK = 16, 8


@dataclass(frozen=True)
class Tile:
    """Rows of head_dim elements in shared memory, in chunks of 16 bytes that a swizzle exchanges.

    Eight lanes of ``ldmatrix`` read a chunk of each of eight rows at once, which must lie in different banks: chunk
    ``c`` of row ``r`` lies at ``c ^ (r >> shift & mask)``.

    Parameters
    ----------
    extent
        Elements of a row that matter.
    rows
        Rows.
    element_bytes
        Bytes of an element.
    """

    extent: int
    rows: int
    element_bytes: int = 2

    @property
    def per_chunk(self) -> int:
        """Elements of a chunk."""
        return CHUNK_BYTES // self.element_bytes

    @cached_property
    def width(self) -> int:
        """Elements of a row: whole steps of a product, the last ones zeros."""
        return round_up(self.extent, 2 * self.per_chunk)

    @property
    def chunks(self) -> int:
        """Chunks of a row."""
        return self.width // self.per_chunk

    @property
    def mask(self) -> int:
        """Bits of a chunk's number that the swizzle changes."""
        return math.gcd(self.chunks, 8) - 1

    @property
    def shift(self) -> int:
        """How often the swizzle repeats: rows that share a line of all banks, as a power of two."""
        return {7: 0, 3: 1, 1: 2}[self.mask]

    @property
    def row_bytes(self) -> int:
        """Bytes of a row."""
        return self.width * self.element_bytes

    @cached_property
    def bytes(self) -> int:
        """Bytes of all rows."""
        return round_up(self.rows * self.width * self.element_bytes, _ALIGNMENT)


class Plan:
    """Extents and layout of one kernel.

    Parameters
    ----------
    problem
        What to compute.
    config
        The choices.
    """

    def __init__(self, problem: Problem, config: Mma) -> None:
        self.problem, self.config = problem, config
        self.rank = problem.rank
        self.warp_box = tuple(config.warp_box)
        self.warps = math.prod(config.warps)
        self.own_tile = tuple(box * count for box, count in zip(self.warp_box, config.warps, strict=True))
        # The longest dilation group of each axis.
        self.lengths = tuple(group_length(x, d) for x, d in zip(problem.layout, problem.dilation, strict=True))
        self.tiles = tuple(-(-length // tile) for length, tile in zip(self.lengths, self.own_tile, strict=True))
        # Of those heads of one batch entry that a warp takes at once.
        self.items = math.prod(self.tiles) * math.prod(problem.dilation)
        self.packed = config.heads
        # Queries of a warp, and how many products they fill: each of keys serves all of them.
        self.rows = math.prod(self.warp_box) * self.packed
        self.row_tiles = self.rows // ROWS

    def is_whole(self, axis: int) -> bool:
        """Return whether every window is all of its dilation group along an axis: nothing there depends on a query."""
        problem = self.problem
        length, dilation = self.lengths[axis], problem.dilation[axis]
        same = problem.layout[axis] % dilation == 0 and problem.kernel_size[axis] == length
        return same and not problem.is_causal[axis] and problem.border[axis] == SHIFT

    @property
    def is_dense(self) -> bool:
        """Whether every window is all of its dilation group: no score of a key that exists is masked."""
        return all(map(self.is_whole, range(self.rank)))

    @property
    def own_box(self) -> tuple[int, ...]:
        """Box of queries that one warp has."""
        return self.warp_box

    @cached_property
    def is_resident(self) -> bool:
        """Whether all keys and values of a block are kept in shared memory."""
        return self.config.key_tile is None

    @cached_property
    def union(self) -> tuple[int, ...]:
        """Box of keys that a block's windows come to, at most."""
        return largest_unions(self.problem, self.own_tile)

    @cached_property
    def warp_union(self) -> tuple[int, ...]:
        """Box of keys that a warp's windows come to, at most."""
        return largest_unions(self.problem, self.warp_box)

    @cached_property
    def stream_tile(self) -> tuple[int, ...]:
        """Box of keys that are loaded at once."""
        return self.union if self.config.key_tile is None else tuple(self.config.key_tile)

    @property
    def groups(self) -> int:
        """Groups of 16 keys of a warp's own box."""
        return -(-math.prod(self.warp_union) // GROUP)

    @cached_property
    def streamed(self) -> int:
        """Keys whose scores are computed together."""
        if self.config.key_tile is not None:
            return math.prod(self.config.key_tile)
        return GROUP * min(self.config.chunk, self.groups)

    @cached_property
    def query(self) -> Tile:
        """A warp's queries."""
        return Tile(self.problem.head_dim, self.rows, self.problem.element_bytes)

    @cached_property
    def key(self) -> Tile:
        """A tile of keys."""
        return Tile(self.problem.head_dim, self._rows, self.problem.element_bytes)

    @cached_property
    def value(self) -> Tile:
        """A tile of values."""
        return Tile(self.problem.head_dim_v, self._rows, self.problem.element_bytes)

    @property
    def _rows(self) -> int:
        """Rows of a tile of keys; additional keys, if all others stay there, take their place."""
        rows = math.prod(self.stream_tile)
        return max(rows, self.streamed) if self.problem.additional_kv else rows

    @cached_property
    def output(self) -> Tile:
        """A warp's outputs, which are gathered where its queries were."""
        return Tile(self.problem.head_dim_v, self.rows, self.problem.element_bytes)

    @property
    def is_tf32(self) -> bool:
        """Whether products round numbers of 32 bits to TF32."""
        return self.problem.dtype == "float32"

    @property
    def query_bytes(self) -> int:
        """Bytes of one warp's queries, or outputs."""
        return max(self.query.bytes, self.output.bytes)

    @property
    def stages(self) -> int:
        """Tiles of keys that shared memory holds."""
        return 1 if self.is_resident else self.config.stages

    @property
    def key_offset(self) -> int:
        """Where keys begin in shared memory."""
        return self.warps * self.query_bytes

    @property
    def value_offset(self) -> int:
        """Where values begin in shared memory."""
        return self.key_offset + self.stages * self.key.bytes

    @property
    def shared_bytes(self) -> int:
        """Bytes of shared memory."""
        return self.value_offset + self.stages * self.value.bytes

    @property
    def threads(self) -> int:
        """Threads of a block."""
        return 32 * self.warps

    @property
    def keeps_queries(self) -> bool:
        """Whether a warp's queries stay in registers; they are read again for each tile of keys otherwise."""
        return self.row_tiles * (2 * self.query.chunks + self.value.width // 2 + self.streamed // 2) <= _KEPT

    @property
    def needed_registers(self) -> int:
        """About how many registers a thread needs: queries, accumulators, scores, and what is beside them."""
        queries = 2 * self.query.chunks if self.keeps_queries else 4
        products = self.row_tiles * (queries + self.problem.head_dim_v // 2 + self.streamed // 2)
        beside = _BESIDE + (self.row_tiles - 1) * _ANOTHER
        bias = _BIAS if self.problem.has(RELATIVE_POSITION_BIAS) else 0
        key_mask = _KEY_MASK if self.problem.has(KEY_MASK) else 0
        return beside + bias + key_mask + products
