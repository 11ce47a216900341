"""What follows from a problem and a config of the backward: extents, layout of shared memory. Pure Python."""

from __future__ import annotations

import functools
import math
from functools import cached_property
from typing import TYPE_CHECKING

from na_compiler.operands import KEY_MASK, RELATIVE_POSITION_BIAS
from na_compiler.problem import Problem
from na_compiler.schedules.mma.backward.sweep_config import Sweep
from na_compiler.schedules.mma.boxes import largest_inverses, largest_unions, usual_inverses
from na_compiler.schedules.mma.plan import GROUP, ROWS, Tile
from na_compiler.tensorir.axes import round_up
from na_compiler.window import group_length

if TYPE_CHECKING:
    from na_compiler.schedules.mma.backward.config import MmaBackward

__all__ = ["MOST_INNER", "MOST_LISTED", "STATISTICS", "AdditionalPlan", "BackwardPlan", "SweepPlan", "places_of",
           "statistics_shape"]  # fmt: skip

# What a query keeps for the keys' kernel: lse in units of the exponent, and what all its gradients of weights are less.
STATISTICS = 2
_ALIGNMENT = 128
_WORD = 32
# Additional keys that come at once, about.
_TAIL = 64
# Thread blocks that the additional keys' gradients are spread over, about: two for each multiprocessor of a large GPU.
_STRIP_BLOCKS = 264
# Of their blocks, for head_dims up to 128 and beyond: warps, queries that come at once, and groups of 16 of them.
_NARROW, _NARROW_STRIP, _WIDE_STRIP = 128, (4, 64, 2), (2, 32, 1)
# Bytes of a warp's tables of the gradient of biases, up to which it has one for each lane of four. Assumed: what 16
# warps of a multiprocessor can spare.
_TABLES_BYTES = 6144
# Registers for places in a table of biases: those of rows, and what is added up. Assumed.
_BIAS = 8
# A number of the list is divided by extents of the box by a multiplication, which is exact up to these; see `Lists`.
MOST_LISTED, MOST_INNER = (1 << 12) - 1, (1 << 8) - 1


@functools.cache
def _rows_of(columns: int) -> Tile:
    """Return a warp's rows."""
    return Tile(columns, ROWS)


def places_of(problem: Problem) -> int:
    """Return how many biases a head has."""
    return math.prod(2 * extent - 1 for extent in problem.kernel_size)


def statistics_shape(problem: Problem) -> tuple[int, ...]:
    """Return the workspace of statistics, without the batch."""
    return (problem.heads, *problem.layout, STATISTICS)


class BackwardPlan:
    """Extents of a backward and its kernels.

    Attributes
    ----------
    sweeps
        The kernels over the layout in the order of their launches; the first one writes the statistics that the others
        read.
    additional
        Those for the gradients of additional keys and values.
    """

    def __init__(self, problem: Problem, config: MmaBackward) -> None:
        self.problem, self.config = problem, config
        results = [("grad_key",), ("grad_value",)] if config.split else [("grad_key", "grad_value")]
        self.sweeps = [
            SweepPlan(problem, config.queries, "queries", ("grad_query",)),
            *(SweepPlan(problem, config.keys, "keys", names) for names in results),
        ]
        self.additional = [AdditionalPlan(problem, names) for names in results] if problem.additional_kv else []

    @property
    def shared_bytes(self) -> int:
        """Bytes of shared memory of the kernel that needs most."""
        return max(sweep.shared_bytes for sweep in (*self.sweeps, *self.additional))

    @property
    def strips(self) -> int:
        """Strips of queries, whose parts of the gradients of additional keys are summed by one thread block each."""
        return self.additional[0].strips if self.additional else 0

    @property
    def bias_space(self) -> tuple[int, ...]:
        """Workspace of what each block gives to the gradient of biases, without the batch."""
        return (self.problem.heads, self.sweeps[0].items, places_of(self.problem))


