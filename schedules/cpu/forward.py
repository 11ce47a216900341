"""The forward: scores on the window, softmax, weighted sum.

``output = sum_key softmax(scale * query . key) value`` over the keys of each query's window and the additional
keys, and ``lse = log sum_key exp(scale * query . key)``. Inside, scores are in units of ``log2(e)``, so that the
exponential is a power of two.

Where all keys of a tile are at hand at once the softmax is the plain one. Where they come in chunks (a large
window, or additional keys) each chunk's sums are merged into those so far, scaled to the highest score so far.

`na_compiler.schedules.cpu.tangent` computes the derivative of it beside it, from the same steps.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from tvm import tirx
from tvm.tirx.script import builder as T

from na_compiler.operands import KEY_MASK, RELATIVE_POSITION_BIAS
from na_compiler.schedules.cpu.frame import Additional, Frame, Place, Window
from na_compiler.schedules.cpu.plan import TilingPlan
from na_compiler.schedules.cpu.position_bias import PositionBias
from na_compiler.schedules.cpu.steps import (
    Buffer,
    Keys,
    Visible,
    fetch_ahead,
    products,
    stage_keys,
    stage_mask,
    stage_queries,
    to_lanes,
    trimmed,
    weighted_rows,
)
from na_compiler.tensorir.arithmetic import LN2, LOG2_E, LOWEST, exp2, log2_sum
from na_compiler.tensorir.axes import round_up
from na_compiler.tensorir.blocks import block, local, prim_func, reduction, update

__all__ = ["Sums", "Task", "Visit", "describe", "forward"]

_ALL = (0, 0, 0)


def forward(plan: TilingPlan) -> tirx.PrimFunc:
    """Describe the forward of a problem, cut as the plan says.

    Returns
    -------
    PrimFunc
        ``main(query, key, value, [additional_keys, additional_values,] [relative_position_bias,] [key_mask,] scale,
        [length, first_query and first_key of each axis,] output, lse)``. Query, key, value and the additional tensors
        may have any strides but the last one, which is 1; the others are contiguous.
    """
    return describe(plan, Task)


def describe(plan: TilingPlan, kind: type[Task]) -> tirx.PrimFunc:
    """Describe a function whose parallel loop runs tasks of a kind."""
    f = Frame(plan, trims=True)
    read, written = kind.inputs(f), kind.outputs(f)
    parameters = {**read, "scale": "float32", **f.place(), **written}

    def body(*arguments: Any) -> None:
        tensors = dict(zip(parameters, arguments, strict=True))
        f.begin(tensors)
        # Heads innermost: those of one token lie side by side in memory, and the prefetchers bring them all.
        with block("task", (f.batch, *f.strips, f.heads_kv)) as (batch, *strip, head):
            T.reads(*(f.whole(tensors[name]) for name in read))
            T.writes(*(f.whole(tensors[name]) for name in written))
            task = kind(f, tensors, batch, head, strip)
            if plan.merges:
                task.in_chunks()
            else:
                task.at_once()

    return prim_func(parameters, body)


class Sums:
    """What a tile gathers over its keys: highest score, sum of weights, weighted sum of values."""

    def __init__(self, f: Frame, *first: int) -> None:
        """Allocate, with further axes in front."""
        self.highest = local((*first, f.lanes))
        self.total = local((*first, f.lanes))
        self.weighted = local((*first, *f.patches, *f.patch, f.staged_dim_v))

    def starts(self) -> list[tuple[Buffer, float]]:
        """Return each buffer, and what it holds before there are keys."""
        return [(self.highest, LOWEST), (self.total, 0.0), (self.weighted, 0.0)]

    @property
    def regions(self) -> list[tirx.BufferRegion]:
        """All of them, as a block reads or writes them."""
        return [Frame.whole(buffer) for buffer, _ in self.starts()]


@dataclass
class Visit:
    """A tile of one of the heads that share keys, and some keys that are staged.

    Parameters
    ----------
    keys, chunk
        Which keys.
    staged
        Their rows, as `Task.rows` lists them; and last which of them the key mask hides, where there is one.
    member, tile
        Which queries.
    kept, factor
        The sums over the keys before, to which these are merged, and, once it is known, what they are scaled by;
        ``None`` where there are no others.
    """

    keys: Keys
    chunk: Place
    staged: tuple[Buffer, ...]
    member: Any
    tile: Place
    kept: Sums | None = None
    factor: Buffer = None

    @property
    def place(self) -> list[Any]:
        """Where the tile's sums are kept."""
        return [self.member, *self.tile]


