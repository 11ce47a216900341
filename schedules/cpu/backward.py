"""The backward: gradients of query, key, value and the additional keys and values.

With ``P = exp(scale * query . key - lse)`` and ``delta = grad_output . output - grad_lse`` a query::

    dS = P * (grad_output . value - delta)
    grad_query = scale * sum_key dS key
    grad_key = scale * sum_query dS query
    grad_value = sum_query P grad_output

One pass over the queries does the five products. A task has its strip's gradients of keys and values to itself, in
a workspace, and a second loop adds up what the strips left, in a fixed order: no atomics, the same bits every time.
"""

from __future__ import annotations

from typing import Any

from tvm import tirx
from tvm.tirx.script import builder as T

from na_compiler.operands import KEY_MASK, RELATIVE_POSITION_BIAS
from na_compiler.schedules.cpu.frame import Additional, Frame, Place, Window
from na_compiler.schedules.cpu.plan import TilingPlan
from na_compiler.schedules.cpu.position_bias import (
    PARTS,
    Places,
    PositionBias,
    PositionGradient,
    gather_bias,
    parts_shape,
)
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
from na_compiler.tensorir.arithmetic import LN2, LOG2_E, below, weight
from na_compiler.tensorir.axes import AXES
from na_compiler.tensorir.blocks import block, local, prim_func, reduction, update

__all__ = ["backward"]

_ALL = (0, 0, 0)
_READ = {
    "query",
    "key",
    "value",
    "additional_keys",
    "additional_values",
    "output",
    "grad_output",
    "lse",
    "grad_lse",
    RELATIVE_POSITION_BIAS,
    KEY_MASK,
}
_GRAD_BIAS = f"grad_{RELATIVE_POSITION_BIAS}"


def backward(plan: TilingPlan) -> tirx.PrimFunc:
    """Describe the backward of a problem, cut as the plan says.

    Returns
    -------
    PrimFunc
        ``main(query, key, value, [additional_keys, additional_values,] [relative_position_bias,] [key_mask,] output,
        grad_output, lse, grad_lse, scale, [length, first_query and first_key of each axis,] grad_query, grad_key,
        grad_value, [grad_additional_keys, grad_additional_values,] [grad_relative_position_bias,] key_space,
        value_space, [additional_key_space, additional_value_space,] [bias_parts])``. The first ones, ``grad_output``
        and the first three gradients may have any strides but the last one, which is 1; all others are contiguous.
        ``grad_lse`` may have no batch entries, and is 0 then. Spaces and ``bias_parts`` are workspace, see
        `Frame.space`.
    """
    f = Frame(plan)
    extra = plan.problem.additional_kv
    parameters = _parameters(f)

    def body(*arguments: Any) -> None:
        tensors = dict(zip(parameters, arguments, strict=True))
        f.begin(tensors)
        written = [name for name in parameters if name in {"grad_query", PARTS} or name.endswith("_space")]
        read = [name for name in parameters if name in _READ]
        # Heads innermost: those of one token lie side by side in memory, and the prefetchers bring them all.
        with block("task", (f.batch, *f.strips, f.heads_kv)) as (batch, *strip, head):
            reads, writes = ([f.whole(tensors[name]) for name in names] for names in (read, written))
            T.reads(*reads)
            T.writes(*writes)
            # One block inside the other: TensorIR makes a loop parallel only over a block in which the outputs have
            # one writer, and here the workspace is cleared and then added to.
            with T.sblock("strip"):
                T.reads(*reads)
                T.writes(*writes)
                task = _Task(f, tensors, batch, head, strip)
                task.clear()
                if plan.merges:
                    task.in_chunks()
                else:
                    task.at_once()
                if task.bias_gradient is not None:
                    task.bias_gradient.finish()
        _gather(f, "key", tensors["key_space"], tensors["grad_key"], f.head_dim, LN2)
        _gather(f, "value", tensors["value_space"], tensors["grad_value"], f.head_dim_v, 1.0)
        if extra:
            _gather_additional(
                f, "additional_key", tensors["additional_key_space"], tensors["grad_additional_keys"], f.head_dim, LN2
            )
            _gather_additional(
                f,
                "additional_value",
                tensors["additional_value_space"],
                tensors["grad_additional_values"],
                f.head_dim_v,
                1.0,
            )
        if f.has_bias:
            gather_bias(f, tensors[PARTS], tensors[_GRAD_BIAS])

    return prim_func(parameters, body)