class SweepPlan:
    """Extents and layout of one kernel.

    Parameters
    ----------
    problem
        What to compute.
    config
        The choices.
    side
        What a thread block owns: ``"queries"``, ``"keys"``, or ``"additional"`` keys.
    results
        Names of the gradients.

    Notes
    -----
    The two sides mirror each other. A warp owns rows of two tensors, and rows of two others stream by::

        queries     own query, grad_output    stream key, value
        keys        own key, value            stream query, grad_output

    The first of a pair make scores, ``S = own[0] stream[0]^T``; the second make the gradients of the weights,
    ``own[1] stream[1]^T``.
    """

    def __init__(self, problem: Problem, config: Sweep, side: str, results: tuple[str, ...]) -> None:
        self.problem, self.config, self.side, self.results = problem, config, side, results
        self.rank = problem.rank
        self.warp_box = tuple(config.warp_box)
        self.warps = math.prod(config.warps)
        self.own_tile = tuple(box * count for box, count in zip(self.warp_box, config.warps, strict=True))
        # The longest dilation group of each axis.
        self.lengths = tuple(group_length(x, d) for x, d in zip(problem.layout, problem.dilation, strict=True))
        # Additional keys are no tiles of the layout.
        along = self.lengths if side != "additional" else ()
        self.tiles = tuple(-(-length // tile) for length, tile in zip(along, self.own_tile, strict=bool(along)))
        # Of one head of one batch entry.
        self.items = math.prod(self.tiles) * math.prod(problem.dilation)
        # Columns of the first tensors of the pairs, and of the second.
        self.columns = (problem.head_dim, problem.head_dim_v)

    @property
    def own_box(self) -> tuple[int, ...]:
        """Box of tokens that one warp owns."""
        return self.warp_box

    @property
    def of_queries(self) -> bool:
        """Whether the block owns queries."""
        return self.side == "queries"

    @property
    def heads(self) -> int:
        """Heads of the owned tensors."""
        return self.problem.heads if self.of_queries else self.problem.heads_kv

    @property
    def sums(self) -> tuple[int, ...]:
        """Which tensors that stream by are summed up: by the gradients of scores the first, by weights the second."""
        return tuple(1 if name == "grad_value" else 0 for name in self.results)

    @property
    def needs_gradient(self) -> bool:
        """Whether gradients of scores are needed: for all but the gradient of values."""
        return 0 in self.sums

    @cached_property
    def union(self) -> tuple[int, ...]:
        """Box of tokens that a block's tokens come to, at most."""
        return (largest_unions if self.of_queries else largest_inverses)(self.problem, self.own_tile)

    @cached_property
    def warp_union(self) -> tuple[int, ...]:
        """Box of tokens that a warp's tokens come to, at most."""
        return (largest_unions if self.of_queries else largest_inverses)(self.problem, self.warp_box)

    @cached_property
    def usual_union(self) -> tuple[int, ...]:
        """Box of tokens that a warp's tokens come to away from borders: keys near one are seen by more queries."""
        return self.warp_union if self.of_queries else usual_inverses(self.problem, self.warp_box)

    @cached_property
    def stream_tile(self) -> tuple[int, ...]:
        """Box of tokens that are loaded at once."""
        return self.union if self.config.stream_tile is None else tuple(self.config.stream_tile)

    @property
    def streamed(self) -> int:
        """Tokens whose scores are computed together."""
        return GROUP * self.config.chunk

    @property
    def stages(self) -> int:
        """Tiles that shared memory holds."""
        return 1 if self.config.stream_tile is None else self.config.stages

    @cached_property
    def listed(self) -> int:
        """Tokens of a tile that a warp's tokens see together, at most, in whole steps."""
        pairs = zip(self.warp_union, self.stream_tile, strict=True)
        return max(round_up(math.prod(min(union, tile) for union, tile in pairs), self.streamed), self.tail)

    @property
    def tail(self) -> int:
        """Additional keys that come at once, after all others; 0 where there are none."""
        return round_up(_TAIL, self.streamed) if self.of_queries and self.problem.additional_kv else 0

    @property
    def order(self) -> tuple[int, ...]:
        """By how much a step along each axis changes the number of a streamed row that swizzles it.

        Such that rows that follow each other in a warp's list lie in different banks, where its box is the usual one.
        """
        box = [min(union, tile) for union, tile in zip(self.usual_union, self.stream_tile, strict=True)]
        return tuple(math.prod(box[axis + 1 :]) for axis in range(self.rank))

    @property
    def word(self) -> int:
        """Tokens of the list that a word of the mask is for."""
        return _WORD if self.config.chunk % 2 == 0 else GROUP

    # Shared memory: each warp's rows, the ring of tiles, each warp's tables.

    def own(self, which: int) -> Tile:
        """Return a warp's rows of an owned tensor."""
        return _rows_of(self.columns[which])

    @property
    def owned(self) -> tuple[int, ...]:
        """Which of the owned pair are loaded."""
        return (0, 1) if self.needs_gradient else (0,)

    def own_offset(self, which: int) -> int:
        """Where an owned tensor begins in a warp's part; results take their places. The third is that of outputs."""
        return sum(self.own(i).bytes for i in (0, 1)[:which])

    @property
    def own_bytes(self) -> int:
        """Bytes of a warp's rows: for statistics the queries' kernel has the outputs as well."""
        return self.own_offset(2) + (self.own(1).bytes if self.of_queries else 0)

    def stream(self, which: int) -> Tile:
        """Return a tile of a tensor that streams by."""
        return self._stream[which]

    @cached_property
    def _stream(self) -> list[Tile]:
        return [Tile(columns, max(math.prod(self.stream_tile), self.tail)) for columns in self.columns]

    def stream_offset(self, which: int) -> int:
        """Where the tiles of a tensor that streams by begin; the third is that of statistics."""
        first = self.warps * self.own_bytes
        return first + self.stages * sum(self.stream(i).bytes for i in (0, 1)[:which])

    @property
    def statistics_bytes(self) -> int:
        """Bytes of the statistics of a tile of queries."""
        return 0 if self.of_queries else round_up(math.prod(self.stream_tile) * 4 * STATISTICS, _ALIGNMENT)

    @property
    def same_rows(self) -> bool:
        """Whether rows of both tensors that stream by are as long."""
        return self.stream(0).width == self.stream(1).width

    @property
    def table_offset(self) -> int:
        """Where the warps' tables begin."""
        return self.stream_offset(2) + self.stages * self.statistics_bytes

    @property
    def addresses_bytes(self) -> int:
        """Bytes of a list of addresses."""
        return round_up(4 * self.listed, _ALIGNMENT)

    @property
    def lists(self) -> int:
        """Lists of addresses."""
        return 1 if self.same_rows else 2

    @property
    def mask_bytes(self) -> int:
        """Bytes of the words of a mask: for each word of tokens one for each row."""
        return round_up(4 * ROWS * self.listed // self.word, _ALIGNMENT)

    @property
    def list_statistics_bytes(self) -> int:
        """Bytes of the statistics of a list of queries."""
        return 0 if self.of_queries else round_up(4 * STATISTICS * self.listed, _ALIGNMENT)

    @property
    def has_bias(self) -> bool:
        """Whether scores have biases by relative position: none of additional keys has."""
        return self.side != "additional" and self.problem.has(RELATIVE_POSITION_BIAS)

    @property
    def has_key_mask(self) -> bool:
        """Whether keys may be hidden."""
        return self.side != "additional" and self.problem.has(KEY_MASK)

    @property
    def places_bytes(self) -> int:
        """Bytes of the places of a list's tokens in a table of biases."""
        return round_up(4 * self.listed, _ALIGNMENT) if self.has_bias else 0

    @property
    def hidden_bytes(self) -> int:
        """Bytes of the words that tell which keys of a list take part; the last step may be half of a vote."""
        hides = self.of_queries and self.has_key_mask
        return round_up(4 * (self.listed // self.word + 1), _ALIGNMENT) if hides else 0

    @property
    def table_bytes(self) -> int:
        """Bytes of a warp's tables: addresses, mask, statistics, places of biases, keys that take part."""
        lists = self.lists * self.addresses_bytes
        return lists + self.mask_bytes + self.list_statistics_bytes + self.places_bytes + self.hidden_bytes

    @property
    def sums_bias(self) -> bool:
        """Whether the kernel sums up the gradient of biases: where queries are owned each pair is met once."""
        return self.of_queries and self.has_bias

    @property
    def bias_pitch(self) -> int:
        """Numbers from one of a warp's tables of that gradient to the next: four of them lie in different banks."""
        return round_up(places_of(self.problem), _WORD) + 8

    @property
    def bias_tables(self) -> int:
        """How many of them a warp has: 1, 2 or 4, for four lanes that meet a row's keys at once."""
        return next((n for n in (4, 2) if 4 * n * self.bias_pitch <= _TABLES_BYTES), 1)

    @property
    def bias_offset(self) -> int:
        """Where these tables begin, one warp's after another's."""
        return self.table_offset + self.warps * self.table_bytes

    @property
    def bias_bytes(self) -> int:
        """Bytes of those of a warp."""
        return 4 * self.bias_tables * self.bias_pitch if self.sums_bias else 0

    @cached_property
    def shared_bytes(self) -> int:
        """Bytes of shared memory."""
        return self.bias_offset + self.warps * self.bias_bytes

    @property
    def threads(self) -> int:
        """Threads of a block."""
        return 32 * self.warps

    # Registers.

    @property
    def _sums_registers(self) -> int:
        return sum(self.own(which).width // 2 for which in self.sums)

    @property
    def _step_registers(self) -> int:
        """Scores, their gradients, and operands of sums."""
        both = 2 if self.needs_gradient else 1
        return both * self.streamed // 2 + self.streamed // 4

    @property
    def keeps_own(self) -> bool:
        """Whether a warp's rows stay in registers; they are read again for each step otherwise."""
        rows = sum(self.own(which).width // 4 for which in self.owned)
        return rows + self._sums_registers + self._step_registers <= 160

    @property
    def needed_registers(self) -> int:
        """About how many registers a thread needs."""
        rows = sum(self.own(which).width // 4 for which in self.owned) if self.keeps_own else 4
        # Found by compiling: addresses of copies, and of what streams by in a ring.
        beside = 40 + 4 * self.rank + (0 if self.of_queries else 4) + (12 if self.config.stream_tile else 0)
        if self.has_bias:
            beside += _BIAS + self.streamed // 4
        return beside + rows + self._sums_registers + self._step_registers


class AdditionalPlan(SweepPlan):
    """Extents and layout of a kernel whose blocks own additional keys, which all queries see.

    Parameters
    ----------
    problem
        What to compute.
    results
        Names of the gradients, as of the keys' kernel.
    """

    def __init__(self, problem: Problem, results: tuple[str, ...]) -> None:
        is_wide = max(problem.head_dim, problem.head_dim_v) > _NARROW
        warps, tokens, chunk = _WIDE_STRIP if is_wide else _NARROW_STRIP
        tile: list[int] = []
        for layout, dilation in zip(reversed(problem.layout), reversed(problem.dilation), strict=True):
            tile.insert(0, min(group_length(layout, dilation), max(tokens // math.prod(tile), 1)))
        super().__init__(problem, Sweep((ROWS,), (warps,), tuple(tile), 1, chunk), "additional", results)

    @property
    def warp_union(self) -> tuple[int, ...]:
        """All of a tile."""
        return self.stream_tile

    usual_union = warp_union

    @property
    def strips(self) -> int:
        """Strips of queries."""
        return min(max(_STRIP_BLOCKS // self.heads, 1), self.stream_items)

    @property
    def stream_tiles(self) -> tuple[int, ...]:
        """Tiles of queries that a dilation group has, along each axis."""
        return tuple(-(-length // tile) for length, tile in zip(self.lengths, self.stream_tile, strict=True))

    @property
    def stream_items(self) -> int:
        """Tiles of queries of all heads that share a key."""
        return math.prod(self.stream_tiles) * math.prod(self.problem.dilation) * self.problem.group_size
