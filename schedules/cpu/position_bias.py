"""The bias by relative position, and its gradient.

A table has a number for each difference between a key and a query. A tile wants a vector of them for each key that it
visits, one for each lane. Where the table is small it is *spread* once a task: for each difference between a key and
the first query of a tile, the biases of all lanes lie side by side, and all tiles load what they need as it is. The
gradient is added up in the same form, and the lanes that stand for one difference are summed at the end of the task.
Where the table is large each bias is looked up, and each part of the gradient is added where it belongs.

Either way a task has a gradient of its own, and these are summed in a fixed order: see `gather_bias`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tvm.tirx.script import builder as T

from na_compiler.schedules.cpu.frame import Frame, Place, Window
from na_compiler.schedules.cpu.steps import Buffer
from na_compiler.tensorir.arithmetic import LOG2_E
from na_compiler.tensorir.blocks import block, local, reduction, update

__all__ = ["PARTS", "Places", "PositionBias", "PositionGradient", "gather_bias", "parts_shape"]

# From the position of a key and a lane to places in a table, one for each axis.
Places = Callable[[Place, Any], list[Any]]
# What tasks leave of the gradient, among the parameters of the backward.
PARTS = "bias_parts"


class PositionBias:
    """What is added to the scores of a task, in units of ``log2(e)`` as these are."""

    def __init__(self, f: Frame, table: Buffer, head: Any, strip: Place) -> None:
        """Emit what a task needs of the table, for the heads that share keys."""
        self.f, self.table, self.head, self.strip = f, table, head, strip
        self.spread: Buffer | None = None
        if not f.plan.spreads_bias:
            return
        axes = f.plan.axes
        extents = (f.group_size, *f.plan.extents("spread"), f.lanes)
        self.spread = local(extents)
        with block("spread_bias", extents) as (member, *differences, lane):
            places = [
                T.max(T.min(e - axis.before - at + (axis.kernel_size - 1), 2 * axis.kernel_size - 2), 0)
                for axis, e, at in zip(axes, differences, f.lane(lane), strict=True)
            ]
            T.buffer_store(self.spread, self._scaled(member, places), [member, *differences, lane])

    def _scaled(self, member: Any, places: list[Any]) -> Any:
        head = self.head * self.f.group_size + member
        return self.table[[head, *self.f.layout(places)]] * T.float32(LOG2_E)

    def places(self, keys: Window, tile: Place, chunk: Place) -> Places:
        """Return ``places(position, lane)``, in the spread table or in the table itself, for a tile and a chunk."""
        if self.spread is not None:
            return _spread_places(self.f, self.strip, tile, chunk)
        return _looked_up(self.f, keys, self.strip, tile, chunk)

    def of(self, member: Any, places: Places) -> Callable[[Place, Any], Any]:
        """Return ``bias(position, lane)`` for one of the heads that share keys."""

        def bias(position: Place, lane: Any) -> Any:
            at = places(position, lane)
            return self._scaled(member, at) if self.spread is None else self.spread[[member, *at, lane]]

        return bias


class PositionGradient:
    """What a task adds up of the gradient of the table."""

    def __init__(self, f: Frame, parts: Buffer, at: list[Any], strip: Place) -> None:
        """Emit zeros; of a table that is not spread, in the task's part of the workspace, which is ``at`` a place."""
        self.f, self.parts, self.strip, self.at = f, parts, strip, at
        self.spread: Buffer | None = None
        vector = f.plan.tiling.vector
        if f.plan.spreads_bias:
            self.spread = local((f.group_size, *f.plan.extents("spread"), f.lanes))
            with update("clear_spread", tuple(map(int, self.spread.shape)), vector) as index:
                T.buffer_store(self.spread, T.float32(0), list(index))
        else:
            with update(f"clear_{PARTS}", tuple(map(int, parts.shape[len(at) :])), vector) as index:
                T.buffer_store(parts, T.float32(0), [*self.at, *index])

    def add(self, keys: Window, member: Any, places: Places, slope: Buffer) -> None:
        """Add the gradients of a tile's scores; 0 of keys that are hidden."""
        f = self.f
        if self.spread is not None:
            with update("spread_add", (*keys.visited, f.lanes), f.plan.tiling.vector) as (*u, lane):
                at = [member, *places(u, lane), lane]
                T.buffer_store(self.spread, self.spread[at] + slope[[*u, lane]], at)
            return
        with update("bias_add", (*keys.visited, f.lanes), 1) as (*u, lane):
            at = [*self.at, member, *places(u, lane)]
            T.buffer_store(self.parts, self.parts[at] + slope[[*u, lane]], at)

    def finish(self) -> None:
        """Sum the lanes that stand for one difference, in order, and leave them in the workspace."""
        if self.spread is None:
            return
        f, spread = self.f, self.spread
        extents = tuple(map(int, self.parts.shape[len(self.at) :]))
        total = local(extents)
        with reduction("bias_lanes", extents, (f.lanes,)) as (member, *places, lane):
            with T.init():
                T.buffer_store(total, T.float32(0), [member, *places])
            at = [
                place + axis.before + along - (axis.kernel_size - 1)
                for axis, place, along in zip(f.plan.axes, places, f.lane(lane), strict=True)
            ]
            sum_ = total[[member, *places]] + spread[[member, *at, lane]]
            T.buffer_store(total, sum_, [member, *places])
        with block("bias_store", extents) as index:
            T.buffer_store(self.parts, total[list(index)], [*self.at, *index])


