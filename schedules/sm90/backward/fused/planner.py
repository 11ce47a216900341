"""Says whether the backward of five products is worth it, and with which choices. Pure Python: no TVM, milliseconds.

All figures are of one H100, bfloat16, head_dim 128: docs/notes-hopper.md has them. What was not measured is left to the
two sweeps: fewer thread blocks, or fewer tiles of each, than any problem had that was.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from na_compiler.problem import Problem
from na_compiler.schedules.shared.candidate import Candidate
from na_compiler.schedules.shared.counts import tiles_met
from na_compiler.schedules.shared.gpus import H100
from na_compiler.schedules.sm90.backward.fused.config import Sm90Fused
from na_compiler.schedules.sm90.backward.fused.limits import refusal
from na_compiler.schedules.sm90.backward.fused.plan import FusedPlan
from na_compiler.schedules.sm90.backward.planner import MEGAHERTZ, statistics_time
from na_compiler.schedules.sm90.plan import ROWS, pieces_of
from na_compiler.window import group_length, query_bounds

__all__ = ["FusedCandidate", "candidates"]

_PROCESSORS = H100.processors
_WARPGROUPS = 2
# Extents of boxes that are tried on several axes: longer ones are no boxes but lines, and cover more than they need.
_EXTENTS = (1, 2, 4, 8, 16)
# Cycles of a tile of 64 queries and 128 keys, in the unit of the planner of two sweeps: 4660 to 5030 in six problems.
# More than in any of them, so that two sweeps stay where they are about as fast.
_TILE = 5100.0
# Thread blocks of a batch entry, tiles of one, and heads (of each dilation group) that take turns on several axes: the
# fewest that were measured and not slower than two sweeps. One head of 256x256 took 1.04 times as long as they did.
_FEWEST_BLOCKS, _FEWEST_TILES, _FEWEST_HEADS = 256, 32.0, 3
# Heads whose tiles are taken in turn: of 2 to 12 the fastest in 3-D, and in 2-D where they divide the heads. More of
# them have more queries under way than L2 holds.
_TOGETHER, _TOGETHER_2D = 4, 6
# An axis with so many tiles of keys for each of its windows runs fastest: neighbors see the same queries.
_TILES_OF_A_WINDOW = 4
# Gradients of queries in float32, of a batch entry, take no more bytes; nor more than so many times their numbers,
# where tiles cover more than the layout.
_MOST_BYTES, _MOST_COVERED = 2 << 30, 1.5


@dataclass(frozen=True)
class FusedCandidate(Candidate):
    """A config of the backward of five products, and what it would do for one batch entry.

    Parameters
    ----------
    config
        The choices.
    cycles
        Estimated time, to be compared with that of two sweeps.
    steady
        The same among many batch entries.
    statistics
        Microseconds of the kernel before it.
    waste
        Scores computed for each one that is needed.
    terms
        What the cycles are made of.
    """

    config: Sm90Fused
    cycles: float
    steady: float
    statistics: float
    waste: float
    terms: Mapping[str, float]

    combined = "one after another"

    @property
    def microseconds(self) -> float:
        """Estimated time among many batch entries."""
        return self.steady / MEGAHERTZ + self.statistics

    def columns(self) -> dict[str, str]:
        """Return its row of a table, which has the columns of two sweeps."""
        keys, queries = ("x".join(map(str, tile)) for tile in (self.config.key_tile, self.config.query_tile))
        return {
            "queries": "with keys",
            "queries' stream": "",
            "queries' waste": "",
            "keys": f"{_WARPGROUPS} x {keys}",
            "keys' stream": f"{queries} by {self.config.stages}",
            "keys' waste": f"{self.waste:.2f}",
        }

    def __str__(self) -> str:
        keys, queries = ("x".join(map(str, tile)) for tile in (self.config.key_tile, self.config.query_tile))
        return (
            f"all gradients in one sweep, {_WARPGROUPS} warpgroups of {keys} keys, tiles of {queries} queries: "
            f"{self.waste:.2f} scores computed for each one needed"
        )


@functools.lru_cache(maxsize=256)
def candidates(problem: Problem) -> tuple[FusedCandidate, ...]:
    """Return the best config of a problem, and none where the form is not taken."""
    heads = problem.heads_kv * math.prod(problem.dilation)
    if refusal(problem) or (problem.rank > 1 and heads < _FEWEST_HEADS):
        return ()
    found = _tiles(problem)
    if found is None:
        return ()
    tiles, key_tile, query_tile = found
    config = _ordered(problem, Sm90Fused(key_tile, query_tile))
    plan = config.plan(problem)
    blocks = plan.items * plan.heads
    each = tiles * plan.heads * problem.group_size / blocks
    numbers = math.prod(plan.parts_shape)  # Few enough for `_waits`, too.
    if (
        blocks < _FEWEST_BLOCKS
        or each < _FEWEST_TILES
        or 4 * numbers > _MOST_BYTES
        or numbers > _MOST_COVERED * problem.tokens * problem.heads * problem.head_dim
    ):
        return ()
    # A batch is likely to fill the last wave, so waves are not rounded up.
    waves, waits = blocks / _PROCESSORS, _waits(plan)
    terms = {
        "tiles": _TILE * each * waves,
        "waiting for others": _TILE * waits * waves,
        "last wave": _TILE * (each + waits) / 2,
    }
    cycles = sum(terms.values())
    waste = tiles * _WARPGROUPS * ROWS * ROWS / problem.pairs()
    return (FusedCandidate(config, cycles, cycles - terms["last wave"], statistics_time(problem), waste, terms),)


def _tiles(problem: Problem) -> tuple[float, tuple[int, ...], tuple[int, ...]] | None:
    """Return boxes of keys and of queries that meet least often, and how often, for one head of each."""
    lengths = [group_length(x, d) for x, d in zip(problem.layout, problem.dilation, strict=True)]
    queries = [tile for tile in _boxes(problem.rank) if tile[-1] % 8 == 0 and _fits(problem, tile, lengths)]
    within = [-(-lengths[0] // _WARPGROUPS), *lengths[1:]]
    keys = [tile for tile in _boxes(problem.rank) if _fits(problem, tile, within)]
    met = functools.cache(functools.partial(_met, problem))
    found = [
        (math.prod(met(axis, *pair) for axis, pair in enumerate(zip(key, query, strict=True))), key, query)
        for key, query in itertools.product(keys, queries)
    ]
    # Of equals the boxes that are most like cubes, whose neighbors share most: those were measured.
    return min(found, key=lambda one: (one[0], sum(one[1]) + sum(one[2]), one[1:]), default=None)


@functools.cache
def _boxes(rank: int) -> list[tuple[int, ...]]:
    if rank == 1:
        return [(ROWS,)]
    return [tile for tile in itertools.product(_EXTENTS, repeat=rank) if math.prod(tile) == ROWS]


def _fits(problem: Problem, tile: tuple[int, ...], lengths: list[int]) -> bool:
    """Whether TMA can fetch a tile, and none of it lies beyond an axis that is shorter."""
    return pieces_of(tile, problem.dilation) is not None and all(map(int.__le__, tile, lengths))


def _met(problem: Problem, axis: int, key: int, query: int) -> float:
    """Count tiles of queries that thread blocks go through along one axis, over all of its dilation groups."""
    rule = (problem.kernel_size[axis], problem.stride[axis], problem.dilation[axis], problem.is_causal[axis])
    own = (key, 1, _WARPGROUPS if axis == 0 else 1)
    counts = tiles_met(
        (problem.layout[axis], *rule), own, (query,), skips=False, of_queries=False, align=query
    )  # fmt: skip
    return float(counts[2, 0])


def _waits(plan: FusedPlan) -> float:
    """Return how many tiles' time a thread block waits on the average, because others begin with the same queries.

    These are under way at once, one after another at each tile of queries. They are many at borders, where windows are
    shifted, and all there are where one window has everything. What waits later, the time of a tile has in it.
    """
    problem = plan.problem
    last: NDArray[np.int64] = np.zeros(1, np.int64)
    for axis in plan.order:
        own, length = plan.own_tile[axis], plan.lengths[axis]
        key = np.minimum((np.arange(plan.tiles[axis]) + 1) * own, length) - 1
        rule = (problem.kernel_size[axis], problem.stride[axis], problem.is_causal[axis])
        queries = query_bounds(key, length, *rule, minimum=np.minimum, maximum=np.maximum, choose=np.where)[1]
        tile = (queries - 1) // plan.stream_tile[axis]
        last = (last[:, None] * plan.stream_tiles[axis] + tile).ravel()
    heads = min(plan.fused.together, plan.heads * plan.groups)
    under_way = min(_PROCESSORS // heads, len(last) - 1)
    return sum(int((last[back:] == last[:-back]).sum()) for back in range(1, under_way + 1)) / len(last)


def _ordered(problem: Problem, config: Sm90Fused) -> Sm90Fused:
    """Return a config with the order of its tiles, and how many heads take turns.

    Along an axis with few windows, tiles of keys one after another are seen by the same queries, which then are in L2.
    """
    plan = config.plan(problem)
    windows = [_windows(problem, axis) for axis in range(problem.rank)]
    shared = [
        number == 1 or number * _TILES_OF_A_WINDOW <= tiles for number, tiles in zip(windows, plan.tiles, strict=True)
    ]
    heads = problem.heads_kv * plan.groups
    together = _TOGETHER_2D if problem.rank == 2 and heads % _TOGETHER_2D == 0 else _TOGETHER
    order, walk = _last(shared), _last([number == 1 for number in windows])
    return replace(config, together=together, order=order, walk=walk)


def _last(which: list[bool]) -> tuple[int, ...]:
    """Return all axes, some of them last; nothing where that is how they are."""
    axes = tuple(sorted(range(len(which)), key=lambda axis: which[axis]))
    return () if axes == tuple(range(len(which))) else axes


def _windows(problem: Problem, axis: int) -> int:
    """Return how many different windows the queries of an axis have."""
    length: int = group_length(problem.layout[axis], problem.dilation[axis])
    if problem.is_causal[axis]:
        return length
    return -(-(length - problem.kernel_size[axis]) // problem.stride[axis]) + 1
