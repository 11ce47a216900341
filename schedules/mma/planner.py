"""Chooses boxes for the schedule for tensor cores of single warps. Pure Python: no TVM, no GPU, milliseconds.

A warp computes scores for all keys of its windows' union, or of the tiles that it meets, and masks what is too much.
How long it takes has two bounds: what it issues, and how long its instructions wait for each other, divided by the
warps that run beside it. Constants are fitted to an H100; they need not be right, only in the right order.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from na_compiler.operands import KEY_MASK
from na_compiler.problem import Problem
from na_compiler.schedules.mma.boxes import largest_unions
from na_compiler.schedules.mma.config import Mma
from na_compiler.schedules.mma.occupancy import blocks_at_once
from na_compiler.schedules.mma.plan import GROUP, ROWS
from na_compiler.schedules.shared.candidate import Candidate as Base
from na_compiler.schedules.shared.gpus import H100

__all__ = ["Candidate", "arrangements", "candidates", "fitting_boxes", "unsuited", "unsuited_rounded"]

# Elements: the sums of 256 columns take 128 registers of a thread, half of what it can have.
_MOST_HEAD_DIM = 256
# Times below are fitted to an H100; elsewhere only the order of candidates matters.
_PROCESSORS, _MEGAHERTZ = H100.processors, H100.megahertz
# Warps of a block along all axes.
_WARPS = (1, 2, 4, 8)
# Keys of a warp's own box, up to which it is unrolled: code of some thousand instructions.
_MOST_KEYS = 512
# Bits of a mask's word, in which a row of the box has to lie.
_MOST_LINE = 32
# Keys of a tile of a ring, and tiles that the ring holds, that are tried: assumed to be enough; among them the model of
# time chooses.
_KEYS = (32, 64, 128)
_STAGES = (3, 2)
# Registers of a thread at most, and schedulers of a multiprocessor: CUDA's programming guide, compute capabilities 8.0
# and 9.0.
_MOST_REGISTERS, _SCHEDULERS = 255, 4


def unsuited(problem: Problem) -> str | None:
    """Return what of a problem the family's kernels do not take, in either direction; ``None`` if they take it."""
    dims = (problem.head_dim, problem.head_dim_v)
    given = " and ".join(map(str, dims))
    reasons = {
        "takes float16 and bfloat16, and float32 only where TF32 is allowed": problem.dtype == "float32",
        f"takes multiples of 8 up to {_MOST_HEAD_DIM} as head_dim, not {given}": (
            any(dim % 8 or dim > _MOST_HEAD_DIM for dim in dims)
        ),
    }
    return next((reason for reason, holds in reasons.items() if holds), None)


