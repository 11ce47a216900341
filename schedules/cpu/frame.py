"""`Frame`: a tiling plan in the form that the descriptions are written with.

It holds the static extents under short names, and turns places (a strip, a tile, a lane, a position in a box)
into tensor indices. `Window` and `Additional` are the two sets of keys that a query sees; the
steps work on either.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from tvm import ir, tirx

from na_compiler.operands import KEY_MASK, PLACE, RELATIVE_POSITION_BIAS, place_names
from na_compiler.schedules.cpu.places import AxisPlaces, Expr
from na_compiler.schedules.cpu.plan import TilingPlan
from na_compiler.schedules.cpu.strips import Range, Strip
from na_compiler.tensorir.axes import AXES, Extents

__all__ = ["Additional", "Frame", "Window"]

Place = Sequence[Any]  # Of three: one for each axis.
Index = tuple[Expr, ...]

_ELEMENT_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "bool": 1}


class Frame:
    """Extents and indices of one `TilingPlan`.

    Parameters
    ----------
    plan
        Of the kernel.
    trims
        Whether what is written with it visits the plan's trimmed axis only as far as needed.
    """

    def __init__(self, plan: TilingPlan, *, trims: bool = False) -> None:
        problem = plan.problem
        self.plan = plan
        self.problem = problem
        self.axes = tuple(_places(plan, number, trims=trims) for number in range(AXES))
        self.dtype, self.element_bytes = problem.dtype, problem.element_bytes
        self.heads, self.heads_kv, self.group_size = problem.heads, problem.heads_kv, problem.group_size
        self.head_dim, self.head_dim_v = problem.head_dim, problem.head_dim_v
        self.staged_dim, self.staged_dim_v = plan.head_dim, plan.head_dim_v
        self.merges = plan.merges
        self.is_ragged = any(axis.is_ragged for axis in plan)
        self.strips = tuple(extent for axis in self.axes for extent in axis.strips)
        self.tiles = plan.tiling.strip
        self.tile, self.patch = plan.tiling.tile, plan.tiling.patch
        self.patches = tuple(tile // patch for tile, patch in zip(self.tile, self.patch, strict=True))
        self.lanes = math.prod(self.tile)
        self.chunks = plan.extents("chunks")
        self.batch = tirx.Var("batch", "int64")
        self.additional = tirx.Var("additional", "int64")
        # The batch, or 0 where there is no gradient of lse.
        self.given = tirx.Var("given", "int64")
        self.additional_block = plan.tiling.additional_block
        self.additional_chunks = tirx.ceildiv(self.additional, tirx.IntImm("int64", self.additional_block))
        self.staged_additional = self.additional_chunks * self.additional_block
        self.has_bias = problem.has(RELATIVE_POSITION_BIAS)
        self.has_key_mask = problem.has(KEY_MASK)

    def tokens(self, *last: int) -> Index:
        """Return the shape of a tensor with one entry a query: ``[batch, *layout, *last]``."""
        return self.batch, *_int64((*self.layout(axis.extent for axis in self.axes), *last))

    def key_tokens(self, *last: int) -> Index:
        """Return the shape of a tensor with one entry a key of the layout: ``[batch, *layout, *last]``."""
        return self.batch, *_int64((*self.layout(axis.key_extent for axis in self.axes), *last))

    def place(self) -> dict[str, str]:
        """Return the parameters that say where in a larger layout the tensors lie, with their dtypes."""
        return dict.fromkeys(place_names(self.problem), "int64")

    def begin(self, tensors: dict[str, Any]) -> None:
        """Tell the axes what the function was called with, by the names of its parameters."""
        if not self.problem.is_open:
            return
        missing = AXES - self.problem.rank
        for axis in range(self.problem.rank):
            along = self.axes[missing + axis]
            numbers = {name: tirx.Cast("int32", tensors[f"{name}{axis}"]) for name in PLACE}
            queries, keys = (tirx.Cast("int32", extent) for extent in (along.extent, along.key_extent))
            along.range = Range(numbers["length"], numbers["first_query"], queries, numbers["first_key"], keys)

    def strip(self, iterators: Sequence[Expr]) -> tuple[Strip, Strip, Strip]:
        """Return the strips of an iteration of the parallel loop."""
        left = list(iterators)
        first, second, third = (axis.strip(*[left.pop(0) for _ in axis.strips]) for axis in self.axes)
        return first, second, third

    def extra(self, *last: int) -> Index:
        """Return the shape of additional keys or values: ``[batch, additional, *last]``."""
        return self.batch, self.additional, *(tirx.IntImm("int64", extent) for extent in last)

    def optional(self) -> dict[str, Any]:
        """Return the parameters of the bias by relative position and the key mask, where the problem has them."""
        found: dict[str, Any] = {}
        if self.has_bias:
            shape = (self.heads, *(2 * extent - 1 for extent in self.problem.kernel_size))
            found[RELATIVE_POSITION_BIAS] = self.tensor(tuple(tirx.IntImm("int64", e) for e in shape), "float32")
        if self.has_key_mask:
            found[KEY_MASK] = self.tensor(self.key_tokens(), "bool")
        return found

    def space(self, *last: Any) -> Index:
        """Return the shape of a workspace in which every task has a part: ``[batch, heads_kv, *strips, *last]``."""
        extents = (self.heads_kv, *self.strips, *last)
        return self.batch, *(tirx.IntImm("int64", extent) if isinstance(extent, int) else extent for extent in extents)

    def tensor(self, shape: Index, dtype: str | None = None) -> dict[str, Any]:
        """Return the arguments of ``T.match_buffer`` for a contiguous tensor."""
        dtype = dtype or self.dtype
        # TVM assumes 64-byte alignment otherwise, and a tensor that lies elsewhere (a slice, NumPy's memory) crashes.
        return {"shape": shape, "dtype": dtype, "align": _ELEMENT_BYTES[dtype]}

    def strided(self, name: str, shape: Index) -> dict[str, Any]:
        """Return the arguments of ``T.match_buffer`` for a tensor used where it is, at any strides but the last's."""
        strides = [tirx.Var(f"{name}_stride{axis}", "int64") for axis in range(len(shape) - 1)]
        return {**self.tensor(shape), "strides": [*strides, tirx.IntImm("int64", 1)]}

    def inputs(self, prefix: str = "") -> dict[str, Any]:
        """Return the parameters that every description begins with; with a prefix, as many of other names."""
        shapes = {
            "query": self.tokens(self.heads, self.head_dim),
            "key": self.key_tokens(self.heads_kv, self.head_dim),
            "value": self.key_tokens(self.heads_kv, self.head_dim_v),
        }
        if self.problem.additional_kv:
            shapes["additional_keys"] = self.extra(self.heads_kv, self.head_dim)
            shapes["additional_values"] = self.extra(self.heads_kv, self.head_dim_v)
        return {prefix + name: self.strided(prefix + name, shape) for name, shape in shapes.items()}

    def lane(self, lane: Expr) -> Place:
        """Return the place in its tile of a lane."""
        _, second, third = self.tile
        return lane // (second * third), lane // third % second, lane % third

    def query(self, patch: Place, place: Place) -> Place:
        """Return the place in its tile of a patch's query."""
        first, second, third = (patch[axis] * self.patch[axis] + place[axis] for axis in range(AXES))
        return first, second, third

    def lane_of(self, patch: Place, place: Place) -> Expr:
        """Return the lane of a patch's query."""
        first, second, third = self.query(patch, place)
        return (first * self.tile[1] + second) * self.tile[2] + third

    def layout(self, tokens: Iterable[Expr]) -> list[Expr]:
        """Leave out the axes that the problem does not have."""
        return list(tokens)[AXES - self.problem.rank :]

    def queries(self, batch: Expr, strip: Place, tile: Place, head: Expr) -> Callable[..., Index]:
        """Return ``index(lane, ...)``; a lane beyond the end gives the last query again."""

        def index(lane: Expr, *last: Expr) -> Index:
            place = self.lane(lane)
            tokens = (strip[i].query_token(axis.query(strip[i], tile[i], place[i])) for i, axis in enumerate(self.axes))
            return batch, *self.layout(tokens), head, *last

        return index

    def exists(self, strip: Place, tile: Place, query: Place) -> Expr:
        """Return whether a tile's query exists."""
        return _all(axis.is_query(strip[i], tile[i], query[i]) for i, axis in enumerate(self.axes))

    @staticmethod
    def whole(buffer: tirx.Buffer) -> tirx.BufferRegion:
        """Return all of a buffer, as the region that a block reads or writes."""
        return tirx.BufferRegion(buffer, [ir.Range(0, extent) for extent in buffer.shape])


