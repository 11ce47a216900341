"""The forward and its derivative in one direction, in one pass, a strip of queries at a time.

The formula, its names and the parameters are in `na_compiler.schedules.shared.tangents`.
"""

from __future__ import annotations

from typing import Any

from tvm import tirx
from tvm.tirx.script import builder as T

from na_compiler.schedules.cpu.forward import Sums, Task, Visit, describe
from na_compiler.schedules.cpu.frame import Frame, Place
from na_compiler.schedules.cpu.plan import TilingPlan
from na_compiler.schedules.cpu.steps import Buffer, Keys, Visible, products, trimmed, weighted_rows
from na_compiler.schedules.shared.tangents import mean_so_far, natural_mean, with_tangents
from na_compiler.tensorir.arithmetic import LN2
from na_compiler.tensorir.blocks import block, local, reduction, update

__all__ = ["tangent"]


def tangent(plan: TilingPlan) -> tirx.PrimFunc:
    """Describe the forward and its derivative of a problem, cut as the plan says.

    Returns
    -------
    PrimFunc
        ``main`` of the parameters in `na_compiler.schedules.shared.tangents`.
    """
    return describe(plan, _Task)


class _Sums(Sums):
    """What a tile gathers, and beside it: the mean of ``S'``, and the sum of ``P (S' - mean) value + P value'``."""

    def __init__(self, f: Frame, *first: int) -> None:
        super().__init__(f, *first)
        self.mean = local((*first, f.lanes))
        self.tangent = local((*first, *f.patches, *f.patch, f.staged_dim_v))

    def starts(self) -> list[tuple[Buffer, float]]:
        return [*super().starts(), (self.mean, 0.0), (self.tangent, 0.0)]


class _Task(Task):
    """Emits what a task of the forward does, and the same of the tangents beside it."""

    sums = _Sums

    @classmethod
    def inputs(cls, f: Frame) -> dict[str, Any]:
        return f.inputs() | f.inputs("tangent_")

    @classmethod
    def outputs(cls, f: Frame) -> dict[str, Any]:
        return with_tangents(super().outputs(f))

    def query_rows(self) -> list[tuple[Buffer, int]]:
        return [*super().query_rows(), (self.tensors["tangent_query"], self.f.head_dim)]

    def output_rows(self) -> list[tuple[Buffer, int]]:
        return [*super().output_rows(), (self.tensors["tangent_output"], self.f.head_dim_v)]

    def rows(self, keys: Keys) -> list[tuple[str, Buffer, int]]:
        rows = super().rows(keys)
        tangents = zip(self.names(keys), rows, strict=True)
        return [
            *rows,
            *((f"tangent_{kind}", self.tensors[f"tangent_{name}"], width) for name, (kind, _, width) in tangents),
        ]

    def gather(self, visit: Visit, sums: Sums) -> tuple[Visible, Buffer, Buffer]:
        visible, Q, P = super().gather(visit, sums)
        assert isinstance(sums, _Sums)
        f, keys = self.f, visit.keys
        K, V, dK, dV = visit.staged
        dQ = self.query_lanes(visit, "tangent_query")
        slopes, dP = local((*keys.visited, f.lanes)), local((*keys.visited, f.lanes))

        def hide(slope: Any, u: Place, lane: Any) -> Any:
            # The queries are in units of log2(e). Hidden too, not only multiplied by P = 0: the product with a hidden
            # key may overflow.
            return visible.hide(slope * T.float32(LN2), u, lane, hidden=0.0)

        offset = keys.offset(self.strip, visit.tile)
        products("tangent_score", f, keys, [(K, dQ), (dK, Q)], offset, f.head_dim, slopes, hide)
        self.center(visit, P, slopes, sums)
        with (
            trimmed(keys, "tangent_weight", [P, slopes, sums.mean], [dP]),
            block(f"{keys.prefix}tangent_weight", (*keys.loops, f.lanes)) as (*u, lane),
        ):
            at = [*u, lane]
            T.buffer_store(dP, P[at] * (slopes[at] - sums.mean[lane]), at)
        pairs = [(dP, V), (P, dV)]
        weighted_rows("tangent_weighted", f, keys, pairs, self.strip, visit.tile, sums.tangent)
        return visible, Q, P

    def center(self, visit: Visit, P: Buffer, slopes: Buffer, sums: _Sums) -> None:
        """Find the mean of ``S'``, over these keys and those before."""
        f, keys, kept = self.f, visit.keys, visit.kept
        weighed = local((f.lanes,))
        with (
            trimmed(keys, "tangent_total", [P, slopes], [weighed]),
            reduction(f"{keys.prefix}tangent_total", (f.lanes,), keys.loops) as (lane, *u),
        ):
            with T.init():
                T.buffer_store(weighed, T.float32(0), [lane])
            T.buffer_store(weighed, weighed[lane] + P[[*u, lane]] * slopes[[*u, lane]], [lane])
        with block(f"{keys.prefix}mean", (f.lanes,)) as (lane,):
            if kept is None:
                mean = weighed[lane] / sums.total[lane]
            else:
                assert isinstance(kept, _Sums)
                at = [*visit.place, lane]
                before = kept.total[at] * visit.factor[lane]
                total = before + sums.total[lane]
                mean = mean_so_far(before, kept.mean[at], weighed[lane], total)
            T.buffer_store(sums.mean, mean, [lane])

    def merge(self, visit: Visit, sums: Sums, kept: Sums) -> None:
        assert isinstance(sums, _Sums)
        assert isinstance(kept, _Sums)
        f, prefix, tile, factor = self.f, visit.keys.prefix, visit.place, visit.factor
        vector = f.plan.tiling.vector
        moved = local((f.lanes,))
        with block(f"{prefix}moved", (f.lanes,)) as (lane,):
            T.buffer_store(moved, kept.mean[[*tile, lane]] - sums.mean[lane], [lane])
        # Before the weighted sum of values, which it is moved by as it was, is another one.
        with update(f"{prefix}merge_tangent", (*f.patches, *f.patch, f.staged_dim_v), vector) as index:
            at, lane = [*tile, *index], f.lane_of(index[:3], index[3:6])
            before = (kept.tangent[at] + moved[lane] * kept.weighted[at]) * factor[lane]
            T.buffer_store(kept.tangent, before + sums.tangent[list(index)], at)
        with update(f"{prefix}merge_mean", (f.lanes,), vector) as (lane,):
            T.buffer_store(kept.mean, sums.mean[lane], [*tile, lane])
        super().merge(visit, sums, kept)

    def finish(self, sums: Sums, member: Any, tile: Place, *first: Any) -> Buffer:
        inverse = super().finish(sums, member, tile, *first)
        assert isinstance(sums, _Sums)
        f = self.f
        mean = local((f.lanes,))
        with block("tangent_natural", (f.lanes,)) as (lane,):
            at = [*first, lane]
            T.buffer_store(mean, natural_mean(sums.mean[at], sums.total[at]), [lane])
        self.store("tangent_output", lambda index, lane: sums.tangent[[*first, *index]] * inverse[lane], member, tile)
        self.store_number("tangent_lse", mean, member, tile)
        return inverse
