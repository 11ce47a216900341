"""The forward and its derivative in one direction, directly: a query at a time, over exactly the keys of its window.

The formula, its names and the parameters are in `na_compiler.schedules.shared.tangents`. The mean of what scores change
by is that of the keys so far; the sum so far moves with it from chunk to chunk.
"""

from __future__ import annotations

from typing import Any

from tvm import tirx
from tvm.tirx.script import builder as T

from na_compiler.schedules.shared.tangents import mean_so_far, natural_mean, with_tangents
from na_compiler.schedules.simt.chunks import Chunks
from na_compiler.schedules.simt.forward import Query, Weights, describe
from na_compiler.schedules.simt.frame import Buffer, DirectFrame, registers, scalar
from na_compiler.schedules.simt.plan import DirectPlan
from na_compiler.tensorir.arithmetic import LN2
from na_compiler.tensorir.blocks import block, reduction

__all__ = ["direct_tangent"]


def direct_tangent(plan: DirectPlan) -> tirx.PrimFunc:
    """Describe the forward and its derivative of a problem, cut as the plan says.

    Returns
    -------
    PrimFunc
        ``main`` of the parameters in `na_compiler.schedules.shared.tangents`.
    """
    return describe(plan, _Query)


class _Query(Query):
    """Emits what belongs to one query, and to its tangent."""

    @classmethod
    def inputs(cls, f: DirectFrame) -> dict[str, Any]:
        return f.inputs() | f.inputs("tangent_")

    @classmethod
    def outputs(cls, f: DirectFrame) -> dict[str, Any]:
        return with_tangents(super().outputs(f))

    def start(self) -> None:
        super().start()
        self.dQ = self.load("tangent_query")
        self.mean = registers((1,))
        self.start_number("mean", self.mean, 0.0)
        self.dO = self.f.clear("start_tangent", self.f.problem.head_dim_v)

    def kept(self) -> list[Buffer]:
        return [*super().kept(), self.mean, self.dO]

    def read(self, key: str, value: str) -> list[Buffer]:
        return [*super().read(key, value), self.dQ, self.tensors[f"tangent_{key}"], self.tensors[f"tangent_{value}"]]

    def step(self, chunks: Chunks, chunk: Any, key: str, value: str) -> None:
        at = chunks.rows(chunk, self.batch, self.head_kv)
        K, dK = self.stage(chunks, at, "key", key), self.stage(chunks, at, "tangent_key", f"tangent_{key}")
        scores = self.scores(chunks, chunk, K)
        # Two sums: TensorIR knows none of two products over threads.
        by_query = self.f.products(f"{chunks.prefix}query_slope", self.dQ, K, self.f.problem.head_dim)
        by_key = self.f.products(f"{chunks.prefix}key_slope", self.Q, dK, self.f.problem.head_dim)
        slopes = registers(chunks.size)
        with block(f"{chunks.prefix}tangent_seen", chunks.size) as place:
            slope = (by_query[list(place)] + by_key[list(place)]) * T.float32(LN2)  # They are in units of log2(e).
            T.buffer_store(slopes, chunks.only(chunk, place, slope), list(place))
        V, dV = self.stage(chunks, at, "value", value), self.stage(chunks, at, "tangent_value", f"tangent_{value}")
        weights = self.weigh(chunks, scores)
        # Before the weighted sum of values, which the tangent's is moved by as it was, is another one.
        self.merge_tangent(chunks, weights, slopes, V, dV)
        self.merge(chunks, weights, V)

    def merge_tangent(self, chunks: Chunks, weights: Weights, slopes: Buffer, values: Buffer, tangents: Buffer) -> None:
        """Add a chunk's tangent, relative to the mean of what scores change by over all keys so far."""
        prefix, P, factor = chunks.prefix, weights.P, weights.factor
        weighed = registers((1,))
        with reduction(f"{prefix}tangent_total", (1,), chunks.size) as (zero, *place):
            with T.init():
                T.buffer_store(weighed, T.float32(0), [zero])
            T.buffer_store(weighed, weighed[zero] + P[place] * slopes[place], [zero])
        before = scalar(f"{prefix}before", self.total[0] * factor[0])
        total = before[0] + weights.total[0]
        mean = scalar(f"{prefix}mean", mean_so_far(before[0], self.mean[0], weighed[0], total))
        moved = scalar(f"{prefix}moved", self.mean[0] - mean[0])
        dP = registers(chunks.size)
        with block(f"{prefix}tangent_weight", chunks.size) as place:
            T.buffer_store(dP, P[list(place)] * (slopes[list(place)] - mean[0]), list(place))
        self.f.accumulate(
            f"{prefix}tangent_weighted",
            [(dP, values), (P, tangents)],
            self.dO,
            lambda d: (self.dO[d] + moved[0] * self.O[d]) * factor[0],
        )
        with block(f"{prefix}merge_mean", (1,)) as (zero,):
            T.buffer_store(self.mean, mean[zero], [zero])

    def finish(self, is_row: Any) -> Buffer:
        inverse = super().finish(is_row)
        natural = scalar("tangent_natural", natural_mean(self.mean[0], self.total[0]))
        self.store("tangent_output", lambda d: self.dO[d] * inverse[0], is_row)
        self.store_number("tangent_lse", natural, is_row)
        return inverse
