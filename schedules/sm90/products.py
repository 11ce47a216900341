"""The two products of a warpgroup: scores and weighted sum, by wgmma."""

from __future__ import annotations

from typing import Any

from na_compiler.schedules.sm90.block import Block
from na_compiler.schedules.sm90.plan import ROWS
from na_compiler.schedules.sm90.trace import T, emit, local

__all__ = ["Products"]

Expr = Any
_STEP = 16  # Columns (or keys) of one instruction.
_UNIT = 16  # Descriptors count in 16 bytes.
_TYPES = {"bfloat16": "bf16", "float16": "f16"}

# An accumulator may only be read after wait_group, which names no registers: the compiler must be told that they
# change there. This changes nothing, and it cannot know.
_PIN = r"""
template <typename E, int N>
__forceinline__ __device__ void na_pin(E (&r)[N]) {
#pragma unroll
  for (int i = 0; i < N; ++i) {
    if constexpr (sizeof(E) == 4 && E(0.5f) != E(0)) {
      asm volatile("" : "+f"(r[i]) :: "memory");
    } else {
      asm volatile("" : "+r"(r[i]) :: "memory");
    }
  }
}
"""


class Products:
    """Emits the products of one warpgroup.

    Attributes
    ----------
    scores
        Accumulators of ``Q K^T``: element ``4g + 2h + e`` of a thread is row ``16 warp + lane / 4 + 8h`` and key
        ``8g + 2 (lane % 4) + e`` of the tile.
    output
        Accumulators of ``P V``, likewise.
    weights
        P in pairs of 16 bits: in the order in which it is an operand of the second product, with nothing exchanged.
    """

    def __init__(self, block: Block, warpgroup: Expr) -> None:
        self.block, plan = block, block.plan
        self.plan = plan
        kind = _TYPES[block.dtype]
        problem = plan.problem
        self.scores = local(plan.keys // 2)
        self.weights = local(plan.keys // 4, "uint32")
        self.output = local(problem.head_dim_v // 2)
        name = "wgmma.mma_async.sync.aligned.m64n{}k16.f32.{}.{}"
        self._first, self._second = name.format(plan.keys, kind, kind), name.format(problem.head_dim_v, kind, kind)
        self._cvt = T.ptx[f"cvt.rn.{kind}x2.f32"]
        # Rows are as long as the swizzle's span, and 8 of them are one pattern: the stride between patterns.
        query_place = warpgroup * (plan.query_bytes // 2)
        self._queries = self._descriptor(block.queries, query_place, 1, plan.columns)
        self._keys = self._descriptor(block.keys, 0, 1, plan.columns)
        # Read across its rows, an operand also needs the distance of its boxes of columns.
        apart = plan.columns_v.box_bytes(plan.keys) // _UNIT
        self._values = self._descriptor(block.values, 0, apart, plan.columns_v)

    @staticmethod
    def _descriptor(buffer: Any, place: Expr, leading: int, columns: Any) -> Any:
        descriptor = local(1, "uint64")
        stride = 8 * columns.width * 2 // _UNIT
        emit(
            T.cuda.wgmma.encode_matrix_descriptor(
                T.address_of(descriptor[0]), buffer.ptr_to([place]), leading, stride, columns.swizzle
            )
        )
        return descriptor

    def score(self, stage: Expr) -> None:
        """Emit ``scores = Q K^T`` for the keys of a stage."""
        plan = self.plan
        columns = plan.columns
        steps = columns.width // _STEP
        for step in range(-(-columns.extent // _STEP)):
            box, within = divmod(step, steps)
            within *= _STEP * 2 // _UNIT
            query = box * (columns.box_bytes(ROWS) // _UNIT) + within
            key = box * (columns.box_bytes(plan.keys) // _UNIT) + within
            emit(
                T.ptx[self._first](
                    *(self.scores[i] for i in range(plan.keys // 2)),
                    self._queries[0] + T.uint64(query),
                    self._keys[0] + T.Cast("uint64", stage * (plan.key_bytes // _UNIT) + key),
                    T.bool(step > 0),
                    1,
                    1,
                    0,
                    0,
                )
            )

    def weigh(self, stage: Expr) -> None:
        """Emit ``output += P V`` for the values of a stage."""
        plan = self.plan
        rows = _STEP * plan.columns_v.width * 2 // _UNIT
        for step in range(plan.keys // _STEP):
            emit(
                T.ptx[self._second](
                    *(self.output[i] for i in range(plan.problem.head_dim_v // 2)),
                    *(self.weights[4 * step + i] for i in range(4)),
                    self._values[0] + T.Cast("uint64", stage * (plan.value_bytes // _UNIT) + step * rows),
                    T.bool(True),
                    1,
                    1,
                    1,
                )
            )

    def pack(self, target: Any, index: int, high: Expr, low: Expr) -> None:
        """Round two numbers to 16 bits each, into one register."""
        emit(self._cvt(target[index], high, low))

    @staticmethod
    def fence() -> None:
        """Order the registers that products read and write; before each chain of them."""
        emit(T.ptx.wgmma.fence.sync.aligned())

    @staticmethod
    def commit() -> None:
        """Close a group of products."""
        emit(T.ptx.wgmma.commit_group.sync.aligned())

    @classmethod
    def wait(cls, pending: int, *registers: Any) -> None:
        """Wait until at most so many groups are pending, and let registers have changed there."""
        emit(T.ptx.wgmma.wait_group.sync.aligned(pending))
        for buffer in registers:
            cls.pin(buffer)

    @staticmethod
    def pin(buffer: Any) -> None:
        """Let the compiler believe that registers change here."""
        emit(T.cuda.func_call("na_pin", buffer.data, source_code=_PIN, return_type="void"))