class Window:
    """The keys of the windows: a box of the layout, staged in chunks.

    Attributes
    ----------
    box
        Keys of a chunk.
    visited, patch_visited
        Keys of it that a tile, and a patch, visits at most: what scores are kept for.
    loops, patch_loops
        The same as loops have them; of a trimmed axis only those that the queries see.
    """

    # Before the names of its blocks, so that schedules can tell the two sets of keys apart.
    prefix = ""

    def __init__(self, frame: Frame) -> None:
        plan = frame.plan
        self.frame = frame
        self.box: Extents = plan.extents("chunk")
        self.visited: Extents = plan.extents("visited")
        self.patch_visited: Extents = plan.extents("patch_visited")
        self.masks = plan.extents("masks")
        self.loops: Index = self.visited
        self.patch_loops: Index = self.patch_visited

    @property
    def is_trimmed(self) -> bool:
        """Whether extents of loops are known only when they run."""
        return self.loops is not self.visited

    def staged(self, strip: Sequence[Strip]) -> Index:
        """Return how many keys of the box are staged along each axis."""
        return tuple(extent if at.staged is None else at.staged for extent, at in zip(self.box, strip, strict=True))

    def of_tile(self, strip: Sequence[Strip], tile: Place) -> Window:
        """Return the keys as a tile visits them; emits how many rows it does, where an axis is trimmed."""
        axes = [(i, axis) for i, axis in enumerate(self.frame.axes) if axis.trims]
        if not axes:
            return self
        trimmed, loops, patch_loops = Window(self.frame), list(self.loops), list(self.patch_loops)
        for i, axis in axes:
            loops[i] = axis.rows(strip[i], tile[i])
            patch_loops[i] = tirx.min(axis.axis.patch_box, loops[i])
        trimmed.loops, trimmed.patch_loops = tuple(loops), tuple(patch_loops)
        return trimmed

    def at(self, batch: Expr, strip: Place, chunk: Place, head: Expr) -> Callable[[Place, Expr], Index]:
        """Return ``index(position, d)`` of a chunk; a position beyond the end gives the last key again."""
        frame = self.frame

        def index(position: Place, d: Expr) -> Index:
            tokens = (axis.key(strip[i], chunk[i] * self.box[i] + position[i]) for i, axis in enumerate(frame.axes))
            return batch, *frame.layout(tokens), head, d

        return index

    def token(self, batch: Expr, strip: Place, chunk: Place, position: Place) -> Index:
        """Return the batch and the token at a position of a chunk."""
        *index, _, _ = self.at(batch, strip, chunk, 0)(position, 0)
        return tuple(index)

    def offset(self, strip: Place, tile: Place) -> Place:
        """Return where a tile's box begins in the staged one."""
        first, second, third = (axis.tile_offset(strip[i], tile[i]) for i, axis in enumerate(self.frame.axes))
        return first, second, third

    def patch_offset(self, strip: Place, tile: Place, patch: Place) -> Place:
        """Return where a patch's box begins in its tile's."""
        axes = self.frame.axes
        offsets = [axis.patch_offset(strip[i], tile[i], patch[i]) for i, axis in enumerate(axes)]
        for i in range(AXES):
            if self.loops[i] is not self.visited[i]:
                offsets[i] = tirx.min(offsets[i], self.loops[i] - self.patch_loops[i])
        return tuple(offsets)

    def start(self, axis: int, strip: Place, tile: Place, chunk: Place) -> Expr:
        """Return the position in the strip's box of the first key that a tile visits."""
        return chunk[axis] * self.box[axis] + self.frame.axes[axis].tile_offset(strip[axis], tile[axis])

    def space_at(self, position: Place) -> list[Expr]:
        """Return the place in a task's workspace of a key, given its position in the strip's box."""
        return list(position)

    def meets(self, strip: Place, tile: Place, chunk: Place) -> Expr:
        """Return whether a tile has queries, and these see keys of the chunk."""
        axes = self.frame.axes
        needed = _all(axis.meets(strip[i], tile[i], chunk[i]) for i, axis in enumerate(axes))
        return tirx.all(self.frame.exists(strip, tile, (0, 0, 0)), needed)


