"""Chooses tiles for the schedule for Hopper by counting what they would do. Pure Python: no TVM, no GPU, milliseconds.

A tile of queries visits tiles of keys that cover the union of its windows. What it visits beyond the windows is
computed and masked, for nothing: small tiles waste less, and cost more apiece. The counts become cycles with four
constants fitted to an H100; they need not be right, only in the right order.
"""

from __future__ import annotations

import functools
import itertools
import math
import operator
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from na_compiler.problem import Problem
from na_compiler.schedules.shared.candidate import Candidate as Base
from na_compiler.schedules.shared.counts import tiles_met
from na_compiler.schedules.shared.gpus import H100
from na_compiler.schedules.sm90.backward import planner as backward
from na_compiler.schedules.sm90.boxes import boxes, fits
from na_compiler.schedules.sm90.config import Sm90
from na_compiler.schedules.sm90.plan import MAX_ELEMENT_STRIDE, ROWS, SHARED_MEMORY, Plan
from na_compiler.window import group_length

__all__ = ["Candidate", "candidates", "most_registers", "refusal"]

_Numbers = NDArray[Any]

_PROCESSORS = H100.processors
# Columns of one wgmma at most (PTX ISA), which makes a head's output at once.
_MOST_HEAD_DIM = 256
_MEGAHERTZ = H100.megahertz
# Products of 16-bit numbers, in operations a cycle of one multiprocessor.
_RATE = float(H100.tensor)
# Cycles: of products over what the datasheet says, of a tile of keys beside its products, of masking it (and a key
# of it), and of a tile of queries beside its keys.
_PRODUCTS, _TILE, _MASK, _BLOCK = 1.40, 250.0, (100.0, 1.2), 3000.0
# Share of a tile's time that it takes more where only one warpgroup needs it.
_LONE = 0.25
# Share that it takes more for each of its rows: tokens that follow each other are near in memory, rows are far apart.
_ROW = 0.002
# Exponentials are the other unit's work that grows with the keys, whatever head_dim is: cycles a key, by warpgroups.
_EXPONENTIALS = {2: 7.0, 3: 6.0}
# Keys of a tile, and tiles of keys that are kept in shared memory, that are tried.
_KEYS = (32, 48, 64, 80, 96, 112, 128, 144, 160, 176)
_STAGES = (4, 2)
# More keys at once than this leave the compiler few registers to overlap with: products take so much longer.
_AMPLE_KEYS, _CROWDED = 128, 1.05
# Tiles of keys of a block, up to which it pays to keep the block for another tile of queries: what begins and ends it
# is then hidden behind other loads. Longer ones are better handed out as multiprocessors become free. Measured on an
# H100, see docs/notes-hopper.md.
_SHORT = 8
# Rounds of blocks up to which the last one is a whole round, and what it is on average where there are more. Assumed.
_FEW_ROUNDS, _LAST_ROUND = 4, 0.5
# Registers that the compiler makes do with, by warpgroups, found by compiling; and in persistent blocks, for values up
# to a length and for longer ones.
_REGISTERS = {2: 240, 3: 152}
_REGISTERS_KEPT = {2: (128, 236, 216), 3: (64, 152, 144)}
# Powers of two that weights may reach before sums are rescaled: few rows rise by as much after their first tiles, and
# of 15, which a float16 would hold, enough are left for their sum.
_THRESHOLD = 8
# How many fewer with queries longer than this, by warpgroups.
_LONG_QUERY, _FEWER = 128, {2: 0, 3: 12}


