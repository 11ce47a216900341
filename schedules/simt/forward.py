"""The forward, directly: a query at a time, over exactly the keys of its window.

The same function as `na_compiler.schedules.cpu.forward`, with the same parameters. The softmax is merged from chunk to
chunk: sums are kept relative to the highest score so far. Scores are in units of ``log2(e)``.
"""

from __future__ import annotations

import math
from typing import Any

from tvm import tirx
from tvm.tirx.script import builder as T

from na_compiler.operands import KEY_MASK
from na_compiler.schedules.simt.frame import (
    AdditionalChunks,
    Buffer,
    Chunks,
    DirectFrame,
    KeyChunks,
    registers,
    scalar,
    unless_masked,
    with_bias,
)
from na_compiler.schedules.simt.plan import DirectPlan
from na_compiler.tensorir.arithmetic import HIDDEN, LN2, LOG2_E, LOWEST, log2_sum
from na_compiler.tensorir.blocks import block, prim_func, reduction

__all__ = ["direct_forward"]


def direct_forward(plan: DirectPlan) -> tirx.PrimFunc:
    """Describe the forward of a problem, cut as the plan says.

    Returns
    -------
    PrimFunc
        ``main(query, key, value, [additional_keys, additional_values,] [relative_position_bias,] [key_mask,] scale,
        output, lse)``. Query, key, value and the additional tensors may have any strides but the last one, which is 1;
        the others are contiguous.
    """
    f = DirectFrame(plan)
    problem = plan.problem
    parameters = f.inputs()
    strided = list(parameters)
    parameters |= f.optional()
    read = list(parameters)
    parameters["scale"] = "float32"
    parameters["output"] = f.tensor(f.tokens(problem.heads, problem.head_dim_v))
    parameters["lse"] = f.tensor(f.tokens(problem.heads), "float32")

    def body(*arguments: Any) -> None:
        tensors = dict(zip(parameters, arguments, strict=True))
        tensors |= f.views({name: tensors[name] for name in strided})
        with f.rows("query_task", problem.heads) as (batch, head, part, place):
            T.reads(*(f.whole(tensors[name]) for name in read))
            T.writes(f.whole(tensors["output"]), f.whole(tensors["lse"]))
            _Query(f, tensors, batch, head, f.token(f.row(part, place))).attend(f.is_row(part, place))

    return prim_func(parameters, body)


class _Query:
    """Emits what belongs to one query."""

    def __init__(self, f: DirectFrame, tensors: dict[str, Buffer], batch: Any, head: Any, token: list[Any]) -> None:
        self.f, self.tensors = f, tensors
        self.batch, self.head, self.token = batch, head, token
        self.head_kv = head // f.problem.group_size

    def at(self, d: Any) -> list[Any]:
        """Return the indices of an element of the query."""
        return [self.batch, *self.token, self.head, d]

    def attend(self, is_row: Any) -> None:
        """Compute output and lse of the query, and store them if it is one."""
        f, width = self.f, self.f.problem.head_dim_v
        factor = self.tensors["scale"] * T.float32(LOG2_E)
        self.Q = f.load("query", self.tensors["query"], self.at, f.problem.head_dim, factor)
        self.highest, self.total = registers((1,)), registers((1,))
        for name, buffer, value in (("highest", self.highest, LOWEST), ("total", self.total, 0.0)):
            with block(f"start_{name}", (1,)) as (zero,):
                T.buffer_store(buffer, T.float32(value), [zero])
        self.seen: Buffer | None = None
        if KEY_MASK in self.tensors:
            self.seen = registers((1,), "int32")
            with block("start_seen", (1,)) as (zero,):
                T.buffer_store(self.seen, T.int32(0), [zero])
        self.O = f.clear("start_output", width)
        self.visit(KeyChunks(f, self.token), "key", "value")
        if f.problem.additional_kv:
            self.visit(AdditionalChunks(f), "additional_keys", "additional_values")
        inverse = scalar("inverse", T.float32(1) / self.total[0])
        lse = log2_sum(self.highest[0], self.total[0], T.log2) * T.float32(LN2)
        if self.seen is not None:
            lse = T.Select(self.seen[0] == 0, T.float32(-math.inf), lse)
        natural = scalar("natural", lse)
        with block("output", (f.padded(width),), where=lambda d: tirx.all(is_row, d < width)) as (d,):
            result = self.O[d] * inverse[0]
            if self.seen is not None:
                result = T.Select(self.seen[0] == 0, T.float32(0), result)
            T.buffer_store(self.tensors["output"], T.Cast(f.dtype, result), self.at(d))
        with block("lse", (1,), where=lambda _: is_row) as (zero,):
            T.buffer_store(self.tensors["lse"], natural[zero], [self.batch, *self.token, self.head])

    def visit(self, chunks: Chunks, key: str, value: str) -> None:
        """Attend to every chunk of keys."""
        f = self.f
        kept = [f.whole(buffer) for buffer in (self.highest, self.total, self.O, self.seen) if buffer is not None]
        with block(f"{chunks.prefix}chunk", chunks.counts, where=lambda *chunk: chunks.meets(chunk)) as chunk:
            T.reads(f.whole(self.Q), f.whole(self.tensors[key]), f.whole(self.tensors[value]), *kept)
            T.writes(*kept)
            at = chunks.rows(chunk, self.batch, self.head_kv)
            keys = f.stage(f"{chunks.prefix}key", self.tensors[key], at, chunks.size, f.problem.head_dim)
            scores = self.scores(chunks, chunk, keys)
            values = f.stage(f"{chunks.prefix}value", self.tensors[value], at, chunks.size, f.problem.head_dim_v)
            self.merge(chunks, scores, values)

    def scores(self, chunks: Chunks, chunk: Any, keys: Buffer) -> Buffer:
        """Return the scores of a chunk, minus infinity where there is no key."""
        S = self.f.products(f"{chunks.prefix}score", self.Q, keys)
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

    def merge(self, chunks: Chunks, scores: Buffer, values: Buffer) -> None:
        """Add a chunk's weights and weighted values, all relative to the highest score so far."""
        f, prefix = self.f, chunks.prefix
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
        f.accumulate(f"{prefix}weighted", P, values, self.O, factor[0])
        with block(f"{prefix}merge_total", (1,)) as (zero,):
            T.buffer_store(self.total, self.total[zero] * factor[zero] + total[zero], [zero])
        with block(f"{prefix}merge_highest", (1,)) as (zero,):
            T.buffer_store(self.highest, raised[zero], [zero])
