"""The picture of ``na-compile draw``. Needs matplotlib.

A layout of one axis is drawn as a matrix, queries by keys: what is seen, and what all tiles of the plan compute. Others
have a column for each query: above, the keys that it sees; below, the queries that the kernel takes together with it,
and the keys that it computes scores for: seen by all of them, so that no mask is needed, by some, or by none. Of a
layout of three axes the planes around the query's are drawn, side by side.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle
from matplotlib.ticker import MaxNLocator

from na_compiler.problem import Problem
from na_compiler.schedules.choose import family_of
from na_compiler.schedules.shared.config import Config
from na_compiler.schedules.shared.visit import Visit, window_of
from na_compiler.target import Target

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["draw"]

# What a token, or a pair of a query and a key, is.
_OTHER, _ALL, _SOME, _NONE, _QUERY, _GAP = range(6)
_COLOURS = ("#eceef1", "#3d6fa5", "#a5c4e3", "#ecc0ae", "#f28e2b", "#ffffff")
_EDGE = "#b34700"
_LINE: dict[str, Any] = {"edgecolor": _EDGE, "linewidth": 2, "zorder": 5, "clip_on": False}
# Planes of a layout of three axes that are drawn side by side.
_PLANES = 6
# Tokens along an axis up to which each is drawn apart; tokens around what is shown.
_FINE, _AROUND = 72, 4

Place = tuple[int, ...]


def draw(
    problem: Problem, target: Target, config: Config, queries: Sequence[Place], path: Path, direction: str = "forward"
) -> list[Visit]:
    """Draw a problem and the plan of a direction into a file.

    Parameters
    ----------
    problem
        What to draw.
    target, config
        Whose plan.
    queries
        Places in the layout.
    path
        Its suffix says in which format.
    direction
        That of the config; of a backward the visits are those for the gradient of queries.

    Returns
    -------
    list of Visit
        What is visited with each query.
    """
    family = family_of(config)

    def visit_of(place: Place) -> Visit:
        visit = family.visit(problem, config, place)
        if visit is None:
            raise ValueError(
                f"the family {family.name} does not say what a {direction} like this visits; draw another --target"
            )
        return visit

    visits = [visit_of(query) for query in queries]
    figure = _matrices(problem, queries, visit_of) if problem.rank == 1 else _maps(problem, queries, visits)
    figure.suptitle(f"{problem}\nplan of the {direction} for {target}", fontsize=11)
    path.parent.mkdir(parents=True, exist_ok=True)
    # Text that depends on the day or the version would make a picture of the same problem another file.
    figure.savefig(path, dpi=110, metadata={"Software": None} if path.suffix == ".png" else None)
    return visits


def _matrices(problem: Problem, queries: Sequence[Place], visit_of: Callable[[Place], Visit]) -> Figure:
    """Draw a layout of one axis: every pair of a query and a key."""
    (tokens,) = problem.layout
    seen = np.full((tokens, tokens), _OTHER, np.int8)
    for query in range(tokens):
        window = window_of(problem, 0, query)
        seen[query, list(window)] = _ALL
    computed = np.full_like(seen, _OTHER)
    outlines: dict[tuple[range, range], None] = {}
    total = 0
    for query in range(tokens):
        visit = visit_of((query,))
        (together,) = visit.queries
        if query != together[0]:
            continue
        total += visit.pairs()
        for (keys,) in visit.keys:
            part = np.ix_(together, keys)
            computed[part] = np.where(seen[part] == _ALL, _ALL, _NONE)
            outlines[together, keys] = None
    figure = Figure(figsize=(11, 6.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    _show(left, seen, (0, 0))
    _show(right, computed, (0, 0))
    for (query,) in queries:
        _mark(left, query, window_of(problem, 0, query))
    if len(outlines) <= _FINE and problem.dilation == (1,):
        for together, keys in outlines:
            _outline(right, together, keys)
    left.set_title("the keys that each query sees", fontsize=10)
    ratio = total / problem.pairs()
    right.set_title(f"the keys that each {visit.what} computes:\n{ratio:.2f} scores for each one needed", fontsize=10)
    for axes in (left, right):
        axes.set_xlabel("key", fontsize=9)
        axes.set_ylabel("query", fontsize=9)
    chosen = ", ".join(map(str, sorted(query for (query,) in queries)))
    _legend(figure, {_QUERY: f"seen by the queries {chosen}", _ALL: "seen", _NONE: "computed, and masked"})
    return figure


def _maps(problem: Problem, queries: Sequence[Place], visits: Sequence[Visit]) -> Figure:
    """Draw a layout of two or three axes: a column for each query."""
    wide = 3.9 if problem.rank == 2 else 7.5
    shape = (2, len(queries)) if problem.rank == 2 else (len(queries), 2)
    size = (max(wide * shape[1], 7.5), 3.9 * shape[0] + 1.2) if problem.rank == 2 else (15, 1.9 * shape[0] + 1.2)
    figure = Figure(figsize=size, layout="constrained")
    panels = figure.subplots(*shape, squeeze=False)
    for query, visit, (above, below) in zip(queries, visits, panels.T if problem.rank == 2 else panels, strict=True):
        cells = np.full(problem.layout, _OTHER, np.int8)
        window = [window_of(problem, axis, place) for axis, place in enumerate(query)]
        cells[np.ix_(*window)] = _ALL
        cells[query] = _QUERY
        shown = _around(problem, window, visit)
        _show_layout(above, cells, shown, query)
        keys = math.prod(map(len, window))
        above.set_title(f"query {query} sees {keys} keys", fontsize=10)
        _show_layout(below, _visited(problem, visit), shown, query)
        if problem.rank == 2:
            _outline(below, *visit.queries)
        pairs, together = visit.pairs(), math.prod(map(len, visit.queries))
        below.set_title(
            f"its {visit.what}: {_times(map(len, visit.queries))} queries, {pairs // together} keys,\n"
            f"{100 * (1 - visit.needed(problem) / pairs):.0f}% of their scores masked",
            fontsize=10,
        )
    _legend(
        figure,
        {
            _QUERY: "the query" if problem.rank == 2 else "the query; the queries taken together",
            _ALL: "seen by the query, or by all that are taken together: no mask",
            _SOME: "seen by some: masked for the others",
            _NONE: "computed, and seen by none",
        },
        outlined=problem.rank == 2,
    )
    return figure


def _visited(problem: Problem, visit: Visit) -> NDArray[np.int8]:
    cells = np.full(problem.layout, _OTHER, np.int8)
    together = math.prod(map(len, visit.queries))
    for key, count in visit.seen(problem).items():
        cells[key] = _ALL if count == together else _SOME if count else _NONE
    if problem.rank == 3:
        for query in itertools.product(*visit.queries):
            cells[query] = _QUERY
    return cells


def _around(problem: Problem, window: Sequence[Sequence[int]], visit: Visit) -> list[range]:
    """Return what of the layout is shown: all of it where it is small, else what is looked at and some tokens more."""
    found = []
    for axis, tokens in enumerate(problem.layout):
        stretches = [window[axis], visit.queries[axis], *(box[axis] for box in visit.keys)]
        places = [place for stretch in stretches if stretch for place in (stretch[0], stretch[-1])]
        first, last = min(places) - _AROUND, max(places) + _AROUND
        found.append(range(tokens) if tokens <= _FINE // 2 else range(max(first, 0), min(last + 1, tokens)))
    return found


def _show_layout(axes: Axes, cells: NDArray[np.int8], shown: Sequence[range], query: Place) -> None:
    """Show a part of a layout of two axes, or planes of one of three, side by side."""
    if cells.ndim == 2:
        _show(axes, cells[np.ix_(*shown)], (shown[0][0], shown[1][0]))
        return
    planes = _planes([plane for plane in shown[0] if (cells[plane] != _OTHER).any()], query[0])
    gap = np.full((len(shown[1]), 1), _GAP, np.int8)
    parts = [part for plane in planes for part in (cells[plane][np.ix_(*shown[1:])], gap)][:-1]
    _show(axes, np.concatenate(parts, 1), (shown[1][0], 0))
    width = len(shown[2]) + 1
    axes.set_xticks([number * width + (width - 2) / 2 for number in range(len(planes))])
    axes.set_xticklabels([f"plane {plane}" for plane in planes])


def _planes(used: list[int], own: int) -> list[int]:
    """Return a few of the planes that are used, the query's own among them."""
    if len(used) <= _PLANES:
        return used
    steps = {used[round(number * (len(used) - 1) / (_PLANES - 1))] for number in range(_PLANES)}
    nearest = min(steps, key=lambda plane: abs(plane - own))
    return sorted({*steps} - {nearest} | {own})


