"""Arguments of the backward, and the tensor maps of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from tvm import tirx

from na_compiler.schedules.shared.trace import I, T, emit, when
from na_compiler.schedules.sm90.backward.plan import PLANES, BackwardPlan, SweepPlan, statistics_shape
from na_compiler.schedules.sm90.block import strided, wide
from na_compiler.schedules.sm90.maps import TensorMap
from na_compiler.schedules.sm90.plan import ROWS

__all__ = ["BackwardArguments", "StatisticsMap"]

Expr = Any
_PAIRS = {
    "queries": (("query", "grad_output"), ("key", "value")),
    "keys": (("key", "value"), ("query", "grad_output")),
    "additional": (("additional_keys", "additional_values"), ("query", "grad_output")),
}


class BackwardArguments:
    """The function's arguments.

    ``main(query, key, value, [additional_keys, additional_values,] output, grad_output, lse, grad_lse, scale,
    grad_query, grad_key, grad_value, [grad_additional_keys, grad_additional_values,] statistics,
    [additional_key_space, additional_value_space])``: inputs, ``grad_output`` and the first three gradients may have
    any strides that TMA takes, all others are contiguous. ``grad_lse`` may have no batch entries, and
    is 0 then. The last ones are workspace.
    """

    def __init__(self, plan: BackwardPlan | SweepPlan) -> None:
        self.plan = plan
        problem = plan.problem
        self.batch = tirx.Var("batch", "int64")
        self.additional: Expr = tirx.Var("additional", "int64") if problem.additional_kv else None
        # The batch, or 0 where there is no gradient of lse.
        self.given = tirx.Var("given", "int64")
        tokens = (self.batch, *problem.layout)
        shapes: dict[str, Sequence[Expr]] = {
            "query": (*tokens, problem.heads, problem.head_dim),
            "key": (*tokens, problem.heads_kv, problem.head_dim),
            "value": (*tokens, problem.heads_kv, problem.head_dim_v),
        }
        if problem.additional_kv:
            extra = (self.batch, self.additional, problem.heads_kv)
            shapes["additional_keys"] = (*extra, problem.head_dim)
            shapes["additional_values"] = (*extra, problem.head_dim_v)
        self.tensors = {name: strided(name, shape, problem.dtype) for name, shape in shapes.items()}
        output = (*tokens, problem.heads, problem.head_dim_v)
        self._contiguous("output", output, problem.dtype)
        self.tensors["grad_output"] = strided("grad_output", output, problem.dtype)
        self._contiguous("lse", output[:-1], "float32")
        self._contiguous("grad_lse", (self.given, *output[1:-1]), "float32")
        self.scale = I.arg("scale", tirx.Var("scale", "float32"))
        for name, shape in shapes.items():
            if name.startswith("additional"):
                self._contiguous(f"grad_{name}", shape, problem.dtype)
            else:
                self.tensors[f"grad_{name}"] = strided(f"grad_{name}", shape, problem.dtype)
        self._contiguous("statistics", (self.batch, *statistics_shape(problem)), "float32")
        if problem.additional_kv:
            parts = (self.batch, problem.heads_kv, plan.strips, self.additional)
            self._contiguous("additional_key_space", (*parts, problem.head_dim), "float32")
            self._contiguous("additional_value_space", (*parts, problem.head_dim_v), "float32")

    def _contiguous(self, name: str, shape: Sequence[Expr], dtype: str) -> None:
        align = 4 if name in ("lse", "grad_lse") else 16
        self.tensors[name] = I.arg(name, I.buffer(wide(shape), dtype, align=align))

    def __getitem__(self, name: str) -> Any:
        return self.tensors[name]

    @property
    def count(self) -> Expr:
        """Number of additional keys, as the device counts; ``None`` without them."""
        return None if self.additional is None else T.Cast("int32", self.additional)

    def encode(self, plan: SweepPlan) -> Maps:
        """Emit the host's part of a sweep over the layout: its tensor maps."""
        own, stream = _PAIRS[plan.side]
        dilation = plan.problem.dilation
        own_dilation = None if plan.side == "additional" else dilation
        columns = plan.columns
        maps = Maps(
            [TensorMap(self[own[i]], columns[i], plan.own_box, own_dilation) for i in plan.owned],
            [TensorMap(self[stream[i]], columns[i], plan.stream_tile, dilation) for i in range(2)],
        )
        if not plan.of_queries:
            maps.statistics = StatisticsMap(self["statistics"], plan)
        for tensor_map in (*maps.own, *maps.stream):
            tensor_map.encode()
        if maps.statistics is not None:
            maps.statistics.encode()
        return maps

    def encode_additional(self, plan: SweepPlan, maps: Maps) -> None:
        """Emit the maps of additional keys that stream by as well; there are none of no keys."""
        names = _PAIRS["additional"][0]
        maps.additional = [TensorMap(self[name], plan.columns[i], (plan.streamed,)) for i, name in enumerate(names)]
        with when(self.additional > 0):
            for tensor_map in maps.additional:
                tensor_map.encode()


class Maps:
    """Tensor maps of a sweep: of the owned pair, of the pair that streams by, of additional keys, and of statistics."""

    def __init__(self, own: list[TensorMap], stream: list[TensorMap]) -> None:
        assert own[0].box[0] * own[0].pieces * math.prod(own[0].box[1:]) == ROWS
        self.own, self.stream = own, stream
        self.additional: list[TensorMap] = []
        self.statistics: StatisticsMap | None = None


class StatisticsMap:
    """The tensor map of statistics: tokens of a dilation group; planes, batch, heads and groups are one axis.

    Parameters
    ----------
    buffer
        The workspace.
    plan
        Of the kernel.
    """

    def __init__(self, buffer: Any, plan: SweepPlan) -> None:
        self.buffer, self.plan = buffer, plan
        self.rank = plan.rank + 1
        self.handle = I.Bind(T.tvm_stack_alloca("tensormap", 1))

    def encode(self) -> None:
        """Emit the call that fills the map in."""
        plan = self.plan
        _, planes, heads, groups, *tokens = self.buffer.shape
        pitches = [4 * math.prod(int(extent) for extent in tokens[axis:]) for axis in reversed(range(plan.rank))]
        # In order: extents, pitches, box, steps; no interleaving, no swizzle, 256 bytes into L2, zeros beyond.
        emit(
            T.call_packed(
                "runtime.cuTensorMapEncodeTiled",
                self.handle,
                "float32",
                self.rank,
                self.buffer.data,
                *reversed(plan.lengths),
                self.buffer.shape[0] * (planes * heads * groups),
                *pitches,
                *reversed(plan.stream_tile),
                1,
                *([1] * self.rank),
                *(0, 0, 3, 0),
            )
        )

    def at(self, batch: Expr, plane: int, head: Expr, group: Expr, positions: Sequence[Expr]) -> list[Expr]:
        """Return the coordinates of a box."""
        outer = ((batch * PLANES + plane) * self.plan.problem.heads + head) * self.plan.groups + group
        return [*reversed(positions), outer]

    @property
    def load(self) -> Any:
        """The instruction that fetches a box."""
        return T.ptx[f"cp.async.bulk.tensor.{self.rank}d.shared::cluster.global.mbarrier::complete_tx::bytes"]
