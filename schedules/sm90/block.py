"""`Block`: what the warps of a thread block share: arguments, shared memory, barriers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tvm import tirx

from na_compiler.schedules.shared.trace import I, T, emit, when
from na_compiler.schedules.sm90.maps import TensorMap
from na_compiler.schedules.sm90.plan import Plan

__all__ = ["Arguments", "Block", "SharedBlock", "strided", "wide"]

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
        self.query = strided("query", (*tokens, problem.heads, problem.head_dim), problem.dtype)
        self.key = strided("key", (*tokens, problem.heads_kv, problem.head_dim), problem.dtype)
        self.value = strided("value", (*tokens, problem.heads_kv, problem.head_dim_v), problem.dtype)
        if problem.additional_kv:
            extra = (self.batch, self.additional)
            self.keys = strided("additional_keys", (*extra, problem.heads_kv, problem.head_dim), problem.dtype)
            self.values = strided("additional_values", (*extra, problem.heads_kv, problem.head_dim_v), problem.dtype)
        self.scale = I.arg("scale", tirx.Var("scale", "float32"))
        shape = (*tokens, problem.heads, problem.head_dim_v)
        self.output = I.arg("output", I.buffer(wide(shape), problem.dtype, align=16))
        self.lse = I.arg("lse", I.buffer(wide(shape[:-1]), "float32", align=4))

    @property
    def count(self) -> Expr:
        """Number of additional keys, as the device counts; ``None`` without them."""
        return None if self.additional is None else T.Cast("int32", self.additional)

    def encode(self, plan: Plan) -> dict[str, TensorMap]:
        """Emit the host's part: tensor maps by name."""
        dilation = plan.problem.dilation
        maps = {
            "query": TensorMap(self.query, plan.columns, plan.own_box, dilation),
            "key": TensorMap(self.key, plan.columns, plan.stream_tile, dilation),
            "value": TensorMap(self.value, plan.columns_v, plan.stream_tile, dilation),
        }
        if plan.stores_by_tma:
            maps["output"] = TensorMap(self.output, plan.columns_v, plan.own_box)
        for tensor_map in maps.values():
            tensor_map.encode()
        if plan.problem.additional_kv:
            maps["additional_keys"] = TensorMap(self.keys, plan.columns, (plan.streamed,))
            maps["additional_values"] = TensorMap(self.values, plan.columns_v, (plan.streamed,))
            with when(self.additional > 0):
                maps["additional_keys"].encode()
                maps["additional_values"].encode()
        return maps


def strided(name: str, shape: Sequence[Expr], dtype: str) -> Any:
    """Declare a tensor ``[batch, *tokens, heads, head_dim]`` with strides that the caller chooses."""
    strides: list[Expr] = [tirx.Var(f"{name}_stride{axis}", "int64") for axis in range(len(shape) - 1)]
    if len(shape) == 6:  # Three axes of tokens: heads and head_dim are one axis of the map.
        strides[-1] = tirx.IntImm("int64", shape[-1])
    strides.append(tirx.IntImm("int64", 1))
    return I.arg(name, I.buffer(wide(shape), dtype, strides=strides, align=16))


def wide(shape: Sequence[Expr]) -> list[Expr]:
    """Return a shape in int64 throughout: TVM's packed ABI trips over mixed widths."""
    return [tirx.IntImm("int64", extent) if isinstance(extent, int) else extent for extent in shape]


class SharedBlock:
    """Threads, shared memory and barriers of a thread block.

    Parameters
    ----------
    plan
        Of the kernel.
    shared_bytes, barrier_offset, barriers
        Bytes of shared memory, where barriers begin in it, and their number.
    """

    def __init__(self, plan: Any, shared_bytes: int, barrier_offset: int, barriers: int) -> None:
        self.plan = plan
        self.dtype = plan.problem.dtype
        self.warp, self.lane = I.warp_id([plan.threads // 32]), I.lane_id([32])
        self.thread = I.thread_id([plan.threads])
        self._memory = I.alloc_buffer([shared_bytes], "uint8", scope="shared.dyn", align=1024)
        self._barriers = self.view(barrier_offset, barriers, "uint64", 8)
        self._places: dict[str, tuple[int, int]] = {}

    def view(self, offset: int, count: int, dtype: str | None = None, align: int = 1024) -> Any:
        """Return a part of shared memory, of the problem's dtype or another."""
        return I.decl_buffer(
            [count], dtype or self.dtype, data=self._memory.data, byte_offset=offset, scope="shared.dyn", align=align
        )

    def place_barriers(self, counts: Mapping[str, int]) -> None:
        """Name the barriers: so many of each name, one after another."""
        first = 0
        for name, count in counts.items():
            self._places[name] = (first, count)
            first += count

    def barrier(self, name: str, stage: Expr = 0) -> Expr:
        """Return the address of a barrier."""
        return self._barriers.ptr_to([self._places[name][0] + stage])

    def initialise_barriers(self, arrivals: Mapping[str, int]) -> None:
        """Set the barriers up, once for all threads, for so many arrivals a phase at each of a name."""
        with when(self.thread == 0):
            for name, count in arrivals.items():
                for stage in range(self._places[name][1]):
                    emit(T.ptx.mbarrier.init.shared.b64(self.barrier(name, stage), T.uint32(count)))
        emit(T.ptx.fence.mbarrier_init.release.cluster())
        emit(T.ptx.fence.proxy.async_.shared__cta())
        emit(T.cuda.cta_sync())

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


class Block(SharedBlock):
    """Shared memory and barriers of the forward.

    Shared memory holds each warpgroup's queries, a ring of tiles of keys, one of values, and the barriers. A tile is
    loaded into a stage when its ``empty`` barrier says that all warps have done with it, and used when its ``full``
    barrier says that all bytes have come.
    """

    def __init__(self, plan: Plan, arguments: Arguments, maps: dict[str, TensorMap]) -> None:
        super().__init__(plan, plan.shared_bytes, plan.barrier_offset, plan.barriers)
        self.arguments, self.maps = arguments, maps
        stages = plan.config.stages
        self.queries = self.view(0, plan.config.warpgroups * plan.query_bytes // 2)
        self.query_words = self.view(0, plan.config.warpgroups * plan.query_bytes // 4, "uint32")
        self.keys = self.view(plan.key_offset, stages * plan.key_bytes // 2)
        self.values = self.view(plan.value_offset, stages * plan.value_bytes // 2)
        ring = dict.fromkeys(("key", "key_empty", "value", "value_empty"), stages)
        self.place_barriers({"query": 1, "query_empty": 1, **ring})

    def initialise(self) -> None:
        """Set the barriers up, once for all threads."""
        computing = _WARPS * self.plan.config.warpgroups
        empty = dict.fromkeys(("query_empty", "key_empty", "value_empty"), computing)
        self.initialise_barriers({"query": 1, "key": 1, "value": 1, **empty})
