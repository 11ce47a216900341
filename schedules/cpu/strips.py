"""Strips of one axis: what is the same for all of a task, from numbers that are known or from the kernel's arguments.

A `ClosedStrip` is one of a layout that is known: expressions of the parallel loop's iterator, made anew wherever they
are used. An `OpenStrip` is one of a layout, or of a part of one, that the kernel learns when it is called. Both say the
same of themselves, and `na_compiler.schedules.cpu.places` asks either.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tvm import ir, tirx
from tvm.tirx.script import builder as T

from na_compiler.schedules.cpu.plan import AxisTiling
from na_compiler.tensorir.blocks import block, local
from na_compiler.window import WRAP, group_length, query_bounds, window_end, window_start

__all__ = ["ClosedStrip", "Coverings", "OpenStrip", "Range", "Strip", "end_of", "start_of"]

Expr = Any  # tvm.ir.Expr, which has no types.


def start_of(axis: AxisTiling, index: Expr, length: Expr) -> Expr:
    """Return the first key of the window of a query, in a dilation group of a length."""
    return window_start(index, length, *axis.rule, minimum=tirx.min, maximum=tirx.max)


def end_of(axis: AxisTiling, index: Expr, length: Expr) -> Expr:
    """Return one past the last key of the window of a query, in a dilation group of a length."""
    return window_end(index, length, *axis.rule, minimum=tirx.min, maximum=tirx.max)


class ClosedStrip:
    """A strip of an axis whose tokens are all there, and are known.

    Attributes
    ----------
    staged
        How many keys of the box are staged; ``None`` for all.
    """

    staged = None

    def __init__(self, axis: AxisTiling, number: Expr) -> None:
        self.axis, self.number = axis, number

    @property
    def group(self) -> Expr:
        """The dilation group."""
        return 0 if self.axis.dilation == 1 else self.number // self.axis.strips

    @property
    def length(self) -> Expr:
        """Tokens of the group."""
        if self.axis.longest == self.axis.shortest:
            return self.axis.longest
        return group_length(self.axis.layout, self.axis.dilation, self.group)

    @property
    def first(self) -> Expr:
        """The index in the group of the strip's first query."""
        number = self.number if self.axis.dilation == 1 else self.number % self.axis.strips
        return number * self.axis.strip

    @property
    def end(self) -> Expr:
        """One past the group's last query that there is."""
        return self.length

    @property
    def keys_end(self) -> Expr:
        """One past the group's last key that there is."""
        return self.length

    @property
    def box(self) -> Expr:
        """The index of the first key of the strip's box, moved left where the box would pass the end.

        Where windows wrap boxes may lie anywhere, and begin before the first token: indices count modulo the axis.
        """
        axis = self.axis
        if axis.border != WRAP and axis.strip_box >= axis.longest:
            return 0
        first = tirx.min(self.first, self.end - 1) if axis.is_ragged else self.first
        start = start_of(axis, first, self.length)
        if axis.border == WRAP:
            return start
        base = tirx.min(start, self.length - axis.strip_box)
        return tirx.max(base, 0) if axis.strip_box > axis.shortest else base

    def query_token(self, index: Expr) -> Expr:
        """Return the place in the query tensor of an index in the group."""
        return index if self.axis.dilation == 1 else index * self.axis.dilation + self.group

    def key_token(self, index: Expr) -> Expr:
        """Return the place in the key tensor of an index in the group."""
        return self.query_token(index)


@dataclass(frozen=True)
class Range:
    """What an open axis is when the kernel is called, in int32.

    Parameters
    ----------
    length
        Tokens of the whole axis.
    first_query, queries, first_key, keys
        What the tensors hold of it.
    """

    length: Expr
    first_query: Expr
    queries: Expr
    first_key: Expr
    keys: Expr