def _spread_places(f: Frame, strip: Place, tile: Place, chunk: Place) -> Places:
    """Return places in a spread table, which are the same for all lanes."""
    first = [
        along.axis.before + along.relative(strip[i], tile[i], chunk[i]) if along.axis.spread > 1 else 0
        for i, along in enumerate(f.axes)
    ]

    def places(position: Place, lane: Any) -> list[Any]:  # noqa: ARG001
        return [start + u for start, u in zip(first, position, strict=True)]

    return places


def _looked_up(f: Frame, keys: Window, strip: Place, tile: Place, chunk: Place) -> Places:
    """Return places in the table, of numbers for each axis that are made once for a tile."""
    found: list[Buffer | None] = []
    for i, along in enumerate(f.axes):
        if along.axis.kernel_size == 1:
            found.append(None)
            continue
        numbers = local((keys.visited[i], f.lanes), "int32")
        with block(f"place{i}", (keys.visited[i], f.lanes)) as (u, lane):
            place = along.bias(strip[i], tile[i], chunk[i], u, f.lane(lane)[i])
            T.buffer_store(numbers, place, [u, lane])
        found.append(numbers)

    def places(position: Place, lane: Any) -> list[Any]:
        return [0 if numbers is None else numbers[u, lane] for numbers, u in zip(found, position, strict=True)]

    return places


def parts_shape(f: Frame) -> tuple[Any, ...]:
    """Return the shape of what tasks leave: ``[batch, heads_kv, *strips, group, *places]``, of three axes."""
    return f.space(f.group_size, *(2 * axis.kernel_size - 1 for axis in f.plan))


def gather_bias(f: Frame, parts: Buffer, gradient: Buffer) -> None:
    """Add up what the tasks of a batch entry left, in order."""
    extents = tuple(map(int, parts.shape[2 + len(f.strips) :]))
    with block("gather_bias", (f.batch, f.heads_kv, *extents[:-1])) as (batch, head, member, *outer):
        T.reads(f.whole(parts))
        T.writes(f.whole(gradient))
        total = local((extents[-1],))
        with reduction("bias_total", (extents[-1],), f.strips) as (place, *strip):
            with T.init():
                T.buffer_store(total, T.float32(0), [place])
            T.buffer_store(total, total[place] + parts[[batch, head, *strip, member, *outer, place]], [place])
        with block("bias_grad", (extents[-1],)) as (place,):
            at = [batch, head * f.group_size + member, *f.layout([*outer, place])]
            T.buffer_store(gradient, total[place], at)
