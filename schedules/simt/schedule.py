"""Schedule for CUDA cores, of every GPU: the direct descriptions, a few threads to each query or key.

A thread block has some rows (queries or keys), along ``threadIdx.y``; the threads along ``threadIdx.x`` share the
elements of a row, and add up products by shuffles. All that belongs to a row is in registers, and what neighbours
read again is in the caches: there is no shared memory, and nothing to wait for.
"""

from __future__ import annotations

from typing import Any

from tvm import s_tir, tirx

from na_compiler.schedules.simt.backward import direct_backward
from na_compiler.schedules.simt.config import Simt
from na_compiler.schedules.simt.forward import direct_forward
from na_compiler.schedules.simt.plan import DirectPlan
from na_compiler.schedules.simt.tangent import direct_tangent
from na_compiler.tensorir.axes import AXES
from na_compiler.tensorir.blocks import steps

__all__ = ["schedule"]

# All steps by name, each in one list. Their prefixes, which say what is visited, are left out.
_PREFIXES = ("additional_", "strip_")
# Steps of one pair of query and key, for the gradient of biases.
_PAIR = {f"bias_{name}" for name in ("query_rows", "key_rows", "grad_rows", "value_rows")}
# Steps that copy rows as they are, by vectors.
_ROWS = {
    "grad_rows",
    "key_rows",
    "output_rows",
    "query_rows",
    "tangent_key_rows",
    "tangent_query_rows",
    "tangent_value_rows",
    "value_rows",
    *_PAIR,
}
# Steps whose last loop runs over the elements of a row: loads, stores, and products that are summed over the lanes.
_LAST = {
    "bias_grad",
    "bias_grad_weight",
    "bias_key",
    "bias_query",
    "bias_score",
    "bias_value",
    "dot",
    "grad",
    "grad_weight",
    "key",
    "key_slope",
    "key_space",
    "key_store",
    "key_sum",
    "output",
    "query",
    "query_slope",
    "query_store",
    "score",
    "tangent_output",
    "tangent_query",
    "value",
    "value_space",
    "value_store",
    "value_sum",
}
# Sums over the rows of a chunk, or over strips, whose first loop runs over the elements of a row.
_FIRST = {"key_part", "key_total", "query_part", "tangent_weighted", "value_part", "value_total", "weighted"}
# Steps that change a row in place, which are written as they are to run, and steps on a number for each row of a chunk.
_EACH = {
    *(f"{name}{axis}" for name in ("first_key", "first_query", "keys", "queries") for axis in range(AXES)),
    "before",
    "bias_add",
    "bias_store",
    "bias_sum",
    "bias_total",
    "bias_weight",
    "count",
    "delta",
    "delta_store",
    "exponent",
    "factor",
    "highest",
    "inverse",
    "key_part_add",
    "lse",
    "masked",
    "mean",
    "merge_highest",
    "merge_mean",
    "merge_total",
    "moved",
    "natural",
    "query_part_add",
    "raised",
    "seen",
    "slope",
    "start_bias",
    "start_highest",
    "start_key_grad",
    "start_mean",
    "start_output",
    "start_query_grad",
    "start_seen",
    "start_tangent",
    "start_total",
    "start_value_grad",
    "tangent_lse",
    "tangent_natural",
    "tangent_seen",
    "tangent_total",
    "tangent_weight",
    "tangent_weighted_add",
    "total",
    "value_part_add",
    "weight",
    "weighted_add",
}
# Sums with too many terms to unroll.
_LONG = {"bias_total", "key_total", "value_total"}


_DESCRIPTIONS = {"forward": direct_forward, "backward": direct_backward, "tangent": direct_tangent}


def schedule(plan: DirectPlan, config: Simt, direction: str) -> tirx.PrimFunc:
    """Return the scheduled description of a direction."""
    schedule = s_tir.Schedule(_DESCRIPTIONS[direction](plan))
    for task in schedule.get_child_blocks(schedule.get_sblock("root")):
        *outer, rows = schedule.get_loops(task)
        schedule.bind(schedule.fuse(*outer), "blockIdx.x")
        schedule.bind(rows, "threadIdx.y")
    for step in steps(schedule):
        _schedule(schedule, config, step)
    return schedule.mod["main"]


def _schedule(schedule: s_tir.Schedule, config: Simt, step: Any) -> None:
    """Schedule a step of a task, or of a chunk, known by the name of its block."""
    name = schedule.get(step).name_hint
    for prefix in _PREFIXES:
        name = name.removeprefix(prefix)
    loops = schedule.get_loops(step)
    if name in _ROWS:
        vectors, elements = _spread(schedule, config, loops[-1])
        schedule.vectorize(elements)
        loops[-1:] = [vectors]
    elif name in _LAST:
        loops[-1:] = _spread(schedule, config, loops[-1])
    elif name in _FIRST:
        loops[:1] = _spread(schedule, config, loops[0])
    elif name not in _EACH:
        raise ValueError(
            f"the schedule for CUDA cores knows no block {name!r}: it belongs in one of its lists of steps"
        )
    for loop in loops[:1] if name in _LONG else loops:
        # Loops over lanes, which blocks that change a row in place have from the start, stay as they are.
        if schedule.get(loop).thread_binding is None:
            schedule.unroll(loop)


def _spread(schedule: s_tir.Schedule, config: Simt, loop: Any) -> tuple[Any, Any]:
    """Spread a loop over the lanes; returns the loops over vectors, and over the elements of one, of each lane."""
    vectors, lanes, elements = schedule.split(loop, [None, config.lanes, config.vector])
    schedule.bind(lanes, "threadIdx.x")
    return vectors, elements
