"""`Block`: what the warps of a thread block share; `Arguments`, and `Source`, a tensor as warps address it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from tvm import tirx

from na_compiler.operands import KEY_MASK, RELATIVE_POSITION_BIAS
from na_compiler.schedules.mma.plan import CHUNK_BYTES, Plan
from na_compiler.schedules.shared.trace import I, T, emit, index64, let, register

__all__ = ["Arguments", "Block", "Source", "WarpBlock", "strided", "wide"]

Expr = Any


class Arguments:
    """The function's arguments.

    ``main(query, key, value, [additional_keys, additional_values,] [relative_position_bias,] [key_mask,] scale, output,
    lse)``: inputs may have any strides that are multiples of 16 bytes, the last one 1; the table of biases, the mask,
    output and lse are contiguous.
    """

    def __init__(self, plan: Plan) -> None:
        problem = plan.problem
        self.batch = tirx.Var("batch", "int64")
        self.additional: Expr = tirx.Var("additional", "int64") if problem.additional_kv else None
        tokens = (self.batch, *problem.layout)
        dtype = problem.dtype
        self.query = strided("query", (*tokens, problem.heads, problem.head_dim), dtype)
        self.key = strided("key", (*tokens, problem.heads_kv, problem.head_dim), dtype)
        self.value = strided("value", (*tokens, problem.heads_kv, problem.head_dim_v), dtype)
        if problem.additional_kv:
            extra = (self.batch, self.additional)
            self.keys = strided("additional_keys", (*extra, problem.heads_kv, problem.head_dim), dtype)
            self.values = strided("additional_values", (*extra, problem.heads_kv, problem.head_dim_v), dtype)
        if problem.has(RELATIVE_POSITION_BIAS):
            places = (2 * extent - 1 for extent in problem.kernel_size)
            buffer = I.buffer(wide((problem.heads, *places)), "float32", align=4)
            self.bias = I.arg(RELATIVE_POSITION_BIAS, buffer)
        if problem.has(KEY_MASK):
            self.key_mask = I.arg(KEY_MASK, I.buffer(wide(tokens), "bool", align=1))
        self.scale = I.arg("scale", tirx.Var("scale", "float32"))
        shape = (*tokens, problem.heads, problem.head_dim_v)
        self.output = I.arg("output", I.buffer(wide(shape), dtype, align=16))
        self.lse = I.arg("lse", I.buffer(wide(shape[:-1]), "float32", align=4))

    @property
    def count(self) -> Expr:
        """Number of additional keys, as the device counts; ``None`` without them."""
        return None if self.additional is None else T.Cast("int32", self.additional)


def strided(name: str, shape: Sequence[Expr], dtype: str) -> Any:
    """Declare a tensor with strides that the caller chooses."""
    strides: list[Expr] = [tirx.Var(f"{name}_stride{axis}", "int64") for axis in range(len(shape) - 1)]
    strides.append(tirx.IntImm("int64", 1))
    return I.arg(name, I.buffer(wide(shape), dtype, strides=strides, align=16))


def wide(shape: Sequence[Expr]) -> list[Expr]:
    """Return a shape in int64 throughout: TVM's packed ABI trips over mixed widths."""
    return [tirx.IntImm("int64", extent) if isinstance(extent, int) else extent for extent in shape]


class WarpBlock:
    """Threads of a block of single warps, how they wait for each other and for their copies; its shared memory.

    Parameters
    ----------
    warps
        Of the block.
    shared_bytes
        Bytes of shared memory.
    """

    def __init__(self, warps: int, shared_bytes: int) -> None:
        self._warps = warps
        self.thread = I.thread_id([32 * warps])
        self.warp: Expr = let(T.shift_right(self.thread, 5)) if warps > 1 else 0
        self.lane = let(T.bitwise_and(self.thread, 31)) if warps > 1 else self.thread
        self._memory = I.alloc_buffer([shared_bytes], "uint8", scope="shared.dyn", align=1024)

    def view(self, offset: int, count: int, dtype: str) -> Any:
        """Return some elements of shared memory, from a byte on, as a buffer."""
        return I.decl_buffer([count], dtype, data=self._memory.data, byte_offset=offset, scope="shared.dyn", align=128)

    def sync(self) -> None:
        """Wait for all warps of the block."""
        emit(T.cuda.cta_sync() if self._warps > 1 else T.cuda.warp_sync())

    @staticmethod
    def sync_warp() -> None:
        """Wait for all lanes of the warp."""
        emit(T.cuda.warp_sync())

    @staticmethod
    def commit() -> None:
        """Close a group of copies."""
        emit(T.ptx.cp.async_.commit_group())

    @staticmethod
    def wait(pending: int) -> None:
        """Wait until at most so many groups of this thread's copies are pending."""
        emit(T.ptx.cp.async_.wait_group(pending))


