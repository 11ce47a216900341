"""The backward for single warps' tensor cores, generated with TVM's TIRx: several kernels, one function.

With ``P = exp(scale Q K^T - lse)``, ``dP = dO V^T`` and ``dS = P (dP - delta)`` the gradients are ``dQ = scale dS K``,
``dK = scale dS^T Q`` and ``dV = P^T dO``. Two kernels mirror each other. In one a warp owns 16 queries, and the keys of
their windows stream by; in the other it owns 16 keys, and the queries that see them stream by, which are consecutive
along every axis. No two warps add to one place, so there are no atomics, and the bits are the same every time; the
price is that two of the five products are computed twice.

The queries' kernel comes first: it makes the statistics that the keys' kernel reads. Additional keys are seen by all
queries: those are cut into strips, whose parts of the gradients are added up in order by a last kernel. So are the
parts of the gradient of biases by relative position, which the queries' kernel makes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from tvm import tirx

from na_compiler.operands import RELATIVE_POSITION_BIAS
from na_compiler.schedules.mma.backward.arguments import BackwardArguments
from na_compiler.schedules.mma.backward.bias import gather_bias, store_nothing
from na_compiler.schedules.mma.backward.block import SweepBlock
from na_compiler.schedules.mma.backward.plan import AdditionalPlan, BackwardPlan, SweepPlan
from na_compiler.schedules.mma.backward.strips import StripWork
from na_compiler.schedules.mma.backward.sweep import StripSweep, Sweep
from na_compiler.schedules.shared.gather import launch_gather
from na_compiler.schedules.shared.keys import KeyWork
from na_compiler.schedules.shared.trace import I, T, traced, when
from na_compiler.schedules.shared.work import Work

__all__ = ["schedule_backward"]


def schedule_backward(plan: BackwardPlan) -> tirx.PrimFunc:
    """Return the backward of a problem, for TVM's ``tirx`` pipeline."""
    return traced(lambda: _trace(plan))


def _trace(plan: BackwardPlan) -> None:
    arguments = BackwardArguments(plan)
    # There are no launches on an empty grid.
    with when(arguments.batch > 0):
        for sweep in plan.sweeps:
            with _launch(sweep.config.blocks):
                _sweep(sweep, arguments)
        if plan.additional:
            with when(arguments.additional > 0):
                for sweep in plan.additional:
                    with _launch(sweep.config.blocks):
                        _strip(sweep, arguments)
                for name in ("key", "value"):
                    with _launch(1):
                        launch_gather(plan.problem, arguments, plan.strips, name)
        if plan.problem.has(RELATIVE_POSITION_BIAS):
            with _launch(1):
                gather_bias(plan.problem, arguments, plan.sweeps[0].items)


@contextlib.contextmanager
def _launch(blocks: int) -> Iterator[None]:
    """Make a kernel of what is traced inside; registers are limited so that so many of its blocks fit."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(I.attr({"tirx.device_entry": True}))
        if blocks:
            stack.enter_context(I.attr({"tirx.launch_bounds_min_blocks_per_sm": blocks}))
        yield


def _sweep(plan: SweepPlan, arguments: BackwardArguments) -> None:
    item = I.cta_id([T.Cast("int32", arguments.batch * (plan.heads * plan.items))])
    block = SweepBlock(plan, arguments)
    work = (Work if plan.of_queries else KeyWork)(plan, item)
    if work.exists is None or not plan.sums_bias:
        with when(work.exists):
            Sweep(block, work, item).compute()
        return
    with I.If(work.exists):
        with I.Then():
            Sweep(block, work, item).compute()
        with I.Else():
            store_nothing(plan, arguments, block.thread, item)


def _strip(plan: AdditionalPlan, arguments: BackwardArguments) -> None:
    extent = plan.own_tile[0]
    owned = T.Cast("int32", (arguments.additional + (extent - 1)) // extent)
    item = I.cta_id([T.Cast("int32", arguments.batch * (plan.heads * plan.strips)) * owned])
    block = SweepBlock(plan, arguments)
    StripSweep(block, StripWork(plan, item, arguments.count)).compute()
