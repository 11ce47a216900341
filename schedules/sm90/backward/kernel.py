"""The backward for Hopper, generated with TVM's TIRx: several kernels, one function.

With ``P = exp(scale Q K^T - lse)``, ``dP = dO V^T`` and ``dS = P (dP - delta)`` the gradients are ``dQ = scale dS K``,
``dK = scale dS^T Q`` and ``dV = P^T dO``. Two kernels mirror each other. In one a thread block owns queries, and the
keys of their windows stream by; in the other it owns keys, and the queries that see them stream by, which are
consecutive along every axis. No two blocks add to one place, so there are no atomics, and the bits are the same every
time; the price is that two of the five products are computed twice.

Additional keys are seen by all queries: those are cut into strips, whose parts are added up in order by a last kernel.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from tvm import tirx

from na_compiler.schedules.shared.gather import launch_gather
from na_compiler.schedules.shared.trace import I, T, emit, let, traced, when
from na_compiler.schedules.sm90.backward.arguments import BackwardArguments, Maps
from na_compiler.schedules.sm90.backward.block import SweepBlock
from na_compiler.schedules.sm90.backward.consumer import SweepConsumer
from na_compiler.schedules.sm90.backward.plan import LOADING_REGISTERS, BackwardPlan, SweepPlan
from na_compiler.schedules.sm90.backward.producer import SweepProducer
from na_compiler.schedules.sm90.backward.statistics import launch_statistics
from na_compiler.schedules.sm90.backward.work import KeyWork, QueryWork, StripWork

__all__ = ["launch", "schedule_backward"]

Expr = Any


def schedule_backward(plan: BackwardPlan) -> tirx.PrimFunc:
    """Return the backward of a problem, for TVM's ``tirx`` pipeline."""
    return traced(lambda: _trace(plan))


def _trace(plan: BackwardPlan) -> None:
    arguments = BackwardArguments(plan)
    # There are no tensor maps of nothing, and no launches on an empty grid.
    with when(arguments.batch > 0):
        with launch(1):
            launch_statistics(plan, arguments)
        for sweep in plan.sweeps:
            maps = arguments.encode(sweep)
            if sweep.of_queries and arguments.additional is not None:
                arguments.encode_additional(sweep, maps)
            with launch(sweep.config.blocks):
                _sweep(sweep, arguments, maps)
        if plan.additional:
            with when(arguments.additional > 0):
                for sweep in plan.additional:
                    maps = arguments.encode(sweep)
                    with launch(sweep.config.blocks):
                        _sweep(sweep, arguments, maps)
                for name in ("key", "value"):
                    with launch(1):
                        launch_gather(plan.problem, arguments, plan.strips, name)


@contextlib.contextmanager
def launch(blocks: int) -> Iterator[None]:
    """Make a kernel of what is traced inside, of which so many thread blocks share a multiprocessor.

    The second bound of the launch: without it, setmaxnreg is ignored.
    """
    with I.attr({"tirx.device_entry": True}), I.attr({"tirx.launch_bounds_min_blocks_per_sm": blocks}):
        yield


def _sweep(plan: SweepPlan, arguments: BackwardArguments, maps: Maps) -> None:
    count = arguments.count
    # Of additional keys: tiles that stream by, and those that blocks own.
    extra: Expr = 0
    if maps.additional:
        extra = (count + (plan.streamed - 1)) // plan.streamed
    if plan.side == "additional":
        owned = T.Cast("int32", (arguments.additional + (plan.own_tile[0] - 1)) // plan.own_tile[0])
        items = T.Cast("int32", arguments.batch * (plan.heads * plan.strips)) * owned
    else:
        items = KeyWork.count(plan, arguments.batch, plan.heads)
    number = I.cta_id([items])
    block = SweepBlock(plan, arguments, maps)
    block.initialise()
    extra = let(extra)

    def work() -> Any:
        if plan.side == "additional":
            tiles = let((count + (plan.own_tile[0] - 1)) // plan.own_tile[0])
            return StripWork(plan, number, tiles, count)
        return (QueryWork if plan.of_queries else KeyWork)(plan, number)

    def do(role: Callable[[Any, Expr], None]) -> None:
        place = work()
        with when(place.exists):
            role(place, extra)

    computing = block.warp < plan.computing_warps
    # One if and else: each budget of registers belongs to a whole branch.
    with I.If(computing):
        with I.Then():
            if plan.exchanges_registers:
                emit(T.ptx.setmaxnreg.inc.sync.aligned.u32(plan.registers))
            do(SweepConsumer(block).compute)
        with I.Else():
            if plan.exchanges_registers:
                emit(T.ptx.setmaxnreg.dec.sync.aligned.u32(LOADING_REGISTERS))
            with when(block.warp == plan.computing_warps), when(T.cuda.elect_sync() != T.uint32(0)):
                do(SweepProducer(block).load)
