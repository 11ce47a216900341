"""The forward for Hopper, generated with TVM's TIRx.

A thread block has a tile of queries of one head. Its first warpgroup loads: queries, then keys and values tile by
tile, straight from the tensors' natural layout by TMA, whatever the axes and the dilation. The others compute, 64
queries each: ``S = Q K^T`` by wgmma with both operands in shared memory, the softmax in registers, and
``O += P V`` with P in registers. Products are asynchronous: the scores of one tile are computed beside the softmax
and the weighted sum of the one before, and two warpgroups take turns so that one's softmax runs while the other's
products do.

The body is traced: Python drives TVM's builder, so ints, loops and conditions of Python are those of the generator.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tvm import tirx

from na_compiler.schedules.shared.trace import I, T, emit, hold, let, local, put, traced, when
from na_compiler.schedules.shared.work import Work
from na_compiler.schedules.sm90.block import Arguments, Block
from na_compiler.schedules.sm90.config import Sm90
from na_compiler.schedules.sm90.consumer import Consumer
from na_compiler.schedules.sm90.plan import Plan
from na_compiler.schedules.sm90.producer import Producer

__all__ = ["schedule_forward"]

Expr = Any
# Streaming multiprocessors of an H100 or H200: thread blocks of a persistent kernel. Another number is only slower.
_PROCESSORS = 132


def schedule_forward(plan: Plan, config: Sm90) -> tirx.PrimFunc:  # noqa: ARG001
    """Return the forward of a problem, for TVM's ``tirx`` pipeline."""
    return traced(_Kernel(plan).trace)


class _Kernel:
    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.persistent = plan.config.persistent

    def trace(self) -> None:
        """Trace host and device."""
        arguments = Arguments(self.plan)
        # There are no tensor maps of nothing, and no launches on an empty grid.
        hold(I.If(arguments.batch > 0))
        hold(I.Then())
        self._launch(arguments)

    def _launch(self, arguments: Arguments) -> None:
        plan = self.plan
        maps = arguments.encode(plan)
        self.count = Work.count(plan, arguments.batch, plan.problem.heads)
        blocks = T.min(self.count, _PROCESSORS) if self.persistent else self.count
        I.device_entry()
        # The second bound of the launch: without it, setmaxnreg is ignored.
        hold(I.attr({"tirx.launch_bounds_min_blocks_per_sm": 1}))
        self.block_id = I.cta_id([blocks])
        self.blocks = blocks
        block = Block(plan, arguments, maps)
        block.initialise()
        # Of additional keys.
        extra: Expr = (
            0 if arguments.additional is None else let((arguments.count + (plan.streamed - 1)) // plan.streamed)
        )
        loading, computing = plan.registers
        # One if and else: each budget of registers belongs to a whole branch.
        with I.If(block.warp < 4):
            with I.Then():
                emit(T.ptx.setmaxnreg.dec.sync.aligned.u32(loading))
                with when(block.warp == 0), when(T.cuda.elect_sync() != T.uint32(0)):
                    self._work(Producer(block).load, extra)
            with I.Else():
                emit(T.ptx.setmaxnreg.inc.sync.aligned.u32(computing))
                self._work(Consumer(block).compute, extra)

    def _work(self, do: Callable[[Work, Expr, Expr, Expr], None], extra: Expr) -> None:
        """Do the block's tiles of queries: one, or where blocks are persistent every so many'th."""
        if not self.persistent:
            work = Work(self.plan, self.block_id)
            with when(work.exists):
                do(work, 0, 0, extra)
            return
        item, base, turn = local(1, "int32"), local(1, "int32"), local(1, "int32")
        put(item, 0, self.block_id)
        put(base, 0, 0)
        put(turn, 0, 0)
        with I.While(item[0] < self.count):
            work = Work(self.plan, item[0])
            with when(work.exists):
                do(work, base[0], turn[0], extra)
                put(base, 0, base[0] + work.tiles + extra)
                put(turn, 0, turn[0] + 1)
            put(item, 0, item[0] + self.blocks)
