"""The backward of five products for Hopper: one sweep over tiles of keys makes all three gradients.

A thread block owns 128 keys, as in the other form's sweep over keys, and has all that the gradient of queries is made
of: ``dQ = dS K``. Its parts leave by shared memory and are added up in global memory, in float32, in an order that
`na_compiler.schedules.sm90.backward.fused.work` gives; a last kernel scales and rounds them. So no product is
computed twice, and the bits are the same in every run.

Budget with head_dim 128, of a thread that computes (240 registers): dK and dV 128, S and dP 32 each, P packed 16, and
what is beside. dS packed and dQ come when S and dP are gone. Shared memory: K and V 64 KB, two stages of Q and dO
64 KB, two of dS 32 KB, two parts of dQ 64 KB: 224 KB, and the statistics.

Prediction: a tile of 128 keys and 64 queries is five products of 512 cycles. Shared memory gives their operands in
2048 (an instruction of S, dP or dQ reads two tiles of 64 rows, as long as it takes), takes 256 of loads and 128 of
dS, and 512 of dQ in and out: 2944 cycles at best, 87% of the products' rate.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tvm import tirx

from na_compiler.schedules.shared.trace import I, T, emit, let, traced, when
from na_compiler.schedules.sm90.backward.arguments import Maps
from na_compiler.schedules.sm90.backward.fused.adder import Adder
from na_compiler.schedules.sm90.backward.fused.arguments import FusedArguments
from na_compiler.schedules.sm90.backward.fused.block import FusedBlock
from na_compiler.schedules.sm90.backward.fused.consumer import FusedConsumer
from na_compiler.schedules.sm90.backward.fused.convert import launch_convert
from na_compiler.schedules.sm90.backward.fused.plan import FusedPlan
from na_compiler.schedules.sm90.backward.fused.work import FusedWork
from na_compiler.schedules.sm90.backward.kernel import launch
from na_compiler.schedules.sm90.backward.plan import LOADING_REGISTERS
from na_compiler.schedules.sm90.backward.producer import SweepProducer
from na_compiler.schedules.sm90.backward.statistics import launch_statistics

__all__ = ["schedule_fused"]

Expr = Any


def schedule_fused(plan: FusedPlan) -> tirx.PrimFunc:
    """Return the backward of a problem, for TVM's ``tirx`` pipeline."""
    return traced(lambda: _trace(plan))


def _trace(plan: FusedPlan) -> None:
    arguments = FusedArguments(plan)
    # There are no tensor maps of nothing, and no launches on an empty grid.
    with when(arguments.batch > 0):
        with launch(1):
            launch_statistics(plan, arguments, ("turns", "ticket"))
        maps = arguments.encode(plan)
        with launch(1):
            _sweep(plan, arguments, maps)
        with launch(1):
            launch_convert(plan, arguments)


def _sweep(plan: FusedPlan, arguments: FusedArguments, maps: Maps) -> None:
    # Which tile a block has, its ticket says.
    I.cta_id([T.Cast("int32", arguments.batch * (plan.heads * plan.items))])
    block = FusedBlock(plan, arguments, maps)
    block.initialise()

    def do(role: Callable[[Any, Expr], None]) -> None:
        work = FusedWork(plan, block.item)
        with when(work.exists):
            role(work, 0)

    first = plan.computing_warps
    # One if and else: each budget of registers belongs to a whole branch.
    with I.If(block.warp < first):
        with I.Then():
            emit(T.ptx.setmaxnreg.inc.sync.aligned.u32(plan.registers))
            do(FusedConsumer(block).compute)
        with I.Else():
            emit(T.ptx.setmaxnreg.dec.sync.aligned.u32(LOADING_REGISTERS))
            with when(T.cuda.elect_sync() != T.uint32(0)):
                with when(block.warp == first):
                    do(SweepProducer(block).load)
                with when(T.And(block.warp > first, block.warp <= first + plan.fused.parts)):
                    do(Adder(block, let(block.warp - (first + 1))).add)
