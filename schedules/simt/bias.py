"""The gradient of the bias by relative position: place by place of the table, over strips of queries.

A place collects from every query that sees a key at its distance. No two tasks add to one number, so there are no
atomics, and the bits are the same every time. The price is that scores are computed once more.
"""

from __future__ import annotations

from typing import Any

from tvm import tirx
from tvm.tirx.script import builder as T

from na_compiler.operands import KEY_MASK, RELATIVE_POSITION_BIAS
from na_compiler.schedules.simt.frame import At, Buffer, DirectFrame, Place, registers, scalar
from na_compiler.tensorir.arithmetic import LOG2_E, below, weight
from na_compiler.tensorir.blocks import block, reduction

__all__ = ["GRAD_BIAS", "PARTS", "bias_task", "gather_bias"]

GRAD_BIAS = f"grad_{RELATIVE_POSITION_BIAS}"
# What strips of queries leave of it, among the parameters of the backward.
PARTS = "bias_parts"


def bias_task(f: DirectFrame, tensors: dict[str, Buffer]) -> None:
    """Sum over each strip of queries what it gives to each place of the table."""
    p, parts = f.problem, tensors[PARTS]
    names = ("query", "key", "value", "grad_output", "lse", "delta", RELATIVE_POSITION_BIAS, KEY_MASK)
    with f.table_rows("bias_task", p.heads, f.plan.bias_strips) as (batch, head, strip, part, row):
        T.reads(*(f.whole(tensors[name]) for name in names if name in tensors))
        T.writes(f.whole(parts))
        number, is_place = f.table_row(part, row)
        sum_ = registers((1,))
        with block("start_bias", (1,)) as (zero,):
            T.buffer_store(sum_, T.float32(0), [zero])
        with block("bias_visit", (f.plan.bias_strip,)) as (query,):
            _Pair(f, tensors, batch, head, f.table_place(number)).add(f.places.of_bias_strip(strip, query), sum_)
        with block("bias_store", (1,), where=lambda _: is_place) as (zero,):
            T.buffer_store(parts, sum_[zero], [batch, head, strip, number])


class _Pair:
    """Emits what belongs to a query and the key at a distance from it."""

    def __init__(self, f: DirectFrame, tensors: dict[str, Buffer], batch: Any, head: Any, place: Place) -> None:
        self.f, self.tensors, self.batch, self.head, self.place = f, tensors, batch, head, place

    def add(self, number: Any, sum_: Buffer) -> None:
        """Add the gradient of the score of a query, if it sees the key."""
        f, p, tensors = self.f, self.f.problem, self.tensors
        token = f.token(f.places.clamp(number))
        conditions, key = [f.places.exists(number)], []
        for along, place in zip(f.places.along_axes(token), self.place, strict=True):
            where, sees = along.key_at(place)
            key.append(where)
            conditions.append(sees)
        key = key[-p.rank :]
        at_query = [self.batch, *token, self.head]
        at_key = [self.batch, *key, self.head // p.group_size]
        if KEY_MASK in tensors:
            conditions.append(tensors[KEY_MASK][[self.batch, *key]])
        names = ("query", "key", "value", "grad_output", "lse", "delta", RELATIVE_POSITION_BIAS)
        with block("bias_pair", (1,), where=lambda _: tirx.all(*conditions)):
            T.reads(*(f.whole(tensors[name]) for name in names), f.whole(sum_))
            T.writes(f.whole(sum_))
            Q, K, G, V = (
                f.load(f"bias_{name}", tensors[tensor], _row(at), width)
                for name, tensor, at, width in (
                    ("query", "query", at_query, p.head_dim),
                    ("key", "key", at_key, p.head_dim),
                    ("grad", "grad_output", at_query, p.head_dim_v),
                    ("value", "value", at_key, p.head_dim_v),
                )
            )
            score = f.dot("bias_score", p.head_dim, lambda d: Q[d] * K[d])
            product = f.dot("bias_grad_weight", p.head_dim_v, lambda d: G[d] * V[d])
            bias = tensors[RELATIVE_POSITION_BIAS][[self.head, *self.place[-p.rank :]]]
            exponent = (score[0] * tensors["scale"] + bias) * T.float32(LOG2_E)
            lse = below(tensors["lse"][at_query] * T.float32(LOG2_E))
            probability = scalar("bias_weight", weight(exponent, lse, T.exp2))
            delta = tensors["delta"][[self.batch, self.head, f.places.clamp(number)]]
            with block("bias_add", (1,)) as (zero,):
                T.buffer_store(sum_, sum_[zero] + probability[0] * (product[0] - delta), [zero])


def _row(at: list[Any]) -> At:
    return lambda d: [*at, d]


def gather_bias(f: DirectFrame, tensors: dict[str, Buffer]) -> None:
    """Add up what the strips give to each place, in order."""
    parts, gradient = tensors[PARTS], tensors[GRAD_BIAS]
    with f.table_rows("gather_bias", f.problem.heads) as (batch, head, part, row):
        T.reads(f.whole(parts))
        T.writes(f.whole(gradient))
        number, is_place = f.table_row(part, row)
        total = registers((1,))
        with reduction("bias_total", (1,), (f.plan.bias_strips,)) as (zero, strip):
            with T.init():
                T.buffer_store(total, T.float32(0), [zero])
            T.buffer_store(total, total[zero] + parts[[batch, head, strip, number]], [zero])
        with block("bias_sum", (1,), where=lambda _: is_place) as (zero,):
            at = [batch, head, *f.table_place(number)[-f.problem.rank :]]
            T.buffer_store(gradient, total[zero], at)
