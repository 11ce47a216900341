"""Where the tokens that a row visits lie along an axis, as TensorIR expressions: the window rule both ways round.

All that depends on an axis' extent, or on where windows are, is asked here.
"""

from __future__ import annotations

from typing import Any

from tvm import tirx
from tvm.tirx.script import builder as T

from na_compiler.schedules.simt.plan import DirectAxis
from na_compiler.window import group_length, query_bounds, window_bounds

__all__ = ["AxisPlaces"]

Expr = Any


class AxisPlaces:
    """Expressions of one token along one axis.

    Parameters
    ----------
    axis
        The axis.
    token
        Place of the token in the layout.
    """

    def __init__(self, axis: DirectAxis, token: Expr) -> None:
        self.axis = axis
        self.group: Expr = 0 if axis.dilation == 1 else token % axis.dilation
        self.index: Expr = token if axis.dilation == 1 else token // axis.dilation

    @property
    def length(self) -> Expr:
        """Tokens of the token's dilation group."""
        axis = self.axis
        return axis.layout if axis.dilation == 1 else group_length(axis.layout, axis.dilation, self.group)

    def keys(self) -> tuple[Expr, Expr]:
        """Return where the first key of a query's window is in the layout, and how many there are."""
        start, end = window_bounds(self.index, *self._rule, minimum=tirx.min, maximum=tirx.max)
        return self._token(start), end - start

    def queries(self) -> tuple[Expr, Expr]:
        """Return where the first query that sees a key is in the layout, and how many there are."""
        start, end = query_bounds(self.index, *self._rule, minimum=tirx.min, maximum=tirx.max, choose=T.Select)
        return self._token(start), end - start

    @property
    def _rule(self) -> tuple[Expr, int, int, bool]:
        return self.length, self.axis.kernel_size, self.axis.stride, self.axis.is_causal

    def _token(self, index: Expr) -> Expr:
        return index * self.axis.dilation + self.group