def _show(axes: Axes, cells: NDArray[np.int8], first: tuple[int, int]) -> None:
    """Show cells; ``first`` is the place of the upper left one."""
    rows, columns = cells.shape
    top, left = first[0] - 0.5, first[1] - 0.5
    axes.imshow(
        cells, ListedColormap(_COLOURS), vmin=0, vmax=len(_COLOURS) - 1, interpolation="nearest",
        extent=(left, left + columns, top + rows, top), aspect="equal",
    )  # fmt: skip
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(integer=True))
        axis.remove_overlapping_locs = False  # A line between cells stays where a label is.
    if max(rows, columns) <= _FINE:
        axes.set_xticks([left + column for column in range(1, columns)], minor=True)
        axes.set_yticks([top + row for row in range(1, rows)], minor=True)
        axes.grid(which="minor", color="white", linewidth=0.7)
    axes.tick_params(which="both", length=0, labelsize=8)
    axes.spines[:].set_visible(False)


def _mark(axes: Axes, query: int, keys: Sequence[int]) -> None:
    """Mark the keys of a query in a matrix, visibly at any size."""
    height = max(1.0, len(range(*map(round, axes.get_xlim()))) / 120)
    for stretch in _stretches(keys):
        corner = (stretch[0] - 0.5, query - height / 2)
        axes.add_patch(Rectangle(corner, len(stretch), height, color=_COLOURS[_QUERY], linewidth=0, zorder=5))


def _outline(axes: Axes, rows: range, columns: range) -> None:
    """Draw a line around tokens; around each where they are apart."""
    for row, column in itertools.product(_stretches(rows), _stretches(columns)):
        corner = (column[0] - 0.5, row[0] - 0.5)
        axes.add_patch(
            Rectangle(corner, len(column), len(row), fill=False, edgecolor=_EDGE, linewidth=2, zorder=5, clip_on=False)
        )


def _stretches(tokens: Sequence[int]) -> list[range]:
    is_one = isinstance(tokens, range) and tokens.step == 1
    return [tokens] if is_one else [range(token, token + 1) for token in tokens]  # type: ignore[list-item]


def _legend(figure: Figure, names: dict[int, str], outlined: bool = False) -> None:
    handles = [Patch(facecolor=_COLOURS[kind], label=name) for kind, name in names.items()]
    if outlined:
        handles.insert(1, Patch(facecolor="white", edgecolor=_EDGE, label="the queries that are taken together"))
    figure.legend(handles=handles, loc="outside lower center", ncols=3, frameon=False, fontsize=9)


def _times(values: Iterable[int]) -> str:
    return "x".join(map(str, values))
