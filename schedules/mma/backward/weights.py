"""Weights and the gradients of scores, from scores, in registers.

``P = exp(scale S - lse)`` where a row sees a column and 0 elsewhere; ``dS = P (dP - delta)``, likewise. What is not
seen is set to 0, whatever comes out there: weights and gradients of tokens that do not see each other may overflow.
"""

from __future__ import annotations

from typing import Any

from na_compiler.schedules.mma.backward.bias import SweepBias
from na_compiler.schedules.mma.backward.products import SweepProducts
from na_compiler.schedules.mma.plan import ROWS
from na_compiler.schedules.shared.statistics import LOG2_E
from na_compiler.schedules.shared.trace import T, emit, let, local, put, register

__all__ = ["Weights"]

Expr = Any
_HALVES = 2


class Weights:
    """Emits weights and gradients of scores.

    A query's statistics belong to the rows where the warp owns queries; each thread has its two rows' in registers.
    Elsewhere they belong to the columns, and are in the list's order in shared memory.

    Attributes
    ----------
    rows
        Of the thread's two rows lse in units of the exponent, and delta; nothing where queries stream by.
    """

    def __init__(self, products: SweepProducts, rows: list[list[Expr]]) -> None:
        self.products, self.plan, self.block, self.rows = products, products.plan, products.block, rows
        lane = self.block.lane
        self._unit = register(self.block.arguments.scale * T.float32(LOG2_E), "float32")
        self._pair = register(T.bitwise_and(lane, 3) * 2)
        self._row = register(T.shift_right(lane, 2))
        self._bits: list[list[Expr]] = []
        self._columns: list[list[Expr]] = []

    def look_up(self, number: Expr, bias: SweepBias | None) -> None:
        """Read the mask, statistics and places of biases of the step that begins with a number of the list."""
        plan, block = self.plan, self.block
        shift = T.Cast("uint32", self._pair)
        first = let(block.mask // 4 + number * ROWS // plan.word + self._row)
        self._bits = []
        for word in range(plan.streamed // plan.word):
            found = [block.words[first + (ROWS * word + 8 * half)] for half in range(_HALVES)]
            self._bits.append([register(T.shift_right(bits, shift), "uint32") for bits in found])
        if bias is not None:
            bias.look_up(number)
        self._columns = []
        if plan.of_queries:
            return
        first = let(block.list_statistics // 4 + 2 * (number + self._pair))
        for eight in range(plan.streamed // 8):
            found = local(4)
            place = block.floats.ptr_to([first + 16 * eight])
            emit(T.ptx["ld.shared.v4.f32"](*(found[i] for i in range(4)), place))
            self._columns.append([found[i] for i in range(4)])

    def _statistic(self, which: int, eight: int, half: int, e: int) -> Expr:
        return self.rows[half][which] if self.plan.of_queries else self._columns[eight][2 * e + which]

    def exponentiate(self, bias: SweepBias | None) -> None:
        """Turn a step's scores into weights."""
        scores = self.products.scores
        for eight, half, e, index in self._elements():
            score = scores[index] * self._unit
            if bias is not None:
                score = score + bias.at(eight, half, e)
            put(scores, index, score - self._statistic(0, eight, half, e))
            # No weight is above 1, however coarse lse is; this minimum keeps NaN.
            emit(T.ptx["min.NaN.f32"](scores[index], scores[index], T.float32(0)))
            emit(T.ptx.ex2.approx.ftz.f32(scores[index], scores[index]))

    def differentiate(self) -> None:
        """Turn the gradients of a step's weights into those of its scores."""
        scores, slopes = self.products.scores, self.products.slopes
        for eight, half, e, index in self._elements():
            put(slopes, index, scores[index] * (slopes[index] - self._statistic(1, eight, half, e)))

    def clear(self, elements: Any) -> None:
        """Set to 0 what is not seen."""
        for eight, half, e, index in self._elements():
            put(elements, index, T.Select(self.sees(eight, half, e), elements[index], T.float32(0)))

    def sees(self, eight: int, half: int, e: int) -> Expr:
        """Return whether a row sees a column."""
        word, place = divmod(8 * eight, self.plan.word)
        return T.bitwise_and(self._bits[word][half], T.uint32(1 << (place + e))) != T.uint32(0)

    def _elements(self) -> list[tuple[int, int, int, int]]:
        """Return of all elements the eight columns, the row's half, the column's parity, and the index."""
        return [
            (eight, half, e, 4 * eight + 2 * half + e)
            for eight in range(self.plan.streamed // 8)
            for half in range(_HALVES)
            for e in (0, 1)
        ]
