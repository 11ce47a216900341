"""The steps that the forward and the backward are made of.

Each function emits TensorIR where it is called. Block names are what the schedules know the steps by. Buffers are
upper case, as in the formulas. The last axis of what belongs to one query is the *lane*: the query's number in its
tile. ``f`` is the `Frame`, ``keys`` a `Window` or `Additional`; ``strip``, ``tile`` and ``chunk`` are places on the
three axes.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from tvm import tirx
from tvm.tirx.script import builder as T

from na_compiler.schedules.cpu.frame import Additional, Frame, Place, Window
from na_compiler.schedules.cpu.strips import Strip
from na_compiler.tensorir.arithmetic import HIDDEN
from na_compiler.tensorir.axes import AXES
from na_compiler.tensorir.blocks import block, local, reduction

__all__ = [
    "Buffer",
    "Keys",
    "Visible",
    "fetch_ahead",
    "following",
    "products",
    "stage_keys",
    "stage_mask",
    "stage_queries",
    "to_lanes",
    "trimmed",
    "weighted_rows",
]

# What LLVM's prefetch is told: which cache, and that it is no code.
_SECOND_LEVEL, _DATA = 2, 1
_LINE_BYTES = 64

Buffer = Any
Keys = Window | Additional


@contextlib.contextmanager
def trimmed(keys: Keys, name: str, reads: list[Buffer], writes: list[Buffer]) -> Iterator[None]:
    """Open a block around loops over keys of which not all extents are known, where that is so.

    What is around cannot see which regions such loops read and write: it is told that they may be all.
    """
    if not keys.is_trimmed:
        yield
        return
    with _around(f"{keys.prefix}{name}_step", reads, writes):
        yield


@contextlib.contextmanager
def _around(name: str, reads: list[Buffer], writes: list[Buffer]) -> Iterator[None]:
    # In a loop of one: TVM's `rfactor` fails in a block that holds another one directly.
    with block(name, (1,)):
        T.reads(*map(Frame.whole, reads))
        T.writes(*map(Frame.whole, writes))
        yield


def stage_keys(
    name: str,
    keys: Keys,
    strip: Sequence[Strip],
    chunk: Place,
    source: Buffer,
    at: Callable[..., Any],
    staged: Buffer,
    width: int,
) -> None:
    """Copy a box of keys or values to float32, each padded with zeros to the staged width.

    Of a trimmed axis only the keys that the strip's queries see.
    """
    *_, padded = map(int, staged.shape)
    extents = keys.staged(strip)
    is_trimmed = not all(isinstance(extent, int) for extent in extents)

    def around(step: str, reads: list[Buffer]) -> contextlib.AbstractContextManager[None]:
        return _around(step, reads, [staged]) if is_trimmed else contextlib.nullcontext()

    with around(f"{name}_step", [source]), block(name, (*extents, width)) as (*position, d):
        row = T.Cast("float32", source[at(position, d)])
        if isinstance(keys, Additional):
            # Not the last value again, which if it is infinite, and the weight 0, would make a NaN of every output.
            row = T.if_then_else(position[-1] < keys.left(chunk), row, T.float32(0))
        T.buffer_store(staged, row, [*position, d])
    if padded > width:
        with (
            around(f"{name}_padding_step", []),
            block(f"{name}_padding", (*extents, padded - width)) as (*position, d),
        ):
            T.buffer_store(staged, T.float32(0), [*position, width + d])


def stage_mask(keys: Window, batch: Any, strip: Place, chunk: Place, mask: Buffer) -> Buffer:
    """Return, for each staged key, -1 where the key mask hides it, and else 0."""
    masked = local(keys.box, "int32")
    with block("key_mask", keys.box) as position:
        is_seen = mask[keys.token(batch, strip, chunk, position)]
        T.buffer_store(masked, T.if_then_else(is_seen, T.int32(0), T.int32(-1)), list(position))
    return masked


def stage_queries(name: str, source: Buffer, at: Callable[..., Any], factor: Any, rows: Buffer, width: int) -> None:
    """Copy what belongs to a tile's queries to float32, times a factor."""
    count, padded = map(int, rows.shape)
    with block(name, (count, width)) as (lane, d):
        T.buffer_store(rows, T.Cast("float32", source[at(lane, d)]) * factor, [lane, d])
    if padded > width:
        with block(f"{name}_padding", (count, padded - width)) as (lane, d):
            T.buffer_store(rows, T.float32(0), [lane, width + d])