class Task:
    """Emits what one iteration of the parallel loop does: a strip of queries of the heads that share keys."""

    sums = Sums

    def __init__(self, f: Frame, tensors: dict[str, Buffer], batch: Any, head: Any, strip: Any) -> None:
        self.f, self.tensors, self.scale = f, tensors, tensors["scale"]
        self.batch, self.head, self.strip = batch, head, f.strip(strip)
        self.tiles = (f.group_size, *f.tiles)
        self.key_mask: Buffer | None = tensors.get(KEY_MASK)
        table = tensors.get(RELATIVE_POSITION_BIAS)
        self.bias = None if table is None else PositionBias(f, table, head, self.strip)

    @classmethod
    def inputs(cls, f: Frame) -> dict[str, Any]:
        """Return the parameters before the scale."""
        return f.inputs() | f.optional()

    @classmethod
    def outputs(cls, f: Frame) -> dict[str, Any]:
        """Return the parameters after the scale."""
        return {"output": f.tensor(f.tokens(f.heads, f.head_dim_v)), "lse": f.tensor(f.tokens(f.heads), "float32")}

    def query_rows(self) -> list[tuple[Buffer, int]]:
        """Return the tensors with a row for each query that are read, and the rows' widths."""
        return [(self.tensors["query"], self.f.head_dim)]

    def output_rows(self) -> list[tuple[Buffer, int]]:
        """Return the tensors with a row for each query that are written, and the rows' widths."""
        return [(self.tensors["output"], self.f.head_dim_v)]

    def rows(self, keys: Keys) -> list[tuple[str, Buffer, int]]:
        """Return what is staged of a set of keys: a name, the tensor, and its rows' width."""
        key, value = self.names(keys)
        return [("key", self.tensors[key], self.f.head_dim), ("value", self.tensors[value], self.f.head_dim_v)]

    @staticmethod
    def names(keys: Keys) -> tuple[str, str]:
        """Return the names of the tensors of a set of keys."""
        return ("additional_keys", "additional_values") if isinstance(keys, Additional) else ("key", "value")

    def at(self, member: Any, tile: Place) -> Any:
        """Return ``index(lane, ...)`` of the tokens of a tile, for one of the heads that share keys."""
        return self.f.queries(self.batch, self.strip, tile, self.head * self.f.group_size + member)

    def at_once(self) -> None:
        """All keys of the strip are staged at once, and a tile is finished when it has visited its own."""
        f, keys = self.f, Window(self.f)
        staged = self.stage(keys, _ALL)
        queries = [tensor for tensor, _ in self.query_rows()]
        with block("tile", self.tiles, where=lambda _, *tile: f.exists(self.strip, tile, _ALL)) as (member, *tile):
            T.reads(*map(f.whole, (*queries, *staged)))
            T.writes(*(f.whole(self.tensors[name]) for name in self.outputs(f)))
            if f.plan.fetches_ahead:
                fetch_ahead(f, self.at, (member, *tile), self.query_rows(), self.output_rows())
            sums = self.sums(f)
            self.attend(Visit(keys, _ALL, staged, member, tile), sums)
            self.finish(sums, member, tile)

    def in_chunks(self) -> None:
        """Keys come in chunks; each tile's sums are kept, and merged with those of the next chunk."""
        f = self.f
        kept = self.sums(f, *self.tiles)
        for buffer, value in kept.starts():
            with block(f"start_{buffer.name}", tuple(map(int, buffer.shape))) as index:
                T.buffer_store(buffer, T.float32(value), list(index))
        self.visit(Window(f), f.chunks, kept)
        if f.problem.additional_kv:
            self.visit(Additional(f), (1, 1, f.additional_chunks), kept)
        with block("tile", self.tiles, where=lambda _, *tile: f.exists(self.strip, tile, _ALL)) as (member, *tile):
            T.reads(*kept.regions)
            T.writes(*(f.whole(self.tensors[name]) for name in self.outputs(f)))
            self.finish(kept, member, tile, member, *tile)

    def visit(self, keys: Keys, chunks: Any, kept: Sums) -> None:
        """Attend from every tile to every chunk of a set of keys."""
        f = self.f
        queries = [tensor for tensor, _ in self.query_rows()]
        with block(f"{keys.prefix}chunk", chunks) as chunk:
            T.reads(*map(f.whole, (*queries, *(tensor for _, tensor, _ in self.rows(keys)))), *kept.regions)
            T.writes(*kept.regions)
            staged = self.stage(keys, chunk)
            with block(
                f"{keys.prefix}visit", self.tiles, where=lambda _, *tile: keys.meets(self.strip, tile, chunk)
            ) as (member, *tile):
                T.reads(*map(f.whole, (*queries, *staged)), *kept.regions)
                T.writes(*kept.regions)
                sums = self.sums(f)
                visit = Visit(keys, chunk, staged, member, tile, kept, local((f.lanes,)))
                self.attend(visit, sums)
                self.merge(visit, sums, kept)

    def stage(self, keys: Keys, chunk: Place) -> tuple[Buffer, ...]:
        """Stage the rows of a chunk, and which of them the key mask hides, where there is one."""
        f = self.f
        at = keys.at(self.batch, self.strip, chunk, self.head)
        staged = []
        for name, tensor, width in self.rows(keys):
            staged.append(local((*keys.box, round_up(width, f.plan.tiling.vector))))
            stage_keys(f"{keys.prefix}{name}", keys, self.strip, chunk, tensor, at, staged[-1], width)
        if self.key_mask is not None and isinstance(keys, Window):
            staged.append(stage_mask(keys, self.batch, self.strip, chunk, self.key_mask))
        return tuple(staged)

    def attend(self, visit: Visit, sums: Sums) -> None:
        """Gather a tile's sums over the keys of a chunk, relative to the highest score of it and those before."""
        f, kept = self.f, visit.kept
        queries = [tensor for tensor, _ in self.query_rows()]
        with T.sblock(f"{visit.keys.prefix}attend"):
            T.reads(*map(f.whole, (*queries, *visit.staged)), *(kept.regions if kept else ()))
            T.writes(*sums.regions, *([f.whole(visit.factor)] if kept else ()))
            self.gather(replace(visit, keys=visit.keys.of_tile(self.strip, visit.tile)), sums)

    def gather(self, visit: Visit, sums: Sums) -> tuple[Visible, Buffer, Buffer]:
        """Emit the steps of `attend`; returns what hides keys, the queries by lanes, and the weights."""
        f, keys = self.f, visit.keys
        K, V, *_ = visit.staged
        scores, P = local((*keys.visited, f.lanes)), local((*keys.visited, f.lanes))
        Q = self.query_lanes(visit, "query")
        is_masked = self.key_mask is not None and isinstance(keys, Window)
        masked = visit.staged[-1] if is_masked else None
        visible = Visible(f, keys, self.strip, visit.tile, visit.chunk, masked=masked)
        bias = None
        if self.bias is not None and isinstance(keys, Window):
            bias = self.bias.of(visit.member, self.bias.places(keys, visit.tile, visit.chunk))
        offset = keys.offset(self.strip, visit.tile)
        products("score", f, keys, [(K, Q)], offset, f.head_dim, scores, visible.hide, bias)
        self.softmax(visit, scores, P, sums)
        weighted_rows("weighted", f, keys, [(P, V)], self.strip, visit.tile, sums.weighted)
        return visible, Q, P

    def query_lanes(self, visit: Visit, name: str) -> Buffer:
        """Return what a tensor has for a tile's queries, scaled as scores are, by lanes."""
        f, name_here = self.f, f"{visit.keys.prefix}{name}"
        rows = local((f.lanes, f.staged_dim))
        scale = self.scale * T.float32(LOG2_E)
        stage_queries(name_here, self.tensors[name], self.at(visit.member, visit.tile), scale, rows, f.head_dim)
        return to_lanes(name_here, rows)

    def softmax(self, visit: Visit, scores: Buffer, P: Buffer, sums: Sums) -> None:
        """Weigh scores by the power of two of their distance to the highest, and sum the weights."""
        lanes, keys, kept = self.f.lanes, visit.keys, visit.kept
        highest = local((lanes,)) if kept else sums.highest
        with (
            trimmed(keys, "highest", [scores], [highest]),
            reduction(f"{keys.prefix}highest", (lanes,), keys.loops) as (lane, *u),
        ):
            with T.init():
                T.buffer_store(highest, T.min_value("float32"), [lane])
            T.buffer_store(highest, T.max(highest[lane], scores[[*u, lane]]), [lane])
        if kept:
            with block(f"{keys.prefix}raised", (lanes,)) as (lane,):
                T.buffer_store(sums.highest, T.max(highest[lane], kept.highest[[*visit.place, lane]]), [lane])
            with block(f"{keys.prefix}factor", (lanes,)) as (lane,):
                T.buffer_store(visit.factor, exp2(kept.highest[[*visit.place, lane]] - sums.highest[lane]), [lane])
        with (
            trimmed(keys, "weight", [scores, sums.highest], [P]),
            block(f"{keys.prefix}weight", (*keys.loops, lanes)) as (*u, lane),
        ):
            T.buffer_store(P, exp2(scores[[*u, lane]] - sums.highest[lane]), [*u, lane])
        with (
            trimmed(keys, "total", [P], [sums.total]),
            reduction(f"{keys.prefix}total", (lanes,), keys.loops) as (lane, *u),
        ):
            with T.init():
                T.buffer_store(sums.total, T.float32(0), [lane])
            T.buffer_store(sums.total, sums.total[lane] + P[[*u, lane]], [lane])

    def merge(self, visit: Visit, sums: Sums, kept: Sums) -> None:
        """Scale the sums so far to the new highest score, and add the chunk's."""
        f, prefix, tile, factor = self.f, visit.keys.prefix, visit.place, visit.factor
        vector = f.plan.tiling.vector
        with update(f"{prefix}merge_highest", (f.lanes,), vector) as (lane,):
            T.buffer_store(kept.highest, sums.highest[lane], [*tile, lane])
        with update(f"{prefix}merge_total", (f.lanes,), vector) as (lane,):
            at = [*tile, lane]
            T.buffer_store(kept.total, kept.total[at] * factor[lane] + sums.total[lane], at)
        with update(f"{prefix}merge_weighted", (*f.patches, *f.patch, f.staged_dim_v), vector) as index:
            at = [*tile, *index]
            lane = f.lane_of(index[:3], index[3:6])
            T.buffer_store(kept.weighted, kept.weighted[at] * factor[lane] + sums.weighted[list(index)], at)

    def count(self, mask: Buffer, total: Buffer, tile: Place, first: tuple[Any, ...]) -> Buffer:
        """Count the keys that each query sees where that may be none: a sum of weights above 0 is that of some."""
        f, strip = self.f, self.strip
        seen = local((f.lanes,), "int32")
        with block("seen", (f.lanes,)) as (lane,):
            T.buffer_store(seen, T.int32(1), [lane])
        with block("count", (f.lanes,), where=lambda lane: T.Not(total[[*first, lane]] > T.float32(0))) as (lane,):
            T.reads(f.whole(mask), f.whole(seen))
            T.writes(f.whole(seen))
            place = f.lane(lane)
            with update("count_start", (1,), 1):
                more = T.Cast("int32", f.additional > 0) if f.problem.additional_kv else T.int32(0)
                T.buffer_store(seen, more, [lane])
            with update("count_add", tuple(axis.kernel_size for axis in f.plan), 1) as window:
                where = [axis.window_key(strip[i], tile[i], place[i], window[i]) for i, axis in enumerate(f.axes)]
                is_seen = tirx.all(
                    mask[[self.batch, *f.layout(token for token, _ in where)]], *(sees for _, sees in where)
                )
                T.buffer_store(seen, seen[lane] + T.Cast("int32", is_seen), [lane])
        return seen

    def finish(self, sums: Sums, member: Any, tile: Place, *first: Any) -> Buffer:
        """Store a tile's outputs, divided by the sum of weights, and that sum's logarithm; returns what divides."""
        f = self.f
        inverse, natural = local((f.lanes,)), local((f.lanes,))
        with block("inverse", (f.lanes,)) as (lane,):
            T.buffer_store(inverse, T.float32(1) / sums.total[[*first, lane]], [lane])
        seen = None if self.key_mask is None else self.count(self.key_mask, sums.total, tile, first)
        with block("natural", (f.lanes,)) as (lane,):
            exponent = log2_sum(sums.highest[[*first, lane]], sums.total[[*first, lane]]) * T.float32(LN2)
            if seen is not None:
                exponent = T.Select(seen[lane] == 0, T.float32(-math.inf), exponent)
            T.buffer_store(natural, exponent, [lane])

        def row(index: list[Any], lane: Any) -> Any:
            result = sums.weighted[[*first, *index]] * inverse[lane]
            return result if seen is None else T.Select(seen[lane] == 0, T.float32(0), result)

        self.store("output", row, member, tile)
        self.store_number("lse", natural, member, tile)
        return inverse

    def store(self, name: str, row: Callable[[list[Any], Any], Any], member: Any, tile: Place) -> None:
        """Store a tile's rows: ``row(index, lane)``, the index that of an element among a patch's."""
        f, at = self.f, self.at(member, tile)

        def is_query(*loops: Any) -> Any:
            return f.exists(self.strip, tile, f.query(loops[:3], loops[3:6]))

        with block(name, (*f.patches, *f.patch, f.head_dim_v), where=is_query) as index:
            lane = f.lane_of(index[:3], index[3:6])
            T.buffer_store(self.tensors[name], T.Cast(f.dtype, row(list(index), lane)), at(lane, index[-1]))

    def store_number(self, name: str, numbers: Buffer, member: Any, tile: Place) -> None:
        """Store a number for each of a tile's queries."""
        f, at = self.f, self.at(member, tile)
        with block(name, (f.lanes,), where=lambda lane: f.exists(self.strip, tile, f.lane(lane))) as (lane,):
            T.buffer_store(self.tensors[name], numbers[lane], at(lane))
