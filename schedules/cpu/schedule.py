"""CPU schedule with one query in each vector lane.

Scores of a tile are ``S[key, lane] += Q[d, lane] * K[key, d]``: a vector of queries, transposed once, times one
element of a key that is broadcast, so keys need no packing and the softmax no operation across lanes. The weighted
sum turns to ``O[query, d] += P[key, query] * V[key, d]``, with the lanes along ``d``, so outputs need no transposing
back. Every product keeps a block of accumulators in registers.
"""

from __future__ import annotations

import math
from typing import Any

from tvm import s_tir, tirx

from na_compiler.operands import KEY_MASK, RELATIVE_POSITION_BIAS
from na_compiler.schedules.cpu.backward import backward
from na_compiler.schedules.cpu.config import QueriesInLanes
from na_compiler.schedules.cpu.forward import forward
from na_compiler.schedules.cpu.plan import TilingPlan
from na_compiler.schedules.cpu.tangent import tangent
from na_compiler.schedules.cpu.transpose import transpose_intrin
from na_compiler.tensorir.axes import AXES
from na_compiler.tensorir.blocks import steps

__all__ = ["schedule"]

_CHAINS = 4  # Independent partial results of a reduction: enough to cover the latency of an addition.
# Steps of a loop over head_dim or keys that are written out: assumed, as many as the chains above.
_UNROLL = 4
# Elements of a row up to which fetching a tile's rows is written out: four lines of a cache of 64 bytes. Assumed; what
# longer rows cost is time to compile.
_SHORT_ROW = 64
# Blocks that stay as they are written: zeros, and sums that are changed in place, whose loops are vectors already.
# Those of additional keys have a prefix, which is left out. All others are scheduled by their names, each by one step.
_AS_WRITTEN = {
    "add",
    "bias_add",
    "bias_lanes",
    "bias_store",
    "clear_additional_key_space",
    "clear_additional_value_space",
    "clear_bias_parts",
    "clear_key_space",
    "clear_spread",
    "clear_value_space",
    "count_add",
    "count_start",
    "covering",
    "covering_box",
    "grad_padding",
    "key_mask",
    "key_padding",
    "key_part_add",
    "merge_highest",
    "merge_mean",
    "merge_tangent",
    "merge_total",
    "merge_weighted",
    "output_padding",
    "query_padding",
    "rows",
    "spread_add",
    "start",
    "start_",
    "strip_numbers",
    "tangent_key_padding",
    "tangent_query_padding",
    "tangent_value_padding",
    "value_padding",
    "value_part_add",
}


def schedule(plan: TilingPlan, config: QueriesInLanes, direction: str) -> tirx.PrimFunc:
    """Return the scheduled description of a direction."""
    describe, arrange = _DIRECTIONS[direction]
    made = _Steps(describe(plan), plan, config)
    arrange(made, plan)
    return made.function()


def _forward(made: _Steps, plan: TilingPlan) -> None:
    made.ahead()
    for prefix in made.prefixes:
        made.stage(prefix)
        made.queries(f"{prefix}query", plan.problem.head_dim)
        made.visible(prefix)
        made.product(f"{prefix}score", plan.problem.head_dim)
        made.over_keys(f"{prefix}highest")
        made.elementwise(f"{prefix}weight")
        made.over_keys(f"{prefix}total")
        made.weighted_rows(f"{prefix}weighted", plan.head_dim_v)
        if plan.merges:
            made.lanes(f"{prefix}raised", f"{prefix}factor")
    made.lanes("inverse", "natural")
    made.store("output", plan.problem.head_dim_v)
    made.unroll("lse")
    made.position_bias()
    if plan.problem.has(KEY_MASK):
        made.lanes("seen")


def _tangent(made: _Steps, plan: TilingPlan) -> None:
    """Schedule the forward's steps, and those of the tangents beside them."""
    _forward(made, plan)
    for prefix in made.prefixes:
        made.stage(f"{prefix}tangent_")
        made.queries(f"{prefix}tangent_query", plan.problem.head_dim)
        made.product(f"{prefix}tangent_score", plan.problem.head_dim)
        made.over_keys(f"{prefix}tangent_total")
        made.lanes(f"{prefix}mean")
        made.elementwise(f"{prefix}tangent_weight")
        made.weighted_rows(f"{prefix}tangent_weighted", plan.head_dim_v)
        if plan.merges:
            made.lanes(f"{prefix}moved")
    made.lanes("tangent_natural")
    made.store("tangent_output", plan.problem.head_dim_v)
    made.unroll("tangent_lse")