def _parameters(f: Frame) -> dict[str, Any]:
    """Return the parameters, see `backward`."""
    plan, extra = f.plan, f.problem.additional_kv
    queries, values = f.tokens(f.heads, f.head_dim), f.key_tokens(f.heads_kv, f.head_dim_v)
    keys, outputs = f.key_tokens(f.heads_kv, f.head_dim), f.tokens(f.heads, f.head_dim_v)
    more_keys, more_values = f.extra(f.heads_kv, f.head_dim), f.extra(f.heads_kv, f.head_dim_v)
    parameters: dict[str, Any] = {
        "query": f.strided("query", queries),
        "key": f.strided("key", keys),
        "value": f.strided("value", values),
    }
    if extra:
        parameters["additional_keys"] = f.strided("additional_keys", more_keys)
        parameters["additional_values"] = f.strided("additional_values", more_values)
    parameters |= f.optional()
    parameters |= {
        "output": f.tensor(outputs),
        "grad_output": f.strided("grad_output", outputs),
        "lse": f.tensor(f.tokens(f.heads), "float32"),
        "grad_lse": f.tensor((f.given, *f.tokens(f.heads)[1:]), "float32"),
        "scale": "float32",
        **f.place(),
        "grad_query": f.strided("grad_query", queries),
        "grad_key": f.strided("grad_key", keys),
        "grad_value": f.strided("grad_value", values),
    }
    if extra:
        parameters["grad_additional_keys"] = f.tensor(more_keys)
        parameters["grad_additional_values"] = f.tensor(more_values)
    if f.has_bias:
        heads, *places = parameters[RELATIVE_POSITION_BIAS]["shape"]
        parameters[_GRAD_BIAS] = f.tensor((f.batch, heads, *places), "float32")
    box = [chunk * count for chunk, count in zip(plan.extents("chunk"), plan.extents("chunks"), strict=True)]
    parameters["key_space"] = f.tensor(f.space(*box, f.staged_dim), "float32")
    parameters["value_space"] = f.tensor(f.space(*box, f.staged_dim_v), "float32")
    if extra:
        parameters["additional_key_space"] = f.tensor(f.space(f.staged_additional, f.staged_dim), "float32")
        parameters["additional_value_space"] = f.tensor(f.space(f.staged_additional, f.staged_dim_v), "float32")
    if f.has_bias:
        parameters[PARTS] = f.tensor(parts_shape(f), "float32")

    return parameters