class Block(WarpBlock):
    """Shared memory of a thread block of the forward: each warp's queries, then keys, then values."""

    def __init__(self, plan: Plan, arguments: Arguments) -> None:
        super().__init__(plan.warps, plan.shared_bytes)
        self.plan, self.arguments = plan, arguments
        self.dtype = dtype = plan.problem.dtype
        size = plan.problem.element_bytes
        self.queries = self.view(0, plan.warps * plan.query_bytes // size, dtype)
        self.query_words = self.view(0, plan.warps * plan.query_bytes // 4, "uint32")
        self.keys = self.view(plan.key_offset, plan.stages * plan.key.bytes // size, dtype)
        self.values = self.view(plan.value_offset, plan.stages * plan.value.bytes // size, dtype)


class _Place(Protocol):
    """What is asked of a block's tile: its batch entry."""

    batch: Expr


class Source:
    """One head of one batch entry of a tensor, of one dilation group: rows at positions along the layout's axes.

    Offsets within it are counted in chunks of 16 bytes and 32 bits, which reaches 32 GiB.

    Parameters
    ----------
    work
        The block's tile of queries.
    buffer
        ``[batch, *layout, heads, head_dim]``, or ``[batch, additional, heads, head_dim]``.
    head
        Which head.
    dilation, group
        Of the layout's axes; additional keys have neither.
    steps_heads
        Whether a place has a head as well, counted from ``head`` on, after the axes.
    around
        Of what streams by where windows wrap: returns for an axis and a position beyond an end the one on the axis.
    """

    def __init__(
        self,
        work: _Place,
        buffer: Any,
        head: Expr,
        dilation: Sequence[int],
        group: Sequence[Expr],
        *,
        around: Callable[[int, Expr], Expr] | None = None,
        steps_heads: bool = False,
    ) -> None:
        self.around = around
        dtype = str(buffer.dtype)
        self.per_chunk = CHUNK_BYTES // (4 if dtype == "float32" else 2)
        whole = I.decl_buffer([2**62], dtype, data=buffer.data, scope="global")
        strides = _strides(buffer)
        start = index64(register(work.batch)) * strides[0] + index64(register(head)) * strides[-2]
        for place, stride in zip(group, strides[1:-2], strict=True):
            if not (isinstance(place, int) and place == 0):
                start = start + index64(register(place)) * stride
        # A pointer of its own, so that an address is one multiplication away from it.
        self.buffer = I.decl_buffer([2**62], dtype, data=I.Bind(whole.ptr_to([start])), scope="global")
        self.steps = [self._chunks(step, stride) for step, stride in zip(dilation, strides[1:-2], strict=True)]
        if steps_heads:
            self.steps.append(self._chunks(1, strides[-2]))

    def _chunks(self, dilation: int, stride: Expr) -> Expr:
        if isinstance(stride, int):
            return dilation * stride // self.per_chunk
        shift = T.int64(self.per_chunk.bit_length() - 1)
        return register(T.Cast("int32", T.shift_right(stride, shift)) * dilation)

    def at(self, offset: Expr) -> Expr:
        """Return the element of an offset in chunks."""
        return index64(register(offset)) * self.per_chunk


def _strides(buffer: Any) -> list[Expr]:
    """Return the strides of a buffer, ints where they are known."""
    if buffer.strides:
        return list(buffer.strides)
    extents = [int(extent) for extent in buffer.shape[1:]]
    return [math.prod(extents[axis:]) for axis in range(len(extents) + 1)]
