"""The backward, directly: query by query for the gradient of queries, key by key for those of keys and values.

The same function as `na_compiler.schedules.cpu.backward`, with the same parameters but for the workspace. A key
collects from the queries that see it, which are consecutive on every axis; no two tasks add to one place, so there
are no atomics, and the bits are the same every time. The price is that scores are computed twice.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tvm import tirx
from tvm.tirx.script import builder as T

from na_compiler.operands import KEY_MASK, RELATIVE_POSITION_BIAS
from na_compiler.schedules.simt.bias import GRAD_BIAS, PARTS, bias_task, gather_bias
from na_compiler.schedules.simt.chunks import (
    AdditionalChunks,
    Chunks,
    KeyChunks,
    QueryChunks,
    StripChunks,
    unless_masked,
    with_bias,
)
from na_compiler.schedules.simt.frame import At, Buffer, DirectFrame, registers, scalar
from na_compiler.schedules.simt.plan import DirectPlan
from na_compiler.tensorir.arithmetic import LOG2_E, below, weight
from na_compiler.tensorir.blocks import block, prim_func, reduction

__all__ = ["direct_backward"]

# Beside the inputs, what may have any strides.
_STRIDED = ("grad_output", "grad_query", "grad_key", "grad_value")


def direct_backward(plan: DirectPlan) -> tirx.PrimFunc:
    """Describe the backward of a problem, cut as the plan says.

    Returns
    -------
    PrimFunc
        ``main(query, key, value, [additional_keys, additional_values,] [relative_position_bias,] [key_mask,] output,
        grad_output, lse, grad_lse, scale, grad_query, grad_key, grad_value, [grad_additional_keys,
        grad_additional_values,] [grad_relative_position_bias,] delta, [additional_key_space, additional_value_space,]
        [bias_parts])``. The first ones, ``grad_output`` and the first three gradients may have any strides but the last
        one, which is 1; all others are contiguous. ``grad_lse`` may have no batch entries, and is 0 then. The last ones
        are workspace: ``delta`` has a number for each query, the spaces and parts one for each strip of queries.
    """
    f = DirectFrame(plan)
    p = plan.problem
    parameters = f.inputs()
    strided = list(parameters)
    parameters |= f.optional()
    parameters |= {
        "output": f.tensor(f.tokens(p.heads, p.head_dim_v)),
        "grad_output": f.strided("grad_output", f.tokens(p.heads, p.head_dim_v)),
        "lse": f.tensor(f.tokens(p.heads), "float32"),
        "grad_lse": f.tensor(f.shape(f.given, *p.layout, p.heads), "float32"),
    }
    parameters["scale"] = "float32"
    parameters |= {
        "grad_query": f.strided("grad_query", f.tokens(p.heads, p.head_dim)),
        "grad_key": f.strided("grad_key", f.tokens(p.heads_kv, p.head_dim)),
        "grad_value": f.strided("grad_value", f.tokens(p.heads_kv, p.head_dim_v)),
    }
    if p.additional_kv:
        parameters["grad_additional_keys"] = f.tensor(f.extra(p.heads_kv, p.head_dim))
        parameters["grad_additional_values"] = f.tensor(f.extra(p.heads_kv, p.head_dim_v))
    if p.has(RELATIVE_POSITION_BIAS):
        table = parameters[RELATIVE_POSITION_BIAS]["shape"]
        parameters[GRAD_BIAS] = f.tensor((f.batch, *table), "float32")
    parameters["delta"] = f.tensor(f.shape(f.batch, p.heads, f.places.count), "float32")
    if p.additional_kv:
        parts = (f.batch, p.heads_kv, plan.strips, f.additional)
        for name, width in (("additional_key_space", plan.head_dim), ("additional_value_space", plan.head_dim_v)):
            parameters[name] = f.tensor(f.shape(*parts, width), "float32")
    if p.has(RELATIVE_POSITION_BIAS):
        parameters[PARTS] = f.tensor(f.shape(f.batch, p.heads, plan.bias_strips, plan.offsets), "float32")

    def body(*arguments: Any) -> None:
        tensors = dict(zip(parameters, arguments, strict=True))
        tensors |= f.views({name: tensors[name] for name in (*strided, *_STRIDED)})
        _query_task(f, tensors)
        _key_task(f, tensors)
        if p.has(RELATIVE_POSITION_BIAS):
            bias_task(f, tensors)
            gather_bias(f, tensors)
        if p.additional_kv:
            _additional_task(f, tensors)
            _gather(f, "key", tensors["additional_key_space"], tensors["grad_additional_keys"], tensors["scale"])
            _gather(f, "value", tensors["additional_value_space"], tensors["grad_additional_values"], T.float32(1))

    return prim_func(parameters, body)


def _query_task(f: DirectFrame, tensors: dict[str, Buffer]) -> None:
    with f.rows("query_task", f.problem.heads) as (batch, head, part, place):
        names = ("query", "key", "value", "additional_keys", "additional_values", "output", "grad_output", "lse")
        more = ("grad_lse", RELATIVE_POSITION_BIAS, KEY_MASK)
        T.reads(*(f.whole(tensors[name]) for name in (*names, *more) if name in tensors))
        T.writes(f.whole(tensors["grad_query"]), f.whole(tensors["delta"]))
        _Query(f, tensors, batch, head, f.row(part, place)).differentiate(f.is_row(part, place))


class _Query:
    """Emits what belongs to one query."""

    def __init__(self, f: DirectFrame, tensors: dict[str, Buffer], batch: Any, head: Any, number: Any) -> None:
        self.f, self.tensors = f, tensors
        self.batch, self.head, self.number, self.token = batch, head, number, f.token(number)

    def at(self, d: Any) -> list[Any]:
        """Return the indices of an element of the query."""
        return [self.batch, *self.token, self.head, d]

    def differentiate(self, is_row: Any) -> None:
        """Store the gradient of the query, and what the keys want to know of it."""
        f, p, tensors = self.f, self.f.problem, self.tensors
        self.Q = f.load("query", tensors["query"], self.at, p.head_dim, tensors["scale"] * T.float32(LOG2_E))
        self.G = f.load("grad", tensors["grad_output"], self.at, p.head_dim_v)

        output = f.load("output", tensors["output"], self.at, p.head_dim_v)
        dot = f.dot("dot", p.head_dim_v, lambda d: self.G[d] * output[d])
        at = [self.batch, *self.token, self.head]
        grad_lse = T.if_then_else(self.batch < f.given, tensors["grad_lse"][at], T.float32(0))
        self.delta = scalar("delta", dot[0] - grad_lse)
        self.exponent = scalar("exponent", below(tensors["lse"][at] * T.float32(LOG2_E)))
        with block("delta_store", (1,), where=lambda _: is_row) as (zero,):
            T.buffer_store(tensors["delta"], self.delta[zero], [self.batch, self.head, self.number])
        self.D = f.clear("start_query_grad", p.head_dim)
        self.visit(KeyChunks(f, self.token), "key", "value")
        if p.additional_kv:
            self.visit(AdditionalChunks(f), "additional_keys", "additional_values")
        padded = f.padded(p.head_dim)
        with block("query_store", (padded,), where=lambda d: tirx.all(is_row, d < p.head_dim)) as (d,):
            T.buffer_store(tensors["grad_query"], T.Cast(f.dtype, self.D[d] * tensors["scale"]), self.at(d))

    def visit(self, chunks: Chunks, key: str, value: str) -> None:
        """Add what every chunk of keys gives."""
        f, p, prefix, tensors = self.f, self.f.problem, chunks.prefix, self.tensors
        keys, values = self.tensors[key], self.tensors[value]
        with block(f"{prefix}chunk", chunks.counts, where=lambda *chunk: chunks.meets(chunk)) as chunk:
            T.reads(*map(f.whole, (self.Q, self.G, self.D, keys, values)))
            T.writes(f.whole(self.D))
            at = chunks.rows(chunk, self.batch, self.head // p.group_size)
            K = f.stage(f"{prefix}key", keys, at, chunks.size, p.head_dim)
            V = f.stage(f"{prefix}value", values, at, chunks.size, p.head_dim_v)
            S = f.products(f"{prefix}score", self.Q, K, f.problem.head_dim)
            dP = f.products(f"{prefix}grad_weight", self.G, V, f.problem.head_dim_v)
            slope = registers(chunks.size)
            with block(f"{prefix}slope", chunks.size) as place:
                score = with_bias(chunks, chunk, place, S[list(place)], tensors, self.head)
                probability = weight(score, self.exponent[0], T.exp2)
                result = probability * (dP[list(place)] - self.delta[0])
                result = unless_masked(chunks, chunk, place, result, tensors, self.batch, 0.0)
                T.buffer_store(slope, chunks.only(chunk, place, result), list(place))
            f.accumulate(f"{prefix}query_part", [(slope, K)], self.D)


def _key_task(f: DirectFrame, tensors: dict[str, Buffer]) -> None:
    p = f.problem
    with f.rows("key_task", p.heads_kv) as (batch, head, part, place):
        names = ("query", "key", "value", "grad_output", "lse", "delta", RELATIVE_POSITION_BIAS, KEY_MASK)
        T.reads(*(f.whole(tensors[name]) for name in names if name in tensors))
        T.writes(f.whole(tensors["grad_key"]), f.whole(tensors["grad_value"]))
        token, is_row = f.token(f.row(part, place)), f.is_row(part, place)
        at = _row(batch, token, head)
        key = _Key(f, tensors, batch, head, tensors["key"], tensors["value"], at)
        if KEY_MASK in tensors:
            key.mask = scalar("masked", T.Cast("int32", tensors[KEY_MASK][[batch, *token]]), "int32")
        key.collect(QueryChunks(f, token))
        for name, gradient, width, factor, target in (
            ("key_store", key.DK, p.head_dim, tensors["scale"], tensors["grad_key"]),
            ("value_store", key.DV, p.head_dim_v, T.float32(1), tensors["grad_value"]),
        ):
            with block(name, (f.padded(width),), where=_inside(is_row, width)) as (d,):
                T.buffer_store(target, T.Cast(f.dtype, gradient[d] * factor), at(d))


def _row(batch: Any, token: list[Any], head: Any) -> At:
    return lambda d: [batch, *token, head, d]


def _inside(is_row: Any, width: int) -> Callable[[Any], Any]:
    return lambda d: tirx.all(is_row, d < width)


def _additional_task(f: DirectFrame, tensors: dict[str, Buffer]) -> None:
    """Sum over each strip of queries what it gives to each additional key."""
    p, plan = f.problem, f.plan
    with f.additional_rows("additional_task", p.heads_kv, plan.strips) as (batch, head, strip, part, place):
        names = ("query", "additional_keys", "additional_values", "grad_output", "lse", "delta")
        spaces = {"key_space": tensors["additional_key_space"], "value_space": tensors["additional_value_space"]}
        T.reads(*(f.whole(tensors[name]) for name in names))
        T.writes(*map(f.whole, spaces.values()))
        number, is_row = f.additional_row(part, place)
        at = _row(batch, [number], head)
        key = _Key(f, tensors, batch, head, tensors["additional_keys"], tensors["additional_values"], at)
        key.collect(StripChunks(f, strip))
        for (name, space), gradient in zip(spaces.items(), (key.DK, key.DV), strict=True):
            with block(name, (int(gradient.shape[0]),), where=lambda _: is_row) as (d,):
                T.buffer_store(space, gradient[d], [batch, head, strip, number, d])


class _Key:
    """Emits what belongs to one key, or additional key."""

    def __init__(
        self, f: DirectFrame, tensors: dict[str, Buffer], batch: Any, head: Any, keys: Buffer, values: Buffer, at: Any
    ) -> None:
        self.f, self.tensors, self.batch, self.head = f, tensors, batch, head
        p = f.problem
        self.K = f.load("key", keys, at, p.head_dim, tensors["scale"] * T.float32(LOG2_E))
        self.V = f.load("value", values, at, p.head_dim_v)
        self.DK, self.DV = f.clear("start_key_grad", p.head_dim), f.clear("start_value_grad", p.head_dim_v)
        # 0 where the key mask hides the key, if there is one.
        self.mask: Buffer | None = None

    def hide(self, value: Any) -> Any:
        """Return a value, or 0 where the key mask hides the key."""
        return value if self.mask is None else T.if_then_else(self.mask[0] != 0, value, T.float32(0))

    def collect(self, chunks: Chunks) -> None:
        """Add what every chunk of queries gives, of all heads that share the key."""
        f, p, tensors, prefix = self.f, self.f.problem, self.tensors, chunks.prefix
        counts = (p.group_size, *chunks.counts)
        read = [tensors[name] for name in ("query", "grad_output", "lse", "delta")]
        with block(f"{prefix}query_chunk", counts, where=lambda _, *chunk: chunks.meets(chunk)) as (member, *chunk):
            T.reads(*map(f.whole, (self.K, self.V, self.DK, self.DV, *read)))
            T.writes(f.whole(self.DK), f.whole(self.DV))
            head = self.head * p.group_size + member
            at = chunks.rows(chunk, self.batch, head)
            Q = f.stage(f"{prefix}query", tensors["query"], at, chunks.size, p.head_dim)
            G = f.stage(f"{prefix}grad", tensors["grad_output"], at, chunks.size, p.head_dim_v)
            S = f.products(f"{prefix}score", self.K, Q, f.problem.head_dim)
            dP = f.products(f"{prefix}grad_weight", self.V, G, f.problem.head_dim_v)
            P, slope = registers(chunks.size), registers(chunks.size)
            with block(f"{prefix}weight", chunks.size) as place:
                lse = tensors["lse"][[self.batch, *chunks.token(chunk, place), head]]
                score = with_bias(chunks, chunk, place, S[list(place)], tensors, head)
                probability = self.hide(weight(score, below(lse * T.float32(LOG2_E)), T.exp2))
                T.buffer_store(P, chunks.only(chunk, place, probability), list(place))
            with block(f"{prefix}slope", chunks.size) as place:
                delta = tensors["delta"][[self.batch, head, chunks.number(chunk, place)]]
                result = self.hide(P[list(place)] * (dP[list(place)] - delta))
                T.buffer_store(slope, chunks.only(chunk, place, result), list(place))
            f.accumulate(f"{prefix}value_part", [(P, G)], self.DV)
            f.accumulate(f"{prefix}key_part", [(slope, Q)], self.DK)


def _gather(f: DirectFrame, name: str, space: Buffer, gradient: Buffer, factor: Any) -> None:
    """Add up what the strips give to each additional key, in order."""
    padded, width = int(space.shape[-1]), int(gradient.shape[-1])
    with f.additional_rows(f"gather_{name}", f.problem.heads_kv) as (batch, head, part, place):
        T.reads(f.whole(space))
        T.writes(f.whole(gradient))
        number, is_row = f.additional_row(part, place)
        total = registers((padded,))
        with reduction(f"{name}_total", (padded,), (f.plan.strips,)) as (d, strip):
            with T.init():
                T.buffer_store(total, T.float32(0), [d])
            T.buffer_store(total, total[d] + space[[batch, head, strip, number, d]], [d])
        with block(f"{name}_sum", (padded,), where=_inside(is_row, width)) as (d,):
            T.buffer_store(gradient, T.Cast(f.dtype, total[d] * factor), [batch, number, head, d])
