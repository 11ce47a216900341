"""The products of a warp of the backward: scores, gradients of weights, and sums over what streams by."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from na_compiler.schedules.mma.backward.block import SweepBlock
from na_compiler.schedules.mma.copies import swizzled
from na_compiler.schedules.mma.plan import CHUNK, GROUP, Tile
from na_compiler.schedules.mma.products import LOAD, LOAD_TRANSPOSED, TYPES
from na_compiler.schedules.shared.trace import T, emit, let, local, put, register

__all__ = ["SweepProducts"]

Expr = Any


class SweepProducts:
    """Emits the products of one warp, for groups of 16 rows of a list, each lane's row of a group at an address.

    A load brings four matrices of 8x8; lane ``l`` says where row ``l % 8`` of matrix ``l // 8`` is: rows 0-7 and 8-15
    of eight columns, then of the next.

    Attributes
    ----------
    scores
        Accumulators of ``S = own[0] stream[0]^T``, which become the weights P; and, where scores have gradients,
        `slopes`: those of ``dP = own[1] stream[1]^T``, which become the scores' gradients dS. Element ``4g + 2h + e``
        of a thread is row ``lane // 4 + 8h`` and column ``8g + 2 (lane % 4) + e`` of the step.
    sums
        Accumulators of the results, in the plan's order.
    operand
        P or dS, in pairs of 16 bits.
    """

    def __init__(self, block: SweepBlock) -> None:
        self.block, self.plan = block, block.plan
        plan, lane = self.plan, block.lane
        kind = TYPES[block.dtype]
        self.scores = local(plan.streamed // 2)
        self.slopes: Any = local(plan.streamed // 2) if plan.needs_gradient else None
        self.sums = [local(plan.columns[which] // 2) for which in plan.sums]
        self.operand = local(plan.streamed // 4, "uint32")
        self._loaded = local(4, "uint32")
        self._mma = T.ptx[f"mma.sync.aligned.m16n8k16.row.col.f32.{kind}.{kind}.f32"]
        self._cvt = T.ptx[f"cvt.rn.{kind}x2.f32"]
        self.row = register(T.bitwise_and(lane, 15))
        self.late = register(T.shift_right(lane, 4))
        self._steps = [plan.own(which).width // GROUP for which in (0, 1)]
        kept = [4 * steps if plan.keeps_own else 4 for steps in self._steps]
        self._own = [local(count, "uint32") for count in kept]
        self._own_at = [self.own_address(which, plan.own_offset(which)) for which in (0, 1)]

    def own_address(self, which: int, offset: int) -> Expr:
        """Return where this lane's row is of a tensor that the warp owns, ``offset`` bytes into the warp's part."""
        tile = self.plan.own(which)
        column = T.bitwise_xor(self.late, swizzled(self.row, tile)) * (2 * CHUNK)
        place = self.block.own + offset + self.row * (2 * tile.width) + column
        return register(self.block.base + T.Cast("uint32", place), "uint32")

    def start(self) -> None:
        """Begin with sums of nothing."""
        for sums in self.sums:
            for i in range(int(sums.shape[0])):
                put(sums, i, T.float32(0))

    def load_own(self) -> None:
        """Read the warp's rows into registers, if they stay there."""
        if self.plan.keeps_own:
            for which in self.plan.owned:
                for step in range(self._steps[which]):
                    self.load_step(self._own[which], 4 * step, self._own_at[which], which, step)

    def load_step(self, target: Any, first: int, address: Expr, which: int, step: int) -> None:
        """Read 16 columns of the warp's rows."""
        emit(T.ptx[LOAD](*(target[first + i] for i in range(4)), self.shifted(address, step, self.plan.own(which))))

    def own_at(self, which: int, step: int) -> tuple[Any, int]:
        """Return the registers with 16 columns of the warp's rows, having read them if they do not stay."""
        if self.plan.keeps_own:
            return self._own[which], 4 * step
        self.load_step(self._own[which], 0, self._own_at[which], which, step)
        return self._own[which], 0

    @staticmethod
    def shifted(address: Expr, pair: int, tile: Tile) -> Expr:
        """Return the address of a pair of chunks of a row, given that of the first."""
        low = 2 * pair & tile.mask
        moved = T.bitwise_xor(address, T.uint32(low * 2 * CHUNK)) if low else address
        return T.ptx.addr(moved, (2 * pair - low) * 2 * CHUNK)

    def addresses(self, number: Expr) -> list[list[Expr]]:
        """Return for both tensors where this lane's rows of the step's groups are, from a number of the list on."""
        plan, block = self.plan, self.block
        column = let(self.late * (2 * CHUNK))
        found = []
        for which in range(plan.lists):
            first = let(block.table // 4 + which * (plan.addresses_bytes // 4) + number + self.row)
            words = [block.words[first + GROUP * group] for group in range(plan.config.chunk)]
            found.append([register(T.bitwise_xor(word, T.Cast("uint32", column)), "uint32") for word in words])
        if plan.same_rows:
            # All stages of one tensor lie before those of the other, and tiles of both are as large.
            distance = T.uint32(plan.stream_offset(1) - plan.stream_offset(0))
            found.append([register(address + distance, "uint32") for address in found[0]])
        return found

    def score(self, which: int, addresses: Sequence[Expr]) -> None:
        """Emit S (0) or dP (1) of a step."""
        target = self.slopes if which else self.scores
        for i in range(self.plan.streamed // 2):
            put(target, i, T.float32(0))
        for step in range(self._steps[which]):
            left, at = self.own_at(which, step)
            for group, address in enumerate(addresses):
                self._load(LOAD, self.shifted(address, step, self.plan.stream(which)))
                for half in range(2):
                    self._multiply(target, 8 * group + 4 * half, left, at, (half, 2 + half))

    def add(self, result: int, addresses: Sequence[Expr]) -> None:
        """Emit what a step adds to a result; its operand is packed."""
        which = self.plan.sums[result]
        tile = self.plan.stream(which)
        for group, address in enumerate(addresses):
            for pair in range(tile.width // GROUP):
                self._load(LOAD_TRANSPOSED, self.shifted(address, pair, tile))
                for half in range(min(2, self.plan.columns[which] // CHUNK - 2 * pair)):
                    sums, place = self.sums[result], 8 * pair + 4 * half
                    self._multiply(sums, place, self.operand, 4 * group, (2 * half, 2 * half + 1))

    def _load(self, instruction: str, address: Expr) -> None:
        emit(T.ptx[instruction](*(self._loaded[i] for i in range(4)), address))

    def _multiply(self, sums: Any, at: int, left: Any, first: int, right: tuple[int, int]) -> None:
        accumulators = [sums[at + i] for i in range(4)]
        operands = (*(left[first + i] for i in range(4)), *(self._loaded[i] for i in right))
        emit(self._mma(*accumulators, *operands, *accumulators))

    def pack_operand(self, source: Any) -> None:
        """Round a step's elements to the operand of a sum."""
        for index in range(self.plan.streamed // 4):
            self.pack(self.operand, index, source[2 * index + 1], source[2 * index])

    def pack(self, target: Any, index: int, high: Expr, low: Expr) -> None:
        """Round two numbers to 16 bits each, into one register."""
        emit(self._cvt(target[index], high, low))