class _Task:
    """Emits what one iteration of the parallel loop does: a strip of queries of the heads that share keys."""

    def __init__(self, f: Frame, tensors: dict[str, Buffer], batch: Any, head: Any, strip: Any) -> None:
        self.f, self.tensors = f, tensors
        # As the parallel loop counts them, and what they are.
        self.batch, self.head, self.iteration, self.strip = batch, head, tuple(strip), f.strip(strip)
        self.tiles = (f.group_size, *f.tiles)
        self.vector = f.plan.tiling.vector
        self.key_mask: Buffer | None = tensors.get(KEY_MASK)
        self.bias: PositionBias | None = None
        self.bias_gradient: PositionGradient | None = None
        if f.has_bias:
            self.bias = PositionBias(f, tensors[RELATIVE_POSITION_BIAS], head, self.strip)
            self.bias_gradient = PositionGradient(f, tensors[PARTS], [batch, head, *self.iteration], self.strip)

    def whole(self, *names: str) -> list[tirx.BufferRegion]:
        """Return all of some tensors."""
        return [self.f.whole(self.tensors[name]) for name in names]

    def at(self, member: Any, tile: Place) -> Any:
        """Return ``index(lane, ...)`` of the tokens of a tile, for one of the heads that share keys."""
        return self.f.queries(self.batch, self.strip, tile, self.head * self.f.group_size + member)

    def spaces(self, keys: Keys) -> tuple[Buffer, Buffer]:
        """Return the workspace of a set of keys."""
        return self.tensors[f"{keys.prefix}key_space"], self.tensors[f"{keys.prefix}value_space"]

    def clear(self) -> None:
        """Set the task's part of the workspace to zero."""
        for name, space in self.tensors.items():
            if name.endswith("_space"):
                with update(f"clear_{name}", tuple(space.shape[2 + len(self.iteration) :]), self.vector) as index:
                    T.buffer_store(space, T.float32(0), [self.batch, self.head, *self.iteration, *index])

    def at_once(self) -> None:
        """All keys of the strip are staged at once, and a tile is finished when it has visited its own."""
        f, keys = self.f, Window(self.f)
        staged = self.stage(keys, "key", "value", _ALL)
        spaces = [f.whole(space) for space in self.spaces(keys)]
        with block("tile", self.tiles, where=lambda _, *tile: f.exists(self.strip, tile, _ALL)) as (member, *tile):
            T.reads(*self.whole("query", "output", "grad_output", "lse", "grad_lse"), *map(f.whole, staged), *spaces)
            T.writes(*self.whole("grad_query"), *spaces)
            if f.plan.fetches_ahead:
                names = (("query", f.head_dim), ("output", f.head_dim_v), ("grad_output", f.head_dim_v))
                read = [(self.tensors[name], width) for name, width in names]
                fetch_ahead(f, self.at, (member, *tile), read, [(self.tensors["grad_query"], f.head_dim)])
            gradient = local((*f.patches, *f.patch, f.staged_dim))
            self.differentiate(keys, staged, member, tile, _ALL, gradient)
            self.finish(gradient, member, tile)

    def in_chunks(self) -> None:
        """Keys come in chunks; the gradients of the queries are kept."""
        f = self.f
        kept = local((*self.tiles, *f.patches, *f.patch, f.staged_dim))
        with update("start", tuple(map(int, kept.shape)), self.vector) as index:
            T.buffer_store(kept, T.float32(0), list(index))
        self.visit(Window(f), f.chunks, "key", "value", kept)
        if f.problem.additional_kv:
            self.visit(Additional(f), (1, 1, f.additional_chunks), "additional_keys", "additional_values", kept)
        with block("tile", self.tiles, where=lambda _, *tile: f.exists(self.strip, tile, _ALL)) as (member, *tile):
            T.reads(f.whole(kept))
            T.writes(*self.whole("grad_query"))
            self.finish(kept, member, tile, member, *tile)

    def visit(self, keys: Keys, chunks: Any, key: str, value: str, kept: Buffer) -> None:
        """Differentiate every tile's attention to every chunk of a set of keys."""
        f = self.f
        inputs = self.whole("query", "output", "grad_output", "lse", "grad_lse")
        changed = [f.whole(buffer) for buffer in (kept, *self.spaces(keys))]
        with block(f"{keys.prefix}chunk", chunks) as chunk:
            T.reads(*inputs, *self.whole(key, value), *changed)
            T.writes(*changed)
            staged = self.stage(keys, key, value, chunk)
            with block(
                f"{keys.prefix}visit", self.tiles, where=lambda _, *tile: keys.meets(self.strip, tile, chunk)
            ) as (member, *tile):
                T.reads(*inputs, *map(f.whole, staged), *changed)
                T.writes(*changed)
                gradient = local((*f.patches, *f.patch, f.staged_dim))
                self.differentiate(keys, staged, member, tile, chunk, gradient)
                with update(f"{keys.prefix}add", tuple(map(int, gradient.shape)), self.vector) as index:
                    at = [member, *tile, *index]
                    T.buffer_store(kept, kept[at] + gradient[list(index)], at)

    def stage(self, keys: Keys, key: str, value: str, chunk: Place) -> tuple[Buffer, ...]:
        """Stage the keys and values of a chunk, and which of them the key mask hides, where there is one."""
        f = self.f
        at = keys.at(self.batch, self.strip, chunk, self.head)
        K, V = local((*keys.box, f.staged_dim)), local((*keys.box, f.staged_dim_v))
        stage_keys(f"{keys.prefix}key", keys, self.strip, chunk, self.tensors[key], at, K, f.head_dim)
        stage_keys(f"{keys.prefix}value", keys, self.strip, chunk, self.tensors[value], at, V, f.head_dim_v)
        if self.key_mask is None or isinstance(keys, Additional):
            return K, V
        return K, V, stage_mask(keys, self.batch, self.strip, chunk, self.key_mask)

    def differentiate(
        self, keys: Keys, staged: tuple[Buffer, ...], member: Any, tile: Place, chunk: Place, gradient: Buffer
    ) -> None:
        """Make a tile's gradient of its queries, and add to those of the chunk's keys and values."""
        f = self.f
        K, *_ = staged
        P, slope = (local((*keys.visited, f.lanes)) for _ in range(2))
        Q, G = local((f.lanes, f.staged_dim)), local((f.lanes, f.staged_dim_v))
        places = None
        if self.bias is not None and isinstance(keys, Window):
            places = self.bias.places(keys, tile, chunk)
        with T.sblock(f"{keys.prefix}differentiate"):
            T.reads(*self.whole("query", "output", "grad_output", "lse", "grad_lse"), *map(f.whole, staged))
            T.writes(*map(f.whole, (P, slope, Q, G, gradient)))
            self.probabilities(keys, staged, member, tile, chunk, places, Q, G, P, slope)
            weighted_rows("query_grad", f, keys, [(slope, K)], self.strip, tile, gradient)
        first = [keys.start(axis, self.strip, tile, chunk) for axis in range(AXES)]
        self.accumulate(keys, first, P, G, slope, Q)
        if self.bias_gradient is not None and isinstance(keys, Window) and places is not None:
            self.bias_gradient.add(keys, member, places, slope)

    def probabilities(
        self,
        keys: Keys,
        staged: tuple[Buffer, ...],
        member: Any,
        tile: Place,
        chunk: Place,
        places: Places | None,
        Q: Buffer,
        G: Buffer,
        P: Buffer,
        slope: Buffer,
    ) -> None:
        """Recompute ``P`` from lse, and ``dS`` from it; both 0 for what a query does not see."""
        f, at, prefix = self.f, self.at(member, tile), keys.prefix
        K, V, *masked = staged
        O = local((f.lanes, f.staged_dim_v))
        delta, exponent, dot = local((f.lanes,)), local((f.lanes,)), local((f.lanes,))
        scale = self.tensors["scale"] * T.float32(LOG2_E)
        stage_queries(f"{prefix}query", self.tensors["query"], at, scale, Q, f.head_dim)
        stage_queries(f"{prefix}grad", self.tensors["grad_output"], at, T.float32(1), G, f.head_dim_v)
        stage_queries(f"{prefix}output", self.tensors["output"], at, T.float32(1), O, f.head_dim_v)
        Q_lanes, G_lanes, O_lanes = (
            to_lanes(f"{prefix}{name}", rows) for name, rows in (("query", Q), ("grad", G), ("output", O))
        )
        with reduction(f"{prefix}dot", (f.lanes,), (f.staged_dim_v,)) as (lane, d):
            with T.init():
                T.buffer_store(dot, T.float32(0), [lane])
            T.buffer_store(dot, dot[lane] + G_lanes[d, lane] * O_lanes[d, lane], [lane])
        with block(f"{prefix}delta", (f.lanes,)) as (lane,):
            grad_lse = T.if_then_else(self.batch < f.given, self.tensors["grad_lse"][at(lane)], T.float32(0))
            T.buffer_store(delta, dot[lane] - grad_lse, [lane])
        with block(f"{prefix}exponent", (f.lanes,)) as (lane,):
            T.buffer_store(exponent, below(self.tensors["lse"][at(lane)] * T.float32(LOG2_E)), [lane])
        visible = Visible(f, keys, self.strip, tile, chunk, existing=True, masked=masked[0] if masked else None)
        offset = keys.offset(self.strip, tile)

        def weigh(score: Any, u: Place, lane: Any) -> Any:
            return visible.hide(weight(score, exponent[lane]), u, lane, hidden=0.0)

        def slopes(product: Any, u: Place, lane: Any) -> Any:
            # Hidden too, not only multiplied by P = 0: a hidden value may be so large that its product overflows.
            return visible.hide(P[[*u, lane]] * (product - delta[lane]), u, lane, hidden=0.0)

        bias = None if self.bias is None or places is None else self.bias.of(member, places)
        products("score", f, keys, [(K, Q_lanes)], offset, f.head_dim, P, weigh, bias)
        products("grad_weight", f, keys, [(V, G_lanes)], offset, f.head_dim_v, slope, slopes)

    def accumulate(self, keys: Keys, first: list[Any], P: Buffer, G: Buffer, slope: Buffer, Q: Buffer) -> None:
        """Add a tile's part to the gradients of the keys and values that it visits, a few keys at a time."""
        f, prefix = self.f, keys.prefix
        count = f.plan.tiling.grad_block
        key_space, value_space = self.spaces(keys)
        v0, v1, v2 = keys.visited
        with block(f"{prefix}accumulate", (v0, v1, v2 // count)) as (*rows, part):
            T.reads(*map(f.whole, (P, G, slope, Q, key_space, value_space)))
            T.writes(f.whole(key_space), f.whole(value_space))
            for name, weights, vectors, space in (
                ("value_part", P, G, value_space),
                ("key_part", slope, Q, key_space),
            ):
                width = int(vectors.shape[1])
                partial = local((count, width))
                with reduction(f"{prefix}{name}", (count, width), (f.lanes,)) as (u, d, lane):
                    with T.init():
                        T.buffer_store(partial, T.float32(0), [u, d])
                    weight = weights[[*rows, part * count + u, lane]]
                    T.buffer_store(partial, partial[u, d] + weight * vectors[lane, d], [u, d])
                with update(f"{prefix}{name}_add", (count, width), self.vector) as (u, d):
                    position = [rows[0] + first[0], rows[1] + first[1], part * count + u + first[2]]
                    at = [self.batch, self.head, *self.iteration, *keys.space_at(position), d]
                    T.buffer_store(space, space[at] + partial[u, d], at)

    def finish(self, gradient: Buffer, member: Any, tile: Place, *first: Any) -> None:
        """Store a tile's gradient of its queries."""
        f, at = self.f, self.at(member, tile)

        def is_query(*loops: Any) -> Any:
            return f.exists(self.strip, tile, f.query(loops[:3], loops[3:6]))

        with block("query_store", (*f.patches, *f.patch, f.head_dim), where=is_query) as index:
            lane = f.lane_of(index[:3], index[3:6])
            value = T.Cast(f.dtype, gradient[[*first, *index]] * self.tensors["scale"])
            T.buffer_store(self.tensors["grad_query"], value, list(at(lane, index[-1])))


def _gather(f: Frame, name: str, space: Buffer, gradient: Buffer, width: int, factor: float) -> None:
    """Add up what the strips left for each token, in order."""
    padded = int(space.shape[-1])
    with block(f"gather_{name}", (f.batch, *(axis.key_extent for axis in f.axes), f.heads_kv)) as (batch, *token, head):
        T.reads(f.whole(space))
        T.writes(f.whole(gradient))
        total = local((padded,))
        covering = [axis.covering(x) for axis, x in zip(f.axes, token, strict=True)]
        strips = tuple(axis.coverings for axis in f.axes)
        with reduction(f"{name}_total", (padded,), strips) as (d, *numbers):
            with T.init():
                T.buffer_store(total, T.float32(0), [d])
            places = [of(number) for of, number in zip(covering, numbers, strict=True)]
            strip = [iterator for iterators, _, _ in places for iterator in iterators]
            at = [batch, head, *strip, *(position for _, position, _ in places), d]
            covered = tirx.all(*(covers for _, _, covers in places))
            T.buffer_store(total, total[d] + T.if_then_else(covered, space[at], T.float32(0)), [d])
        with block(f"{name}_grad", (width,)) as (d,):
            T.buffer_store(gradient, T.Cast(f.dtype, total[d] * T.float32(factor)), [batch, *f.layout(token), head, d])


def _gather_additional(f: Frame, name: str, space: Buffer, gradient: Buffer, width: int, factor: float) -> None:
    """Add up what the strips left for each additional key, in order."""
    padded = int(space.shape[-1])
    with block(f"gather_{name}", (f.batch, f.additional, f.heads_kv)) as (batch, key, head):
        T.reads(f.whole(space))
        T.writes(f.whole(gradient))
        total = local((padded,))
        with reduction(f"{name}_total", (padded,), f.strips) as (d, *strip):
            with T.init():
                T.buffer_store(total, T.float32(0), [d])
            T.buffer_store(total, total[d] + space[[batch, head, *strip, key, d]], [d])
        with block(f"{name}_grad", (width,)) as (d,):
            T.buffer_store(gradient, T.Cast(f.dtype, total[d] * T.float32(factor)), [batch, key, head, d])
