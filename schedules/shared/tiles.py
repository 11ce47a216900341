"""What kernels on tensor cores have in common, whatever their instructions: a tile that a block owns, one that streams.

A block owns a tile of queries, and tiles of keys stream by (in a backward also the other way round). Accumulators of
products of 16 rows and 8 columns lie the same way in the registers of a warp, be it on its own or one of four.
"""

from __future__ import annotations

from typing import Any, Protocol

from na_compiler.problem import Problem

__all__ = ["Fragments", "Rows", "TilePlan"]

Expr = Any


class TilePlan(Protocol):
    """Extents of a kernel.

    Attributes
    ----------
    problem, rank
        What to compute, and its axes.
    tiles
        Tiles that are owned, along each axis, for the longest dilation group.
    items
        Such tiles of one head of one batch entry.
    own_tile, own_box
        Tokens of the tile that a block owns, and of the box of it that those threads own that do products together.
    stream_tile, streamed
        Tokens of a tile that streams by, along each axis and in all.
    """

    problem: Problem
    rank: int
    tiles: tuple[int, ...]
    items: int

    @property
    def own_tile(self) -> tuple[int, ...]:
        """Tokens of the tile that a block owns."""

    @property
    def own_box(self) -> tuple[int, ...]:
        """Tokens of the box of it that threads own that do products together."""

    @property
    def stream_tile(self) -> tuple[int, ...]:
        """Tokens of a tile that streams by."""

    @property
    def streamed(self) -> int:
        """How many these are."""


class Fragments(Protocol):
    """Accumulators in a thread's registers.

    Attributes
    ----------
    plan
        Of the kernel.
    scores
        Element ``4g + 2h + e`` is row ``lane // 4 + 8h`` of the warp's 16 and column ``8g + 2 (lane % 4) + e``.
    output
        Likewise; the columns are those of head_dim_v.
    weights
        Pairs of 16 bits, in the order in which they are an operand of the next product.
    """

    plan: Any
    scores: Any
    output: Any
    weights: Any

    def pack(self, target: Any, index: int, high: Expr, low: Expr) -> None:
        """Round two numbers to 16 bits each, into one register."""


class Rows(Protocol):
    """The two rows that a thread has.

    Attributes
    ----------
    lane
        Of its warp.
    rows
        Numbers of the two rows, among those that threads own together.
    """

    lane: Expr
    rows: list[Expr]

    def position(self, row: Expr, first: list[Expr]) -> list[Expr]:
        """Return the token of a row, where the block's first one is at ``first``."""

    def warp_queries(self, first: list[Expr]) -> tuple[list[Expr], list[Expr]]:
        """Return the first and the last token of the box that the warp has."""
