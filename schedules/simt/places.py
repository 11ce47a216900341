"""Where tokens lie in the layout, and those that a row visits along an axis, as TensorIR expressions.

All that depends on the layout's extents, or on where windows are, is asked here: of `Places`, one for each kernel, and
of the `AxisPlaces` that it makes of a token.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tvm import tirx
from tvm.tirx.script import builder as T

from na_compiler.schedules.simt.plan import DirectAxis, DirectPlan
from na_compiler.tensorir.axes import AXES
from na_compiler.window import WRAP, group_length, query_bounds, window_bounds

__all__ = ["AxisPlaces", "Places"]

Expr = Any


class Places:
    """The tokens of the layout, numbered in row-major order, and the blocks and strips that they are cut into.

    Parameters
    ----------
    plan
        Of the kernel.
    """

    def __init__(self, plan: DirectPlan) -> None:
        self.plan = plan

    @property
    def extents(self) -> tuple[int, ...]:
        """Tokens along each axis of the layout."""
        return self.plan.problem.layout

    @property
    def count(self) -> int:
        """Tokens in all."""
        return self.plan.problem.tokens

    def token(self, number: Expr) -> list[Expr]:
        """Return the place in the layout of a token, given its number."""
        places: list[Expr] = []
        for extent in reversed(self.extents[1:]):
            places.insert(0, number % extent)
            number = number // extent
        return [number, *places]

    def number(self, token: Sequence[Expr]) -> Expr:
        """Return the number of a token, given its place in the layout."""
        number: Expr = 0
        for place, extent in zip(token, self.extents, strict=True):
            number = number * extent + place
        return number

    def clamp(self, number: Expr) -> Expr:
        """Return the last token's number in place of one beyond it."""
        return tirx.min(number, self.count - 1)

    def exists(self, number: Expr) -> Expr:
        """Return whether there is a token of a number."""
        return number < self.count

    def along_axes(self, token: Sequence[Expr]) -> list[AxisPlaces]:
        """Return what a token visits along each of three axes; those that the problem does not have come first."""
        missing = [0] * (AXES - len(token))
        return [AxisPlaces(axis, place) for axis, place in zip(self.plan.axes, [*missing, *token], strict=True)]

    # Tokens by blocks, and by strips.

    @property
    def blocks(self) -> int:
        """Blocks of tokens."""
        return self.plan.blocks

    def row(self, part: Expr, place: Expr) -> Expr:
        """Return the number of a block's token; beyond the end, of the last one again."""
        number = part * self.plan.rows + place
        return self.clamp(number) if self.count % self.plan.rows else number

    def is_row(self, part: Expr, place: Expr) -> Expr:
        """Return whether a block has a token at a place."""
        if self.count % self.plan.rows == 0:
            return tirx.const(True, "bool")
        return self.exists(part * self.plan.rows + place)

    def of_bias_strip(self, strip: Expr, place: Expr) -> Expr:
        """Return the number that a token has of a strip for the gradient of biases, if there is one at a place."""
        return strip * self.plan.bias_strip + place

    def of_strip(self, strip: Expr, place: Expr) -> Expr:
        """Return the number that a strip's token has, if there is one at a place."""
        return strip * self.plan.strip + place


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

    def bias(self, number: Expr) -> Expr:
        """Return where along the axis of a table of biases that of the ``number``'th key of a query's window is."""
        start, _ = window_bounds(self.index, *self._rule, minimum=tirx.min, maximum=tirx.max)
        return start - self.index + number + (self.axis.kernel_size - 1)

    def bias_of_query(self, number: Expr) -> Expr:
        """Return where that of a key and the ``number``'th query that sees it is."""
        start, _ = query_bounds(self.index, *self._rule, minimum=tirx.min, maximum=tirx.max, choose=T.Select)
        return self.index - start - number + (self.axis.kernel_size - 1)

    def key_at(self, place: Expr) -> tuple[Expr, Expr]:
        """Return where the key is that a place of the table stands for, and whether the query sees it; else another."""
        start, end = window_bounds(self.index, *self._rule, minimum=tirx.min, maximum=tirx.max)
        key = self.index + place - (self.axis.kernel_size - 1)
        return self._token(tirx.max(tirx.min(key, end - 1), start)), tirx.all(key >= start, key < end)

    @property
    def _rule(self) -> tuple[Expr, int, int, bool, str]:
        return self.length, self.axis.kernel_size, self.axis.stride, self.axis.is_causal, self.axis.border

    def _token(self, index: Expr) -> Expr:
        return self.around(self.axis, index * self.axis.dilation + self.group)

    @staticmethod
    def around(axis: DirectAxis, token: Expr) -> Expr:
        """Return a place in the layout, less than an axis beyond an end, modulo the axis where windows wrap."""
        return (token + axis.layout) % axis.layout if axis.border == WRAP else token
