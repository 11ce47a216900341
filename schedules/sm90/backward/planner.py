"""Chooses tiles for the backward for Hopper by counting what they would do. Pure Python: no TVM, no GPU, milliseconds.

The two kernels are planned apart. Each is a tile that a thread block owns and tiles that stream by; what streams by
covers the union of the windows (or of the queries that see the keys), and what it covers beyond is computed and set to
0. Cycles come from the limits that a multiprocessor has: its tensor cores, its exponentials, what L2 gives it, and the
chain of a tile's steps, which other warpgroups of the same multiprocessor hide.
"""

from __future__ import annotations

import functools
import itertools
import operator
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from na_compiler.problem import Problem
from na_compiler.schedules.shared.candidate import Candidate as Base
from na_compiler.schedules.shared.counts import tiles_met
from na_compiler.schedules.shared.gpus import H100
from na_compiler.schedules.sm90.backward.config import Sm90Backward, Sweep
from na_compiler.schedules.sm90.backward.plan import ALIGNED, SweepPlan
from na_compiler.schedules.sm90.boxes import boxes, fits
from na_compiler.schedules.sm90.plan import ROWS, SHARED_MEMORY
from na_compiler.window import group_length

__all__ = ["MEGAHERTZ", "BackwardCandidate", "SweepCandidate", "candidates", "has_tiles", "statistics_time", "sweeps"]

_Numbers = NDArray[Any]

_PROCESSORS = H100.processors
# Shared memory of a multiprocessor, and what a block takes of it beside its own.
_SHARED_OF_ALL, _SHARED_OF_SYSTEM = 228 * 1024, 1024
# Columns up to which one warpgroup has enough to do with a tile that it loads alone; more, and L2 binds.
_WIDE = 64
# Tokens of a tile that streams by, and tiles kept in shared memory, that are tried.
_STREAMED = (16, 32, 48, 64, 80, 96, 128)
_STAGES = (3, 2)
# What follows was fitted to 202 kernels on an H100, whose times it tells to 12%.
# Products take so much longer than the datasheet says.
_PRODUCTS = 1.18
# Shared memory that an instruction of scores reads beside its columns', in cycles; and of each column.
_SCORE, _SCORE_COLUMN = 17.8, 0.25
# Cycles that a tile keeps the multiprocessor beside its products, and those of a column: always, and of exponentials.
_TILE, _COLUMN_OF_KEYS, _EXPONENTIAL = 20.0, 3.75, 2.5
# Cycles that a warpgroup waits for its own steps beside products: always, without deferred sums, and of a column: where
# statistics come with the columns, and with a mask.
_STEPS, _WAIT, _STEP_OF_KEYS, _STEP_MASKED = 840.0, 200.0, 4.4, 9.2
# Cycles of a block beside its tiles: those it waits, and those it keeps the multiprocessor.
_BLOCK, _BLOCK_WORK = 1910.0, 1120.0
# Two warpgroups of a block wait for each other's tiles: measured where blocks of one were as good in all else.
_PAIR = 1.15
# Its clock at work; bytes a microsecond of the kernel of statistics; and what many batch entries of small windows take
# for each part that one is estimated at: measured in nine rows.
MEGAHERTZ, _BYTES, _STEADY = H100.megahertz, 2.4e6, 1.15
# Bytes a cycle that L2 gives a multiprocessor.
_L2 = H100.l2
# Registers that the compiler makes do with beyond those that there are, as `SweepPlan.needed_registers` counts them;
# found by compiling.
_SLACK = 2


