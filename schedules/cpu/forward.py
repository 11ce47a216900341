"""The forward: scores on the window, softmax, weighted sum.

``output = sum_key softmax(scale * query . key) value`` over the keys of each query's window and the additional
keys, and ``lse = log sum_key exp(scale * query . key)``. Inside, scores are in units of ``log2(e)``, so that the
exponential is a power of two.

Where all keys of a tile are at hand at once the softmax is the plain one. Where they come in chunks (a large
window, or additional keys) each chunk's sums are merged into those so far, scaled to the highest score so far.
"""

from __future__ import annotations

import math
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
    weighted_rows,
)
from na_compiler.tensorir.arithmetic import LN2, LOG2_E, LOWEST, exp2, log2_sum
from na_compiler.tensorir.blocks import block, local, prim_func, reduction, update

__all__ = ["forward"]

_ALL = (0, 0, 0)


def forward(plan: TilingPlan) -> tirx.PrimFunc:
    """Describe the forward of a problem, cut as the plan says.

    Returns
    -------
    PrimFunc
        ``main(query, key, value, [additional_keys, additional_values,] [relative_position_bias,] [key_mask,] scale,
        output, lse)``. Query, key, value and the additional tensors may have any strides but the last one, which is 1;
        the others are contiguous.
    """
    f = Frame(plan)
    parameters: dict[str, Any] = {
        "query": f.strided("query", f.tokens(f.heads, f.head_dim)),
        "key": f.strided("key", f.tokens(f.heads_kv, f.head_dim)),
        "value": f.strided("value", f.tokens(f.heads_kv, f.head_dim_v)),
    }
    if plan.problem.additional_kv:
        parameters["additional_keys"] = f.strided("additional_keys", f.extra(f.heads_kv, f.head_dim))
        parameters["additional_values"] = f.strided("additional_values", f.extra(f.heads_kv, f.head_dim_v))
    parameters |= f.optional()
    parameters["scale"] = "float32"
    parameters["output"] = f.tensor(f.tokens(f.heads, f.head_dim_v))
    parameters["lse"] = f.tensor(f.tokens(f.heads), "float32")

    def body(*arguments: Any) -> None:
        *_, scale, output, lse = arguments
        tensors = dict(zip(parameters, arguments, strict=True))
        # Heads innermost: those of one token lie side by side in memory, and the prefetchers bring them all.
        with block("task", (f.batch, *f.strips, f.heads_kv)) as (batch, *strip, head):
            T.reads(*(f.whole(tensors[name]) for name in parameters if name not in {"scale", "output", "lse"}))
            T.writes(f.whole(output), f.whole(lse))
            task = _Task(f, tensors, scale, output, lse, batch, head, strip)
            if plan.merges:
                task.in_chunks()
            else:
                task.at_once()

    return prim_func(parameters, body)


class _Sums:
    """What a tile gathers over its keys: highest score, sum of weights, weighted sum of values."""

    def __init__(self, f: Frame, *first: int) -> None:
        """Allocate, with further axes in front."""
        self.highest = local((*first, f.lanes))
        self.total = local((*first, f.lanes))
        self.weighted = local((*first, *f.patches, *f.patch, f.staged_dim_v))

    @property
    def regions(self) -> list[tirx.BufferRegion]:
        """All three, as a block reads or writes them."""
        return [Frame.whole(buffer) for buffer in (self.highest, self.total, self.weighted)]


