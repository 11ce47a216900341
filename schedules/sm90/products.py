"""The two products of a warpgroup: scores and weighted sum, by wgmma."""

from __future__ import annotations

from typing import Any

from na_compiler.schedules.shared.trace import T, emit, local
from na_compiler.schedules.sm90.block import Block
from na_compiler.schedules.sm90.plan import ROWS, Columns

__all__ = ["Products", "conversion", "descriptor", "instruction", "multiply_registers", "multiply_shared"]

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


def instruction(columns: int, dtype: str) -> Any:
    """Return the instruction for a product with so many columns."""
    kind = _TYPES[dtype]
    return T.ptx[f"wgmma.mma_async.sync.aligned.m64n{columns}k16.f32.{kind}.{kind}"]


def conversion(dtype: str) -> Any:
    """Return the instruction that rounds two numbers to 16 bits each."""
    return T.ptx[f"cvt.rn.{_TYPES[dtype]}x2.f32"]


def descriptor(buffer: Any, place: Expr, leading: int, columns: Columns) -> Any:
    """Describe an operand in shared memory.

    Rows are as long as the swizzle's span, and 8 of them are one pattern: the stride is that between patterns.
    ``leading`` matters where the operand is read across its rows: it is the distance of its boxes of columns then.
    """
    found = local(1, "uint64")
    stride = 8 * columns.width * 2 // _UNIT
    emit(
        T.cuda.wgmma.encode_matrix_descriptor(
            T.address_of(found[0]), buffer.ptr_to([place]), leading, stride, columns.swizzle
        )
    )
    return found


def multiply_shared(
    mma: Any, sums: Any, own: tuple[Any, int], streamed: tuple[Any, int, Expr], columns: Columns
) -> None:
    """Emit ``sums = A B^T``, over columns of both operands in shared memory.

    Parameters
    ----------
    mma
        The instruction.
    sums
        Accumulators.
    own
        Descriptor of A, and its rows in shared memory.
    streamed
        Descriptor of B, its rows, and where its stage is, in units of a descriptor.
    columns
        Of both.
    """
    steps = columns.width // _STEP
    for step in range(-(-columns.extent // _STEP)):
        box, within = divmod(step, steps)
        within *= _STEP * 2 // _UNIT
        a = box * (columns.box_bytes(own[1]) // _UNIT) + within
        b = box * (columns.box_bytes(streamed[1]) // _UNIT) + within
        emit(
            mma(
                *(sums[i] for i in range(streamed[1] // 2)),
                own[0][0] + T.uint64(a),
                streamed[0][0] + T.Cast("uint64", streamed[2] + b),
                T.bool(step > 0),
                1,
                1,
                0,
                0,
            )
        )


def multiply_registers(mma: Any, sums: Any, weights: Any, streamed: tuple[Any, int, Expr], columns: Columns) -> None:
    """Emit ``sums += A B``, A in registers, over the rows of B in shared memory; parameters as `multiply_shared`."""
    rows = _STEP * columns.width * 2 // _UNIT
    for step in range(streamed[1] // _STEP):
        emit(
            mma(
                *(sums[i] for i in range(columns.extent // 2)),
                *(weights[4 * step + i] for i in range(4)),
                streamed[0][0] + T.Cast("uint64", streamed[2] + step * rows),
                T.bool(True),
                1,
                1,
                1,
            )
        )


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
        problem = plan.problem
        self.scores = local(plan.streamed // 2)
        self.weights = local(plan.streamed // 4, "uint32")
        self.output = local(problem.head_dim_v // 2)
        self._first, self._second = (instruction(n, block.dtype) for n in (plan.streamed, problem.head_dim_v))
        self._cvt = conversion(block.dtype)
        query_place = warpgroup * (plan.query_bytes // 2)
        self._queries = descriptor(block.queries, query_place, 1, plan.columns)
        self._keys = descriptor(block.keys, 0, 1, plan.columns)
        # Read across its rows, an operand also needs the distance of its boxes of columns.
        apart = plan.columns_v.box_bytes(plan.streamed) // _UNIT
        self._values = descriptor(block.values, 0, apart, plan.columns_v)

    def score(self, stage: Expr) -> None:
        """Emit ``scores = Q K^T`` for the keys of a stage."""
        plan = self.plan
        keys = self._keys, plan.streamed, stage * (plan.key_bytes // _UNIT)
        multiply_shared(self._first, self.scores, (self._queries, ROWS), keys, plan.columns)

    def weigh(self, stage: Expr) -> None:
        """Emit ``output += P V`` for the values of a stage."""
        plan = self.plan
        values = self._values, plan.streamed, stage * (plan.value_bytes // _UNIT)
        multiply_registers(self._second, self.output, self.weights, values, plan.columns_v)

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
