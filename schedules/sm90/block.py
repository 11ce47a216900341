"""`Block`: what the warps of a thread block share: arguments, shared memory, barriers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tvm import tirx

from na_compiler.schedules.shared.trace import I, T, emit, when
from na_compiler.schedules.sm90.maps import TensorMap
from na_compiler.schedules.sm90.plan import Plan

__all__ = ["Arguments", "Block"]

Expr = Any
_WARPS = 4  # of a warpgroup


class Arguments:
    """The function's arguments, and the tensor maps of them.

    ``main(query, key, value, [additional_keys, additional_values,] scale, output, lse)``: inputs may have any strides
    that TMA takes (multiples of 16 bytes, the last one 1); output and lse are contiguous.
    """

    def __init__(self, plan: Plan) -> None:
        problem = plan.problem
        self.batch = tirx.Var("batch", "int64")
        self.additional: Expr = tirx.Var("additional", "int64") if problem.additional_kv else None
        tokens = (self.batch, *problem.layout)
        self.query = self._input("query", (*tokens, problem.heads, problem.head_dim), plan)
        self.key = self._input("key", (*tokens, problem.heads_kv, problem.head_dim), plan)
        self.value = self._input("value", (*tokens, problem.heads_kv, problem.head_dim_v), plan)
        if problem.additional_kv:
            extra = (self.batch, self.additional)
            self.keys = self._input("additional_keys", (*extra, problem.heads_kv, problem.head_dim), plan)
            self.values = self._input("additional_values", (*extra, problem.heads_kv, problem.head_dim_v), plan)
        self.scale = I.arg("scale", tirx.Var("scale", "float32"))
        shape = (*tokens, problem.heads, problem.head_dim_v)
        self.output = I.arg("output", I.buffer(_wide(shape), problem.dtype, align=16))
        self.lse = I.arg("lse", I.buffer(_wide(shape[:-1]), "float32", align=4))

    @property
    def count(self) -> Expr:
        """Number of additional keys, as the device counts; ``None`` without them."""
        return None if self.additional is None else T.Cast("int32", self.additional)

    @staticmethod
    def _input(name: str, shape: tuple[Expr, ...], plan: Plan) -> Any:
        """Declare a tensor with strides that the caller chooses."""
        strides: list[Expr] = [tirx.Var(f"{name}_stride{axis}", "int64") for axis in range(len(shape) - 1)]
        if len(shape) == 6:  # Three axes of tokens: heads and head_dim are one axis of the map.
            strides[-1] = tirx.IntImm("int64", shape[-1])
        strides.append(tirx.IntImm("int64", 1))
        return I.arg(name, I.buffer(_wide(shape), plan.problem.dtype, strides=strides, align=16))

    def encode(self, plan: Plan) -> dict[str, TensorMap]:
        """Emit the host's part: tensor maps by name."""
        dilation = plan.problem.dilation
        maps = {
            "query": TensorMap(plan, self.query, plan.columns, plan.own_box, dilation),
            "key": TensorMap(plan, self.key, plan.columns, plan.stream_tile, dilation),
            "value": TensorMap(plan, self.value, plan.columns_v, plan.stream_tile, dilation),
        }
        if plan.stores_by_tma:
            maps["output"] = TensorMap(plan, self.output, plan.columns_v, plan.own_box)
        for tensor_map in maps.values():
            tensor_map.encode()
        if plan.problem.additional_kv:
            maps["additional_keys"] = TensorMap(plan, self.keys, plan.columns, (plan.streamed,))
            maps["additional_values"] = TensorMap(plan, self.values, plan.columns_v, (plan.streamed,))
            with when(self.additional > 0):
                maps["additional_keys"].encode()
                maps["additional_values"].encode()
        return maps


def _wide(shape: Sequence[Expr]) -> list[Expr]:
    """Return a shape in int64 throughout: TVM's packed ABI trips over mixed widths."""
    return [tirx.IntImm("int64", extent) if isinstance(extent, int) else extent for extent in shape]


class Block:
    """Shared memory and barriers of a thread block.

    Shared memory holds each warpgroup's queries, a ring of tiles of keys, one of values, and the barriers. A tile is
    loaded into a stage when its ``empty`` barrier says that all warps have done with it, and used when its ``full``
    barrier says that all bytes have come.
    """

    def __init__(self, plan: Plan, arguments: Arguments, maps: dict[str, TensorMap]) -> None:
        self.plan, self.arguments, self.maps = plan, arguments, maps
        self.dtype = plan.problem.dtype
        self.warp, self.lane = I.warp_id([plan.threads // 32]), I.lane_id([32])
        self.thread = I.thread_id([plan.threads])
        self._memory = I.alloc_buffer([plan.shared_bytes], "uint8", scope="shared.dyn", align=1024)
        stages = plan.config.stages
        self.queries = self._view(0, plan.config.warpgroups * plan.query_bytes // 2)
        self.query_words = self._view(0, plan.config.warpgroups * plan.query_bytes // 4, "uint32")
        self.keys = self._view(plan.key_offset, stages * plan.key_bytes // 2)
        self.values = self._view(plan.value_offset, stages * plan.value_bytes // 2)
        self._barriers = self._view(plan.barrier_offset, plan.barriers, "uint64", 8)
        self._place = {"query": 0, "query_empty": 1}
        for number, name in enumerate(("key", "key_empty", "value", "value_empty")):
            self._place[name] = 2 + number * stages

    def _view(self, offset: int, count: int, dtype: str | None = None, align: int = 1024) -> Any:
        return I.decl_buffer(
            [count], dtype or self.dtype, data=self._memory.data, byte_offset=offset, scope="shared.dyn", align=align
        )

    def barrier(self, name: str, stage: Expr = 0) -> Expr:
        """Return the address of a barrier."""
        return self._barriers.ptr_to([self._place[name] + stage])

    def initialise(self) -> None:
        """Set the barriers up, once for all threads."""
        computing = _WARPS * self.plan.config.warpgroups
        with when(self.thread == 0):
            self._init("query", 0, 1)
            self._init("query_empty", 0, computing)
            for stage in range(self.plan.config.stages):
                for name, count in (("key", 1), ("key_empty", computing), ("value", 1), ("value_empty", computing)):
                    self._init(name, stage, count)
        emit(T.ptx.fence.mbarrier_init.release.cluster())
        emit(T.ptx.fence.proxy.async_.shared__cta())
        emit(T.cuda.cta_sync())

    def _init(self, name: str, stage: int, count: int) -> None:
        emit(T.ptx.mbarrier.init.shared.b64(self.barrier(name, stage), T.uint32(count)))

    def wait(self, name: str, stage: Expr, parity: Expr) -> None:
        """Wait for a phase of a barrier."""
        emit(T.cuda.mbarrier_wait(self.barrier(name, stage), parity))

    def arrive(self, name: str, stage: Expr = 0) -> None:
        """Arrive at a barrier, once for the warp."""
        with when(self.lane == 0):
            emit(T.ptx.mbarrier.arrive.shared.b64(self.barrier(name, stage), T.uint32(1)))

    def expect(self, name: str, stage: Expr, count: int) -> None:
        """Arrive at a barrier, and let it wait for a number of bytes as well."""
        emit(T.ptx.mbarrier.arrive.expect_tx.shared.b64(self.barrier(name, stage), T.uint32(count)))

    def stage(self, tile: Expr) -> Expr:
        """Return where in its ring a tile is, counted from the block's first."""
        return tile % self.plan.config.stages

    def phase(self, tile: Expr) -> Expr:
        """Return the parity of a tile's turn in its stage."""
        return (tile // self.plan.config.stages) % 2
