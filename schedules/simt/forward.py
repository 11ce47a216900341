"""The forward, directly: a query at a time, over exactly the keys of its window.

The same function as `na_compiler.schedules.cpu.forward`, with the same parameters. The softmax is merged from chunk to
chunk: sums are kept relative to the highest score so far. Scores are in units of ``log2(e)``.

`na_compiler.schedules.simt.tangent` computes the derivative of it beside it, from the same steps.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tvm import tirx
from tvm.tirx.script import builder as T

from na_compiler.operands import KEY_MASK
from na_compiler.schedules.simt.chunks import AdditionalChunks, Chunks, KeyChunks, unless_masked, with_bias
from na_compiler.schedules.simt.frame import Buffer, DirectFrame, Rows, registers, scalar
from na_compiler.schedules.simt.plan import DirectPlan
from na_compiler.tensorir.arithmetic import HIDDEN, LN2, LOG2_E, LOWEST, log2_sum
from na_compiler.tensorir.blocks import block, prim_func, reduction

__all__ = ["Query", "Weights", "describe", "direct_forward"]


def direct_forward(plan: DirectPlan) -> tirx.PrimFunc:
    """Describe the forward of a problem, cut as the plan says.

    Returns
    -------
    PrimFunc
        ``main(query, key, value, [additional_keys, additional_values,] [relative_position_bias,] [key_mask,] scale,
        output, lse)``. Query, key, value and the additional tensors may have any strides but the last one, which is 1;
        the others are contiguous.
    """
    return describe(plan, Query)


def describe(plan: DirectPlan, kind: type[Query]) -> tirx.PrimFunc:
    """Describe a function that does to each query what a kind says."""
    f = DirectFrame(plan)
    strided, written = kind.inputs(f), kind.outputs(f)
    read = strided | f.optional()
    parameters = {**read, "scale": "float32", **written}

    def body(*arguments: Any) -> None:
        tensors = dict(zip(parameters, arguments, strict=True))
        tensors |= f.views({name: tensors[name] for name in strided})
        with f.rows("query_task", plan.problem.heads) as (batch, head, part, place):
            T.reads(*(f.whole(tensors[name]) for name in read))
            T.writes(*(f.whole(tensors[name]) for name in written))
            kind(f, tensors, batch, head, f.token(f.row(part, place))).attend(f.is_row(part, place))

    return prim_func(parameters, body)


@dataclass
class Weights:
    """The weights of a chunk's keys, their sum, the highest score by now, and what earlier sums are scaled by."""

    P: Buffer
    total: Buffer
    highest: Buffer
    factor: Buffer