def _backward(made: _Steps, plan: TilingPlan) -> None:
    problem = plan.problem
    made.ahead()
    for prefix in made.prefixes:
        made.stage(prefix)
        made.queries(f"{prefix}query", problem.head_dim)
        made.queries(f"{prefix}grad", problem.head_dim_v)
        made.queries(f"{prefix}output", problem.head_dim_v)
        made.over_depth(f"{prefix}dot", plan.head_dim_v)
        made.unroll(f"{prefix}delta", f"{prefix}exponent")
        made.visible(prefix, existing=True)
        made.product(f"{prefix}score", problem.head_dim)
        made.product(f"{prefix}grad_weight", problem.head_dim_v)
        made.weighted_rows(f"{prefix}query_grad", plan.head_dim)
        made.key_gradients(f"{prefix}value_part", plan.head_dim_v)
        made.key_gradients(f"{prefix}key_part", plan.head_dim)
    made.store("query_store", problem.head_dim)
    made.gather("key", problem.head_dim)
    made.gather("value", problem.head_dim_v)
    made.position_bias()
    if problem.has(RELATIVE_POSITION_BIAS):
        made.gather_bias()
    if problem.additional_kv:
        # As the parallel loop has them: an open axis has its dilation groups beside their strips.
        loops = sum(2 if axis.is_open and axis.dilation > 1 else 1 for axis in plan)
        made.gather("additional_key", problem.head_dim, loops)
        made.gather("additional_value", problem.head_dim_v, loops)


_DIRECTIONS = {"forward": (forward, _forward), "backward": (backward, _backward), "tangent": (tangent, _tangent)}


