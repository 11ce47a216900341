"""Chooses tiles for the schedule for Hopper by counting what they would do. Pure Python: no TVM, no GPU, milliseconds.

A tile of queries visits tiles of keys that cover the union of its windows. What it visits beyond the windows is
computed and masked, for nothing: small tiles waste less, and cost more apiece. The counts become cycles with four
constants fitted to an H100; they need not be right, only in the right order.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

from na_compiler.problem import Problem
from na_compiler.schedules.shared.candidate import Candidate as Base
from na_compiler.schedules.sm90.config import Sm90
from na_compiler.schedules.sm90.plan import MAX_ELEMENT_STRIDE, ROWS, SHARED_MEMORY, pieces_of
from na_compiler.window import group_length, window_bounds

__all__ = ["Candidate", "candidates", "most_registers", "refusal"]

_PROCESSORS = 132
# Products of 16-bit numbers, in operations a cycle of one multiprocessor, by the datasheet.
_RATE = 4096.0
# Cycles: of products over what the datasheet says, of a tile of keys beside its products, of masking it (and a key
# of it), and of a tile of queries beside its keys.
_PRODUCTS, _TILE, _MASK, _BLOCK = 1.40, 250.0, (100.0, 1.2), 3000.0
# Share of a tile's time that it takes more where only one warpgroup needs it.
_LONE = 0.25
# Share that it takes more for each of its rows: tokens that follow each other are near in memory, rows are far apart.
_ROW = 0.002
# Exponentials are the other unit's work that grows with the keys, whatever head_dim is: cycles a key, by warpgroups.
_EXPONENTIALS = {2: 7.0, 3: 6.0}
_KEYS = (32, 48, 64, 80, 96, 112, 128, 144, 160, 176)
_STAGES = (4, 2)
# More keys at once than this leave the compiler few registers to overlap with: products take so much longer.
_AMPLE_KEYS, _CROWDED = 128, 1.05
# Tiles of keys of a block, up to which it pays to keep the block for another tile of queries: what begins and ends it
# is then hidden behind other loads. Longer ones are better handed out as multiprocessors become free.
_SHORT = 8
# Registers that the compiler makes do with, by warpgroups, found by compiling; and in persistent blocks, for values up
# to a length and for longer ones.
_REGISTERS = {2: 240, 3: 152}
_REGISTERS_KEPT = {2: (128, 236, 216), 3: (64, 152, 144)}
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
    """

    config: Sm90
    cycles: float
    waste: float
    masked: float
    blocks: int
    shared_bytes: int

    @property
    def waves(self) -> float:
        """Thread blocks for each multiprocessor, which has one at a time."""
        return self.blocks / _PROCESSORS

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
        "has no backward yet": direction != "forward",
        "takes float16 and bfloat16, not float32": problem.dtype == "float32",
        f"takes multiples of 8 up to 256 as head_dim, not {given}": any(dim % 8 or dim > 256 for dim in dims),
        "takes multiples of 16 as head_dim in 3-D, because TMA has no axis left to pad it": (
            problem.rank == 3 and any(dim % 16 for dim in dims)
        ),
        f"takes dilations up to {MAX_ELEMENT_STRIDE}, TMA's largest step": max(problem.dilation) > MAX_ELEMENT_STRIDE,
    }
    reason = next((reason for reason, holds in reasons.items() if holds), None)
    if reason is None and next(_configs(problem), None) is None:
        reason = f"has no tiles for {problem}"
    return reason and f"The schedule for Hopper {reason}."


@functools.lru_cache(maxsize=256)
def candidates(problem: Problem, count: int = 8) -> tuple[Candidate, ...]:
    """Return the best configs of a problem that the schedule takes, the best first."""
    found = [_measure(problem, config) for config in _configs(problem)]
    return tuple(sorted(found, key=lambda candidate: candidate.cycles)[:count])


def _configs(problem: Problem) -> Iterator[Sm90]:
    """Yield what may be chosen: tiles that fit the layout, and where there are none of these, any."""
    lengths = [group_length(x, d) for x, d in zip(problem.layout, problem.dilation, strict=True)]
    fitting = _configs_within(problem, lengths)
    first = next(fitting, None)
    if first is None:
        yield from _configs_within(problem, list(itertools.repeat(1 << 30, problem.rank)))
        return
    yield first
    yield from fitting


