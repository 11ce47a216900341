"""The bias by relative position in the backward: what is added to scores, and the sums of its gradient.

Its gradient is the sum of those of the scores over all pairs at a distance. Where queries are owned every pair is met
once. Each warp adds in tables of its own in shared memory, in an order that is always the same; a block adds up its
warps' tables, and a last kernel the blocks': there are no atomics, and the bits are the same every time.
"""

from __future__ import annotations

from typing import Any

from na_compiler.operands import RELATIVE_POSITION_BIAS
from na_compiler.problem import Problem
from na_compiler.schedules.mma.backward.plan import places_of
from na_compiler.schedules.mma.backward.products import SweepProducts
from na_compiler.schedules.mma.bias import steps_of
from na_compiler.schedules.mma.rows import Rows
from na_compiler.schedules.shared.statistics import LOG2_E
from na_compiler.schedules.shared.trace import I, T, flat, index64, let, local, put, register, when
from na_compiler.schedules.shared.work import Work

__all__ = ["BiasSums", "SweepBias", "gather_bias", "store_nothing"]

Expr = Any
_HALVES = 2
# Lanes that share a row: each has two keys of every eight.
_LANES = 4
# The last kernel: places of a block, and threads that share one.
_PLACES, _PARTS = 32, 8


class SweepBias:
    """Emits biases of a step's scores.

    A place in a head's table is what the row gives to it and what the column does, which is in the list's table.

    Parameters
    ----------
    products, rows, work
        Scores, the two rows that a thread has, the block's tile.
    head
        Of the queries.
    """

    def __init__(self, products: SweepProducts, rows: Rows, work: Work, head: Expr) -> None:
        self.plan, self.block = products.plan, products.block
        problem = self.plan.problem
        self._last = places_of(problem) - 1
        self._table = flat(self.block.arguments[RELATIVE_POSITION_BIAS])
        self._first = register(head * places_of(problem))
        sign = -1 if self.plan.of_queries else 1
        self._rows = []
        for row in rows.rows:
            axes = zip(rows.position(row, work.first), steps_of(problem), problem.kernel_size, strict=True)
            self._rows.append(register(sum(step * (extent - 1 + sign * token) for token, step, extent in axes)))
        self._pair = register(T.bitwise_and(self.block.lane, _LANES - 1) * 2)
        self._columns: list[list[Expr]] = []

    def look_up(self, number: Expr) -> None:
        """Read what the columns give of the step that begins with a number of the list."""
        first = let(self.block.places // 4 + number + self._pair)
        self._columns = [
            [register(T.Cast("int32", self.block.words[first + (8 * eight + e)])) for e in (0, 1)]
            for eight in range(self.plan.streamed // 8)
        ]

    def place(self, eight: int, half: int, e: int) -> Expr:
        """Return the place of a score's bias in the head's table; of what is not seen, some place of it."""
        return T.max(T.min(self._rows[half] + self._columns[eight][e], self._last), 0)

    def at(self, eight: int, half: int, e: int) -> Expr:
        """Return a score's bias in units of the exponent."""
        return self._table[self._first + self.place(eight, half, e)] * T.float32(LOG2_E)


class BiasSums:
    """Emits the sums of the gradient of biases of a block's queries.

    Keys of one column are at other distances from each of the 16 rows, so that lanes of a column add to other numbers
    of a table. Four columns are met at once, by four lanes of each row: each has a table, or waits for its turn.
    """

    def __init__(self, products: SweepProducts) -> None:
        self.plan, self.block, self._slopes = products.plan, products.block, products.slopes
        plan, block = self.plan, self.block
        lane = T.bitwise_and(block.lane, _LANES - 1)
        self._own = register(block.warp * (plan.bias_bytes // 4) + plan.bias_offset // 4)
        self._turn = register(lane // plan.bias_tables)
        self._table = register(self._own + lane % plan.bias_tables * plan.bias_pitch)

    def clear(self) -> None:
        """Begin with sums of nothing."""
        count = self.plan.bias_bytes // 4
        number = local(1, "int32")
        put(number, 0, self.block.lane)
        with I.While(number[0] < count):
            put(self.block.floats, self._own + number[0], T.float32(0))
            put(number, 0, number[0] + 32)
        self.block.sync_warp()

    def add(self, bias: SweepBias, sees: Any) -> None:
        """Add the gradients of a step's scores; ``sees`` tells of one whether it is seen."""
        turns = _LANES // self.plan.bias_tables
        for eight in range(self.plan.streamed // 8):
            for e in (0, 1):
                places = [register(self._table + bias.place(eight, half, e)) for half in range(_HALVES)]
                for turn in range(turns):
                    with when(self._turn == turn if turns > 1 else None):
                        self._add(places, [sees(eight, half, e) for half in range(_HALVES)], eight, e)
                    self.block.sync_warp()

    def _add(self, places: list[Expr], sees: list[Expr], eight: int, e: int) -> None:
        # Both are read before one is written: they are other places, and need not wait for each other.
        self._write(places, sees, self._totals(places, eight, e))

    def _totals(self, places: list[Expr], eight: int, e: int) -> list[Expr]:
        slopes = [self._slopes[4 * eight + 2 * half + e] for half in range(_HALVES)]
        floats = self.block.floats
        return [register(floats[at] + slope, "float32") for at, slope in zip(places, slopes, strict=True)]

    def _write(self, places: list[Expr], sees: list[Expr], totals: list[Expr]) -> None:
        for at, seen, total in zip(places, sees, totals, strict=True):
            # Places of what is not seen may be those of what is.
            with when(seen):
                put(self.block.floats, at, total)

    def store(self, item: Expr) -> None:
        """Emit the block's sums, over the warps in order, to its part of the workspace."""
        plan, block = self.plan, self.block
        count = places_of(plan.problem)
        space = flat(block.arguments["bias_space"])
        first = register(index64(item) * count, "int64")
        block.sync()
        place, total = local(1, "int32"), local(1)
        put(place, 0, block.thread)
        with I.While(place[0] < count):
            put(total, 0, T.float32(0))
            for warp in range(plan.warps):
                for table in range(plan.bias_tables):
                    at = (plan.bias_offset + warp * plan.bias_bytes) // 4 + table * plan.bias_pitch
                    put(total, 0, total[0] + block.floats[at + place[0]])
            I.buffer_store(space, total[0], [first + index64(place[0])])
            put(place, 0, place[0] + plan.threads)


def store_nothing(plan: Any, arguments: Any, thread: Expr, item: Expr) -> None:
    """Emit that a block without queries gives nothing."""
    count = places_of(plan.problem)
    space = flat(arguments["bias_space"])
    place = local(1, "int32")
    put(place, 0, thread)
    with I.While(place[0] < count):
        I.buffer_store(space, T.float32(0), [index64(item) * count + index64(place[0])])
        put(place, 0, place[0] + plan.threads)


def gather_bias(problem: Problem, arguments: Any, parts: int) -> None:
    """Emit the kernel, inside a launch, that adds up what blocks give to each place, always in one order.

    Eight threads share a place: each adds every eighth block's, and the first of them what they have.

    Parameters
    ----------
    problem
        What to compute.
    arguments
        The backward's arguments, by name; with ``batch``.
    parts
        Blocks of a head.
    """
    count = places_of(problem)
    tiles = -(-count // _PLACES)
    block = I.cta_id([T.Cast("int32", arguments.batch * (problem.heads * tiles))])
    thread = I.thread_id([_PLACES * _PARTS])
    shared = I.alloc_buffer([_PLACES * _PARTS], "float32", scope="shared")
    head, own, part = let(block // tiles), let(thread % _PLACES), let(thread // _PLACES)
    place = let(block % tiles * _PLACES + own)
    total, number = local(1), local(1, "int32")
    put(total, 0, T.float32(0))
    put(number, 0, part)
    space = flat(arguments["bias_space"])
    with when(place < count), I.While(number[0] < parts):
        at = (index64(head) * parts + index64(number[0])) * count + index64(place)
        put(total, 0, total[0] + space[at])
        put(number, 0, number[0] + _PARTS)
    put(shared, thread, total[0])
    I.evaluate(T.cuda.cta_sync())
    with when(T.bitwise_and(part == 0, place < count)):
        put(total, 0, shared[own])
        for other in range(1, _PARTS):
            put(total, 0, total[0] + shared[own + other * _PLACES])
        gradient = flat(arguments[f"grad_{RELATIVE_POSITION_BIAS}"])
        I.buffer_store(gradient, total[0], [index64(head) * count + index64(place)])
