"""What follows from a problem and a config of the backward: extents, layout of shared memory. Pure Python."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from na_compiler.problem import Problem
from na_compiler.schedules.sm90.plan import MAX_RANK_WITH_HEADS, ROWS, Columns, box_of_rows
from na_compiler.window import group_length

if TYPE_CHECKING:
    from na_compiler.schedules.sm90.backward.config import Sm90Backward, Sweep

__all__ = ["ALIGNED", "LOADING_REGISTERS", "PLANES", "BackwardPlan", "SweepPlan", "statistics_shape"]

# What a query keeps for both sweeps: lse in units of the exponent, and what all its gradients of weights are less.
PLANES = 2
_BARRIER_BYTES = 8
# Floats whose bytes a pitch of TMA is a multiple of.
_PITCH = 4
# Where a TMA box begins along its innermost axis is a multiple of 16 bytes; for statistics that axis is of queries.
ALIGNED = 4
# Registers of a multiprocessor; the most that a thread can have, in setmaxnreg's steps of 8; those of a thread that
# loads, the fewest that setmaxnreg gives (PTX ISA).
_REGISTERS, _MOST_REGISTERS = 65536, 248
LOADING_REGISTERS = 24
# Thread blocks that the additional keys' gradients are spread over, about: two for each of an H100's 132
# multiprocessors, so that one has work while the other waits. Assumed.
_STRIP_BLOCKS = 264
# Four for each multiprocessor: of more, the last ones are a small part. Assumed.
_FEW_BLOCKS = 528


def _round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


def statistics_shape(problem: Problem) -> tuple[int, ...]:
    """Return the workspace of statistics, without the batch: planes, heads, dilation groups, the tokens of a group."""
    *outer, inner = (group_length(x, d) for x, d in zip(problem.layout, problem.dilation, strict=True))
    return (PLANES, problem.heads, math.prod(problem.dilation), *outer, _round_up(inner, _PITCH))


class BackwardPlan:
    """Extents of a backward and its kernels.

    Attributes
    ----------
    sweeps
        The kernels over the layout, in the order of their launches.
    additional
        Those for the gradients of additional keys and values.
    """

    def __init__(self, problem: Problem, config: Sm90Backward) -> None:
        self.problem, self.config = problem, config
        self.lengths = tuple(group_length(x, d) for x, d in zip(problem.layout, problem.dilation, strict=True))
        self.groups = math.prod(problem.dilation)
        results = [("grad_key",), ("grad_value",)] if config.split else [("grad_key", "grad_value")]
        self.sweeps = [
            SweepPlan(problem, config.queries, "queries", ("grad_query",)),
            *(SweepPlan(problem, config.keys, "keys", names) for names in results),
        ]
        self.additional = (
            [SweepPlan(problem, config.keys, "additional", names) for names in results] if problem.additional_kv else []
        )

    @property
    def strips(self) -> int:
        """Strips of queries, whose parts of the gradients of additional keys are summed by one thread block each."""
        return self.additional[0].strips if self.additional else 0


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
    The two sides mirror each other. A block owns rows of two tensors, and rows of two others stream by::

        queries     own query, grad_output    stream key, value
        keys        own key, value            stream query, grad_output

    The first of a pair make scores, ``S = own[0] stream[0]^T``; the second make the gradients of the weights,
    ``own[1] stream[1]^T``.
    """

    def __init__(self, problem: Problem, config: Sweep, side: str, results: tuple[str, ...]) -> None:
        self.problem, self.config, self.side, self.results = problem, config, side, results
        self.rank = problem.rank
        self.own_box = (ROWS,) if side == "additional" else tuple(config.own_tile)
        self.own_tile = (self.own_box[0] * config.warpgroups, *self.own_box[1:])
        self.stream_tile = tuple(config.stream_tile)
        self.streamed = math.prod(self.stream_tile)
        # Of the first tensors of the pairs, and of the second.
        self.columns = (Columns.of(problem.head_dim), Columns.of(problem.head_dim_v))
        self.lengths = tuple(group_length(x, d) for x, d in zip(problem.layout, problem.dilation, strict=True))
        self.groups = math.prod(problem.dilation)
        along = self.lengths if side != "additional" else ()
        self.tiles = tuple(
            -(-length // tile) for length, tile in zip(along, self.own_tile, strict=side != "additional")
        )
        # Of one head of one batch entry.
        self.items = math.prod(self.tiles) * self.groups

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

    @property
    def owned(self) -> tuple[int, ...]:
        """Which of the owned pair are loaded."""
        return (0, 1) if self.needs_gradient else (0,)

    @property
    def has_head_axis(self) -> bool:
        """Whether tensor maps have an axis for heads; see `na_compiler.schedules.sm90.plan.Plan`."""
        return self.rank <= MAX_RANK_WITH_HEADS

    @property
    def warp_box(self) -> tuple[int, ...] | None:
        """The box that one warp's 16 rows are, if they are one."""
        return box_of_rows(self.own_box, 16)

    @property
    def skips(self) -> bool:
        """Whether warpgroups leave out tiles that only others need."""
        one_pass = self.problem.group_size == 1 or self.of_queries
        extra = self.of_queries and self.problem.additional_kv
        return self.config.warpgroups > 1 and self.side != "additional" and one_pass and not extra

    @property
    def few_blocks(self) -> bool:
        """Whether a batch entry has so few thread blocks that it matters in which order they come."""
        blocks: int = self.items * self.heads
        return blocks < _FEW_BLOCKS

    @property
    def strips(self) -> int:
        """Strips of queries, for additional keys."""
        return min(max(_STRIP_BLOCKS // self.heads, 1), self.stream_items)

    @property
    def stream_tiles(self) -> tuple[int, ...]:
        """Tiles of queries that a dilation group has, along each axis."""
        return tuple(-(-length // tile) for length, tile in zip(self.lengths, self.stream_tile, strict=True))

    @property
    def stream_items(self) -> int:
        """Tiles of queries of all heads that share a key."""
        return math.prod(self.stream_tiles) * self.groups * self.problem.group_size

    # Shared memory.

    def own_offset(self, which: int) -> int:
        """Where owned tensors begin in a warpgroup's part of shared memory; results take their places."""
        return self.columns[0].bytes(ROWS) if which and len(self.owned) > 1 else 0

    @property
    def own_bytes(self) -> int:
        """Bytes of a warpgroup's owned rows."""
        if len(self.owned) > 1:
            return sum(columns.bytes(ROWS) for columns in self.columns)
        return max(columns.bytes(ROWS) for columns in self.columns)

    def stream_bytes(self, which: int) -> int:
        """Bytes of a tile that streams by."""
        return self.columns[which].bytes(self.streamed)

    def stream_offset(self, which: int) -> int:
        """Where the tiles of one tensor that streams by begin."""
        first = self.config.warpgroups * self.own_bytes
        return first + (self.config.stages * self.stream_bytes(0) if which else 0)

    @property
    def plane_bytes(self) -> int:
        """Bytes of one plane of a tile's statistics."""
        return 0 if self.of_queries else _round_up(self.streamed * 4, 128)

    @property
    def statistics_offset(self) -> int:
        """Where statistics begin."""
        return self.stream_offset(1) + self.config.stages * self.stream_bytes(1)

    @property
    def barrier_offset(self) -> int:
        """Where barriers begin."""
        return self.statistics_offset + self.config.stages * PLANES * self.plane_bytes

    @property
    def barriers(self) -> int:
        """Number of barriers: one for what is owned, and for each stage full and empty, of both tensors."""
        return 1 + 4 * self.config.stages

    @property
    def shared_bytes(self) -> int:
        """Bytes of shared memory."""
        return self.barrier_offset + _BARRIER_BYTES * self.barriers

    # Threads.

    @property
    def computing_warps(self) -> int:
        """Warps that compute: they come first."""
        return 4 * self.config.warpgroups

    @property
    def threads(self) -> int:
        """Threads of a block. One warp loads; it has a warpgroup about it where registers change hands."""
        return 32 * self.computing_warps + (128 if self.exchanges_registers else 32)

    @property
    def exchanges_registers(self) -> bool:
        """Whether those that load hand registers over to those that compute: where these need more than their share."""
        return self.config.warpgroups > 1 or self.needed_registers > self._share

    @property
    def _share(self) -> int:
        """Registers of each thread with one loading warp; every fourth warp has a fourth of the multiprocessor."""
        warps = -(-self.config.blocks * (self.computing_warps + 1) // 4)
        return _REGISTERS // 4 // (32 * warps) // 8 * 8

    @property
    def registers(self) -> int:
        """Registers that a computing thread has, once those that load have handed over theirs."""
        if not self.exchanges_registers:
            return self._share
        warpgroups = self.config.warpgroups
        launched = min(_REGISTERS // (self.config.blocks * self.threads) // 8 * 8, _MOST_REGISTERS)
        return min((launched * (warpgroups + 1) - LOADING_REGISTERS) // warpgroups // 8 * 8, _MOST_REGISTERS)

    @property
    def needed_registers(self) -> int:
        """About how many registers a computing thread needs: sums, scores, their gradients, operands, and the rest."""
        sums = sum((self.problem.head_dim, self.problem.head_dim_v)[which] // 2 for which in self.sums)
        both = 2 if self.needs_gradient else 1
        packed = len(self.sums) if self.config.defer else 1
        # Found by compiling, as the rest is: with more boxes of columns there is more beside.
        rest = 50 if max(self.problem.head_dim, self.problem.head_dim_v) > 128 else 34
        return sums + both * self.streamed // 2 + packed * self.streamed // 4 + rest
