"""The choices for one kernel of the backward for tensor cores of single warps."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Sweep"]


@dataclass(frozen=True)
class Sweep:
    """The choices for one of the kernels: what a thread block owns, and what streams by.

    Parameters
    ----------
    warp_box
        Box of 16 tokens that one warp owns.
    warps
        Warps of a thread block along each axis, their boxes one beside the other.
    stream_tile
        Box of tokens that come into shared memory at once; ``None`` for all that the block's tokens come to.
    stages
        Boxes that shared memory holds.
    chunk
        Groups of 16 tokens whose scores are computed together.
    blocks
        Thread blocks of a multiprocessor that registers are limited for; 0 leaves it to the compiler.
    """

    warp_box: tuple[int, ...]
    warps: tuple[int, ...]
    stream_tile: tuple[int, ...] | None = None
    stages: int = 1
    chunk: int = 2
    blocks: int = 1