@dataclass(frozen=True)
class SweepCandidate:
    """Choices for one of the kernels, and what they would do for one batch entry.

    Parameters
    ----------
    sweep
        The choices.
    cycles
        Estimated time.
    steady
        The same among many batch entries, which fill what one leaves of its last wave.
    waste
        Scores computed for each one that is needed.
    masked
        Share of the tiles that need a mask.
    blocks
        Thread blocks.
    shared_bytes
        Shared memory of one.
    terms
        What the cycles are made of.
    """

    sweep: Sweep
    cycles: float
    steady: float
    waste: float
    masked: float
    blocks: int
    shared_bytes: int
    terms: Mapping[str, float]

    def __str__(self) -> str:
        sweep = self.sweep
        own, stream = ("x".join(map(str, tile)) for tile in (sweep.own_tile, sweep.stream_tile))
        several = f", {sweep.blocks} blocks a multiprocessor" if sweep.blocks > 1 else ""
        return (
            f"{sweep.warpgroups} warpgroups of {own}, tiles of {stream} in {sweep.stages} stages{several}: "
            f"{self.waste:.2f} scores computed for each one needed, {self.masked:.0%} of the tiles masked"
        )


@dataclass(frozen=True)
class BackwardCandidate(Base):
    """A config of the backward, and what it would do for one batch entry.

    Parameters
    ----------
    config
        The choices.
    queries, keys
        What its kernels would do.
    statistics
        Microseconds of the kernel before them.
    """

    config: Sm90Backward
    queries: SweepCandidate
    keys: SweepCandidate
    statistics: float

    combined = "of each kernel, the most of tensor cores and exponentials, L2 and latency; then the last wave"

    @property
    def terms(self) -> Mapping[str, float]:  # type: ignore[override]
        """What the cycles are made of, of both kernels."""
        return {name: cycles + self.keys.terms[name] for name, cycles in self.queries.terms.items()}

    @property
    def cycles(self) -> float:  # type: ignore[override]
        """Estimated time."""
        return self.queries.cycles + self.keys.cycles

    @property
    def microseconds(self) -> float:
        """Estimated time among many batch entries."""
        return _STEADY * (self.queries.steady + self.keys.steady) / MEGAHERTZ + self.statistics

    @property
    def waste(self) -> float:  # type: ignore[override]
        """Scores computed for each one needed, on the average of the kernels."""
        return (self.queries.waste + self.keys.waste) / 2

    def columns(self) -> dict[str, str]:
        """Return its row of a table."""
        found = {}
        for name, sweep in (("queries", self.queries), ("keys", self.keys)):
            own, stream = ("x".join(map(str, tile)) for tile in (sweep.sweep.own_tile, sweep.sweep.stream_tile))
            found[name] = f"{sweep.sweep.warpgroups} x {own}"
            found[f"{name}' stream"] = f"{stream} by {sweep.sweep.stages}"
            found[f"{name}' waste"] = f"{sweep.waste:.2f}"
        return found

    def __str__(self) -> str:
        return f"for the gradient of queries {self.queries}; for those of keys and values {self.keys}"


def statistics_time(problem: Problem) -> float:
    """Return the microseconds of the kernel before the others, which reads output and its gradient."""
    return problem.tokens * problem.heads * 2 * problem.head_dim_v * problem.element_bytes / _BYTES


@functools.lru_cache(maxsize=256)
def candidates(problem: Problem, count: int = 8) -> tuple[BackwardCandidate, ...]:
    """Return the best configs of a problem that the family takes, the best first."""
    queries = sweeps(problem, "queries", ("grad_query",), count)
    together = sweeps(problem, "keys", ("grad_key", "grad_value"), count)
    # A config has one choice for both: that which suits the gradient of keys, which needs more.
    keys = together or sweeps(problem, "keys", ("grad_key",), count)
    statistics = statistics_time(problem)
    found = [
        BackwardCandidate(Sm90Backward(one.sweep, other.sweep, split=not together), one, other, statistics)
        for one, other in itertools.product(queries, keys)
    ]
    return tuple(sorted(found, key=lambda candidate: candidate.cycles)[:count])


def has_tiles(problem: Problem) -> bool:
    """Return whether there is a config for a problem at all."""
    keys = _spaces(problem, "keys", ("grad_key", "grad_value")) or _spaces(problem, "keys", ("grad_key",))
    return bool(keys and _spaces(problem, "queries", ("grad_query",)))


