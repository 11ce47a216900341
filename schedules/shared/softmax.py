"""The softmax of a warpgroup's rows, in registers, tile after tile.

A thread has two rows. Scores are in units of ``log2(e) * scale``, so that the exponential is a power of two.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from na_compiler.schedules.shared.tiles import Fragments
from na_compiler.schedules.shared.trace import T, emit, local, put

__all__ = ["LN2", "Softmax"]

Expr = Any
_LOG2_E = 1.4426950408889634
LN2 = 0.6931471805599453
_ROWS = 2
# Of what a maximum begins with: no visible finite score is below it, and what hides a score, minus infinity, always is.
_LOWEST = -3.4028234663852886e38
# What stands for a scale of 0: times a score that is not 1e30 it is nothing. Smaller ones may count as 0.
_SMALLEST = 1.1754943508222875e-38
# An exponent from which on the rounding of the highest score times the scale is more than weights can take.
_LARGE = 2.0**27


class Softmax:
    """Emits the softmax.

    Parameters
    ----------
    products
        Scores, weights and the weighted sums.
    scale
        Of the scores; ``None`` where these are scaled already, to units of ``log2(e)``.

    Attributes
    ----------
    highest
        Of each row, the highest score so far.
    total
        Of each row, this thread's part of the sum of weights so far.
    """

    def __init__(self, products: Fragments, scale: Expr | None) -> None:
        self.products = products
        self.scores = products.scores
        self.elements = products.plan.streamed // 2
        self.highest, self.total = local(_ROWS), local(_ROWS)
        self._factor, self._step, self._offset, self._other = (local(_ROWS) for _ in range(4))
        # The highest product is the highest score if the scale is positive. A negative one is turned round, with the
        # queries; and in place of 0 stands what makes all scores equal as well, and minus infinity not a NaN.
        self.is_negative = None if scale is None else scale < T.float32(0)
        magnitude = T.float32(1) if scale is None else T.max(scale, T.float32(0) - scale) * T.float32(_LOG2_E)
        self._unit = local(1)
        put(self._unit, 0, T.max(magnitude, T.float32(_SMALLEST)))
        # The power of two at or above it: the exponent of the number whose mantissa it fills.
        bits = T.reinterpret("int32", self._unit[0]) + T.int32(0x7FFFFF)
        self._power = local(1)
        put(self._power, 0, T.reinterpret("float32", T.bitwise_and(bits, T.int32(0x7F800000))))
        # By its inverse, by bits: multiplied by the scale the lowest is finite, so that minus infinity is never taken
        # from itself.
        inverse = T.int32(0x7F000000) - T.max(T.reinterpret("int32", self._power[0]), T.int32(0x3F800000))
        self._lowest = local(1)
        put(self._lowest, 0, T.reinterpret("float32", inverse) * T.float32(_LOWEST))

    def start(self) -> None:
        """Begin with no keys."""
        for row in range(_ROWS):
            put(self.highest, row, self._lowest[0])
            self._find_offset(row)
            put(self.total, row, T.float32(0))
        for i in range(self.products.plan.problem.head_dim_v // 2):
            put(self.products.output, i, T.float32(0))

    def _of_row(self, row: int) -> list[int]:
        return [4 * g + 2 * row + e for g in range(self.elements // 4) for e in (0, 1)]

    def raise_highest(self) -> None:
        """Take a tile's scores into the highest, and find what to rescale earlier sums by."""
        self.raise_to([self.top(row) for row in range(_ROWS)])

    def top(self, row: int) -> Expr:
        """Return the highest of a row's score so far and the thread's scores of a tile."""
        first, second, *rest = self._of_row(row)
        a, b = local(1), local(1)
        put(a, 0, T.max(self.highest[row], self.scores[first]))
        put(b, 0, self.scores[second])
        for k, index in enumerate(rest):
            chain = (a, b)[k % 2]
            put(chain, 0, T.max(chain[0], self.scores[index]))
        put(a, 0, T.max(a[0], b[0]))
        return a[0]

    def raise_to(self, tops: Sequence[Expr]) -> None:
        """Make the highest of what the lanes of a row found its score, and find what to rescale earlier sums by."""
        for row in range(_ROWS):
            put(self.highest, row, tops[row])
        self._over_lanes(self.highest, T.max)
        for row in range(_ROWS):
            put(self._factor, row, self._offset[row])
            self._find_offset(row)
            # What weights were relative to, as it was rounded: so it is exactly 1 while the highest score stays. Not in
            # C, where the product before it would be contracted into the difference.
            emit(T.ptx["sub.rn.ftz.f32"](self._factor[row], self._factor[row], self._offset[row]))
            emit(T.ptx.ex2.approx.ftz.f32(self._factor[row], self._factor[row]))

    def _find_offset(self, row: int) -> None:
        """Scale the highest score.

        Where rounding keeps it from finding itself, a power of two stands for the scale: the product is exact, and
        floats are so far apart there that no other score has a weight.
        """
        put(self._offset, row, self.highest[row] * self._unit[0])
        put(self._step, row, T.Select(T.abs(self._offset[row]) >= T.float32(_LARGE), self._power[0], self._unit[0]))
        put(self._offset, row, self.highest[row] * self._step[row])

    def exponentiate(self, is_rescaled: bool = False) -> None:
        """Turn a tile's scores into weights, and add them up, to totals that may be rescaled already."""
        for row in range(_ROWS):
            sums = (local(1), local(1))
            for k, index in enumerate(self._of_row(row)):
                put(self.scores, index, self.scores[index] * self._step[row] - self._offset[row])
                emit(T.ptx.ex2.approx.ftz.f32(self.scores[index], self.scores[index]))
                chain = sums[k % 2]
                put(chain, 0, self.scores[index] if k < 2 else chain[0] + self.scores[index])
            before = self.total[row] if is_rescaled else self.total[row] * self._factor[row]
            put(self.total, row, before + (sums[0][0] + sums[1][0]))

    def pack(self) -> None:
        """Round the weights to the operand of the second product."""
        for i in range(self.elements // 2):
            self.products.pack(self.products.weights, i, self.scores[2 * i + 1], self.scores[2 * i])

    def rescale(self) -> None:
        """Bring the weighted sums to the highest score so far."""
        output = self.products.output
        for i in range(self.products.plan.problem.head_dim_v // 2):
            put(output, i, output[i] * self._factor[(i // 2) % 2])

    def finish(self) -> tuple[Any, Any]:
        """Add up the rows' totals; returns their inverses and the logarithms ``lse``."""
        self._over_lanes(self.total, lambda a, b: a + b)
        inverse, logarithm = local(_ROWS), local(_ROWS)
        for row in range(_ROWS):
            emit(T.ptx.rcp.approx.ftz.f32(inverse[row], self.total[row]))
            emit(T.ptx.lg2.approx.ftz.f32(logarithm[row], self.total[row]))
            found = (logarithm[row] + self.highest[row] * self._unit[0]) * T.float32(LN2)
            # No total means that all scores are minus infinity, or one is NaN.
            put(logarithm, row, T.Select(self.total[row] > T.float32(0), found, T.float32(math.nan)))
        return inverse, logarithm

    def _over_lanes(self, values: Any, combine: Callable[[Expr, Expr], Expr]) -> None:
        """Combine over the four lanes that share a row."""
        for row in range(_ROWS):
            for distance in (1, 2):
                emit(
                    T.ptx.shfl_sync.bfly.b32(
                        self._other[row], values[row], T.uint32(distance), T.uint32(0x1F), T.uint32(0xFFFFFFFF)
                    )
                )
                put(values, row, combine(values[row], self._other[row]))
