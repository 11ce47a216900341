"""Chooses a config of the schedule for CUDA cores. Pure Python: no TVM is loaded."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator

from na_compiler.problem import Problem
from na_compiler.schedules.simt.config import Simt
from na_compiler.schedules.simt.plan import DirectPlan
from na_compiler.target import CudaTarget
from na_compiler.tensorir.axes import AXES, Extents, round_up

__all__ = ["choose", "contenders"]

# Nothing here was chosen by timing alternatives on a GPU: what is not a limit of the machine is assumed, for the reason
# that stands with it. Registers are those that nvcc 13 takes for sm_80, of four problems with head_dim 32 to 128.

# Threads of a block: one warp for each scheduler of a multiprocessor. Assumed.
_THREADS = 128
# Threads of a warp, over which shuffles reach.
_WARP = 32
# Bytes that one thread reads at once, at most (PTX ISA, ld.v4.b32).
_VECTOR_BYTES = 16
# Compute capability of the first GPUs that convert bfloat16 by an instruction.
_BFLOAT16 = (8, 0)
# Elements of a row that one thread keeps in registers, in float32: of a query, or key, and of each of its sums. The
# backward takes up to 223 registers so; with 32 elements it takes all 255.
_ELEMENTS = 16
# Registers of a thread for rows of a chunk, which wait to be used: assumed, as many as the backward's four rows of
# `_ELEMENTS` take. With twice as many the backward takes up to 253 registers, with these 8 bytes are spilled at most.
_STAGED = 64
# Of the forward in float32, with head_dim up to this: fewer elements in a thread, and more scores at once, with as many
# registers for their rows. On an H100 that took 0.86 of the time at 4096 tokens with a window of 255, and 0.73 at 64x64
# with 13 (head_dim 64, `na-compile tune --count 27`); the backward is slower so.
_NARROW, _NARROW_ELEMENTS, _NARROW_AT_ONCE, _NARROW_STAGED = 64, 8, 16, 128
# Scores that are computed together, so that their loads and additions overlap: an addition takes 4 cycles, a shuffle
# several times that, and 8 fit the registers above. Assumed.
_AT_ONCE = 8
# Threads of one batch entry, below which a row is shared by more of them: about half of what an H100 has at once (132
# multiprocessors of 2048 threads), which is what fits at 64 registers a thread. Assumed.
_MANY = 1 << 17
# Tokens whose part of the gradients of an additional key is summed by one group of threads, and then added to others':
# assumed, short enough that 4096 tokens are 32 groups, long enough that these parts are 1/128 of the scores.
_STRIP = 128
# What a chunk costs beside its rows, in rows: the sums so far are scaled, and loops turn. Assumed; it decides between
# chunks that fit a window as well.
_CHUNK = 1.5


# What is tried beside the choice: times as many threads for a row, threads of a block, scores at once. And elements of
# a row of one thread at most: see `_ELEMENTS`.
_LANES_TRIED, _THREADS_TRIED, _AT_ONCE_TRIED = (2.0, 0.5), (64, 256), (0.5, 2.0)
_ELEMENTS_TRIED = 32


def choose(problem: Problem, target: CudaTarget, direction: str) -> Simt:
    """Return the config to compile a problem with: this schedule takes all problems, on every target."""
    vector = _vector(problem, target)
    lanes = _lanes(problem, direction, vector)
    return _config(problem, vector, lanes, _THREADS, _at_once(problem, direction, vector, lanes))


def contenders(problem: Problem, target: CudaTarget, direction: str) -> tuple[Simt, ...]:
    """Return the config of `choose`, then those that differ from it in one thing, in two, and in three."""
    vector = _vector(problem, target)
    chosen = _lanes(problem, direction, vector)
    width = max(problem.head_dim, problem.head_dim_v)
    found: dict[Simt, int] = {}
    for lanes_by, threads, at_once_by in itertools.product(
        (1.0, *_LANES_TRIED), (_THREADS, *_THREADS_TRIED), (1.0, *_AT_ONCE_TRIED)
    ):
        lanes = int(chosen * lanes_by)
        if not 1 <= lanes <= _WARP or round_up(width, lanes * vector) > lanes * max(_ELEMENTS_TRIED, vector):
            continue
        at_once = int(_at_once(problem, direction, vector, lanes) * at_once_by)
        if at_once >= 1:
            changed = (lanes_by != 1.0) + (threads != _THREADS) + (at_once_by != 1.0)
            found.setdefault(_config(problem, vector, lanes, threads, at_once), changed)
    return tuple(sorted(found, key=lambda config: found[config]))


def _at_once(problem: Problem, direction: str, vector: int, lanes: int) -> int:
    """Return the scores that are computed together: so many that the rows that wait for them fit the registers."""
    elements = round_up(max(problem.head_dim, problem.head_dim_v), lanes * vector) // lanes
    staged = elements * problem.element_bytes // 4 * (1 if direction == "forward" else 2)
    if _is_narrow(problem, direction):
        return max(1, min(_NARROW_AT_ONCE, _NARROW_STAGED // staged))
    return max(1, min(_AT_ONCE, _STAGED // max(staged, 1)))


def _is_narrow(problem: Problem, direction: str) -> bool:
    narrow = max(problem.head_dim, problem.head_dim_v) <= _NARROW
    return direction == "forward" and problem.dtype == "float32" and narrow


def _config(problem: Problem, vector: int, lanes: int, threads: int, at_once: int) -> Simt:
    axes = DirectPlan(problem).axes
    return Simt(
        lanes=lanes,
        rows=threads // lanes,
        keys=_chunk([axis.most_keys for axis in axes], at_once),
        queries=_chunk([axis.most_queries for axis in axes], at_once),
        vector=vector,
        strip=_STRIP,
    )


def _vector(problem: Problem, target: CudaTarget) -> int:
    """Return the elements that a thread reads at once: a power of two that divides both head_dims."""
    most = _VECTOR_BYTES // problem.element_bytes
    if problem.dtype == "bfloat16" and target.capability < _BFLOAT16:
        # Converted by shifts of integers there, and TVM prints no more than four of these as a vector.
        most = 4
    return math.gcd(problem.head_dim, problem.head_dim_v, most)


def _lanes(problem: Problem, direction: str, vector: int) -> int:
    """Return how many threads share a row: as few as can keep it, or more where there are few rows."""
    width = max(problem.head_dim, problem.head_dim_v)
    most = max(_NARROW_ELEMENTS if _is_narrow(problem, direction) else _ELEMENTS, vector)
    lanes = 1
    while lanes < _WARP and round_up(width, lanes * vector) > lanes * most:
        lanes *= 2
    while lanes < _WARP and problem.tokens * problem.heads * lanes < _MANY and width % (2 * lanes * vector) == 0:
        lanes *= 2
    return lanes


def _chunk(extents: list[int], at_once: int) -> Extents:
    """Return the chunk that visits least rows beyond the extents, and not too few at once."""

    def cost(chunk: Extents) -> float:
        counts = [-(-extent // size) for extent, size in zip(extents, chunk, strict=True)]
        return math.prod(counts) * (math.prod(chunk) + _CHUNK)

    return min(_chunks(extents, at_once), key=cost)


def _chunks(extents: list[int], at_once: int) -> Iterator[Extents]:
    for chunk in itertools.product(*(range(1, min(extent, at_once) + 1) for extent in extents)):
        if math.prod(chunk) <= at_once:
            assert len(chunk) == AXES
            yield chunk[0], chunk[1], chunk[2]
