"""Chooses a config of the schedule for CUDA cores. Pure Python: no TVM is loaded."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator

from na_compiler.problem import Problem
from na_compiler.schedules.config import Simt
from na_compiler.target import CudaTarget
from na_compiler.tensorir.direct_plan import DirectPlan
from na_compiler.tensorir.tiling import AXES, Extents

__all__ = ["choose"]

_THREADS = 128  # Of a block.
_WARP = 32
# Elements of a row that one thread keeps. A thread holds a few rows: query, sums, and those that are being read.
_ELEMENTS = 16
# Scores that are computed together: their loads and additions overlap.
_AT_ONCE = 8
_STRIP = 128
# What a chunk costs beside its rows, in rows: the sums so far are scaled, and loops turn.
_CHUNK = 1.5


def choose(problem: Problem, target: CudaTarget, direction: str) -> Simt | str:  # noqa: ARG001
    """Return the config to compile a problem with: this schedule takes all problems, on every target."""
    lanes = _lanes(max(problem.head_dim, problem.head_dim_v))
    axes = DirectPlan(problem).axes
    keys = _chunk([axis.kernel_size for axis in axes])
    queries = _chunk([axis.most_queries for axis in axes])
    return Simt(lanes=lanes, rows=_THREADS // lanes, keys=keys, queries=queries, strip=_STRIP)


def _lanes(width: int) -> int:
    """Return how many threads share a row: more for longer ones, at least four, so that neighbours read together."""
    lanes = 4
    while lanes < _WARP and width > lanes * _ELEMENTS:
        lanes *= 2
    return lanes


def _chunk(extents: list[int]) -> Extents:
    """Return the chunk that visits least rows beyond the extents, and not too few at once."""

    def cost(chunk: Extents) -> float:
        counts = [-(-extent // size) for extent, size in zip(extents, chunk, strict=True)]
        return math.prod(counts) * (math.prod(chunk) + _CHUNK)

    return min(_chunks(extents), key=cost)


def _chunks(extents: list[int]) -> Iterator[Extents]:
    for chunk in itertools.product(*(range(1, min(extent, _AT_ONCE) + 1) for extent in extents)):
        if math.prod(chunk) <= _AT_ONCE:
            assert len(chunk) == AXES
            yield chunk[0], chunk[1], chunk[2]
