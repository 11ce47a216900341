"""Boxes of tokens that a tile may be."""

from __future__ import annotations

import functools

from na_compiler.problem import Problem
from na_compiler.schedules.sm90.plan import pieces_of

__all__ = ["boxes", "fits"]


def fits(problem: Problem, tile: tuple[int, ...], lengths: list[int]) -> bool:
    """Whether TMA can fetch a tile, and it is not twice as long as the axis it lies on."""
    return pieces_of(tile, problem.dilation) is not None and all(
        extent < 2 * max(length, 8) for extent, length in zip(tile, lengths, strict=True)
    )


@functools.cache
def boxes(volume: int, rank: int) -> list[tuple[int, ...]]:
    """Return all boxes of so many tokens."""
    if rank == 1:
        return [(volume,)]
    return [
        (extent, *rest) for extent in range(1, volume + 1) if volume % extent == 0
        for rest in boxes(volume // extent, rank - 1)
    ]  # fmt: skip
