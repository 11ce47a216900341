"""A softmax that brings its sums to a new highest score only where that is much higher."""

from __future__ import annotations

from typing import Any

from na_compiler.schedules.shared.softmax import Softmax
from na_compiler.schedules.shared.tiles import Fragments
from na_compiler.schedules.shared.trace import T, local, put, when

__all__ = ["PatientSoftmax"]

Expr = Any
_ROWS = 2
_ALL = 0xFFFFFFFF  # lanes
# An exponent up to which the highest score, and what stands for it, are rounded by a quarter at most. Beyond, floats
# are so far apart that weights would be more than the threshold lets them be.
_FINE = 2.0**22


class PatientSoftmax(Softmax):
    """Emits a softmax whose weights are relative to a score that may be a little below the highest.

    Sums of weights, and weighted sums, are as right with any such score as long as no weight overflows. With one up to
    ``threshold`` powers of two below the highest, weights are at most ``2 ** threshold``, which both types of 16 bits
    hold with all their digits. So most tiles cost no exchange with the other lanes of a row, no factor, and no
    multiplication of the weighted sums.

    Parameters
    ----------
    products, scale
        See `Softmax`.
    threshold
        Powers of two, at most 15: a float16 holds no more.
    """

    def __init__(self, products: Fragments, scale: Expr, threshold: int) -> None:
        super().__init__(products, scale)
        # Of each row, the highest score with which sums stay as they are; and how far that is above the last highest.
        self._limit, self._slack = local(_ROWS), local(1)
        # Infinite where the scale is nothing: all scores are equal then.
        put(self._slack, 0, T.float32(threshold) / self._unit[0])
        # Whether a row of the warp rose: a vote.
        self._risen = local(1, "uint32")

    def start(self) -> None:
        """Begin with no keys."""
        super().start()
        for row in range(_ROWS):
            # The first score that is seen is above it.
            put(self._limit, row, self.highest[row])

    def weigh(self) -> None:
        """Turn a tile's scores into weights, and add them up; `rescale` the weighted sums before adding to them."""
        tops = [self.top(row) for row in range(_ROWS)]
        rises = T.Or(tops[0] > self._limit[0], tops[1] > self._limit[1])
        put(self._risen, 0, T.cuda.ballot_sync(T.uint32(_ALL), rises))
        with when(self._risen[0] != T.uint32(0)):
            self.raise_to(tops)
            for row in range(_ROWS):
                slack = T.Select(T.abs(self._offset[row]) < T.float32(_FINE), self._slack[0], T.float32(0))
                put(self._limit, row, self.highest[row] + slack)
                put(self.total, row, self.total[row] * self._factor[row])
        self.exponentiate(is_rescaled=True)

    def rescale(self) -> None:
        """Bring the weighted sums to what weights are relative to, if that is another score than before."""
        with when(self._risen[0] != T.uint32(0)):
            super().rescale()