def sweeps(problem: Problem, side: str, results: tuple[str, ...], count: int = 8) -> tuple[SweepCandidate, ...]:
    """Return the best choices for one kernel, the best first; parameters are those of `SweepPlan`."""
    found = [one for space in _spaces(problem, side, results) for one in space.best(count)]
    return tuple(sorted(found, key=lambda candidate: candidate.cycles)[:count])


@functools.lru_cache(maxsize=256)
def _spaces(problem: Problem, side: str, results: tuple[str, ...]) -> list[_Space]:
    """Return what may be chosen: tiles that fit the layout, and where there are none of these, any."""
    lengths = [group_length(x, d) for x, d in zip(problem.layout, problem.dilation, strict=True)]
    found = _spaces_within(problem, side, results, lengths)
    return found or _spaces_within(problem, side, results, [1 << 30] * problem.rank)


def _spaces_within(problem: Problem, side: str, results: tuple[str, ...], lengths: list[int]) -> list[_Space]:
    found = []
    wide = max(problem.head_dim, problem.head_dim_v) > _WIDE
    for warpgroups, blocks in ((2, 1),) if wide else ((2, 1), (1, 2), (1, 3), (1, 4)):
        within = [-(-lengths[0] // warpgroups), *lengths[1:]]
        owns = [tile for tile in boxes(ROWS, problem.rank) if fits(problem, tile, within)]
        for volume in _STREAMED:
            streams = [
                tile for tile in boxes(volume, problem.rank) if tile[-1] % 8 == 0 and fits(problem, tile, lengths)
            ]
            if owns and streams:
                plan = _complete(problem, side, results, Sweep(owns[0], streams[0], warpgroups, 1, blocks))
                if plan is not None:
                    found.append(_Space(plan, owns, streams))
    return found


def _complete(problem: Problem, side: str, results: tuple[str, ...], sweep: Sweep) -> SweepPlan | None:
    """Return the plan with as many stages as there is room for, and deferred sums where registers suffice.

    How many tokens tiles have decides it, whatever their extents.
    """
    for defer in (True, False):
        for stages in _STAGES:
            plan = SweepPlan(problem, replace(sweep, stages=stages, defer=defer), side, results)
            if plan.needed_registers <= plan.registers + _SLACK and _has_room(plan):
                return plan
    return None


def _has_room(plan: SweepPlan) -> bool:
    shared = plan.shared_bytes
    return shared <= SHARED_MEMORY and plan.config.blocks * (shared + _SHARED_OF_SYSTEM) <= _SHARED_OF_ALL


@dataclass(frozen=True)
class _Space:
    """Choices for one kernel: each of some owned boxes with each of some boxes of as many tokens that stream by.

    Parameters
    ----------
    plan
        Of one of them: registers and shared memory are alike for all.
    owns, streams
        The boxes.
    """

    plan: SweepPlan
    owns: list[tuple[int, ...]]
    streams: list[tuple[int, ...]]

    def best(self, count: int) -> list[SweepCandidate]:
        """Return the best of them: a row of the arrays for each owned box, a column for each that streams by."""
        plan, problem, config = self.plan, self.plan.problem, self.plan.config
        plans = [SweepPlan(problem, replace(config, own_tile=own), plan.side, plan.results) for own in self.owns]
        counts = [self._counts(axis, plans) for axis in range(problem.rank)]
        repeats = 1 if plan.of_queries else problem.group_size
        visited, whole, loaded = functools.reduce(operator.mul, counts) * repeats
        blocks = np.array([one.items for one in plans], dtype=float)[:, None]
        masked = 1 - whole / visited
        cycles, steady, terms = _cycles(plan, blocks, visited, loaded, masked)
        waste = visited * ROWS * plan.streamed / (problem.pairs() * repeats)
        found = []
        for place in np.argsort(cycles, axis=None, kind="stable")[:count]:
            at = np.unravel_index(place, cycles.shape)
            own, stream = map(int, at)
            sweep = replace(config, own_tile=self.owns[own], stream_tile=self.streams[stream])
            figures = (float(cycles[at]), float(steady[at]), float(waste[at]), float(masked[at]))
            made_of = {name: float(np.broadcast_to(of, cycles.shape)[at]) for name, of in terms.items()}
            found.append(SweepCandidate(sweep, *figures, plans[own].items * plan.heads, plan.shared_bytes, made_of))
        return found

    def _counts(self, axis: int, plans: list[SweepPlan]) -> _Numbers:
        """Count along one axis: tiles visited, those without a mask, those loaded."""
        problem, of_queries = self.plan.problem, self.plan.of_queries
        rule = (problem.kernel_size[axis], problem.stride[axis], problem.dilation[axis], problem.is_causal[axis])
        extents = [tile[axis] for tile in self.streams]
        streams = sorted(set(extents))
        align = 1 if of_queries or axis < problem.rank - 1 else ALIGNED
        found = []
        for plan in plans:
            parts = plan.config.warpgroups if axis == 0 else 1
            own = (plan.own_box[axis], (plan.warp_box or plan.own_box)[axis], parts)
            given = ((problem.layout[axis], *rule), own, tuple(streams))
            found.append(tiles_met(*given, skips=plan.skips, of_queries=of_queries, align=align))
        return np.stack(found, axis=1)[:, :, [streams.index(extent) for extent in extents]]


def _cycles(
    plan: SweepPlan, blocks: _Numbers, visited: _Numbers, loaded: _Numbers, masked: _Numbers
) -> tuple[_Numbers, _Numbers, dict[str, _Numbers]]:
    """Estimate the time of a batch entry, by itself and among many; and what it is made of."""
    config = plan.config
    work, chain = _tile_cycles(plan, masked)
    # Of a thread block: its chain, what it keeps the multiprocessor with, and what its loads take.
    tiles = visited / blocks
    latency = tiles / config.warpgroups * chain + _BLOCK
    loads = loaded / blocks * sum(plan.stream_bytes(which) for which in range(2)) / _L2
    pair = _PAIR if config.warpgroups > 1 else 1
    together = pair * np.maximum(latency, config.blocks * np.maximum(tiles * work + _BLOCK_WORK, loads))
    # A batch is likely to fill the last wave, so waves are not rounded up.
    waves = blocks * plan.heads / (_PROCESSORS * config.blocks)
    steady: _Numbers = together * waves
    terms = {
        "tensor cores and exponentials": pair * config.blocks * (tiles * work + _BLOCK_WORK) * waves,
        "L2": pair * config.blocks * loads * waves,
        "latency": pair * latency * waves,
        "last wave": latency / 2,
    }
    return steady + latency / 2, steady, terms


def _tile_cycles(plan: SweepPlan, masked: _Numbers) -> tuple[float, _Numbers]:
    """Return the cycles that a tile keeps a multiprocessor, and those of its steps one after another."""
    streamed = plan.streamed
    # An instruction of scores reads both operands from shared memory, and for few columns that takes longer.
    score = max(streamed / 2, _SCORE + _SCORE_COLUMN * streamed)
    scores = sum(-(-plan.columns[which].extent // 16) for which in plan.owned) * score
    sums = streamed / 16 * sum(plan.columns[which].extent / 2 for which in plan.sums)
    products = _PRODUCTS * (scores + sums)
    of_keys = 0 if plan.of_queries else 1
    work = max(products, streamed * _EXPONENTIAL) + _TILE + streamed * _COLUMN_OF_KEYS * of_keys
    steps = _STEPS + streamed * (_STEP_OF_KEYS * of_keys + _STEP_MASKED * masked)
    return work, products + steps + (0 if plan.config.defer else _WAIT)
