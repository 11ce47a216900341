"""Chooses a config for a problem by counting what it would do: pure Python, no TVM, a few milliseconds.

The counts are cycles of one core: multiply-adds over the rate of the vector units, or loads over that of the load
ports where these are more. They need not be right, only in the right order.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from na_compiler.problem import Problem
from na_compiler.schedules.cpu.config import QueriesInLanes
from na_compiler.schedules.cpu.plan import Tiling, TilingPlan, nominal
from na_compiler.schedules.shared.candidate import Candidate as Base
from na_compiler.tensorir.axes import AXES, Extents, round_up

__all__ = ["Candidate", "Machine", "candidates", "choose"]

_Numbers = NDArray[Any]

# Sizes of caches are round numbers below those of usual CPUs (32 KB of L1, 1 MB of L2 a core). The other numbers were
# found by measuring kernels on a CPU with AVX-512, where nothing else is said.
_FLOAT_BYTES = 4  # Staged rows are float32.
# Bytes of staged keys and values that a task may keep: about what a second-level cache holds beside the rest. A factor
# of cost for more; and how many times as many may be staged at once, before they come in chunks.
_STAGED_BYTES = 512 * 1024
_STAGED_BEYOND = 1.5
_STAGED_AT_ONCE = 4
# Bytes of values that stay in the innermost cache while patches share them. A factor of cost for more.
_L1_BYTES = 20 * 1024
_VALUES_BEYOND = 1.3
# Keys whose scores a tile may keep at once, and keys of a chunk where that is too few. A factor of cost for chunks,
# beside the keys of a strip over those of a tile: each tile visits all of its strip's.
_KEYS_AT_ONCE = 4096
_CHUNK_KEYS = 1024
_CHUNK_COST = 10
# Tiles whose sums a task may keep from one chunk to the next.
_KEPT_TILES = {"forward": 64, "backward": 256, "tangent": 32}
# Rows of a key, and of a value, that are staged: its own, and its tangent's.
_ROWS = {"forward": 1, "backward": 1, "tangent": 2}
# The workspace of a backward, over its inputs in float32, from which on its size is what it costs, by a factor so
# large that nothing else counts.
_WORKSPACE = 6.0
_WORKSPACE_COST = 1000
# Tasks of one batch entry, below which a strip is cut smaller: cores wait for the last of few tasks. A factor of cost
# for half as many, and so on.
_TASKS = 24
_TASKS_COST = 2.0
# Keys that all patches visit before the next ones, where values do not stay in the innermost cache.
_ROW_BLOCK = 32
# Keys whose gradients are summed at once.
_GRAD_BLOCK = 4
# Additional keys that are staged at once, at least.
_ADDITIONAL_BLOCK = 64
# Vector multiply-adds that a core begins in a cycle, and cycles until one is there: of Intel's cores with AVX-512, by
# its optimization manual. So many accumulators cover it.
_ADDS, _LATENCY = 2, 4.0
_CHAINS = 8
# Cycles of a product over those, at best: 1 / 0.86. Cycles of a load, fitted to the rates in `_product`.
_AT_BEST, _LOAD = 1.17, 0.63
# Cycles, fitted: of the softmax a vector of scores, of staging a vector, of a tile beside its loops, of a row of a
# patch's box beside its keys, and of a pair's part of the gradients of a key and a value, a vector of them.
_SOFTMAX, _STAGE, _TILE, _PATCH_ROW, _GRADIENT = 18.0, 6.0, 900.0, 12.0, 0.6
# Cycles of a vector of the scores' tangents, beside its products.
_SLOPE = 6.0


@dataclass(frozen=True)
class Machine:
    """What the planner needs to know of a target.

    Parameters
    ----------
    vector
        float32 lanes of a vector.
    registers
        Vector registers.
    """

    vector: int
    registers: int

    @property
    def lanes(self) -> tuple[int, ...]:
        """Queries that a tile may have: two vectors use a broadcast key element twice, one has a tighter box."""
        return (self.vector, 2 * self.vector) if self.vector == 16 else (max(2 * self.vector, 8),)

    @property
    def scores(self) -> int:
        """Vectors of accumulators of the products that make scores: beside them, two operands and what loops keep."""
        return 3 * self.registers // 4

    @property
    def patches(self) -> tuple[int, int]:
        """Queries that a patch may have: with 4 or 2 vectors of each, their sums are all the accumulators."""
        return self.accumulators // 4, self.accumulators // 2

    @property
    def accumulators(self) -> int:
        """Vectors of accumulators of the other products, where there are as many operands beside them as columns."""
        return self.registers // 2


@dataclass(frozen=True)
class Candidate(Base):
    """A config, and what it would do.

    Parameters
    ----------
    config
        The choices.
    cycles
        Estimated time of one head of one batch entry.
    waste
        Scores computed for each one that is needed.
    tasks
        Iterations of the parallel loop for one batch entry.
    terms
        What the cycles are made of.
    """

    config: QueriesInLanes
    cycles: float
    waste: float
    tasks: int
    terms: Mapping[str, float]

    combined = "one after another"

    def columns(self) -> dict[str, str]:
        """Return its row of a table."""
        tiling = self.config.tiling
        boxes = {"tile": tiling.tile, "patch": tiling.patch, "tiles of a strip": tiling.strip}
        shown = {name: "x".join(map(str, box)) for name, box in boxes.items()}
        return shown | {"keys at once": str(tiling.key_block[-1]), "tasks": str(self.tasks)}

    def __str__(self) -> str:
        columns = self.columns()
        return (
            f"tiles of {columns['tile']} queries, weighted sums for {columns['patch']} at once, "
            f"{columns['tiles of a strip']} tiles share staged keys: "
            f"{self.waste:.2f} scores computed for each one needed, {self.tasks} tasks"
        )


def choose(problem: Problem, machine: Machine, direction: str) -> QueriesInLanes:
    """Return the config to compile a problem with."""
    return min(_configs(problem, machine, direction), key=lambda config: _cycles(problem, machine, config, direction))


def choose_steps(problem: Problem, machine: Machine, direction: str) -> QueriesInLanes:
    """Return the config for an open problem of which calls have a few queries: a task of one tile takes least time."""

    def cycles(config: QueriesInLanes) -> float:
        plan = config.plan(problem)
        return _cycles(problem, machine, config, direction) / (plan.size("strips") * plan.size("dilation"))

    return min(_configs(problem, machine, direction, steps=True), key=cycles)


def candidates(problem: Problem, machine: Machine, direction: str, count: int = 8) -> tuple[Candidate, ...]:
    """Return the best configs of a problem, the best first."""
    found = [_measure(problem, machine, config, direction) for config in _configs(problem, machine, direction)]
    return tuple(sorted(found, key=lambda candidate: candidate.cycles)[:count])


def _measure(problem: Problem, machine: Machine, config: QueriesInLanes, direction: str) -> Candidate:
    plan = config.plan(problem)
    waste = plan.visited_pairs() / nominal(problem).pairs()
    terms = _terms(problem, machine, config, direction)
    return Candidate(config, sum(terms.values()), waste, plan.tasks, terms)


def _configs(problem: Problem, machine: Machine, direction: str, *, steps: bool = False) -> Iterator[QueriesInLanes]:
    extents = (1,) * (AXES - problem.rank) + nominal(problem).layout
    tiles = [tile for lanes in machine.lanes for tile in _factorizations(lanes)]

    def wasted(tile: Extents) -> int:
        return sum(queries >= 2 * extent for queries, extent in zip(tile, extents, strict=True) if queries > 1)

    # Tiles that lie mostly beyond the layout, unless it is so small that all do.
    least = min(map(wasted, tiles))
    for tile in tiles:
        if wasted(tile) == least:
            tiling = _of_tile(problem, machine, direction, tile, steps=steps)
            for patch in _patches(tile, machine):
                yield _with_patch(problem, machine, direction, tiling, patch)


def _factorizations(lanes: int) -> Iterator[Extents]:
    sizes = [2**power for power in range(lanes.bit_length())]
    for first, second in itertools.product(sizes, sizes):
        if lanes % (first * second) == 0:
            yield first, second, lanes // (first * second)


def _patches(tile: Extents, machine: Machine) -> Iterator[Extents]:
    sizes = [[size for size in (1, 2, 4) if extent % size == 0] for extent in tile]
    for patch in itertools.product(*sizes):
        if math.prod(patch) in machine.patches or math.prod(tile) <= math.prod(patch):
            yield patch[0], patch[1], patch[2]


def _of_tile(problem: Problem, machine: Machine, direction: str, tile: Extents, *, steps: bool) -> Tiling:
    """Choose the rest of a tiling, given the tile: none of it depends on the patch. In steps a strip has one tile."""
    bare = Tiling(tile=tile, vector=machine.vector)
    box = TilingPlan.make(problem, bare).axes[-1].tile_box
    vectors = math.prod(tile) // machine.vector
    key_block = _block(box, max(_CHAINS // vectors, 1), machine.scores // vectors)
    tiling = replace(bare, key_block=(1, 1, key_block), additional_block=round_up(_ADDITIONAL_BLOCK, key_block))
    tiling = _with_strip(problem, tiling, direction, steps=steps)
    if direction == "backward":
        grad_block = _divisor(TilingPlan.make(problem, tiling).axes[-1].visited, _GRAD_BLOCK)
        additional_block = round_up(_ADDITIONAL_BLOCK, math.lcm(key_block, grad_block))
        tiling = replace(tiling, grad_block=grad_block, additional_block=additional_block)
    return tiling


def _with_patch(problem: Problem, machine: Machine, direction: str, tiling: Tiling, patch: Extents) -> QueriesInLanes:
    """Choose the rest of a config, given tiling and patch."""
    tiling = replace(tiling, patch=patch)
    plan = TilingPlan.make(problem, tiling)
    visited = plan.extents("patch_visited")
    row_block = None
    values = math.prod(visited) * _FLOAT_BYTES * plan.head_dim_v * _ROWS[direction]
    if values > _L1_BYTES and visited[-1] % _ROW_BLOCK == 0:
        row_block = _ROW_BLOCK
    return QueriesInLanes(tiling, machine.accumulators, row_block)


def _with_strip(problem: Problem, tiling: Tiling, direction: str, *, steps: bool) -> Tiling:
    """Choose how many tiles share staged keys, and whether these come in chunks.

    There may be thousands of strips: what they cost is computed side by side.
    """
    single = TilingPlan.make(problem, tiling)
    counts = [[1] if steps else _counts(axis.longest, axis.tile) for axis in single]
    choices = [[axis.with_tiles(count) for count in along] for axis, along in zip(single, counts, strict=True)]

    def grid(name: str) -> list[_Numbers]:
        """Return an attribute of each axis, for all strips."""
        return list(np.broadcast_arrays(*np.ix_(*([getattr(axis, name) for axis in along] for along in choices))))

    box, keys = _volume(grid("strip_box")), single.size("tile_box")
    queries, strips = _volume(grid("strip")), _volume(grid("strips"))
    staged = box * (_FLOAT_BYTES * (single.head_dim + single.head_dim_v) * _ROWS[direction])
    in_chunks = (staged > _STAGED_BYTES * _STAGED_AT_ONCE) | (keys > _KEYS_AT_ONCE)
    limits = _chunk(grid("strip_box"))
    held, is_chunked = _in_chunks(single, grid("strip_box"), limits)
    tasks = problem.heads_kv * strips * single.size("dilation")
    # Staged keys a query, and what a task too many or too large costs.
    cost = box / queries
    cost *= np.where(staged > _STAGED_BYTES, _STAGED_BEYOND, 1.0)
    cost *= np.where(tasks < _TASKS, _TASKS_COST * _TASKS / tasks, 1.0)
    cost *= np.where(in_chunks & is_chunked, box / keys * _CHUNK_COST, 1.0)
    cost *= strips * queries / math.prod(axis.longest for axis in single)
    if direction == "backward":
        space = _workspace(problem, single, strips, np.where(in_chunks, held, box))
        cost *= np.where(space > _WORKSPACE, _WORKSPACE_COST * space, 1.0)
    kept = _volume(grid("tiles"))
    cost = np.where(in_chunks & (kept > _KEPT_TILES[direction]), np.inf, cost)
    best = np.unravel_index(np.argmin(cost), cost.shape)
    first, second, third = (along[int(at)] for along, at in zip(counts, best, strict=True))
    chosen = replace(tiling, strip=(first, second, third))
    if in_chunks[best]:
        first, second, third = (int(limit[best]) for limit in limits)
        chosen = replace(chosen, chunk=(first, second, third))
    return chosen


def _volume(parts: Sequence[_Numbers]) -> _Numbers:
    first, second, third = parts
    return first * second * third


def _workspace(problem: Problem, plan: TilingPlan, strips: _Numbers, held: _Numbers) -> _Numbers:
    """Return the workspace of a backward over query, key and value in float32, for strips that hold so many keys."""
    space = problem.heads_kv * strips * plan.size("dilation") * held * (plan.head_dim + plan.head_dim_v)
    inputs = problem.heads * problem.head_dim + problem.heads_kv * (problem.head_dim + problem.head_dim_v)
    return space / (nominal(problem).tokens * inputs)


def _counts(queries: int, tile: int) -> list[int]:
    tiles = -(-queries // tile)
    return sorted({*(2**power for power in range(tiles.bit_length())), tiles, -(-tiles // 2), -(-tiles // 4)})


def _chunk(boxes: Sequence[_Numbers]) -> list[_Numbers]:
    """Return, for boxes of strips, chunks of about `_CHUNK_KEYS` keys, of whole rows where these are short enough."""
    extents = list(boxes)
    for axis in range(AXES):
        others = math.prod(extents) // extents[axis]
        extents[axis] = np.maximum(1, np.minimum(extents[axis], _CHUNK_KEYS // others))
    return extents


def _in_chunks(plan: TilingPlan, boxes: Sequence[_Numbers], limits: Sequence[_Numbers]) -> tuple[_Numbers, _Numbers]:
    """Return how many keys strips hold that are visited in chunks, and whether these are several; as `AxisTiling`."""
    held, several = np.ones_like(limits[0]), np.zeros_like(limits[0], dtype=bool)
    for axis, box, limit in zip(plan, boxes, limits, strict=True):
        chunk = np.where(limit >= box, box, -(-limit // axis.key_block) * axis.key_block)
        chunks = -(-box // chunk)
        held, several = held * chunk * chunks, several | (chunks > 1)
    return held, several


def _block(extent: int, least: int, most: int) -> int:
    """Return the block size that wastes least of an extent, of those that keep the units busy."""
    return min(range(least, most + 1), key=lambda size: (round_up(extent, size), -size))


def _divisor(value: int, most: int) -> int:
    return max(divisor for divisor in range(1, most + 1) if value % divisor == 0)


def _cycles(problem: Problem, machine: Machine, config: QueriesInLanes, direction: str) -> float:
    """Estimate the cycles of one head of one batch entry."""
    return sum(_terms(problem, machine, config, direction).values())


def _terms(problem: Problem, machine: Machine, config: QueriesInLanes, direction: str) -> dict[str, float]:
    """Return what these cycles are made of."""
    plan = TilingPlan.make(problem, config.tiling)
    lanes = math.prod(config.tiling.tile)
    vectors = lanes // machine.vector
    depth, depth_v = plan.head_dim / machine.vector, plan.head_dim_v / machine.vector
    visited = plan.size("visited") * plan.size("chunks")
    patch_visited = plan.size("patch_visited") * plan.size("chunks")
    rows = config.tiling.key_block[-1]
    score = _product(rows, vectors) / rows  # a key and an element of it
    queries = math.prod(config.tiling.patch)
    columns = _divisor(max(int(depth_v), 1), max(config.accumulators // queries, 1))
    weighted = _product(queries, columns) / (queries * columns)
    columns_bytes = columns * machine.vector * _FLOAT_BYTES * _ROWS[direction]
    if config.row_block is None and plan.size("visited") * columns_bytes > _L1_BYTES:
        weighted *= _VALUES_BEYOND  # The values that the patches share do not stay in the innermost cache.
    patches = lanes // queries
    overhead = patches * plan.extents("patch_visited")[0] * plan.extents("patch_visited")[1] * _PATCH_ROW
    # Of a tile. Beside the forward's product of either kind a tangent has two of that kind in one.
    products = 3 if direction == "tangent" else 1
    widths, sums = problem.head_dim, depth_v
    if direction == "backward":
        widths, sums = problem.head_dim + problem.head_dim_v, depth
    tile = {
        "scores": products * visited * widths * score,
        "weighted sums": products * lanes * patch_visited * sums * weighted,
        "softmax": visited * vectors * (_SOFTMAX + (_SLOPE if direction == "tangent" else 0)),
        "gradients of keys": visited * lanes * (depth + depth_v) * _GRADIENT if direction == "backward" else 0.0,
        "beside": _TILE * vectors + overhead,
    }
    tiles = plan.size("tiles") * plan.size("strips") * plan.size("dilation")
    staged = plan.size("strip_box") * (depth + depth_v) * _STAGE * plan.size("strips") * plan.size("dilation")
    found = {name: tiles * cycles for name, cycles in tile.items() if cycles}
    return {**found, "staging": staged * _ROWS[direction]}


def _product(broadcast: int, vectors: int) -> float:
    """Estimate the cycles of adding the products of some broadcast elements with some vectors to accumulators.

    Two multiply-adds a cycle; loads are slower than that where there is one for each (measured on an Intel CPU with
    AVX-512: 15 x 1 ran at 0.63 of the rate of the units, 12 x 2 at 0.85, 4 x 2 at 0.77, 8 x 2 at 0.86). A chain of
    additions is four cycles long: fewer than eight accumulators wait for it.
    """
    return _AT_BEST * max(broadcast * vectors / _ADDS, _LOAD * (broadcast + vectors), _LATENCY)
