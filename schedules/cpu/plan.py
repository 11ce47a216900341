"""How a problem is cut into tasks, tiles and patches: the static extents that the description is written with.

Problems of rank 1 and 2 get leading axes of one token, so everything below has three axes. All positions are
counted inside a dilation group. From the outside in, on every axis:

strip
    The queries of one task (one iteration of the parallel loop), a whole number of tiles. The keys that they
    need are one box, staged once for all of them.
tile
    The queries whose scores are computed together. They share one box of keys inside the strip's.
patch
    The queries whose weighted sums are computed together, over their own, tighter box.
chunk
    Where the strip's box is too large to stage at once, it is visited in chunks of keys, and the softmax is
    merged from one chunk to the next.

A box has the same extents everywhere, so that loops have constant bounds: those of the largest union of windows.
Keys in a box but outside a query's window are masked.

Of a problem with an open layout the boxes are large enough for a layout of any size, and for any part of one. A config
is chosen for a layout of usual size then, the *nominal* one.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass, field

from na_compiler.counting import most_queries_anywhere, widest_union, widest_union_anywhere
from na_compiler.problem import Problem
from na_compiler.tensorir.axes import AXES, Extents, round_up
from na_compiler.window import SHIFT, WRAP, group_length

__all__ = ["AxisTiling", "Tiling", "TilingPlan", "nominal"]

# Bytes of biases by relative position that a task may spread over the lanes of a tile: what a second-level cache holds.
_SPREAD_BYTES = 512 * 1024
# Tokens of a dilation group along each axis of the layout that configs of open problems are chosen for, by rank; and
# how many windows at least. In 2-D 48 was measured to serve images up to 200 x 200; the others are usual sizes.
_NOMINAL = {1: 4096, 2: 48, 3: 16}
_NOMINAL_WINDOWS = 3


def nominal(problem: Problem) -> Problem:
    """Return a problem with a layout: its own, or the one that its config is chosen for where it is open."""
    if not problem.is_open:
        return problem
    least = _NOMINAL[problem.rank]
    sizes = zip(problem.kernel_size, problem.dilation, strict=True)
    return problem.replace(layout=[max(least, _NOMINAL_WINDOWS * kernel) * dilation for kernel, dilation in sizes])


@dataclass(frozen=True)
class Tiling:
    """The part of a schedule's config that changes what the description looks like.

    Parameters
    ----------
    tile
        Queries of a tile per axis.
    patch
        Queries of a patch per axis; divides ``tile``.
    strip
        Tiles of a task per axis.
    chunk
        Keys staged at once per axis; ``None`` stages a strip's whole box.
    key_block
        Keys whose scores are computed at once per axis; a tile's box is rounded up to a multiple of it.
    vector
        head_dim and head_dim_v are padded with zeros to a multiple of it in the staged copies.
    additional_block
        Additional keys staged at once, a multiple of the last ``key_block``.
    grad_block
        Keys of the last axis whose gradients are summed at once over a tile's queries; divides the number that a tile
        visits of a chunk, and ``additional_block``.
    """

    tile: Extents = (1, 1, 1)
    patch: Extents = (1, 1, 1)
    strip: Extents = (1, 1, 1)
    chunk: Extents | None = None
    key_block: Extents = (1, 1, 1)
    vector: int = 1
    additional_block: int = 1
    grad_block: int = 1


@dataclass(frozen=True)
class AxisTiling:
    """One axis of a `TilingPlan`; extents are in queries or keys of one dilation group.

    Of an open axis, which has any number of tokens, ``layout`` and what counts strips are those of a nominal one.
    """

    layout: int
    kernel_size: int
    stride: int
    dilation: int
    is_causal: bool
    border: str
    tile: int
    patch: int
    tiles: int
    chunk_limit: int | None
    key_block: int
    is_open: bool = False
    longest: int = field(init=False)
    shortest: int = field(init=False)
    strips: int = field(init=False)
    patch_box: int = field(init=False)
    tile_box: int = field(init=False)
    strip_box: int = field(init=False)
    chunk: int = field(init=False)
    chunks: int = field(init=False)

    def __post_init__(self) -> None:
        longest = group_length(self.layout, self.dilation)

        def set_(name: str, value: int) -> None:
            object.__setattr__(self, name, value)

        set_("longest", longest)
        set_("shortest", self.layout // self.dilation)
        set_("strips", -(-longest // self.strip))
        set_("patch_box", self._union(self.patch))
        set_("tile_box", round_up(self._union(self.tile), self.key_block))
        set_("strip_box", max(self._union(self.strip), self.tile_box))
        if self.chunk_limit is None or self.chunk_limit >= self.strip_box:
            set_("chunk", self.strip_box)
        else:
            set_("chunk", round_up(self.chunk_limit, self.key_block))
        set_("chunks", -(-self.strip_box // self.chunk))

    @property
    def strip(self) -> int:
        """Queries of a strip."""
        return self.tile * self.tiles

    @property
    def lengths(self) -> set[int]:
        """The one or two lengths that dilation groups have."""
        return {self.longest, self.shortest}

    @property
    def rule(self) -> tuple[int, int, bool, str]:
        """The window rule's parameters, in the order in which `na_compiler.window` takes them."""
        return self.kernel_size, self.stride, self.is_causal, self.border

    @property
    def is_ragged(self) -> bool:
        """Whether a tile may reach beyond the end of its dilation group."""
        return self.is_open or self.longest != self.shortest or self.longest % self.tile != 0

    @property
    def visited(self) -> int:
        """Keys of a chunk that one tile visits: its own box where there is one chunk, else all of the chunk."""
        return self.tile_box if self.chunks == 1 else self.chunk

    @property
    def patch_visited(self) -> int:
        """Keys of a chunk that one patch visits."""
        return self.patch_box if self.chunks == 1 else self.chunk

    @property
    def masks(self) -> bool:
        """Whether any query masks a key of its tile's box: a whole box as long as a window is every query's window."""
        return self.is_causal or self.border != SHIFT or self.chunks > 1 or self.visited != self.kernel_size

    @property
    def before(self) -> int:
        """How far before a tile's first query a key may lie that is visited in one chunk, or has a bias."""
        return max(self.tile_box, self.kernel_size) - 1

    @property
    def spread(self) -> int:
        """Differences between a key and a tile's first query, from ``-before``: all that are visited or have a bias."""
        return self.before + max(self.tile_box, self.kernel_size + self.tile - 1)

    def with_tiles(self, tiles: int) -> AxisTiling:
        """Return the axis with another number of tiles in a strip."""
        rule = (self.kernel_size, self.stride, self.dilation, self.is_causal, self.border)
        cut = (self.tile, self.patch, tiles, self.chunk_limit, self.key_block)
        return _axis_tiling(self.layout, *rule, *cut, self.is_open)

    def _union(self, queries: int) -> int:
        rule = (self.kernel_size, self.stride, self.is_causal)
        if self.is_open:
            return widest_union_anywhere(*rule, queries)
        return max(widest_union(length, *rule, min(queries, length), self.border) for length in self.lengths)

    @property
    def key_strips(self) -> int:
        """Strips that the queries of one key may lie in, in a dilation group of any length."""
        return -(-(most_queries_anywhere(self.kernel_size, self.is_causal) - 1) // self.strip) + 1

    @property
    def turns(self) -> int:
        """How often a strip's box may hold one key: where windows wrap it may be longer than the axis."""
        return -(-self.chunk * self.chunks // self.longest) if self.border == WRAP else 1


# A planner tries many tilings whose axes have few different cuts each.
_axis_tiling = functools.lru_cache(maxsize=4096)(AxisTiling)


@dataclass(frozen=True)
class TilingPlan:
    """A problem and a tiling, with every extent that follows from the two.

    Examples
    --------
    >>> plan = TilingPlan.make(Problem((56, 56), 4, 32, 7), Tiling(tile=(1, 4, 4), strip=(1, 2, 14)))
    >>> [axis.tile_box for axis in plan.axes], [axis.strip_box for axis in plan.axes]
    ([1, 10, 10], [1, 14, 56])
    """

    problem: Problem
    tiling: Tiling
    axes: tuple[AxisTiling, AxisTiling, AxisTiling]

    @classmethod
    def make(cls, problem: Problem, tiling: Tiling) -> TilingPlan:
        """Derive the extents."""
        missing = AXES - problem.rank
        layout = (1,) * missing + nominal(problem).layout
        kernel_size = (1,) * missing + problem.kernel_size
        stride = (1,) * missing + problem.stride
        dilation = (1,) * missing + problem.dilation
        is_causal = (False,) * missing + problem.is_causal
        border = (SHIFT,) * missing + problem.border
        axes = [
            _axis_tiling(
                layout[axis],
                kernel_size[axis],
                stride[axis],
                dilation[axis],
                is_causal[axis],
                border[axis],
                tiling.tile[axis],
                tiling.patch[axis],
                tiling.strip[axis],
                tiling.chunk[axis] if tiling.chunk else None,
                tiling.key_block[axis],
                problem.is_open and axis >= missing,
            )
            for axis in range(AXES)
        ]
        plan = cls(problem, tiling, (axes[0], axes[1], axes[2]))
        for visited in (axes[-1].visited, tiling.additional_block):
            # The rest of such a division would have no gradient.
            if visited % tiling.grad_block:
                raise ValueError(
                    f"grad_block={tiling.grad_block} does not divide the {visited} keys that a tile visits"
                )
        return plan

    def extents(self, name: str) -> Extents:
        """Return one attribute of the three axes."""
        first, second, third = (getattr(axis, name) for axis in self.axes)
        return first, second, third

    def size(self, name: str) -> int:
        """Return the product of one attribute over the axes."""
        return math.prod(self.extents(name))

    @property
    def is_chunked(self) -> bool:
        """Whether the softmax is merged over several chunks of the window."""
        return self.size("chunks") > 1

    @property
    def merges(self) -> bool:
        """Whether the softmax is merged at all: over chunks, or with additional keys."""
        return self.is_chunked or self.problem.additional_kv

    @property
    def spreads_bias(self) -> bool:
        """Whether biases by relative position are spread over the lanes once a task, so that a tile loads vectors.

        Else each is looked up where it is needed: there are too many of them, or tiles visit chunks far away.
        """
        spread = self.problem.group_size * self.size("spread") * self.size("tile")
        return not self.is_chunked and 4 * spread <= _SPREAD_BYTES

    @property
    def trimmed(self) -> int | None:
        """Which axis is visited only as far as queries see, in loops whose extents are known when they run.

        The outermost open one, where keys are staged at once: there boxes for any layout cost most. Never the last,
        whose keys come in blocks; nor two, since two loops of unknown extent cost more than they save.
        """
        axes = [i for i, axis in enumerate(self.axes[:-1]) if axis.is_open and axis.visited > 1]
        return axes[0] if axes and not self.is_chunked else None

    @property
    def fetches_ahead(self) -> bool:
        """Whether a task has further tiles, each finished at once, whose rows can be fetched before their turn."""
        return not self.merges and self.problem.group_size * self.size("tiles") > 1

    @property
    def head_dim(self) -> int:
        """head_dim in the staged copies."""
        return round_up(self.problem.head_dim, self.tiling.vector)

    @property
    def head_dim_v(self) -> int:
        """head_dim_v in the staged copies."""
        return round_up(self.problem.head_dim_v, self.tiling.vector)

    @property
    def tasks(self) -> int:
        """Iterations of the parallel loop for one batch entry."""
        groups = self.size("dilation")
        return self.problem.heads_kv * self.size("strips") * groups

    def visited_pairs(self) -> int:
        """Return how many pairs of query and key one head of one batch entry visits, at most."""
        tiles = self.size("dilation") * self.size("strips") * self.size("tiles")
        return tiles * self.size("tile") * self.size("visited") * self.size("chunks")

    def __iter__(self) -> Iterator[AxisTiling]:
        return iter(self.axes)