class Query:
    """Emits what belongs to one query."""

    def __init__(self, f: DirectFrame, tensors: dict[str, Buffer], batch: Any, head: Any, token: list[Any]) -> None:
        self.f, self.tensors = f, tensors
        self.batch, self.head, self.token = batch, head, token
        self.head_kv = head // f.problem.group_size

    @classmethod
    def inputs(cls, f: DirectFrame) -> dict[str, Any]:
        """Return the parameters that may have any strides but the last, before the others and the scale."""
        return f.inputs()

    @classmethod
    def outputs(cls, f: DirectFrame) -> dict[str, Any]:
        """Return the parameters after the scale."""
        problem = f.problem
        return {
            "output": f.tensor(f.tokens(problem.heads, problem.head_dim_v)),
            "lse": f.tensor(f.tokens(problem.heads), "float32"),
        }

    def at(self, d: Any) -> list[Any]:
        """Return the indices of an element of the query."""
        return [self.batch, *self.token, self.head, d]

    def attend(self, is_row: Any) -> None:
        """Compute output and lse of the query, and store them if it is one."""
        self.start()
        self.visit(KeyChunks(self.f, self.token), "key", "value")
        if self.f.problem.additional_kv:
            self.visit(AdditionalChunks(self.f), "additional_keys", "additional_values")
        self.finish(is_row)

    def start(self) -> None:
        """Load the query, and begin with no keys."""
        f = self.f
        self.Q = self.load("query")
        self.highest, self.total = registers((1,)), registers((1,))
        for name, buffer, value in (("highest", self.highest, LOWEST), ("total", self.total, 0.0)):
            self.start_number(name, buffer, value)
        self.seen: Buffer | None = None
        if KEY_MASK in self.tensors:
            self.seen = registers((1,), "int32")
            with block("start_seen", (1,)) as (zero,):
                T.buffer_store(self.seen, T.int32(0), [zero])
        self.O = f.clear("start_output", f.problem.head_dim_v)

    def load(self, name: str) -> Buffer:
        """Load what a tensor has for the query, scaled as scores are."""
        factor = self.tensors["scale"] * T.float32(LOG2_E)
        return self.f.load(name, self.tensors[name], self.at, self.f.problem.head_dim, factor)

    @staticmethod
    def start_number(name: str, buffer: Buffer, value: float) -> None:
        """Give a number what it is before there are keys."""
        with block(f"start_{name}", (1,)) as (zero,):
            T.buffer_store(buffer, T.float32(value), [zero])

    def kept(self) -> list[Buffer]:
        """Return what is kept from chunk to chunk."""
        return [buffer for buffer in (self.highest, self.total, self.O, self.seen) if buffer is not None]

    def read(self, key: str, value: str) -> list[Buffer]:
        """Return what a chunk of keys is multiplied with, and the tensors of its keys and values."""
        return [self.Q, self.tensors[key], self.tensors[value]]

    def visit(self, chunks: Chunks, key: str, value: str) -> None:
        """Attend to every chunk of keys."""
        f = self.f
        kept = [f.whole(buffer) for buffer in self.kept()]
        with block(f"{chunks.prefix}chunk", chunks.counts, where=lambda *chunk: chunks.meets(chunk)) as chunk:
            T.reads(*map(f.whole, self.read(key, value)), *kept)
            T.writes(*kept)
            self.step(chunks, chunk, key, value)

    def step(self, chunks: Chunks, chunk: Any, key: str, value: str) -> None:
        """Attend to a chunk of keys."""
        at = chunks.rows(chunk, self.batch, self.head_kv)
        K = self.stage(chunks, at, "key", key)
        scores = self.scores(chunks, chunk, K)
        V = self.stage(chunks, at, "value", value)
        self.merge(chunks, self.weigh(chunks, scores), V)

    def stage(self, chunks: Chunks, at: Rows, kind: str, name: str) -> Buffer:
        """Copy the rows of a chunk, as they are."""
        problem = self.f.problem
        width = problem.head_dim if kind.endswith("key") else problem.head_dim_v
        return self.f.stage(f"{chunks.prefix}{kind}", self.tensors[name], at, chunks.size, width)

    def scores(self, chunks: Chunks, chunk: Any, keys: Buffer) -> Buffer:
        """Return the scores of a chunk, minus infinity where there is no key."""
        S = self.f.products(f"{chunks.prefix}score", self.Q, keys, self.f.problem.head_dim)
        seen = registers(chunks.size)
        with block(f"{chunks.prefix}seen", chunks.size) as place:
            score = with_bias(chunks, chunk, place, S[list(place)], self.tensors, self.head)
            score = unless_masked(chunks, chunk, place, score, self.tensors, self.batch, HIDDEN)
            T.buffer_store(seen, chunks.only(chunk, place, score, HIDDEN), list(place))
        if self.seen is not None:
            with block(f"{chunks.prefix}count", chunks.size) as place:
                one = unless_masked(chunks, chunk, place, T.float32(1), self.tensors, self.batch, 0.0)
                one = T.Cast("int32", chunks.only(chunk, place, one))
                T.buffer_store(self.seen, self.seen[0] + one, [0])
        return seen

    def weigh(self, chunks: Chunks, scores: Buffer) -> Weights:
        """Return a chunk's weights, relative to the highest score so far."""
        prefix = chunks.prefix
        highest = registers((1,))
        with reduction(f"{prefix}highest", (1,), chunks.size) as (zero, *place):
            with T.init():
                T.buffer_store(highest, T.min_value("float32"), [zero])
            T.buffer_store(highest, T.max(highest[zero], scores[place]), [zero])
        raised = scalar(f"{prefix}raised", T.max(highest[0], self.highest[0]))
        factor = scalar(f"{prefix}factor", T.exp2(self.highest[0] - raised[0]))
        P = registers(chunks.size)
        with block(f"{prefix}weight", chunks.size) as place:
            T.buffer_store(P, T.exp2(scores[list(place)] - raised[0]), list(place))
        total = registers((1,))
        with reduction(f"{prefix}total", (1,), chunks.size) as (zero, *place):
            with T.init():
                T.buffer_store(total, T.float32(0), [zero])
            T.buffer_store(total, total[zero] + P[place], [zero])
        return Weights(P, total, raised, factor)

    def merge(self, chunks: Chunks, weights: Weights, values: Buffer) -> None:
        """Add a chunk's weights and weighted values, all relative to the highest score so far."""
        prefix, factor = chunks.prefix, weights.factor
        self.f.accumulate(f"{prefix}weighted", [(weights.P, values)], self.O, lambda d: self.O[d] * factor[0])
        with block(f"{prefix}merge_total", (1,)) as (zero,):
            T.buffer_store(self.total, self.total[zero] * factor[zero] + weights.total[zero], [zero])
        with block(f"{prefix}merge_highest", (1,)) as (zero,):
            T.buffer_store(self.highest, weights.highest[zero], [zero])

    def finish(self, is_row: Any) -> Buffer:
        """Store what the query gets, divided by the sum of weights, and its logarithm; returns what divides."""
        inverse = scalar("inverse", T.float32(1) / self.total[0])
        lse = log2_sum(self.highest[0], self.total[0], T.log2) * T.float32(LN2)
        if self.seen is not None:
            lse = T.Select(self.seen[0] == 0, T.float32(-math.inf), lse)
        natural = scalar("natural", lse)

        def row(d: Any) -> Any:
            result = self.O[d] * inverse[0]
            return result if self.seen is None else T.Select(self.seen[0] == 0, T.float32(0), result)

        self.store("output", row, is_row)
        self.store_number("lse", natural, is_row)
        return inverse

    def store(self, name: str, row: Callable[[Any], Any], is_row: Any) -> None:
        """Store a row of the query, of elements ``row(d)``."""
        f, width = self.f, self.f.problem.head_dim_v
        with block(name, (f.padded(width),), where=lambda d: tirx.all(is_row, d < width)) as (d,):
            T.buffer_store(self.tensors[name], T.Cast(f.dtype, row(d)), self.at(d))

    def store_number(self, name: str, number: Buffer, is_row: Any) -> None:
        """Store a number of the query."""
        with block(name, (1,), where=lambda _: is_row) as (zero,):
            T.buffer_store(self.tensors[name], number[zero], [self.batch, *self.token, self.head])
