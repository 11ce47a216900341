"""Products of float32 that round to TF32: of eight keys or columns at once, where those of 16 bits take 16."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from na_compiler.schedules.mma.block import Block
from na_compiler.schedules.mma.copies import swizzled
from na_compiler.schedules.mma.plan import CHUNK_BYTES
from na_compiler.schedules.mma.products import Products, RowTile
from na_compiler.schedules.shared.trace import T, emit, let, local, register

__all__ = ["RoundedProducts"]

Expr = Any
# To the nearest: the products would cut off what is too much.
_ROUND = "cvt.rna.tf32.f32"
_LOAD_FOUR = "ld.shared.v4.f32"


class _RoundedTile(RowTile):
    """What a thread has of 16 rows; weights are numbers of 32 bits."""

    _WEIGHT_BYTES = 4

    def pack(self, target: Any, index: int, high: Expr, low: Expr) -> None:
        """Round two numbers of a row, of two keys of eight, to an operand of the second product.

        Of a product of eight keys a thread has the numbers ``lane % 4`` and four more. The two keys whose scores it has
        stand for these, and values are read in the same order.
        """
        group, row = divmod(index, 2)
        for e, number in enumerate((low, high)):
            emit(T.ptx[_ROUND](target[4 * group + 2 * e + row], number))


class RoundedProducts(Products):
    """Emits the products of one warp, of float32 rounded to TF32.

    A matrix of 8x8 numbers of 16 bits, as ``ldmatrix`` loads it, is one of eight rows and four numbers of 32: so
    queries and keys are loaded as those of 16 bits are. Values would have to be read across, which ``ldmatrix`` does
    with 16 bits only. A lane reads four columns of each of its two keys instead, one of each of four products: so
    columns of the output are permuted, and four that follow each other lie in one thread.

    Attributes
    ----------
    pair
        A lane's first key of eight, in products with values.
    column
        Its four columns, among eight fours.
    """

    row_tile = _RoundedTile

    def __init__(self, block: Block) -> None:
        super().__init__(block)
        self._four, self._values = local(4), local(8, "uint32")
        self.pair, self.column = let(T.bitwise_and(block.lane, 3) * 2), let(T.shift_right(block.lane, 2))

    @staticmethod
    def _instruction(kind: str) -> str:
        return f"mma.sync.aligned.m16n8k8.row.col.f32.{kind}.{kind}.f32"

    def _read(self, instruction: str, words: Any, at: int, address: Expr) -> None:
        super()._read(instruction, words, at, address)
        for i in range(at, at + 4):
            emit(T.ptx[_ROUND](words[i], T.reinterpret("float32", words[i])))

    def weigh(self, place: Expr) -> None:
        """Emit ``output += P V`` for a tile whose rows follow each other from an element of shared memory on."""
        tile = self.plan.value
        start = self.shared_address(self.block.values) + T.Cast("uint32", place * tile.element_bytes)
        addresses = []
        for row in (self.pair, self.pair + 1):
            column = T.bitwise_xor(self.column, swizzled(row, tile))
            offset = row * tile.row_bytes + column * CHUNK_BYTES
            addresses.append(register(start + T.Cast("uint32", offset), "uint32"))
        for eight in range(self.plan.streamed // 8):
            self._weigh_eight(eight, addresses, 8 * eight * tile.row_bytes)

    def weigh_pairs(self, addresses: Callable[[RoundedProducts, int], list[Expr]], first: int, count: int) -> None:
        """Emit the weighted sum of some values, from one on; asks where a lane's two of each eight are."""
        for eight in range(count // 8):
            self._weigh_eight(eight, addresses(self, first + 8 * eight))

    def _weigh_eight(self, eight: int, addresses: list[Expr], offset: int = 0) -> None:
        """Add the part of eight values, a lane's two of which begin at addresses."""
        for block in range(self.plan.value.chunks // 8):
            for e, first in enumerate(addresses):
                address = T.ptx.addr(first, offset + 8 * block * CHUNK_BYTES)
                emit(T.ptx[_LOAD_FOUR](*(self._four[i] for i in range(4)), address))
                for i in range(4):
                    emit(T.ptx[_ROUND](self._values[2 * i + e], self._four[i]))
            for part in range(4):
                for tile in self.tiles:
                    accumulators = [tile.output[4 * (4 * block + part) + i] for i in range(4)]
                    weights = (tile.weights[4 * eight + i] for i in range(4))
                    values = (self._values[2 * part], self._values[2 * part + 1])
                    emit(self._mma(*accumulators, *weights, *values, *accumulators))
