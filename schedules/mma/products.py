"""The two products of a warp: scores and weighted sum, by mma.sync, with operands from shared memory by ldmatrix."""

from __future__ import annotations

from typing import Any

from na_compiler.schedules.mma.block import Block
from na_compiler.schedules.mma.copies import swizzled
from na_compiler.schedules.mma.plan import CHUNK, CHUNK_BYTES, GROUP, ROWS, Plan, Tile
from na_compiler.schedules.shared.trace import T, emit, let, local, put, register

__all__ = ["LOAD", "LOAD_TRANSPOSED", "TYPES", "Products", "RowTile"]

Expr = Any
TYPES = {"bfloat16": "bf16", "float16": "f16", "float32": "tf32"}
LOAD = "ldmatrix.sync.aligned.m8n8.x4.shared.b16"
LOAD_TRANSPOSED = "ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16"


class RowTile:
    """What a thread has of 16 rows of its warp: as many as one product takes.

    Attributes
    ----------
    scores
        Accumulators of ``Q K^T``: element ``4g + 2h + e`` of a thread is row ``lane // 4 + 8h`` and key
        ``8g + 2 (lane % 4) + e``.
    output
        Accumulators of ``P V``, likewise.
    weights
        P in pairs of 16 bits, in the order in which it is an operand of the second product.
    queries
        Operands of the first product.
    """

    _WEIGHT_BYTES = 2

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.scores = local(plan.streamed // 2)
        self.weights = local(plan.streamed * self._WEIGHT_BYTES // 8, "uint32")
        self.output = local(plan.problem.head_dim_v // 2)
        self.queries = local(2 * plan.query.chunks if plan.keeps_queries else 4, "uint32")

    def pack(self, target: Any, index: int, high: Expr, low: Expr) -> None:
        """Round two numbers to 16 bits each, into one register."""
        emit(T.ptx[f"cvt.rn.{TYPES[self.plan.problem.dtype]}x2.f32"](target[index], high, low))


class Products:
    """Emits the products of one warp; keys and values that are loaded serve all its rows.

    A load brings four matrices of 8x8; lane ``l`` says where row ``l % 8`` of matrix ``l // 8`` is. Those of queries
    are rows 0-7 and 8-15 of the first eight columns, then of the next; those of keys are eight columns of keys 0-7, the
    next eight, then the same of keys 8-15; those of values, read across, are keys 0-7 and 8-15 of eight columns, then
    of the next.

    Attributes
    ----------
    tiles
        Scores and weighted sums of each 16 rows.
    """

    row_tile = RowTile

    def __init__(self, block: Block) -> None:
        self.block, self.plan = block, block.plan
        plan, lane = self.plan, block.lane
        self.tiles = [self.row_tile(plan) for _ in range(plan.row_tiles)]
        self._steps = plan.query.chunks // 2
        self._loaded = local(4, "uint32")
        self._mma = T.ptx[self._instruction(TYPES[block.dtype])]
        row = let(T.bitwise_and(lane, 7))
        # The second matrix, and the third and fourth.
        second, later = T.bitwise_and(T.shift_right(lane, 3), 1), T.shift_right(lane, 4)
        self.late_column = let(later)
        # A lane's key of a group of 16, of keys and of values.
        self.key_row, self.value_row = let(row + 8 * later), let(row + 8 * second)
        self._query_column = let(T.bitwise_xor(later, swizzled(row, plan.query)))
        self._key_column = let(T.bitwise_xor(second, swizzled(row, plan.key)))
        self._value_column = let(T.bitwise_xor(later, swizzled(row, plan.value)))
        self._query_place = let(
            block.warp * (plan.query_bytes // plan.query.element_bytes) + self.value_row * plan.query.width
        )

    @staticmethod
    def _instruction(kind: str) -> str:
        return f"mma.sync.aligned.m16n8k16.row.col.f32.{kind}.{kind}.f32"

    @staticmethod
    def _chunk(column: Expr, pair: int, tile: Tile) -> Expr:
        """Return the element where a pair of chunks of a row begins for this lane, swizzled."""
        low = 2 * pair & tile.mask
        return ((2 * pair - low) + (T.bitwise_xor(column, low) if low else column)) * tile.per_chunk

    def load_queries(self) -> None:
        """Read the warp's queries into registers, if they stay there."""
        if self.plan.keeps_queries:
            for step in range(self._steps):
                self._load_query(step, 4 * step)

    def _load_query(self, step: int, register_: int) -> None:
        place = self._query_place + self._chunk(self._query_column, step, self.plan.query)
        for number, tile in enumerate(self.tiles):
            address = self.block.queries.ptr_to([place + number * ROWS * self.plan.query.width])
            self._read(LOAD, tile.queries, register_, address)

    def _load(self, instruction: str, address: Expr) -> None:
        self._read(instruction, self._loaded, 0, address)

    def _read(self, instruction: str, words: Any, at: int, address: Expr) -> None:
        """Emit the load of four matrices into registers."""
        emit(T.ptx[instruction](*(words[at + i] for i in range(4)), address))

    def _multiply(self, sums: Any, at: int, left: Any, first: int, right: tuple[int, int]) -> None:
        accumulators = [sums[at + i] for i in range(4)]
        operands = (*(left[first + i] for i in range(4)), *(self._loaded[i] for i in right))
        emit(self._mma(*accumulators, *operands, *accumulators))

    def clear_scores(self, groups: int) -> None:
        """Set the scores of some groups of 16 keys to 0."""
        for tile in self.tiles:
            for i in range(8 * groups):
                put(tile.scores, i, T.float32(0))

    def score(self, place: Expr) -> None:
        """Emit ``scores = Q K^T`` for a tile whose rows follow each other from an element of shared memory on."""
        plan = self.plan
        first = let(place + self.key_row * plan.key.width)
        groups = plan.streamed // GROUP
        self.clear_scores(groups)
        for step in range(self._steps):
            at = self._query_at(step)
            column = self._chunk(self._key_column, step, plan.key)
            for group in range(groups):
                address = self.block.keys.ptr_to([first + group * GROUP * plan.key.width + column])
                self._load(LOAD, address)
                self._score(group, at, ((0, 1), (2, 3)))

    def _score(self, group: int, at: int, halves: tuple[tuple[int, int], ...]) -> None:
        """Add 16 columns' part to the scores of a group, whose halves are in two of the registers loaded each."""
        for half, right in enumerate(halves):
            for tile in self.tiles:
                self._multiply(tile.scores, 8 * group + 4 * half, tile.queries, at, right)

    def _query_at(self, step: int) -> int:
        """Return where in the registers a step's queries are, having read them if they do not stay."""
        if self.plan.keeps_queries:
            return 4 * step
        self._load_query(step, 0)
        return 0

    def weigh(self, place: Expr) -> None:
        """Emit ``output += P V`` for a tile whose rows follow each other from an element of shared memory on."""
        plan = self.plan
        first = let(place + self.value_row * plan.value.width)
        for group in range(plan.streamed // GROUP):
            for pair in range(plan.value.width // GROUP):
                column = self._chunk(self._value_column, pair, plan.value)
                address = self.block.values.ptr_to([first + group * GROUP * plan.value.width + column])
                self._load(LOAD_TRANSPOSED, address)
                self._add(group, pair)

    def _add(self, group: int, pair: int) -> None:
        """Add a group's part to 16 columns of the output, or to the 8 that there are."""
        for half in range(min(2, self.plan.problem.head_dim_v // CHUNK - 2 * pair)):
            for tile in self.tiles:
                right = (2 * half, 2 * half + 1)
                self._multiply(tile.output, 8 * pair + 4 * half, tile.weights, 4 * group, right)

    def score_scattered(self, addresses: list[Expr]) -> None:
        """Emit the scores of groups of 16 keys, each lane's row of a group at an address of its own.

        Rows are loaded as those of values are: matrices are keys 0-7, keys 8-15 of eight columns, then of the next.
        """
        self.clear_scores(len(addresses))
        for step in range(self._steps):
            at = self._query_at(step)
            for group, address in enumerate(addresses):
                self._load(LOAD, self._shifted(address, step, self.plan.key))
                self._score(group, at, ((0, 2), (1, 3)))

    def weigh_scattered(self, addresses: list[Expr]) -> None:
        """Emit the weighted sum of groups of 16 values, likewise."""
        for group, address in enumerate(addresses):
            for pair in range(self.plan.value.width // GROUP):
                self._load(LOAD_TRANSPOSED, self._shifted(address, pair, self.plan.value))
                self._add(group, pair)

    @staticmethod
    def _shifted(address: Expr, pair: int, tile: Tile) -> Expr:
        """Return the address of a pair of chunks of a row, given that of the first."""
        low = 2 * pair & tile.mask
        moved = T.bitwise_xor(address, T.uint32(low * CHUNK_BYTES)) if low else address
        return T.ptx.addr(moved, (2 * pair - low) * CHUNK_BYTES)

    def shared_address(self, buffer: Any) -> Expr:
        """Return where a buffer begins in shared memory, in bytes, as instructions count."""
        return register(T.cuda.cvta_generic_to_shared(buffer.ptr_to([0])), "uint32")