def following(place: Place, extents: tuple[int, ...], minimum: Callable[[Any, Any], Any] = min) -> list[Any]:
    """Return the place that loops of some extents visit after one; the last one after itself."""
    number = 0
    for index, extent in zip(place, extents, strict=True):
        number = number * extent + index
    number = minimum(number + 1, math.prod(extents) - 1)
    after: list[Any] = []
    for extent in reversed(extents):
        after.insert(0, number % extent)
        number = number // extent
    return after


def fetch_ahead(
    f: Frame, at: Callable[..., Any], tile: Place, read: list[tuple[Buffer, int]], written: list[tuple[Buffer, int]]
) -> None:
    """Have the rows of the tile after this one brought near, while this one is computed.

    They are few, and far apart: no prefetcher finds them. Keys and values lie in long rows, and need no help. Places
    beyond the layout are asked for as well, at its end: to prefetch what does not exist does nothing.

    Parameters
    ----------
    at
        ``at(member, tile)``, the ``index(lane, ...)`` of a tile.
    tile
        ``member, *tile`` of this one.
    read, written
        Tensors, and the widths of their rows.
    """
    member, *place = following(tile, (f.group_size, *f.tiles), minimum=tirx.min)
    index = at(member, place)
    with block("ahead", (f.lanes,)) as (lane,):
        T.reads()
        T.writes()
        for tensors, is_written in ((read, 0), (written, 1)):
            for tensor, width in tensors:
                for d in range(0, width, _LINE_BYTES // f.element_bytes):
                    address = T.address_of(tensor[index(lane, d)])
                    T.evaluate(tirx.call_intrin("void", "tirx.prefetch", address, is_written, _SECOND_LEVEL, _DATA))


def to_lanes(name: str, rows: Buffer) -> Buffer:
    """Transpose what `stage_queries` staged."""
    count, padded = map(int, rows.shape)
    lanes = local((padded, count))
    with block(f"{name}_lanes", (padded, count)) as (d, lane):
        T.buffer_store(lanes, rows[lane, d], [d, lane])
    return lanes


class Visible:
    """Which keys a query sees: numbers that are negative where it does not, one for each axis, and for each key."""

    def __init__(
        self,
        f: Frame,
        keys: Keys,
        strip: Place,
        tile: Place,
        chunk: Place,
        *,
        existing: bool = False,
        masked: Buffer | None = None,
    ) -> None:
        """Emit the numbers of a tile and a chunk.

        ``existing`` hides everything from lanes that are no queries, ``masked`` staged keys from all: see `stage_mask`.
        """
        self.masked, self.offset = masked, keys.offset(strip, tile)
        self.of_axis = [
            local((keys.visited[axis], f.lanes), "int32") if keys.masks[axis] else None for axis in range(AXES)
        ]
        self.of_lane = local((f.lanes,), "int32") if existing and f.is_ragged else None
        if self.of_lane is not None:
            with block(f"{keys.prefix}existing", (f.lanes,)) as (lane,):
                value = T.Select(f.exists(strip, tile, f.lane(lane)), T.int32(0), T.int32(-1))
                T.buffer_store(self.of_lane, value, [lane])
        if isinstance(keys, Additional):
            with block(f"{keys.prefix}bias", (f.additional_block, f.lanes)) as (u, lane):
                T.buffer_store(self.of_axis[-1], keys.left(chunk) - 1 - u, [u, lane])
            return
        for axis, bias in enumerate(self.of_axis):
            if bias is not None:
                self._window(f, keys, axis, bias, strip, tile, chunk)

    @staticmethod
    def _window(f: Frame, keys: Window, axis: int, bias: Buffer, strip: Place, tile: Place, chunk: Place) -> None:
        along = f.axes[axis]
        first = keys.start(axis, strip, tile, chunk)
        low, high = local((f.lanes,), "int32"), local((f.lanes,), "int32")
        with block(f"{keys.prefix}low{axis}", (f.lanes,)) as (lane,):
            T.buffer_store(low, along.low(strip[axis], tile[axis], f.lane(lane)[axis]) - first, [lane])
        with block(f"{keys.prefix}high{axis}", (f.lanes,)) as (lane,):
            T.buffer_store(high, along.high(strip[axis], tile[axis], f.lane(lane)[axis]) - first, [lane])
        with block(f"{keys.prefix}bias{axis}", (keys.visited[axis], f.lanes)) as (u, lane):
            value = T.min(u - low[lane], high[lane] - u)
            if along.is_wide:
                # One comparison for the whole tile, in place of two for each query.
                value = T.if_then_else(along.seen_by_all(strip[axis], tile[axis], first + u), T.int32(0), value)
            T.buffer_store(bias, value, [u, lane])

    def hide(self, score: Any, position: Place, lane: Any, hidden: float = HIDDEN) -> Any:
        """Return the score, or what stands for it where the query does not see the key."""
        lowest = None if self.of_lane is None else self.of_lane[lane]
        for bias, u in zip(self.of_axis, position, strict=True):
            if bias is not None:
                lowest = bias[u, lane] if lowest is None else T.min(lowest, bias[u, lane])
        if self.masked is not None:
            masked = self.masked[_sum(self.offset, position)]
            lowest = masked if lowest is None else T.min(lowest, masked)
        return score if lowest is None else T.Select(lowest >= 0, score, T.float32(hidden))


def products(
    name: str,
    f: Frame,
    keys: Keys,
    pairs: list[tuple[Buffer, Buffer]],
    offset: Place,
    width: int,
    target: Buffer,
    consume: Callable[[Any, Place, Any], Any],
    first: Callable[[Place, Any], Any] | None = None,
) -> None:
    """Multiply keys (or values) that a tile visits with queries (or gradients), a block of keys at a time.

    ``target[u, lane] = consume(first(u, lane) + sum_d staged[u, d] * lanes[d, lane], u, lane)``, where the sum is over
    the pairs of ``staged`` and ``lanes`` as well; default of ``first`` 0.
    """
    at_once = f.plan.tiling.key_block
    counts = [extent if size == 1 else extent // size for extent, size in zip(keys.loops, at_once, strict=True)]
    with block(f"{keys.prefix}{name}_block", tuple(counts)) as places:
        T.reads(*map(f.whole, (buffer for pair in pairs for buffer in pair)))
        T.writes(f.whole(target))
        part = local((*at_once, f.lanes))

        def position(inner: Any) -> list[Any]:
            return [place * size + u for place, size, u in zip(places, at_once, inner, strict=True)]

        with reduction(f"{keys.prefix}{name}", (*at_once, f.lanes), (width,)) as (*u, lane, d):
            with T.init():
                T.buffer_store(part, T.float32(0) if first is None else first(position(u), lane), [*u, lane])
            total = part[[*u, lane]]
            for staged, lanes in pairs:
                total = total + lanes[d, lane] * staged[[*_sum(offset, position(u)), d]]
            T.buffer_store(part, total, [*u, lane])
        with block(f"{keys.prefix}{name}_use", (*at_once, f.lanes)) as (*u, lane):
            T.buffer_store(target, consume(part[[*u, lane]], position(u), lane), [*position(u), lane])


def weighted_rows(
    name: str, f: Frame, keys: Keys, pairs: list[tuple[Buffer, Buffer]], strip: Place, tile: Place, O: Buffer
) -> None:
    """Sum the rows of a tile's values (or keys), weighted, for each query of each patch over the patch's own box.

    The sum is over the pairs of weights and rows as well.
    """
    width = int(O.shape[-1])
    offset = keys.offset(strip, tile)
    with (
        trimmed(keys, name, [buffer for pair in pairs for buffer in pair], [O]),
        reduction(keys.prefix + name, (*f.patches, *f.patch, width), keys.patch_loops) as indices,
    ):
        patch, query, d, r = indices[:3], indices[3:6], indices[6], indices[7:]
        u = _sum(keys.patch_offset(strip, tile, patch), r)
        with T.init():
            T.buffer_store(O, T.float32(0), [*patch, *query, d])
        total = O[[*patch, *query, d]]
        for P, rows in pairs:
            total = total + P[[*u, f.lane_of(patch, query)]] * rows[[*_sum(offset, u), d]]
        T.buffer_store(O, total, [*patch, *query, d])


def _sum(first: Any, second: Any) -> list[Any]:
    return [a + b for a, b in zip(first, second, strict=True)]