class Additional:
    """The additional keys, which every query sees: a box of one row, staged in chunks."""

    prefix = "additional_"
    is_trimmed = False

    def __init__(self, frame: Frame) -> None:
        self.frame = frame
        self.box = self.visited = self.patch_visited = self.loops = self.patch_loops = (1, 1, frame.additional_block)
        self.masks = (False, False, True)

    def at(self, batch: Expr, strip: Place, chunk: Place, head: Expr) -> Callable[..., Index]:  # noqa: ARG002
        """Return ``index(position, d)`` of a chunk; a position beyond the end gives the last key again."""

        def index(position: Place, d: Expr) -> Index:
            key = chunk[-1] * self.frame.additional_block + position[-1]
            return batch, tirx.min(key, self.frame.additional - 1), head, d

        return index

    def offset(self, strip: Place, tile: Place) -> Place:  # noqa: ARG002
        """Return where a tile's box begins in the staged one."""
        return 0, 0, 0

    def patch_offset(self, strip: Place, tile: Place, patch: Place) -> Place:  # noqa: ARG002
        """Return where a patch's box begins in its tile's."""
        return 0, 0, 0

    def start(self, axis: int, strip: Place, tile: Place, chunk: Place) -> Expr:  # noqa: ARG002
        """Return the number of a chunk's first key."""
        return chunk[axis] * self.box[axis]

    def space_at(self, position: Place) -> list[Expr]:
        """Return the place in a task's workspace of a key, given its number."""
        return [position[-1]]

    def meets(self, strip: Place, tile: Place, chunk: Place) -> Expr:  # noqa: ARG002
        """Return whether a tile has queries."""
        return self.frame.exists(strip, tile, (0, 0, 0))

    def staged(self, strip: Sequence[Strip]) -> Index:  # noqa: ARG002
        """Return how many keys of a chunk are staged along each axis."""
        return self.box

    def of_tile(self, strip: Sequence[Strip], tile: Place) -> Additional:  # noqa: ARG002
        """Return the keys as a tile visits them: all."""
        return self

    def left(self, chunk: Place) -> Expr:
        """Return how many keys are left from the beginning of a chunk on."""
        return tirx.Cast("int32", self.frame.additional - chunk[-1] * self.frame.additional_block)


def _places(plan: TilingPlan, number: int, *, trims: bool) -> AxisPlaces:
    axis, name = plan.axes[number], number - (AXES - plan.problem.rank)
    if not axis.is_open:
        return AxisPlaces(axis)
    queries, keys = (tirx.Var(f"{kind}{name}", "int64") for kind in ("queries", "keys"))
    return AxisPlaces(axis, queries, keys, trims=trims and plan.trimmed == number)


def _int64(extents: Iterable[Any]) -> Iterable[Any]:
    # Every extent is int64: TVM's packed ABI trips over a shape of mixed widths.
    return (tirx.IntImm("int64", extent) if isinstance(extent, int) else extent for extent in extents)


def _all(conditions: Iterable[Any]) -> Expr:
    return tirx.all(*[condition for condition in conditions if condition is not True], tirx.const(True, "bool"))