class OpenStrip:
    """A strip of an open axis: as a `ClosedStrip`.

    Its numbers are kept in a small array where the task begins. Not in variables: TVM's simplifier puts the values of
    those back where they are used, again and again, and compiling takes several times as long.

    Parameters
    ----------
    axis, extents
        Of the axis.
    group, number
        The dilation group, and which strip of it.
    trims
        Whether only the keys are staged that the strip's queries see: the box begins with the first of them, and
        `staged` says how many they are.
    """

    _MOST = 9

    def __init__(self, axis: AxisTiling, extents: Range, group: Expr, number: Expr, *, trims: bool) -> None:
        self.axis = axis
        self._kept, self._count = local((self._MOST,), "int32"), 0
        with T.sblock("strip_numbers"):
            T.reads()
            T.writes(tirx.BufferRegion(self._kept, [ir.Range(0, self._MOST)]))
            self.group = self._keep(group)
            self.length = self._keep(self._before(extents.length))
            self.first = self._keep(self._before(extents.first_query) + number * axis.strip)
            self.end = self._keep(self._before(extents.first_query + extents.queries))
            self.keys_end = self._keep(self._before(extents.first_key + extents.keys))
            start = start_of(axis, tirx.min(self.first, self.end - 1), self.length)
            self.staged: Expr | None = None
            if trims:
                self.box = self._keep(start)
                last = tirx.min(self.first + (axis.strip - 1), self.end - 1)
                # None for a strip without queries, whose box may be nowhere in what is held.
                needed = end_of(axis, last, self.length) - self.box
                self.staged = self._keep(tirx.Select(self.first < self.end, needed, 0))
            else:
                held = self._before(extents.first_key)
                self.box = self._keep(tirx.max(tirx.min(start, self.keys_end - axis.strip_box), held))
            self.query_origin = self._keep(self.group - extents.first_query)
            self.key_origin = self._keep(self.group - extents.first_key)

    def _keep(self, value: Expr) -> Expr:
        if isinstance(value, int):
            return value
        T.buffer_store(self._kept, value, [self._count])
        self._count += 1
        return self._kept[self._count - 1]

    def _before(self, tokens: Expr) -> Expr:
        """Return how many of the first tokens of the axis belong to the group."""
        return tokens if self.axis.dilation == 1 else group_length(tokens, self.axis.dilation, self.group)

    def query_token(self, index: Expr) -> Expr:
        """Return the place in the query tensor of an index in the group."""
        return self._held(index * self.axis.dilation + self.query_origin)

    def key_token(self, index: Expr) -> Expr:
        """Return the place in the key tensor of an index in the group."""
        return self._held(index * self.axis.dilation + self.key_origin)

    def _held(self, token: Expr) -> Expr:
        # A dilation group may have no token in a short range: its last one is before the range then.
        return token if self.axis.dilation == 1 else tirx.max(token, 0)


Strip = ClosedStrip | OpenStrip


class Coverings:
    """The strips of an open axis whose boxes may hold a key: those that the queries lie in that see it."""

    _MOST = 7

    def __init__(self, axis: AxisTiling, extents: Range, token: Expr) -> None:
        """Emit what is the same for all of them; ``token`` is the key's place in its tensor."""
        self.axis, self.extents = axis, extents
        self._kept = local((self._MOST,), "int32")
        self._positions = local((axis.key_strips,), "int32")
        with T.sblock("covering"):
            T.reads()
            T.writes(tirx.BufferRegion(self._kept, [ir.Range(0, self._MOST)]))
            whole = tirx.Cast("int32", token) + extents.first_key
            self._group = 0 if axis.dilation == 1 else self._keep(0, whole % axis.dilation)
            index = self._keep(1, whole // axis.dilation)
            length = self._keep(2, self._before(extents.length))
            first, end = query_bounds(
                index,
                length,
                *axis.rule,
                minimum=tirx.min,
                maximum=tirx.max,
                choose=tirx.Select,
            )
            before = self._before(extents.first_query)
            self._number = self._keep(3, tirx.max(first - before, 0) // axis.strip)
            first_query = self._keep(4, before + self._number * axis.strip)
            held_end = self._keep(5, self._before(extents.first_query + extents.queries))
            end = self._keep(6, tirx.min(end, held_end))
        with block("covering_box", (axis.key_strips,)) as (more,):
            T.reads(tirx.BufferRegion(self._kept, [ir.Range(0, self._MOST)]))
            T.writes(tirx.BufferRegion(self._positions, [ir.Range(0, axis.key_strips)]))
            query = first_query + more * axis.strip
            start = start_of(axis, tirx.min(query, held_end - 1), length)
            keys, keys_end = (self._before(at) for at in (extents.first_key, extents.first_key + extents.keys))
            box = tirx.max(tirx.min(start, keys_end - axis.strip_box), keys)
            T.buffer_store(self._positions, tirx.Select(query < end, index - box, -1), [more])

    def _keep(self, at: int, value: Expr) -> Expr:
        T.buffer_store(self._kept, value, [at])
        return self._kept[at]

    def _before(self, tokens: Expr) -> Expr:
        return tokens if self.axis.dilation == 1 else group_length(tokens, self.axis.dilation, self._group)

    def __call__(self, number: Expr) -> tuple[tuple[Expr, ...], Expr, Expr]:
        """Return the ``number``-th of them as the parallel loop has it, the key's position, and if it is in the box."""
        strip = self._number + number
        position = self._positions[number]
        there = tirx.all(position >= 0, position < self.axis.strip_box)
        return (strip,) if self.axis.dilation == 1 else (self._group, strip), position, there
