"""Chooses boxes for the backward on the tensor cores of single warps. Pure Python: no TVM, no GPU, milliseconds.

Each kernel is planned for itself. A warp takes what it issues, and what its instructions wait for each other, divided
by the warps that run beside it.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from na_compiler.operands import RELATIVE_POSITION_BIAS
from na_compiler.problem import Problem
from na_compiler.schedules.mma.backward.config import MmaBackward
from na_compiler.schedules.mma.backward.plan import MOST_INNER, MOST_LISTED, SweepPlan, places_of
from na_compiler.schedules.mma.backward.sweep_config import Sweep
from na_compiler.schedules.mma.boxes import largest_inverses, largest_unions
from na_compiler.schedules.mma.occupancy import blocks_without_spills
from na_compiler.schedules.mma.plan import GROUP, ROWS
from na_compiler.schedules.mma.planner import arrangements, fitting_boxes
from na_compiler.schedules.shared.candidate import Candidate as Base
from na_compiler.schedules.shared.gpus import H100

__all__ = ["Candidate", "SweepCandidate", "candidates", "sweeps", "unsuited"]

_PROCESSORS, _MEGAHERTZ, _SCHEDULERS = H100.processors, H100.megahertz, 4
_MOST_REGISTERS = 255
_WARPS = (1, 2, 4, 8)
# Groups that are tried: for keys 4 were never best, of all that ran.
_CHUNKS = {"queries": (1, 2, 4), "keys": (1, 2)}
# Lines of a block's box that come at once, in a ring.
_LINES = (1, 2, 4, 8)
_LENGTHS = (32,)
_TOKENS = (32, 64, 128, 256)
_STAGES = 2
# Biases of a head: every warp has a table of so many sums in shared memory, every block one in the workspace. Assumed:
# 32 KB a warp.
_MOST_PLACES = 1 << 13
# Lines up to which none are cut, where head_dim and head_dim_v come to no more.
_SHORT, _NARROW = 64, 128


def unsuited(problem: Problem) -> str | None:
    """Return what of a problem only the forward takes; ``None`` if the backward takes all of it."""
    if not problem.has(RELATIVE_POSITION_BIAS) or places_of(problem) <= _MOST_PLACES:
        return None
    return f"takes tables of at most {_MOST_PLACES} biases a head in the backward, not {places_of(problem)}"


@dataclass(frozen=True)
class SweepCandidate:
    """The choices for one kernel, and what it would do for one batch entry.

    Parameters
    ----------
    sweep
        The choices.
    cycles
        Estimated time of one multiprocessor that does all of it.
    computed
        Scores that are computed.
    plan
        What follows.
    terms
        What the cycles are made of.
    """

    sweep: Sweep
    cycles: float
    computed: float
    plan: SweepPlan
    terms: Mapping[str, float]


@dataclass(frozen=True)
class Candidate(Base):
    """A config, and what it would do for one batch entry.

    Parameters
    ----------
    config
        The choices.
    cycles
        Estimated time of one multiprocessor that does all of it.
    waste
        Scores computed for each one that is needed, in the two kernels.
    kilobytes
        Shared memory of the kernels' blocks.
    terms
        What the cycles are made of, of all kernels.
    """

    config: MmaBackward
    cycles: float
    waste: float
    kilobytes: tuple[float, float]
    terms: Mapping[str, float]

    combined = "one after another"

    @property
    def microseconds(self) -> float:
        """Estimated time among many batch entries, on an H100."""
        return self.cycles / _PROCESSORS / _MEGAHERTZ

    def columns(self) -> dict[str, str]:
        """Return its row of a table."""
        return {
            name: f"{_times(sweep.warps)} x {_times(sweep.warp_box)}, {_tile(sweep)}, {kilobytes:.0f} KB"
            for name, sweep, kilobytes in zip(
                ("queries", "keys"), (self.config.queries, self.config.keys), self.kilobytes, strict=True
            )
        }

    def __str__(self) -> str:
        columns = self.columns()
        return (
            f"gradient of queries by {columns['queries']}, gradients of keys and values by {columns['keys']}"
            f"{', a kernel each' if self.config.split else ''}: {self.waste:.2f} scores computed for each one needed"
        )


def _times(extents: Sequence[int]) -> str:
    return "x".join(map(str, extents))


def _tile(sweep: Sweep) -> str:
    return "all" if sweep.stream_tile is None else f"{_times(sweep.stream_tile)} {sweep.stages} stages"


@functools.lru_cache(maxsize=256)
def candidates(problem: Problem, shared_memory: int, count: int = 8) -> tuple[Candidate, ...]:
    """Return the best configs of a problem for blocks with so much shared memory, the best first."""
    queries = sweeps(problem, "queries", ("grad_query",), shared_memory, count)
    split = False
    keys = sweeps(problem, "keys", ("grad_key", "grad_value"), shared_memory, count)
    if not keys:
        split, keys = True, sweeps(problem, "keys", ("grad_key",), shared_memory, count)
    needed = problem.pairs() * (2 + split)
    found = []
    for one, other in itertools.product(queries, keys):
        config = MmaBackward(one.sweep, other.sweep, split)
        # Values' sums alone are about as much work.
        times = 1 + split
        waste = (one.computed + times * other.computed) / needed
        kilobytes = (one.plan.shared_bytes / 1024, other.plan.shared_bytes / 1024)
        terms = {name: cycles + times * other.terms[name] for name, cycles in one.terms.items()}
        found.append(Candidate(config, one.cycles + times * other.cycles, waste, kilobytes, terms))
    return tuple(sorted(found, key=lambda candidate: candidate.cycles)[:count])


@functools.lru_cache(maxsize=256)
def sweeps(
    problem: Problem, side: str, results: tuple[str, ...], shared_memory: int, count: int
) -> tuple[SweepCandidate, ...]:
    """Return the best choices for one kernel, the best first."""
    found = []
    for sweep in _choices(problem, side, shared_memory):
        candidate = _measure(SweepPlan(problem, sweep, side, results), shared_memory)
        if candidate is not None:
            found.append(candidate)
    return tuple(sorted(found, key=lambda candidate: candidate.cycles)[:count])


def _choices(problem: Problem, side: str, shared_memory: int) -> Iterator[Sweep]:
    # Of a token that streams by: tiles that do not fit are not looked at further.
    each = problem.element_bytes * (problem.head_dim + problem.head_dim_v)
    unions = largest_unions if side == "queries" else largest_inverses
    for warp_box in fitting_boxes(problem):
        for number in _WARPS:
            warps = arrangements(problem, warp_box, number)[0]
            block = tuple(extent * count for extent, count in zip(warp_box, warps, strict=True))
            union = unions(problem, block)
            for tile in _tiles(problem, union):
                stages = 1 if tile is None else _STAGES
                if math.prod(tile or union) * stages * each <= shared_memory:
                    for chunk in _CHUNKS[side]:
                        yield Sweep(warp_box, warps, tile, stages, chunk)


def _tiles(problem: Problem, union: tuple[int, ...]) -> Iterator[tuple[int, ...] | None]:
    """Yield boxes that come at once: all, or some lines as long as they are."""
    yield None
    if len(union) == 1:
        yield from ((tokens,) for tokens in _TOKENS if tokens < union[0])
        return
    lasts = [union[-1]]
    if union[-1] > _SHORT or problem.head_dim + problem.head_dim_v > _NARROW:
        lasts += [extent for extent in _LENGTHS if extent < union[-1]]
    for last in lasts:
        for lines in _LINES:
            if lines < union[0]:
                yield (lines, *union[1:-1], last)
        if len(union) == 3:
            yield from ((1, lines, last) for lines in _LINES if lines < union[1])


# Fitted to 143 kernels on an H100, which they miss by 10% (root mean square), in cycles of a scheduler. What a warp
# issues: beside its list, for a copy, for a token of the list, for a group of 16 of them, and 16 columns of a product
# of it, for a tile.
_ISSUE = (201.0, 12.1, 0.85, 3.35, 19.1, 120.0)
# What these are called, and what comes after them.
_TERMS = (
    "of each warp",
    "copies",
    "lists",
    "softmax and masks",
    "tensor cores",
    "of each tile",
    "latency",
    "borders, alone",
)
# How long it waits by itself: beside its list, for a tile, for a step, and for a group of it; where it owns keys this
# share of it.
_WAIT, _WAIT_OF_KEYS = (4218.0, 143.0, 155.0, 9.0), 0.71
# Blocks hide behind each other, but for this share of one; and lists that are longer near a border than elsewhere take
# longer by this power of what they are.
_ALONE, _BORDER = 0.2, 0.26
# Blocks of few warps load more for each token, of which the terms above tell too little: by this power of their number.
_APART = 0.05


def _measure(plan: SweepPlan, shared_memory: int) -> SweepCandidate | None:
    problem, config = plan.problem, plan.config
    if plan.shared_bytes > shared_memory or plan.listed > MOST_LISTED:
        return None
    if any(extent > MOST_INNER for extent in plan.stream_tile[1:]):
        return None
    registers = plan.needed_registers
    if registers > _MOST_REGISTERS:
        return None
    blocks = blocks_without_spills(plan.shared_bytes, plan.threads, registers, shared_memory)
    if blocks == 0:
        return None
    passes = 1 if plan.of_queries else problem.group_size
    pairs = list(zip(plan.usual_union, plan.stream_tile, strict=True))
    resident = config.stream_tile is None
    block_tiles = 1 if resident else math.prod(-(-u // t) for u, t in zip(plan.union, plan.stream_tile, strict=True))
    met = 1.0 if resident else min(math.prod((u + t - 1) / t for u, t in pairs), block_tiles)
    tokens = math.prod(plan.usual_union)
    each = tokens / met / plan.streamed
    steps = met * (math.ceil(each - 1e-6) if resident else each + 0.5)
    groups = steps * config.chunk
    copies = block_tiles * sum(plan.stream(i).rows * plan.stream(i).chunks for i in range(2)) / plan.threads
    depth = sum(plan.own(i).width for i in plan.owned) + sum(plan.columns[i] for i in plan.sums)
    counts = (copies, tokens, groups, groups * depth / 16, block_tiles)
    issued = [_ISSUE[0], *(passes * cycles for cycles in _products(_ISSUE[1:], counts))]
    wait = _WAIT[0] + passes * sum(_products(_WAIT[1:], (block_tiles, steps, groups)))
    wait *= _SCHEDULERS / (blocks * plan.warps) * (1 if plan.of_queries else _WAIT_OF_KEYS)
    border = (math.prod(plan.warp_union) / tokens) ** _BORDER
    factor = (1 + _ALONE / blocks) * border * (4 / plan.warps) ** _APART
    warps = plan.items * plan.heads * plan.warps
    alone = (sum(issued) + wait) * (factor - 1)
    terms = {name: warps * cycles / _SCHEDULERS for name, cycles in zip(_TERMS, (*issued, wait, alone), strict=True)}
    return SweepCandidate(
        dataclasses.replace(config, blocks=blocks),
        sum(terms.values()),
        warps * passes * groups * GROUP * ROWS,
        plan,
        terms,
    )


def _products(factors: Sequence[float], counts: Sequence[float]) -> list[float]:
    return [factor * count for factor, count in zip(factors, counts, strict=True)]