def unsuited_rounded(problem: Problem) -> str | None:
    """Return what of a problem of float32 the forward does not take in TF32; ``None`` if it takes it."""
    # A lane reads four columns of values at once, eight lanes all of a line of shared memory.
    if problem.head_dim_v % 32:
        return f"takes multiples of 32 as head_dim_v in TF32, not {problem.head_dim_v}"
    return unsuited(problem.replace(dtype="float16"))


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
        Scores computed for each one that is needed.
    blocks
        Thread blocks.
    resident_warps
        Warps that a multiprocessor has at once.
    shared_bytes
        Shared memory of a block.
    terms
        What the cycles are made of.
    """

    config: Mma
    cycles: float
    waste: float
    blocks: int
    resident_warps: int
    shared_bytes: int
    terms: Mapping[str, float]

    combined = (
        "latency beside all others one after another: the cube root of the sum of the two's cubes; then blocks alone"
    )

    @property
    def microseconds(self) -> float:
        """Estimated time among many batch entries, on an H100."""
        return self.cycles / _PROCESSORS / _MEGAHERTZ

    def columns(self) -> dict[str, str]:
        """Return its row of a table."""
        config = self.config
        return {
            "queries": f"{math.prod(config.warps)} x {self._queries}",
            "warps": _times(config.warps),
            "keys": "all" if config.key_tile is None else f"{_times(config.key_tile)}, {config.stages} stages",
            "blocks": str(self.blocks),
            "warps at once": str(self.resident_warps),
            "KB": f"{self.shared_bytes / 1024:.0f}",
        }

    @property
    def _queries(self) -> str:
        heads = self.config.heads
        return _times(self.config.warp_box) + (f" x {heads} heads" if heads > 1 else "")

    def __str__(self) -> str:
        columns = self.columns()
        keys = "all keys of a block kept" if self.config.key_tile is None else f"keys by {columns['keys']}"
        return (
            f"{columns['warps']} warps of {self._queries} queries, {keys}: {self.waste:.2f} scores "
            f"computed for each one needed, {self.resident_warps} warps at once with {columns['KB']} KB a block"
        )


def _times(extents: tuple[int, ...]) -> str:
    return "x".join(map(str, extents))


@functools.lru_cache(maxsize=256)
def candidates(problem: Problem, shared_memory: int, count: int = 8) -> tuple[Candidate, ...]:
    """Return the best configs of a problem for blocks with so much shared memory, the best first."""
    found = [candidate for config in _configs(problem) if (candidate := _measure(problem, config, shared_memory))]
    return tuple(_bounded(candidate) for candidate in sorted(found, key=lambda candidate: candidate.cycles)[:count])


def _bounded(candidate: Candidate) -> Candidate:
    """Return a candidate whose registers are limited for as many blocks as its time was estimated with."""
    config = candidate.config
    blocks = candidate.resident_warps // math.prod(config.warps)
    return dataclasses.replace(candidate, config=dataclasses.replace(config, blocks=blocks))


# Groups of 16 keys whose scores a warp holds at once: 8 numbers a thread for each. More where they are all that there
# are, since no sums so far are scaled then. Assumed: 8 groups are a quarter of a thread's registers.
_GROUPS_ALONE, _GROUPS = 8, 6
# Boxes of a warp, and of the keys that come at once, that are tried: those which compute least.
_BOXES_TRIED, _ARRANGEMENTS_TRIED, _TILES_TRIED = 3, 2, 2


def _configs(problem: Problem) -> Iterator[Mma]:
    # As many heads side by side as there can be, or none: each more leaves fewer tokens, whose windows have more in
    # common. 32 rows a warp were never faster than 16 in two and three dimensions, where a larger box sees many more
    # keys: 26 runs on an H100.
    for heads in sorted({1, math.gcd(problem.group_size, ROWS)}):
        is_long = problem.rank == 1 and not problem.has(KEY_MASK)
        for rows in (ROWS, 2 * ROWS) if is_long else (ROWS,):
            for warp_box in fitting_boxes(problem, rows // heads):
                yield from _configs_of(problem, warp_box, heads, rows // ROWS)


def _configs_of(problem: Problem, warp_box: tuple[int, ...], heads: int, row_tiles: int) -> Iterator[Mma]:
    union = largest_unions(problem, warp_box)
    for warps in (warps for number in _WARPS for warps in arrangements(problem, warp_box, number)):
        # With 32 rows a warp, code that is unrolled spills.
        if row_tiles == 1 and math.prod(union) <= _MOST_KEYS and (problem.rank == 1 or union[-1] <= _MOST_LINE):
            chunk = _chunk(-(-math.prod(union) // GROUP))
            yield Mma(warp_box, warps, None, chunk=chunk, heads=heads)
        for key_tile in _key_tiles(union):
            for stages in _STAGES:
                yield Mma(warp_box, warps, key_tile, stages, heads=heads)


def fitting_boxes(problem: Problem, tokens: int = ROWS) -> list[tuple[int, ...]]:
    """Return the boxes of a warp that are tried: those whose windows come to the fewest keys, for all queries."""
    boxes = sorted(_boxes(tokens, problem.rank), key=lambda box: _queries_beyond(problem, box))
    least = _queries_beyond(problem, boxes[0])
    fitting = [box for box in boxes if _queries_beyond(problem, box) <= 2 * least]
    fitting.sort(key=lambda box: math.prod(largest_unions(problem, box)) * _queries_beyond(problem, box))
    return fitting[:_BOXES_TRIED]


def arrangements(problem: Problem, warp_box: tuple[int, ...], number: int) -> list[tuple[int, ...]]:
    """Return how so many warps may lie beside each other: the ways that load the fewest keys for all queries."""

    def loaded(warps: tuple[int, ...]) -> float:
        box = tuple(extent * count for extent, count in zip(warp_box, warps, strict=True))
        return math.prod(largest_unions(problem, box)) * _queries_beyond(problem, box)

    return sorted(_boxes(number, problem.rank), key=loaded)[:_ARRANGEMENTS_TRIED]


def _queries_beyond(problem: Problem, box: tuple[int, ...]) -> float:
    """Return queries of boxes over queries that exist, for boxes on the longest dilation group."""
    lengths = [-(-x // d) for x, d in zip(problem.layout, problem.dilation, strict=True)]
    return math.prod(-(-length // extent) * extent / length for length, extent in zip(lengths, box, strict=True))


@functools.cache
def _boxes(volume: int, rank: int) -> list[tuple[int, ...]]:
    if rank == 1:
        return [(volume,)]
    return [
        (extent, *rest) for extent in range(1, volume + 1) if volume % extent == 0
        for rest in _boxes(volume // extent, rank - 1)
    ]  # fmt: skip


def _chunk(groups: int) -> int:
    """Return how many groups of keys to take at once: as few steps as registers allow, of equal length."""
    most = _GROUPS_ALONE if groups <= _GROUPS_ALONE else _GROUPS
    return -(-groups // -(-groups // most))


def _key_tiles(union: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
    for keys in _KEYS:
        tiles = [tile for tile in _boxes(keys, len(union)) if tile[-1] % 8 == 0]
        yield from sorted(tiles, key=lambda tile: _met(union, tile))[:_TILES_TRIED]


def _met(union: tuple[int, ...], tile: tuple[int, ...]) -> float:
    """Return how many tiles a box of keys meets on the average, wherever it begins."""
    return math.prod((extent + size - 1) / size for extent, size in zip(union, tile, strict=True))


# Fitted to 140 runs on an H100, which they miss by 10% (root mean square), in cycles of a scheduler. What a warp
# issues: beside its keys, for a copy, for a group of 16 keys, and 16 columns of head_dim of it, for a tile of a ring.
_ISSUE = (555.0, 16.7, 56.7, 12.1, 86.4)
# What these are called, and what comes after them.
_TERMS = ("of each warp", "copies", "softmax and masks", "tensor cores", "of each tile", "latency", "blocks alone")
# How long it waits by itself: beside its keys, for a copy, for 16 columns of a group, for a step of the softmax.
_WAIT = (2247.0, 42.3, 4.8, 231.0)
# All but copies and tiles is for each 16 rows of a warp, and another 16 issue so many times as much for a group of
# keys: fitted to 29 runs with 32 rows, which are missed by 10%. That keys are read once for both does not show.
_ANOTHER = 1.6
# What products of TF32 cost for each of 16 bits: twice as many, and each number is rounded. Fitted to 6 runs.
_TF32 = 3.5
# The two hide behind each other, but for this power; and blocks behind each other, but for this share of one.
_POWER, _ALONE = 3.0, 0.5


def _measure(problem: Problem, config: Mma, shared_memory: int) -> Candidate | None:
    plan = config.plan(problem)
    registers = plan.needed_registers
    if registers > _MOST_REGISTERS or plan.shared_bytes > shared_memory:
        return None
    blocks = blocks_at_once(plan.shared_bytes, plan.threads, registers, shared_memory)
    if blocks == 0:
        return None
    at_once = blocks * plan.warps
    depth = (plan.query.width + plan.value.width) / 16 * (_TF32 if plan.is_tf32 else 1)
    copies = plan.key.rows * (plan.key.chunks + plan.value.chunks) / plan.threads
    if plan.is_resident:
        groups, tiles = float(plan.groups), 0.0
        steps = float(-(-plan.groups // config.chunk))
    else:
        tiles = math.prod(-(-u // t) for u, t in zip(plan.union, plan.stream_tile, strict=True))
        steps = min(_met(plan.warp_union, plan.stream_tile), tiles)
        groups, copies = steps * plan.streamed / GROUP, copies * tiles
    rows = float(plan.row_tiles)
    multiplied = groups * depth * rows
    issued = _products(_ISSUE, (rows, copies, groups * (1 + _ANOTHER * (rows - 1)), multiplied, tiles))
    issue = sum(issued)
    wait = sum(_products(_WAIT, (rows, copies, multiplied, steps * rows))) * _SCHEDULERS / at_once
    together = (issue**_POWER + wait**_POWER) ** (1 / _POWER)
    each = together * (1 + _ALONE / blocks)
    items = plan.items * problem.heads // plan.packed
    warps = items * plan.warps
    terms = dict(zip(_TERMS, (*issued, wait, each - together), strict=True))
    needed = problem.pairs()
    computed = items * plan.warps * plan.rows * groups * GROUP / problem.heads
    return Candidate(
        config,
        warps * each / _SCHEDULERS,
        computed / needed,
        items,
        at_once,
        plan.shared_bytes,
        {name: warps * cycles / _SCHEDULERS for name, cycles in terms.items()},
    )


def _products(factors: Sequence[float], counts: Sequence[float]) -> list[float]:
    return [factor * count for factor, count in zip(factors, counts, strict=True)]
