"""The key mask: which keys of the layout are hidden from all queries, whatever their windows are."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from na_compiler.schedules.shared.tiles import Fragments
from na_compiler.schedules.shared.trace import I, T, both, flat, index64, local, put, register, when
from na_compiler.schedules.shared.work import Work

__all__ = ["KeyMask", "MaskBytes"]

Expr = Any
_ROWS, _WORD = 2, 32
_ALL = 0xFFFFFFFF
# Of every eight bits of a word the first two: a thread's scores, once the word is shifted by its first.
_PAIRS = 0x03030303
# Times this, the pairs at bits 0, 8, 16 and 24 come to bits 24, 26, 28 and 30; no two products meet, so none carries.
_GATHER = 1 << 24 | 1 << 18 | 1 << 12 | 1 << 6


class MaskBytes:
    """Emits reads of the mask of a batch entry and dilation group.

    Parameters
    ----------
    work
        The block's tile.
    buffer
        ``[batch, *layout]`` of bool.
    """

    def __init__(self, work: Work, buffer: Any) -> None:
        problem = work.plan.problem
        pitches = [math.prod(problem.layout[axis + 1 :]) for axis in range(problem.rank)]
        start = index64(work.batch) * problem.tokens
        for group, pitch in zip(work.group, pitches, strict=True):
            start = start + index64(group) * pitch
        self._flat = I.decl_buffer([2**62], "bool", data=I.Bind(flat(buffer).ptr_to([start])), scope="global")
        # Of a position in the dilation group.
        self._steps = [step * pitch for step, pitch in zip(problem.dilation, pitches, strict=True)]
        self._work = work

    def at(self, position: Sequence[Expr]) -> Expr:
        """Return 1 if the key at a position takes part, else 0."""
        offset: Expr = 0
        for axis, (along, step) in enumerate(zip(position, self._steps, strict=True)):
            offset = offset + self._work.around(axis, along) * step
        return T.Cast("int32", self._flat[index64(register(offset))])


class KeyMask:
    """Emits what a warp knows of the keys of a box: words with a bit for each of 32 keys, set where it takes part.

    Each lane reads the byte of one key, and all get the bits of all by a vote. So words are the same in a warp, which
    may leave out keys that are all hidden, and needs no mask where none is.

    Parameters
    ----------
    products, work
        Scores, and the block's tile of queries.
    buffer
        ``[batch, *layout]`` of bool.
    lane
        Which lane of the warp this is.
    additional
        How many additional keys there are, which are never hidden; ``None`` without them.
    """

    def __init__(self, products: Fragments, work: Work, buffer: Any, lane: Expr, additional: Expr | None) -> None:
        self.plan, self._lane = products.plan, lane
        self._mask = MaskBytes(work, buffer)
        most = -(-self.plan.streamed // _WORD)
        self._bytes, self.words = local(most, "int32"), local(most, "uint32")
        self._count = 0
        # Of each row, whether it sees a key: this thread's part of it.
        self._seen = local(_ROWS, "uint32")
        for row in range(_ROWS):
            put(self._seen, row, T.uint32(0) if additional is None else T.Cast("uint32", additional > 0))

    def load(self, box: Sequence[int], low: Sequence[Expr], high: Sequence[Expr], first: int, count: int) -> None:
        """Emit the reads for some keys of a box, which begins at ``low``, counted in it from ``first`` on.

        What lies at ``high`` or beyond, outside of every window, is read as a key before it.
        """
        self._count = -(-count // _WORD)
        for word in range(self._count):
            number: Expr = self._lane + (first + _WORD * word)
            position: list[Expr] = []
            for axis in reversed(range(len(box))):
                along, number = (number, 0) if axis == 0 else (number % box[axis], number // box[axis])
                position.insert(0, T.min(low[axis] + along, high[axis] - 1))
            put(self._bytes, word, self._mask.at(position))

    def vote(self) -> None:
        """Emit the words of the keys that were loaded last."""
        for word in range(self._count):
            put(self.words, word, T.cuda.ballot_sync(T.uint32(_ALL), self._bytes[word]))

    @property
    def has_any(self) -> Expr:
        """Whether one of the keys takes part."""
        found = self.words[0]
        for word in range(1, self._count):
            found = T.bitwise_or(found, self.words[word])
        return found != T.uint32(0)

    @property
    def has_all(self) -> Expr:
        """Whether all of them do."""
        return both(*(self.words[word] == T.uint32(_ALL) for word in range(self._count)))

    def pairs(self, pair: Expr) -> list[Expr]:
        """Return the bits of a thread's own keys, two of every eight from ``pair`` on: words for 128 keys."""
        found: list[Expr] = []
        for first in range(0, self._count, 4):
            word: Expr = T.uint32(0)
            for number in range(first, min(first + 4, self._count)):
                bits = T.bitwise_and(T.shift_right(self.words[number], T.Cast("uint32", pair)), T.uint32(_PAIRS))
                byte = T.shift_right(bits * T.uint32(_GATHER), T.uint32(24))
                word = T.bitwise_or(word, T.shift_left(byte, T.uint32(8 * (number - first))))
            found.append(register(word, "uint32"))
        return found

    def see(self, row: int, words: Sequence[Expr]) -> None:
        """Emit that a row sees the keys whose bits are set, if any is."""
        for word in words:
            put(self._seen, row, T.bitwise_or(self._seen[row], word))

    def see_all(self) -> None:
        """Emit that both rows see a key."""
        for row in range(_ROWS):
            put(self._seen, row, T.uint32(1))

    def finish(self, output: Any, inverse: Any, logarithm: Any) -> None:
        """Emit that queries which see nothing have output 0, and minus infinity as lse."""
        for row in range(_ROWS):
            sees = T.Cast("int32", self._seen[row] != T.uint32(0))
            votes = register(T.cuda.ballot_sync(T.uint32(_ALL), sees), "uint32")
            # Four lanes share a row.
            own = T.shift_right(votes, T.Cast("uint32", T.bitwise_and(self._lane, 28)))
            with when(T.bitwise_and(own, T.uint32(15)) == T.uint32(0)):
                put(inverse, row, T.float32(0))
                put(logarithm, row, T.float32(-math.inf))
                for i in range(self.plan.problem.head_dim_v // 2):
                    if (i // 2) % 2 == row:
                        put(output, i, T.float32(0))