class _Task:
    """Emits what one iteration of the parallel loop does: a strip of queries of the heads that share keys."""

    def __init__(
        self,
        f: Frame,
        tensors: dict[str, Buffer],
        scale: Any,
        output: Buffer,
        lse: Buffer,
        batch: Any,
        head: Any,
        strip: Any,
    ) -> None:
        self.f, self.scale, self.output, self.lse = f, scale, output, lse
        self.query, self.key, self.value = (tensors[name] for name in ("query", "key", "value"))
        self.additional = [tensors[name] for name in ("additional_keys", "additional_values") if name in tensors]
        self.batch, self.head, self.strip = batch, head, tuple(strip)
        self.tiles = (f.group_size, *f.tiles)
        self.key_mask: Buffer | None = tensors.get(KEY_MASK)
        table = tensors.get(RELATIVE_POSITION_BIAS)
        self.bias = None if table is None else PositionBias(f, table, head, self.strip)

    def at(self, member: Any, tile: Place) -> Any:
        """Return ``index(lane, ...)`` of the tokens of a tile, for one of the heads that share keys."""
        return self.f.queries(self.batch, self.strip, tile, self.head * self.f.group_size + member)

    def at_once(self) -> None:
        """All keys of the strip are staged at once, and a tile is finished when it has visited its own."""
        f, keys = self.f, Window(self.f)
        staged = self.stage(keys, self.key, self.value, _ALL)
        with block("tile", self.tiles, where=lambda _, *tile: f.exists(self.strip, tile, _ALL)) as (member, *tile):
            T.reads(*map(f.whole, (self.query, *staged)))
            T.writes(f.whole(self.output), f.whole(self.lse))
            if f.plan.fetches_ahead:
                rows = [(self.query, f.head_dim)], [(self.output, f.head_dim_v)]
                fetch_ahead(f, self.at, (member, *tile), *rows)
            sums = _Sums(f)
            self.attend(keys, staged, member, tile, _ALL, sums, None)
            self.finish(sums, member, tile)

    def in_chunks(self) -> None:
        """Keys come in chunks; each tile's sums are kept, and merged with those of the next chunk."""
        f = self.f
        kept = _Sums(f, *self.tiles)
        for buffer, value in ((kept.highest, LOWEST), (kept.total, 0.0), (kept.weighted, 0.0)):
            with block(f"start_{buffer.name}", tuple(map(int, buffer.shape))) as index:
                T.buffer_store(buffer, T.float32(value), list(index))
        self.visit(Window(f), f.chunks, self.key, self.value, kept)
        if self.additional:
            key, value = self.additional
            self.visit(Additional(f), (1, 1, f.additional_chunks), key, value, kept)
        with block("tile", self.tiles, where=lambda _, *tile: f.exists(self.strip, tile, _ALL)) as (member, *tile):
            T.reads(*kept.regions)
            T.writes(f.whole(self.output), f.whole(self.lse))
            self.finish(kept, member, tile, member, *tile)

    def visit(self, keys: Keys, chunks: Any, key: Buffer, value: Buffer, kept: _Sums) -> None:
        """Attend from every tile to every chunk of a set of keys."""
        f = self.f
        with block(f"{keys.prefix}chunk", chunks) as chunk:
            T.reads(f.whole(self.query), f.whole(key), f.whole(value), *kept.regions)
            T.writes(*kept.regions)
            staged = self.stage(keys, key, value, chunk)
            with block(
                f"{keys.prefix}visit", self.tiles, where=lambda _, *tile: keys.meets(self.strip, tile, chunk)
            ) as (member, *tile):
                T.reads(*map(f.whole, (self.query, *staged)), *kept.regions)
                T.writes(*kept.regions)
                sums = _Sums(f)
                before = lambda lane: kept.highest[[member, *tile, lane]]  # noqa: E731
                self.attend(keys, staged, member, tile, chunk, sums, before)
                self.merge(keys, sums, kept, [member, *tile])

    def stage(self, keys: Keys, key: Buffer, value: Buffer, chunk: Place) -> tuple[Buffer, ...]:
        """Stage the keys and values of a chunk, and which of them the key mask hides, where there is one."""
        f = self.f
        at = keys.at(self.batch, self.strip, chunk, self.head)
        K, V = local((*keys.box, f.staged_dim)), local((*keys.box, f.staged_dim_v))
        stage_keys(f"{keys.prefix}key", keys, chunk, key, at, K, f.head_dim)
        stage_keys(f"{keys.prefix}value", keys, chunk, value, at, V, f.head_dim_v)
        if self.key_mask is None or isinstance(keys, Additional):
            return K, V
        return K, V, stage_mask(keys, self.batch, self.strip, chunk, self.key_mask)

    def attend(
        self,
        keys: Keys,
        staged: tuple[Buffer, ...],
        member: Any,
        tile: Place,
        chunk: Place,
        sums: _Sums,
        before: Any,
    ) -> None:
        """Gather a tile's sums over the keys of a chunk, relative to the highest score of it and those before."""
        f = self.f
        K, V, *masked = staged
        with T.sblock(f"{keys.prefix}attend"):
            T.reads(*map(f.whole, (self.query, K, V)))
            T.writes(*sums.regions)
            Q = local((f.lanes, f.staged_dim))
            scores, P = local((*keys.visited, f.lanes)), local((*keys.visited, f.lanes))
            scale = self.scale * T.float32(LOG2_E)
            stage_queries(f"{keys.prefix}query", self.query, self.at(member, tile), scale, Q, f.head_dim)
            Q_lanes = to_lanes(f"{keys.prefix}query", Q)
            visible = Visible(f, keys, self.strip, tile, chunk, masked=masked[0] if masked else None)
            bias = None
            if self.bias is not None and isinstance(keys, Window):
                bias = self.bias.of(member, self.bias.places(keys, tile, chunk))
            offset = keys.offset(self.strip, tile)
            products("score", f, keys, K, offset, Q_lanes, f.head_dim, scores, visible.hide, bias)
            self.softmax(keys, scores, P, sums, before)
            weighted_rows("weighted", f, keys, P, V, self.strip, tile, sums.weighted)

    def softmax(self, keys: Keys, scores: Buffer, P: Buffer, sums: _Sums, before: Any) -> None:
        """Weigh scores by the power of two of their distance to the highest, and sum the weights."""
        lanes = self.f.lanes
        highest = local((lanes,)) if before else sums.highest
        with reduction(f"{keys.prefix}highest", (lanes,), keys.visited) as (lane, *u):
            with T.init():
                T.buffer_store(highest, T.min_value("float32"), [lane])
            T.buffer_store(highest, T.max(highest[lane], scores[[*u, lane]]), [lane])
        if before:
            with block(f"{keys.prefix}raised", (lanes,)) as (lane,):
                T.buffer_store(sums.highest, T.max(highest[lane], before(lane)), [lane])
        with block(f"{keys.prefix}weight", (*keys.visited, lanes)) as (*u, lane):
            T.buffer_store(P, exp2(scores[[*u, lane]] - sums.highest[lane]), [*u, lane])
        with reduction(f"{keys.prefix}total", (lanes,), keys.visited) as (lane, *u):
            with T.init():
                T.buffer_store(sums.total, T.float32(0), [lane])
            T.buffer_store(sums.total, sums.total[lane] + P[[*u, lane]], [lane])

    def merge(self, keys: Keys, sums: _Sums, kept: _Sums, tile: list[Any]) -> None:
        """Scale the sums so far to the new highest score, and add the chunk's."""
        f = self.f
        factor = local((f.lanes,))
        with block(f"{keys.prefix}factor", (f.lanes,)) as (lane,):
            T.buffer_store(factor, exp2(kept.highest[[*tile, lane]] - sums.highest[lane]), [lane])
        vector = f.plan.tiling.vector
        with update(f"{keys.prefix}merge_highest", (f.lanes,), vector) as (lane,):
            T.buffer_store(kept.highest, sums.highest[lane], [*tile, lane])
        with update(f"{keys.prefix}merge_total", (f.lanes,), vector) as (lane,):
            at = [*tile, lane]
            T.buffer_store(kept.total, kept.total[at] * factor[lane] + sums.total[lane], at)
        with update(f"{keys.prefix}merge_weighted", (*f.patches, *f.patch, f.staged_dim_v), vector) as index:
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
                more = T.Cast("int32", f.additional > 0) if self.additional else T.int32(0)
                T.buffer_store(seen, more, [lane])
            with update("count_add", tuple(axis.kernel_size for axis in f.plan), 1) as window:
                where = [axis.window_key(strip[i], tile[i], place[i], window[i]) for i, axis in enumerate(f.axes)]
                is_seen = tirx.all(
                    mask[[self.batch, *f.layout(token for token, _ in where)]], *(sees for _, sees in where)
                )
                T.buffer_store(seen, seen[lane] + T.Cast("int32", is_seen), [lane])
        return seen

    def finish(self, sums: _Sums, member: Any, tile: Place, *first: Any) -> None:
        """Divide by the sum of weights, and store a tile's outputs and the logarithm of that sum."""
        f, strip, at = self.f, self.strip, self.at(member, tile)
        inverse, natural = local((f.lanes,)), local((f.lanes,))
        with block("inverse", (f.lanes,)) as (lane,):
            T.buffer_store(inverse, T.float32(1) / sums.total[[*first, lane]], [lane])
        seen = None if self.key_mask is None else self.count(self.key_mask, sums.total, tile, first)
        with block("natural", (f.lanes,)) as (lane,):
            exponent = log2_sum(sums.highest[[*first, lane]], sums.total[[*first, lane]]) * T.float32(LN2)
            if seen is not None:
                exponent = T.Select(seen[lane] == 0, T.float32(-math.inf), exponent)
            T.buffer_store(natural, exponent, [lane])

        def is_query(*loops: Any) -> Any:
            return f.exists(strip, tile, f.query(loops[:3], loops[3:6]))

        with block("output", (*f.patches, *f.patch, f.head_dim_v), where=is_query) as index:
            lane = f.lane_of(index[:3], index[3:6])
            result = sums.weighted[[*first, *index]] * inverse[lane]
            if seen is not None:
                result = T.Select(seen[lane] == 0, T.float32(0), result)
            T.buffer_store(self.output, T.Cast(f.dtype, result), at(lane, index[-1]))
        with block("lse", (f.lanes,), where=lambda lane: f.exists(strip, tile, f.lane(lane))) as (lane,):
            T.buffer_store(self.lse, natural[lane], at(lane))
