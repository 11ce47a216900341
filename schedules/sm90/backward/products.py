"""The products of a warpgroup of the backward: scores, gradients of weights, and sums over what streams by."""

from __future__ import annotations

from typing import Any

from na_compiler.schedules.shared.trace import T, emit, let, local, put
from na_compiler.schedules.sm90.backward.block import SweepBlock
from na_compiler.schedules.sm90.plan import ROWS
from na_compiler.schedules.sm90.products import (
    Products,
    conversion,
    descriptor,
    instruction,
    multiply_registers,
    multiply_shared,
)

__all__ = ["SweepProducts"]

Expr = Any
_UNIT = 16  # Descriptors count in 16 bytes.


class SweepProducts:
    """Emits the products of one warpgroup.

    Attributes
    ----------
    scores
        Accumulators of ``S = own[0] stream[0]^T``, which become the weights P; and, where scores have gradients,
        `slopes`: those of ``dP = own[1] stream[1]^T``, which become the scores' gradients dS. Element ``4g + 2h + e``
        of a thread is row ``16 warp + lane / 4 + 8h`` and column ``8g + 2 (lane % 4) + e`` of the tile.
    sums
        Accumulators of the results, in the plan's order.
    """

    fence = staticmethod(Products.fence)
    commit = staticmethod(Products.commit)
    pin = staticmethod(Products.pin)
    wait = Products.wait

    def __init__(self, block: SweepBlock, warpgroup: Expr) -> None:
        plan = block.plan
        self.block, self.plan = block, plan
        self.elements = plan.streamed // 2
        self.scores = local(self.elements)
        self.slopes: Any = local(self.elements) if plan.needs_gradient else None
        self.sums = [local(plan.columns[which].extent // 2) for which in plan.sums]
        # P and dS, rounded to operands: of the sum over the second tensor, and over the first.
        self.operands = [local(plan.streamed // 4, "uint32") for _ in plan.sums]
        # As the mask knows them.
        self.output, self.weights = self.sums[0], self.operands[0]
        self._convert = conversion(block.dtype)
        self._score = instruction(plan.streamed, block.dtype)
        self._own = [
            descriptor(block.own, let(warpgroup * (plan.own_bytes // 2)) + plan.own_offset(i) // 2, 1, plan.columns[i])
            for i in plan.owned
        ]
        # One descriptor for both ways of reading: along rows, the distance of boxes of columns is not looked at.
        self._stream = [
            descriptor(block.stream[i], 0, plan.columns[i].box_bytes(plan.streamed) // _UNIT, plan.columns[i])
            for i in range(2)
        ]

    def start(self) -> None:
        """Begin with sums of nothing."""
        for sums in self.sums:
            for i in range(int(sums.shape[0])):
                put(sums, i, T.float32(0))

    def _tile(self, which: int, stage: Expr) -> tuple[Any, int, Expr]:
        return self._stream[which], self.plan.streamed, stage * (self.plan.stream_bytes(which) // _UNIT)

    def score(self, which: int, stage: Expr) -> None:
        """Emit S (0) or dP (1) for a tile, as a group of its own."""
        target = self.slopes if which else self.scores
        self.fence()
        multiply_shared(
            self._score, target, (self._own[which], ROWS), self._tile(which, stage), self.plan.columns[which]
        )
        self.commit()

    def add(self, result: int, stage: Expr) -> None:
        """Emit the sum of a result over a tile, as a group of its own; its operand is packed."""
        which = self.plan.sums[result]
        columns = self.plan.columns[which]
        self.pin(self.sums[result])
        self.pin(self.operands[result])
        self.fence()
        multiply_registers(
            instruction(columns.extent, self.block.dtype),
            self.sums[result],
            self.operands[result],
            self._tile(which, stage),
            columns,
        )
        self.commit()

    def pack(self, target: Any, index: int, high: Expr, low: Expr) -> None:
        """Round two numbers to 16 bits each, into one register."""
        emit(self._convert(target[index], high, low))