@dataclass(frozen=True)
class Candidate(Base):
    """A config, and what it would do for one batch entry.

    Parameters
    ----------
    config
        The choices.
    cycles
        Estimated time.
    waste
        Scores computed for each one that is needed.
    masked
        Share of the tiles of keys that need a mask.
    blocks
        Thread blocks.
    shared_bytes
        Shared memory of one.
    terms
        What the cycles are made of.
    """

    config: Sm90
    cycles: float
    waste: float
    masked: float
    blocks: int
    shared_bytes: int
    terms: Mapping[str, float]

    combined = "the more of tensor cores and exponentials, then the others one after another"

    @property
    def waves(self) -> float:
        """Thread blocks for each multiprocessor, which has one at a time."""
        return self.blocks / _PROCESSORS

    @property
    def microseconds(self) -> float:
        """Estimated time among many batch entries, which fill what one leaves of the last wave."""
        return float(self.cycles / _rounds(np.array(self.waves)) * self.waves / _MEGAHERTZ)

    def columns(self) -> dict[str, str]:
        """Return its row of a table."""
        return {
            "queries": f"{self.config.warpgroups} x {'x'.join(map(str, self.config.query_tile))}",
            "keys": "x".join(map(str, self.config.key_tile)),
            "stages": str(self.config.stages),
            "masked": f"{self.masked:.0%}",
            "blocks": str(self.blocks),
            "waves": f"{self.waves:.1f}",
            "KB": f"{self.shared_bytes / 1024:.0f}",
        }

    def __str__(self) -> str:
        queries = "x".join(map(str, self.config.query_tile))
        keys = "x".join(map(str, self.config.key_tile))
        return (
            f"{self.config.warpgroups} warpgroups of {queries} queries, keys by {keys} in {self.config.stages} stages: "
            f"{self.waste:.2f} scores computed for each one needed, {self.masked:.0%} of the tiles masked, "
            f"{self.waves:.1f} waves of thread blocks with {self.shared_bytes / 1024:.0f} KB"
        )


def refusal(problem: Problem, direction: str) -> str | None:
    """Return in a sentence why the family does not take a problem; ``None`` if it does."""
    dims = (problem.head_dim, problem.head_dim_v)
    given = " and ".join(map(str, dims))
    reasons = {
        "has no tangents": direction == "tangent",
        "takes float16 and bfloat16, not float32": problem.dtype == "float32",
        f"takes multiples of 8 up to {_MOST_HEAD_DIM} as head_dim, not {given}": (
            any(dim % 8 or dim > _MOST_HEAD_DIM for dim in dims)
        ),
        "takes multiples of 16 as head_dim in 3-D, because TMA has no axis left to pad it": (
            problem.rank == 3 and any(dim % 16 for dim in dims)
        ),
        f"takes dilations up to {MAX_ELEMENT_STRIDE}, TMA's largest step": max(problem.dilation) > MAX_ELEMENT_STRIDE,
    }
    reason = next((reason for reason, holds in reasons.items() if holds), None)
    if reason is None and not (backward.has_tiles(problem) if direction == "backward" else _spaces(problem)):
        reason = f"has no tiles for {problem}"
    return reason and f"The schedule for Hopper {reason}."


@functools.lru_cache(maxsize=256)
def candidates(problem: Problem, count: int = 8) -> tuple[Candidate, ...]:
    """Return the best configs of a problem that the schedule takes, the best first."""
    measured = [_measure(problem, space) for space in _spaces(problem)]
    best: list[tuple[float, _Measured, tuple[int, int]]] = []
    for space in measured:
        order = np.argsort(space.cycles, axis=None, kind="stable")[:count]
        for query, key in zip(*(map(int, at) for at in np.unravel_index(order, space.cycles.shape)), strict=True):
            best.append((float(space.cycles[query, key]), space, (query, key)))
    best.sort(key=lambda one: one[0])
    return tuple(space.candidate(*at) for _, space, at in best[:count])


@dataclass(frozen=True)
class _Space:
    """Configs that may be chosen: each of some boxes of queries with each of some boxes of keys.

    Parameters
    ----------
    warpgroups
        Of all.
    queries, keys
        The boxes.
    stages
        By keys of a box.
    """

    warpgroups: int
    queries: list[tuple[int, ...]]
    keys: list[tuple[int, ...]]
    stages: dict[int, int]

    def config(self, query: int, key: int) -> Sm90:
        """Return the config of a box of queries and one of keys, by their numbers."""
        tile = self.keys[key]
        return Sm90(self.queries[query], tile, self.warpgroups, self.stages[math.prod(tile)])