class _Steps:
    """Schedules the steps that the directions share, each known by the name of its block."""

    def __init__(self, description: tirx.PrimFunc, plan: TilingPlan, config: QueriesInLanes) -> None:
        self.plan, self.config = plan, config
        self.vector = plan.tiling.vector
        self.prefixes = ("", "additional_") if plan.problem.additional_kv else ("",)
        self.schedule = s_tir.Schedule(description)
        self.unclaimed = {self.schedule.get(block).name_hint for block in steps(self.schedule)}
        loops = self.schedule.get_loops(self.schedule.get_sblock("task"))
        self.schedule.parallel(self.schedule.fuse(*loops))

    def function(self) -> tirx.PrimFunc:
        """Return what was scheduled.

        Raises
        ------
        ValueError
            If the description has blocks that no step claimed.
        """
        left = {name for name in self.unclaimed if name.removeprefix("additional_") not in _AS_WRITTEN}
        if left:
            raise ValueError(f"no step of the schedule for CPUs claims the blocks {', '.join(sorted(left))}")
        return self.schedule.mod["main"]

    def claim(self, *names: str) -> None:
        """Note that blocks are scheduled now.

        Raises
        ------
        ValueError
            If there is no such block, or it is claimed already.
        """
        for name in names:
            if name not in self.unclaimed:
                raise ValueError(f"the schedule for CPUs claims a block {name}, which is not there, or claimed already")
            self.unclaimed.remove(name)

    def loops(self, name: str, count: int) -> list[Any]:
        """Return the innermost loops around a block."""
        return list(self.schedule.get_loops(self.schedule.get_sblock(name)))[-count:]

    def vectorize(self, loop: Any, extent: int) -> Any:
        """Vectorize a loop by the widest vector that divides its extent; returns the loop outside."""
        outer, inner = self.schedule.split(loop, [None, math.gcd(extent, self.vector)])
        self.schedule.vectorize(inner)
        return outer

    def lanes(self, *names: str) -> None:
        """Vectorize blocks over the lanes, their last axis."""
        self.claim(*names)
        for name in names:
            self.schedule.vectorize(self.loops(name, 1)[0])

    def unroll(self, *names: str) -> None:
        """Unroll the innermost loop of blocks that gather or scatter, lane by lane."""
        self.claim(*names)
        for name in names:
            self.schedule.unroll(self.loops(name, 1)[0])

    def ahead(self) -> None:
        """Unroll what is fetched ahead where rows are short: long ones are many lines of code, slow to compile."""
        plan = self.plan
        if plan.fetches_ahead:
            if max(plan.head_dim, plan.head_dim_v) <= _SHORT_ROW:
                self.unroll("ahead")
            else:
                self.claim("ahead")

    def stage(self, prefix: str) -> None:
        """Copy rows of keys and values by vectors."""
        for name, width in (("key", self.plan.problem.head_dim), ("value", self.plan.problem.head_dim_v)):
            self.claim(prefix + name)
            self.schedule.unroll(self.vectorize(self.loops(prefix + name, 1)[0], width))

    def queries(self, name: str, width: int) -> None:
        """Copy a tile's rows by vectors, and transpose them in registers."""
        self.claim(name, f"{name}_lanes")
        lane, d = self.loops(name, 2)
        self.schedule.unroll(self.vectorize(d, width))
        self.schedule.unroll(lane)
        d, lane = self.loops(f"{name}_lanes", 2)
        d_outer, d_inner = self.schedule.split(d, [None, self.vector])
        lane_outer, lane_inner = self.schedule.split(lane, [None, self.vector])
        self.schedule.reorder(d_outer, lane_outer, d_inner, lane_inner)
        self.schedule.tensorize(d_inner, transpose_intrin(self.vector))

    def visible(self, prefix: str, *, existing: bool = False) -> None:
        """Make the numbers that hide keys for a whole tile at once."""
        if existing and any(axis.is_ragged for axis in self.plan):
            self.lanes(f"{prefix}existing")
        if prefix:
            self.lanes(f"{prefix}bias")
            return
        for number, axis in enumerate(self.plan):
            if axis.masks:
                self.lanes(f"low{number}", f"high{number}", f"bias{number}")

    def position_bias(self) -> None:
        """Spread the biases by relative position, or make the numbers by which they are looked up."""
        if not self.plan.problem.has(RELATIVE_POSITION_BIAS):
            return
        if self.plan.spreads_bias:
            self.unroll("spread_bias")
        else:
            self.lanes(*(f"place{number}" for number, axis in enumerate(self.plan) if axis.kernel_size > 1))

    def gather_bias(self) -> None:
        """Add up the tasks' parts of the gradient of the biases, in parallel over rows of the table."""
        self.claim("bias_total", "bias_grad")
        schedule = self.schedule
        schedule.parallel(schedule.fuse(*schedule.get_loops(schedule.get_sblock("gather_bias"))))

    def product(self, name: str, depth: int) -> None:
        """Accumulate the scores of a block of keys in registers, and consume them there."""
        self.claim(name, f"{name}_use")
        schedule = self.schedule
        *u, lane, d = self.loops(name, 5)
        d_outer, d_inner = schedule.split(d, [None, math.gcd(depth, _UNROLL)])
        schedule.reorder(d_outer, d_inner, *u, lane)
        for loop in (d_inner, *u):
            schedule.unroll(loop)
        schedule.vectorize(lane)
        init = schedule.decompose_reduction(schedule.get_sblock(name), d_outer)
        for *u, lane in (schedule.get_loops(init)[-4:], self.loops(f"{name}_use", 4)):
            for loop in u:
                schedule.unroll(loop)
            schedule.vectorize(lane)

    def extent(self, loop: Any) -> int:
        """Return a loop's extent, or 1 where it is known only when the kernel runs: by that it can be divided."""
        extent = self.schedule.get(loop).extent
        return int(extent.value) if isinstance(extent, tirx.IntImm) else 1

    def over_keys(self, name: str) -> None:
        """Reduce over the keys of a tile, lane by lane."""
        self.claim(name)
        _, *u = self.loops(name, 4)
        extent = math.prod(map(self.extent, u))
        self._reduce(name, self.schedule.fuse(*u), extent)

    def over_depth(self, name: str, depth: int) -> None:
        """Reduce over head_dim, lane by lane."""
        self.claim(name)
        self._reduce(name, self.loops(name, 2)[1], depth)

    def _reduce(self, name: str, loop: Any, extent: int) -> None:
        """Reduce in a few independent chains, then over the chains."""
        schedule, block = self.schedule, self.schedule.get_sblock(name)
        chains = max(count for count in range(1, _CHAINS + 1) if extent % count == 0)
        _, inner = schedule.split(loop, [None, chains])
        partial = schedule.rfactor(inner, 0)
        lane, outer, inner = schedule.get_loops(partial)[-3:]
        schedule.reorder(outer, inner, lane)
        schedule.unroll(inner)
        schedule.vectorize(lane)
        inner, lane = schedule.get_loops(schedule.decompose_reduction(partial, outer))[-2:]
        schedule.unroll(inner)
        schedule.vectorize(lane)
        lane, inner = schedule.get_loops(block)[-2:]
        schedule.reorder(inner, lane)
        schedule.unroll(inner)
        schedule.vectorize(lane)
        schedule.vectorize(schedule.get_loops(schedule.decompose_reduction(block, inner))[-1])

    def elementwise(self, name: str) -> None:
        """Vectorize over lanes, a few keys at a time."""
        self.claim(name)
        *u, lane = self.loops(name, 4)
        self.schedule.vectorize(lane)
        extent = math.prod(map(self.extent, u))
        _, inner = self.schedule.split(self.schedule.fuse(*u), [None, math.gcd(extent, _UNROLL)])
        self.schedule.unroll(inner)

    def weighted_rows(self, name: str, width: int) -> None:
        """Accumulate a patch's rows in registers, as many vectors at once as there are accumulators for."""
        self.claim(name)
        schedule, config = self.schedule, self.config
        block = schedule.get_sblock(name)
        *patches, y0, y1, y2, d, r0, r1, r2 = self.loops(name, 10)
        d_outer, d_inner = schedule.split(d, [None, self.vector])
        at_once = _largest_divisor(width // self.vector, config.accumulators // math.prod(self.plan.tiling.patch))
        d_outer, d_middle = schedule.split(d_outer, [None, at_once])
        row_block = config.row_block
        if row_block and schedule.get(r2).extent.value % row_block == 0:
            r2_outer, r2 = schedule.split(r2, [None, row_block])
            schedule.reorder(r0, r1, r2_outer, d_outer, *patches, r2, y0, y1, y2, d_middle, d_inner)
        else:
            schedule.reorder(d_outer, *patches, r0, r1, r2, y0, y1, y2, d_middle, d_inner)
        for loop in (y0, y1, y2, d_middle):
            schedule.unroll(loop)
        schedule.vectorize(d_inner)
        *unrolled, d_inner = schedule.get_loops(schedule.decompose_reduction(block, r0))[-5:]
        for loop in unrolled:
            schedule.unroll(loop)
        schedule.vectorize(d_inner)

    def key_gradients(self, name: str, width: int) -> None:
        """Accumulate the gradients of a few keys in registers over the tile's queries."""
        self.claim(name)
        schedule = self.schedule
        block = schedule.get_sblock(name)
        u, d, lane = self.loops(name, 3)
        d_outer, d_inner = schedule.split(d, [None, self.vector])
        at_once = _largest_divisor(width // self.vector, self.config.accumulators // self.plan.tiling.grad_block)
        d_outer, d_middle = schedule.split(d_outer, [None, at_once])
        schedule.reorder(d_outer, lane, u, d_middle, d_inner)
        schedule.unroll(u)
        schedule.unroll(d_middle)
        schedule.vectorize(d_inner)
        *unrolled, d_inner = schedule.get_loops(schedule.decompose_reduction(block, lane))[-3:]
        for loop in unrolled:
            schedule.unroll(loop)
        schedule.vectorize(d_inner)

    def store(self, name: str, width: int) -> None:
        """Store rows of a patch by vectors."""
        self.claim(name)
        *y, d = self.loops(name, 4)
        for loop in y:
            self.schedule.unroll(loop)
        self.vectorize(d, width)

    def gather(self, name: str, width: int, loops: int = AXES) -> None:
        """Add up the parts of the strips, which so many loops run over, in parallel over tokens."""
        self.claim(f"{name}_total", f"{name}_grad")
        schedule = self.schedule
        schedule.parallel(schedule.fuse(*schedule.get_loops(schedule.get_sblock(f"gather_{name}"))))
        block = schedule.get_sblock(f"{name}_total")
        d, *strips = self.loops(f"{name}_total", 1 + loops)
        d_outer, d_inner = schedule.split(d, [None, self.vector])
        schedule.reorder(*strips, d_outer, d_inner)
        schedule.vectorize(d_inner)
        schedule.vectorize(schedule.get_loops(schedule.decompose_reduction(block, strips[0]))[-1])
        self.vectorize(self.loops(f"{name}_grad", 1)[0], width)


def _largest_divisor(value: int, limit: int) -> int:
    return max(divisor for divisor in range(1, max(min(value, limit), 1) + 1) if value % divisor == 0)
