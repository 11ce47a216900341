"""Tensor maps: how tiles of a tensor in its natural layout are fetched and stored by TMA.

A map has head_dim innermost, then heads, then the axes of the layout from the last to the first, then the batch.
Dilation is a step of the box along its axis, so a tile of one dilation group is one box. With three axes of layout
TMA's five are used up, and heads and head_dim are one: then heads must lie head_dim apart.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from na_compiler.schedules.shared.trace import I, T, emit
from na_compiler.schedules.sm90.plan import MAX_RANK_WITH_HEADS, Columns, pieces_of

__all__ = ["TensorMap"]

Expr = Any
_BYTES = 2
# Arguments of cuTensorMapEncodeTiled: CU_TENSOR_MAP_INTERLEAVE_NONE, L2_PROMOTION_L2_256B, FLOAT_OOB_FILL_NONE (zeros).
_NO_INTERLEAVE, _PROMOTE_256, _ZERO_FILL = 0, 3, 0


class TensorMap:
    """A tensor map, encoded on the host, and the coordinates of boxes in it.

    Parameters
    ----------
    buffer
        The tensor, ``[batch, *tokens, heads, head_dim]``.
    columns
        How its last axis lies in shared memory.
    box
        Tokens of a box, one an axis.
    dilation
        Step of the box, one an axis.
    """

    def __init__(
        self, buffer: Any, columns: Columns, box: Sequence[int], dilation: Sequence[int] | None = None
    ) -> None:
        self.columns, self.buffer = columns, buffer
        self.dilation = tuple(dilation or (1,) * len(box))
        pieces = pieces_of(box, self.dilation)
        assert pieces is not None, f"{box} with dilation {self.dilation} is no box of TMA"
        self.pieces = pieces
        self.box = (box[0] // pieces, *box[1:])
        axes = len(self.box)
        self.has_head_axis = axes <= MAX_RANK_WITH_HEADS
        self.rank = axes + (3 if self.has_head_axis else 2)
        self.handle = I.Bind(T.tvm_stack_alloca("tensormap", 1))

    def encode(self) -> None:
        """Emit the call that fills the map in, where the tensor is not empty."""
        batch, *tokens, heads, _ = self.buffer.shape
        strides = list(self.buffer.strides) or _dense(self.buffer.shape)
        batch_stride, *token_strides, head_stride, _ = strides
        box, step = self.box, self.dilation
        span = [extent * stride for extent, stride in zip(box, step, strict=True)]
        if self.has_head_axis:
            extents, pitches, boxes, steps = (
                [self.columns.extent, heads],
                [head_stride],
                [self.columns.width, 1],
                [1, 1],
            )
        else:
            extents, pitches, boxes, steps = [heads * self.columns.extent], [], [self.columns.width], [1]
        extents += [*reversed(tokens), batch]
        pitches += [*reversed(token_strides), batch_stride]
        boxes += [*reversed(span), 1]
        steps += [*reversed(step), 1]
        emit(
            T.call_packed(
                "runtime.cuTensorMapEncodeTiled",
                self.handle,
                str(self.buffer.dtype),
                self.rank,
                self.buffer.data,
                *extents,
                *(pitch * _BYTES for pitch in pitches),
                *boxes,
                *steps,
                _NO_INTERLEAVE,
                self.columns.swizzle,
                _PROMOTE_256,
                _ZERO_FILL,
            )
        )

    @property
    def piece_bytes(self) -> int:
        """Bytes in shared memory of one piece of a box of columns."""
        return self.columns.box_bytes(math.prod(self.box))

    def piece(self, tokens: Sequence[Expr], number: int) -> list[Expr]:
        """Return the first tokens of a piece of the tile that begins at ``tokens``."""
        first, *rest = tokens
        return [first + number * self.box[0] * self.dilation[0], *rest] if number else list(tokens)

    def at(self, batch: Expr, tokens: Sequence[Expr], head: Expr, box: int) -> list[Expr]:
        """Return the coordinates of a box of columns."""
        column = box * self.columns.width
        inner = [column, head] if self.has_head_axis else [head * self.columns.extent + column]
        return [*inner, *reversed(tokens), batch]

    @property
    def load(self) -> Any:
        """The instruction that fetches a box."""
        return T.ptx[f"cp.async.bulk.tensor.{self.rank}d.shared::cluster.global.mbarrier::complete_tx::bytes"]

    @property
    def store(self) -> Any:
        """The instruction that stores a box."""
        return T.ptx[f"cp.async.bulk.tensor.{self.rank}d.global.shared::cta.tile.bulk_group"]


def _dense(shape: Sequence[Expr]) -> list[Expr]:
    return [math.prod(shape[axis + 1 :], start=1) for axis in range(len(shape))]