def _spaces(problem: Problem) -> list[_Space]:
    """Return what may be chosen: tiles that fit the layout, and where there are none of these, any."""
    lengths = [group_length(x, d) for x, d in zip(problem.layout, problem.dilation, strict=True)]
    return _spaces_within(problem, lengths) or _spaces_within(problem, [1 << 30] * problem.rank)


def _spaces_within(problem: Problem, lengths: list[int]) -> list[_Space]:
    found = []
    for warpgroups in (2, 3):
        stages = {extent: number for extent in _KEYS if (number := _most_stages(problem, warpgroups, extent))}
        keys = [
            tile
            for extent in stages
            for tile in boxes(extent, problem.rank)
            if tile[-1] % 8 == 0 and fits(problem, tile, lengths)
        ]
        within = [-(-lengths[0] // warpgroups), *lengths[1:]]
        queries = [tile for tile in boxes(ROWS, problem.rank) if fits(problem, tile, within)]
        if queries and keys:
            found.append(_Space(warpgroups, queries, keys, stages))
    return found


def _most_stages(problem: Problem, warpgroups: int, keys: int) -> int | None:
    """Return the stages that there is room for; ``None`` if for none. What lies where in a box plays no part in it."""
    row = (1,) * (problem.rank - 1)
    for stages in _STAGES:
        plan = Sm90((*row, ROWS), (*row, keys), warpgroups, stages).plan(problem)
        if plan.shared_bytes <= SHARED_MEMORY and plan.needed_registers <= _REGISTERS[warpgroups]:
            return stages
    return None


def _configs(problem: Problem) -> Iterator[Sm90]:
    """Yield what may be chosen."""
    for space in _spaces(problem):
        for query, key in itertools.product(range(len(space.queries)), range(len(space.keys))):
            yield space.config(query, key)


@dataclass(frozen=True)
class _Measured:
    """What the configs of a space would do: a row for each box of queries, a column for each of keys."""

    problem: Problem
    space: _Space
    cycles: _Numbers
    visited: _Numbers
    whole: _Numbers
    blocks: _Numbers
    terms: dict[str, _Numbers]

    def candidate(self, query: int, key: int) -> Candidate:
        """Return one of them."""
        config, blocks = self.space.config(query, key), int(self.blocks[query, 0])
        plan = config.plan(self.problem)
        visited, whole = (float(counted[query, key]) for counted in (self.visited, self.whole))
        waves = blocks * self.problem.heads / _PROCESSORS
        is_short = waves > 1 and visited <= _SHORT * blocks * config.warpgroups
        chosen = _complete(config, persistent=is_short and _may_persist(self.problem, config))
        waste = visited * ROWS * plan.streamed / self.problem.pairs()
        masked = (visited - whole) / visited
        cycles, terms = float(self.cycles[query, key]), {name: float(of[query, key]) for name, of in self.terms.items()}
        return Candidate(chosen, cycles, waste, masked, blocks * self.problem.heads, plan.shared_bytes, terms)


def _measure(problem: Problem, space: _Space) -> _Measured:
    """Count what the configs of a space would do, and make cycles of it: of some thousands, side by side."""
    plans = [space.config(query, 0).plan(problem) for query in range(len(space.queries))]
    counts = [_counts(problem, axis, space, plans) for axis in range(problem.rank)]
    visited, whole, steps = functools.reduce(operator.mul, counts)
    blocks = np.array([math.prod(plan.tiles) * plan.groups for plan in plans], dtype=float)[:, None]
    streamed = np.array([math.prod(tile) for tile in space.keys])
    products = 2 * (ROWS * streamed) * (16 * -(-problem.head_dim // 16) + problem.head_dim_v) / _RATE * _PRODUCTS
    products = products * np.where(streamed > _AMPLE_KEYS, _CROWDED, 1)
    exponentials = streamed * _EXPONENTIALS[space.warpgroups]
    rows = 1 + _ROW * np.array([math.prod(tile[:-1]) for tile in space.keys])
    tile = (np.maximum(products, exponentials) + _TILE) * rows
    masks = (visited - whole) * (_MASK[0] + streamed * _MASK[1])
    # While one warpgroup leaves a tile out, the others' softmax has less to hide behind.
    alone = (space.warpgroups * steps - visited) * tile * _LONE
    block = (visited * tile + alone + masks) / blocks + _BLOCK
    waves = blocks * problem.heads / _PROCESSORS
    rounds = _rounds(waves)
    each = waves / blocks
    terms = {
        "tensor cores": visited * products * rows * each,
        "exponentials": visited * exponentials * rows * each,
        "of each tile": visited * _TILE * rows * each,
        "masks": masks * each,
        "without another": alone * each,
        "of each block": np.broadcast_to(_BLOCK * waves, visited.shape),
        "last wave": block * (rounds - waves),
    }
    return _Measured(problem, space, block * rounds, visited, whole, blocks, terms)


def _rounds(waves: _Numbers) -> _Numbers:
    """Return how many thread blocks one multiprocessor does after another.

    The last wave is as long as any other, and it is the tiles in the middle of the layout that take longest.
    """
    return np.where(waves < _FEW_ROUNDS, np.ceil(waves), waves + _LAST_ROUND)


def _counts(problem: Problem, axis: int, space: _Space, plans: list[Plan]) -> _Numbers:
    """Count along one axis: tiles of keys visited, those without a mask, those loaded, for all configs of a space."""
    rule = (problem.kernel_size[axis], problem.stride[axis], problem.dilation[axis], problem.is_causal[axis])
    extents = [tile[axis] for tile in space.keys]
    streams = sorted(set(extents))
    found = []
    for plan in plans:
        own = (plan.own_box[axis], (plan.warp_box or plan.own_box)[axis], space.warpgroups if axis == 0 else 1)
        found.append(tiles_met((problem.layout[axis], *rule), own, tuple(streams), skips=plan.skips))
    return np.stack(found, axis=1)[:, :, [streams.index(extent) for extent in extents]]


def _may_persist(problem: Problem, config: Sm90) -> bool:
    """Whether the registers suffice for a persistent block."""
    width, most, most_of_longer = _REGISTERS_KEPT[config.warpgroups]
    limit = most if problem.head_dim_v <= width else most_of_longer
    limit -= _FEWER[config.warpgroups] if problem.head_dim > _LONG_QUERY else 0
    return config.plan(problem).needed_registers <= limit


def _complete(config: Sm90, persistent: bool) -> Sm90:
    """Return a config with what follows from its other choices.

    Measured on an H100: with two warpgroups rescaling rarely is 2 to 14% faster, and 3 to 6% less so beside `overlap`;
    with three `overlap` is 7% faster. Rescaling rarely was not measured with three, nor in persistent blocks.
    """
    is_patient = config.warpgroups == 2 and not persistent
    return replace(
        config,
        persistent=persistent,
        overlap=config.warpgroups == 3,
        threshold=_THRESHOLD if is_patient else 0,
    )


def most_registers(problem: Problem, warpgroups: int, persistent: bool = False) -> Sm90 | None:
    """Return the config that needs most registers, of those that may be chosen; ``None`` if there is none."""
    configs = [
        _complete(config, persistent)
        for config in _configs(problem)
        if config.warpgroups == warpgroups and (not persistent or _may_persist(problem, config))
    ]
    return max(configs, key=lambda config: config.plan(problem).needed_registers, default=None)
