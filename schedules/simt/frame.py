"""What the direct descriptions share: a plan's tensors, places in them, and steps on rows and on chunks of rows.

Which rows a chunk has is in `na_compiler.schedules.simt.chunks`. Block names are what the schedule knows the steps by.
Every buffer that these functions allocate belongs to one query or key, so that a schedule can keep it in the registers
of the threads that have it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from tvm import ir, tirx
from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script import builder as T

from na_compiler.operands import KEY_MASK, RELATIVE_POSITION_BIAS
from na_compiler.schedules.simt.places import Places
from na_compiler.schedules.simt.plan import DirectPlan
from na_compiler.tensorir.blocks import block, reduction

__all__ = [
    "At",
    "Buffer",
    "DirectFrame",
    "Expr",
    "Place",
    "Rows",
    "registers",
    "scalar",
]

Buffer = Any
Expr = Any
Place = Sequence[Any]
# From the place in a row to the indices of its tensor.
At = Callable[[Expr], list[Expr]]
# The same for each row of a chunk.
Rows = Callable[[Any], At]

_ELEMENT_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "bool": 1}


class DirectFrame:
    """A plan in the form that descriptions are written with: tensors, and places in them."""

    def __init__(self, plan: DirectPlan) -> None:
        problem = plan.problem
        self.plan, self.problem = plan, problem
        self.places = Places(plan)
        self.dtype = problem.dtype
        self.batch = tirx.Var("batch", "int64")
        self.additional = tirx.Var("additional", "int64")
        # The batch, or 0 where there is no gradient of lse.
        self.given = tirx.Var("given", "int64")

    def tokens(self, *last: int) -> tuple[Expr, ...]:
        """Return the shape of a tensor with one entry a token: ``[batch, *layout, *last]``."""
        return self.shape(self.batch, *self.places.extents, *last)

    def extra(self, *last: int) -> tuple[Expr, ...]:
        """Return the shape of additional keys or values: ``[batch, additional, *last]``."""
        return self.shape(self.batch, self.additional, *last)

    def shape(self, *extents: Expr) -> tuple[Expr, ...]:
        """Return a shape of 64-bit extents: TVM's packed ABI trips over a shape of mixed widths."""
        return tuple(tirx.IntImm("int64", extent) if isinstance(extent, int) else extent for extent in extents)

    def tensor(self, shape: tuple[Expr, ...], dtype: str | None = None) -> dict[str, Any]:
        """Return the arguments of ``T.match_buffer`` for a contiguous tensor."""
        dtype = dtype or self.dtype
        return {"shape": shape, "dtype": dtype, "align": _ELEMENT_BYTES[dtype]}

    def strided(self, name: str, shape: tuple[Expr, ...]) -> dict[str, Any]:
        """Return the arguments of ``T.match_buffer`` for a tensor used where it is, at any strides but the last's."""
        strides = [tirx.Var(f"{name}_stride{axis}", "int64") for axis in range(len(shape) - 1)]
        return {**self.tensor(shape), "strides": [*strides, tirx.IntImm("int64", 1)]}

    def inputs(self, prefix: str = "") -> dict[str, Any]:
        """Return the parameters that every description begins with; with a prefix, as many of other names."""
        p = self.problem
        shapes = {
            "query": self.tokens(p.heads, p.head_dim),
            "key": self.tokens(p.heads_kv, p.head_dim),
            "value": self.tokens(p.heads_kv, p.head_dim_v),
        }
        if p.additional_kv:
            shapes["additional_keys"] = self.extra(p.heads_kv, p.head_dim)
            shapes["additional_values"] = self.extra(p.heads_kv, p.head_dim_v)
        return {prefix + name: self.strided(prefix + name, shape) for name, shape in shapes.items()}

    def optional(self) -> dict[str, Any]:
        """Return the parameters of the bias by relative position and the key mask, where the problem has them."""
        found: dict[str, Any] = {}
        if self.problem.has(RELATIVE_POSITION_BIAS):
            shape = self.shape(self.problem.heads, *(2 * extent - 1 for extent in self.problem.kernel_size))
            found[RELATIVE_POSITION_BIAS] = self.tensor(shape, "float32")
        if self.problem.has(KEY_MASK):
            found[KEY_MASK] = self.tensor(self.tokens(), "bool")
        return found

    def token(self, number: Expr) -> list[Expr]:
        """Return the place in the layout of a token, given its number."""
        return self.places.token(number)

    @contextlib.contextmanager
    def rows(self, name: str, heads: int) -> Iterator[tuple[Expr, ...]]:
        """Open a block for each token of each head; yields batch, head, number of the block of tokens, place in it."""
        # A launch of no blocks is an error, so that an empty batch has one that does nothing.
        extents = (_at_least_one(self.batch), heads, self.places.blocks, self.plan.rows)
        with block(name, extents, where=lambda batch, *_: batch < self.batch) as places:
            yield places

    def row(self, part: Expr, place: Expr) -> Expr:
        """Return the number of a block's token; beyond the end, of the last one again."""
        return self.places.row(part, place)

    def is_row(self, part: Expr, place: Expr) -> Expr:
        """Return whether a block has a token at a place."""
        return self.places.is_row(part, place)

    @contextlib.contextmanager
    def additional_rows(self, name: str, *extents: int) -> Iterator[tuple[Expr, ...]]:
        """Open a block for each additional key; yields batch, ..., number of the block of keys, and place in it."""
        rows = tirx.IntImm("int64", self.plan.rows)
        parts = tirx.ceildiv(_at_least_one(self.additional), rows)
        all_extents = (_at_least_one(self.batch), *extents, parts, self.plan.rows)
        with block(
            name, all_extents, where=lambda batch, *_: tirx.all(batch < self.batch, self.additional > 0)
        ) as places:
            yield places

    def additional_row(self, part: Expr, place: Expr) -> tuple[Expr, Expr]:
        """Return the number of a block's additional key, beyond the end of the last one again, and if it is there."""
        number = part * self.plan.rows + place
        return tirx.min(number, self.additional - 1), number < self.additional

    @contextlib.contextmanager
    def table_rows(self, name: str, *extents: int) -> Iterator[tuple[Expr, ...]]:
        """Open a block for each place of a table of biases; yields batch, ..., number of the block, and place in it."""
        parts = -(-self.plan.offsets // self.plan.rows)
        all_extents = (_at_least_one(self.batch), *extents, parts, self.plan.rows)
        with block(name, all_extents, where=lambda batch, *_: batch < self.batch) as places:
            yield places

    def table_row(self, part: Expr, place: Expr) -> tuple[Expr, Expr]:
        """Return the number of a block's place of the table, beyond the end of the last one, and if it is there."""
        number = part * self.plan.rows + place
        return tirx.min(number, self.plan.offsets - 1), number < self.plan.offsets

    def table_place(self, number: Expr) -> list[Expr]:
        """Return where in a table of biases a place is along each of three axes, given its number."""
        places: list[Expr] = []
        for axis in reversed(self.plan.axes[1:]):
            extent = 2 * axis.kernel_size - 1
            places.insert(0, number % extent)
            number = number // extent
        return [number, *places]

    @staticmethod
    def whole(buffer: tirx.Buffer) -> tirx.BufferRegion:
        """Return all of a buffer, as the region that a block reads or writes."""
        return tirx.BufferRegion(buffer, [ir.Range(0, extent) for extent in buffer.shape])

    def padded(self, width: int) -> int:
        """Return a row's width, rounded up so that lanes have equal parts."""
        return self.plan.padded(width)

    def views(self, tensors: dict[str, Buffer]) -> dict[str, Buffer]:
        """Return the same tensors, of whose strides it can be seen that they are multiples of the vector.

        Vectors are read and written as a whole only where their places are known to be multiples of their length.
        That strides and addresses are is for the caller to see to; `Simt.alignment` says so.
        """
        vector = self.plan.vector
        return {name: _multiples(name, tensor, vector) for name, tensor in tensors.items()} if vector > 1 else tensors

    def stage(self, name: str, source: Buffer, at: Rows, size: tuple[int, ...], width: int) -> Buffer:
        """Copy some rows as they are; beyond a row's width are some of its elements again."""
        padded, vector = self.padded(width), self.plan.vector
        raw = registers((*size, padded), self.dtype)
        with block(f"{name}_rows", (*size, padded)) as index:
            *place, d = index if size else (*index,)
            if padded != width:
                d = tirx.min(d // vector, width // vector - 1) * vector + d % vector
            T.buffer_store(raw, source[at(place)(d)], list(index))
        return raw

    def load(self, name: str, source: Buffer, at: At, width: int, factor: Expr | None = None) -> Buffer:
        """Copy a row to float32, times a factor, padded with zeros."""
        padded = self.padded(width)
        raw = self.stage(name, source, lambda _: at, (), width)
        row = registers((padded,))
        with block(name, (padded,)) as (d,):
            value = T.Cast("float32", raw[d])
            value = value if factor is None else value * factor
            T.buffer_store(row, value if padded == width else T.Select(d < width, value, T.float32(0)), [d])
        return row

    def clear(self, name: str, width: int) -> Buffer:
        """Return a row of zeros, to which chunks add."""
        row = registers((self.padded(width),))
        with self.spread(name, self.padded(width)) as d:
            T.buffer_store(row, T.float32(0), [d])
        return row

    @contextlib.contextmanager
    def spread(self, name: str, width: int) -> Iterator[Expr]:
        """Open a block that changes a row in place, its elements spread over the lanes as schedules spread others.

        TensorIR's schedule refuses to bind a block that reads what it writes, so these loops are written as they are
        to run.
        """
        lanes, vector = self.plan.lanes, self.plan.vector
        with contextlib.ExitStack() as stack:
            part = stack.enter_context(T.serial(width // (lanes * vector)))
            thread = self.plan.thread
            lane = stack.enter_context(T.thread_binding(lanes, thread=thread) if thread else T.serial(lanes))
            element = stack.enter_context(T.serial(vector))
            stack.enter_context(T.sblock(name))
            yield T.axis.spatial(width, (part * lanes + lane) * vector + element)

    def dot(self, name: str, width: int, product: Callable[[Expr], Expr]) -> Buffer:
        """Return the sum of ``product(d)`` over a row, in a buffer of one number."""
        result = registers((1,))
        with reduction(name, (1,), (self.padded(width),)) as (zero, d):
            with T.init():
                T.buffer_store(result, T.float32(0), [zero])
            T.buffer_store(result, result[zero] + product(d), [zero])
        return result

    def products(self, name: str, row: Buffer, rows: Buffer, width: int) -> Buffer:
        """Return the products of a row of so many elements with each of some staged rows.

        What staged rows hold beyond them may be infinite, and 0 times that is NaN.
        """
        *size, padded = map(int, rows.shape)
        result = registers(tuple(size))
        with reduction(name, tuple(size), (padded,)) as (*place, d):
            with T.init():
                T.buffer_store(result, T.float32(0), place)
            other = T.Cast("float32", rows[[*place, d]])
            other = other if padded == width else T.Select(d < width, other, T.float32(0))
            T.buffer_store(result, result[place] + row[d] * other, place)
        return result

    def accumulate(
        self,
        name: str,
        pairs: list[tuple[Buffer, Buffer]],
        kept: Buffer,
        before: Callable[[Expr], Expr] | None = None,
    ) -> None:
        """Add some staged rows, weighted, to a row, or to what ``before(d)`` says that it is by now.

        The sum is over pairs of weights and rows as well.
        """
        *size, padded = map(int, pairs[0][1].shape)
        part = registers((padded,))
        with reduction(name, (padded,), tuple(size)) as (d, *place):
            with T.init():
                T.buffer_store(part, T.float32(0), [d])
            total = part[d]
            for weights, rows in pairs:
                total = total + weights[place] * T.Cast("float32", rows[[*place, d]])
            T.buffer_store(part, total, [d])
        with self.spread(f"{name}_add", padded) as d:
            T.buffer_store(kept, (kept[d] if before is None else before(d)) + part[d], [d])


def _multiples(name: str, tensor: Buffer, vector: int) -> Buffer:
    strides = [stride // vector * vector for stride in tensor.strides[:-1]]
    view = T.decl_buffer(
        tensor.shape,
        tensor.dtype,
        data=tensor.data,
        strides=[*strides, tensor.strides[-1]],
        align=tensor.data_alignment,
    )
    return IRBuilder.name(f"{name}_view", view)


def registers(shape: tuple[int, ...], dtype: str = "float32") -> Buffer:
    """Allocate a buffer for the threads that share a row, each of which keeps what it uses of it."""
    return T.sblock_alloc_buffer(shape, dtype, scope="local")


def scalar(name: str, value: Expr, dtype: str = "float32") -> Buffer:
    """Return a number in a buffer of its own, so that it is computed once."""
    result = registers((1,), dtype)
    with block(name, (1,)) as (zero,):
        T.buffer_store(result, value, [zero])
    return result


def _at_least_one(extent: Expr) -> Expr:
    return tirx.max(extent, tirx.IntImm("int64", 1))