def _configs_within(problem: Problem, lengths: list[int]) -> Iterator[Sm90]:
    keys = [
        tile
        for extent in _KEYS
        for tile in _boxes(extent, problem.rank)
        if tile[-1] % 8 == 0 and _fits(problem, tile, lengths)
    ]
    for warpgroups in (2, 3):
        queries = [
            tile
            for tile in _boxes(ROWS, problem.rank)
            if _fits(problem, tile, [-(-lengths[0] // warpgroups), *lengths[1:]])
        ]
        for query_tile, key_tile in itertools.product(queries, keys):
            for stages in _STAGES:
                config = Sm90(query_tile, key_tile, warpgroups, stages)
                plan = config.plan(problem)
                if plan.shared_bytes <= SHARED_MEMORY and plan.needed_registers <= _REGISTERS[warpgroups]:
                    yield config
                    break


def _fits(problem: Problem, tile: tuple[int, ...], lengths: list[int]) -> bool:
    """Whether TMA can fetch a tile, and it is not twice as long as the axis it lies on."""
    return pieces_of(tile, problem.dilation) is not None and all(
        extent < 2 * max(length, 8) for extent, length in zip(tile, lengths, strict=True)
    )


@functools.cache
def _boxes(volume: int, rank: int) -> list[tuple[int, ...]]:
    if rank == 1:
        return [(volume,)]
    return [
        (extent, *rest) for extent in range(1, volume + 1) if volume % extent == 0
        for rest in _boxes(volume // extent, rank - 1)
    ]  # fmt: skip


def _measure(problem: Problem, config: Sm90) -> Candidate:
    plan = config.plan(problem)
    visited = steps = 1
    whole = 1.0
    warp_box = plan.warp_box or plan.own_box
    blocks = math.prod(plan.tiles) * plan.groups
    for axis in range(problem.rank):
        parts = config.warpgroups if axis == 0 else 1
        counts = _axis(problem, axis, config.query_tile[axis], warp_box[axis], parts, config.key_tile[axis], plan.skips)
        visited, whole, steps = visited * counts[0], whole * counts[1], steps * counts[2]
    score = ROWS * plan.streamed
    products = 2 * score * (16 * -(-problem.head_dim // 16) + problem.head_dim_v) / _RATE * _PRODUCTS
    products *= _CROWDED if plan.streamed > _AMPLE_KEYS else 1
    tile = max(products, plan.streamed * _EXPONENTIALS[config.warpgroups]) + _TILE
    tile *= 1 + _ROW * (plan.streamed // plan.stream_tile[-1])
    masked = visited - whole
    # While one warpgroup leaves a tile out, the others' softmax has less to hide behind.
    lone = config.warpgroups * steps - visited
    block = (visited * tile + lone * tile * _LONE + masked * (_MASK[0] + plan.streamed * _MASK[1])) / blocks + _BLOCK
    waves = blocks * problem.heads / _PROCESSORS
    # The last wave is as long as any other, and it is the tiles in the middle of the layout that take longest.
    cycles = block * (math.ceil(waves) if waves < 4 else waves + 0.5)
    needed = problem.pairs()
    persistent = waves > 1 and visited <= _SHORT * blocks * config.warpgroups and _may_persist(problem, config)
    # Measured: 7% faster with three warpgroups, 1 to 5% slower elsewhere.
    config = replace(config, persistent=persistent, overlap=config.warpgroups == 3)
    return Candidate(
        config, cycles, visited * score / needed, masked / visited, blocks * problem.heads, plan.shared_bytes
    )


@functools.lru_cache(maxsize=65536)
def _axis(
    problem: Problem, axis: int, box: int, warp_box: int, parts: int, keys: int, skips: bool
) -> tuple[int, float, int]:
    """Count along one axis, over all tiles of queries: tiles of keys visited, those without a mask, those loaded."""
    dilation, kernel = problem.dilation[axis], problem.kernel_size[axis]
    rule = (kernel, problem.stride[axis], problem.is_causal[axis])
    tile = box * parts
    visited = loaded = 0
    whole = 0.0
    for group in range(dilation):
        length = group_length(problem.layout[axis], dilation, group)
        bounds = functools.partial(window_bounds, length=length, kernel_size=rule[0], stride=rule[1], is_causal=rule[2])
        for first in range(0, length, tile):
            low = bounds(first)[0]
            highest = bounds(min(first + tile, length) - 1)[1]
            loaded += -(-(highest - low) // keys)
            for part in range(parts):
                begin = min(first + part * box, length - 1)
                last = min(begin + box, length) - 1
                start, end = (bounds(begin)[0], bounds(last)[1]) if skips else (low, highest)
                from_tile, to_tile = (start - low) // keys, -(-(end - low) // keys)
                visited += to_tile - from_tile
                # Tiles that lie in every window of a warp, on the average of the warps.
                for offset in range(0, box, warp_box):
                    its_first = min(begin + offset, length - 1)
                    its_last = min(its_first + warp_box, length) - 1
                    until, since = (bounds(its_first)[1] - low) // keys, -(-(bounds(its_last)[0] - low) // keys)
                    whole += max(until - max(since, from_tile), 0) * warp_box / box
    return visited, whole, loaded


def _may_persist(problem: Problem, config: Sm90) -> bool:
    """Whether the registers suffice for a persistent block."""
    width, most, most_of_longer = _REGISTERS_KEPT[config.warpgroups]
    limit = most if problem.head_dim_v <= width else most_of_longer
    limit -= _FEWER[config.warpgroups] if problem.head_dim > _LONG_QUERY else 0
    return config.plan(problem).needed_registers <= limit


def most_registers(problem: Problem, warpgroups: int, persistent: bool = False) -> Sm90 | None:
    """Return the config that needs most registers, of those that may be chosen; ``None`` if there is none."""
    configs = [
        replace(config, persistent=persistent, overlap=warpgroups == 3)
        for config in _configs(problem)
        if config.warpgroups == warpgroups and (not persistent or _may_persist(problem, config))
    ]
    return max(configs, key=lambda config: config.plan(problem).needed_registers, default=None)
