"""Draws the picture of the page on the architecture."""

from __future__ import annotations

from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch

__all__ = ["draw"]

Point = tuple[float, float]

_LINE = "#44505c"
_CALL, _BUILD, _KERNEL = "#dbe7f3", "#fbe3cd", "#d9ecd9"


def draw(path: Path) -> None:
    """Save the picture."""
    figure = Figure(figsize=(11, 6.4), layout="constrained")
    axes = figure.subplots()
    axes.set_xlim(0, 11)
    axes.set_ylim(0.2, 6.6)
    axes.set_axis_off()
    call = [
        ("na2d, NeighborhoodAttention2D", "functional.py, modules.py"),
        ("torch.ops.na_compiler.na2d", "ops/call.py: the short way; else\nops/operators.py: autocast, vmap, ..."),
        ("table of kernels", "ops/kernels.py: found by what the\ntensors are"),
        ("kernel", "on CUDA runtime/kernel.py looks at\nwhere its tensors lie"),
        ("machine code", "on torch's stream, or its threads"),
    ]
    for number, (title, text) in enumerate(call):
        _box(axes, 0.1, 5.3 - 1.25 * number, title, text, _KERNEL if number == 4 else _CALL)
        if number:
            _arrow(axes, (1.6, 6.55 - 1.25 * number), (1.6, 6.25 - 1.25 * number))
    miss = [
        ("a loaded bundle?", "runtime/bundle.py"),
        ("in the cache?", "compiler/cache.py, by the spec's key:\nno plan, no TVM"),
        ("may it be compiled?", "runtime/jit.py; or else an error that\nnames the command which adds it"),
    ]
    for number, (title, text) in enumerate(miss):
        _box(axes, 4.0, 4.05 - 1.25 * number, title, text, _CALL)
        if number:
            _arrow(axes, (5.5, 5.3 - 1.25 * number), (5.5, 5.0 - 1.25 * number))
    _arrow(axes, (3.1, 3.3), (4.0, 4.4), "a miss", (3.35, 4.05))
    _arrow(axes, (7.9, 0.6), (3.1, 1.6), "the library is loaded", (5.5, 0.8))
    build = [
        ("choose a family and its config", "schedules/choose.py asks them in turn"),
        ("describe and schedule", "FAMILY/family.py: lower\n(window.py: the rule; tensorir/)"),
        ("TVM, then LLVM or nvcc", "compiler/build.py; many at once in\nworker processes"),
        ("a library in the cache", "compiler/cache.py: written beside,\nand renamed"),
    ]
    for number, (title, text) in enumerate(build):
        _box(axes, 7.9, 4.05 - 1.25 * number, title, text, _KERNEL if number == 3 else _BUILD)
        if number:
            _arrow(axes, (9.4, 5.3 - 1.25 * number), (9.4, 5.0 - 1.25 * number))
    _arrow(axes, (7.0, 2.1), (7.9, 4.4), "yes", (7.3, 3.3))
    for x, y, text in (
        (0.1, 6.33, "every call"),
        (4.0, 5.08, "the first call with a problem"),
        (7.9, 5.08, "once on a machine"),
    ):
        axes.text(x, y, text, fontsize=11, fontweight="bold", va="bottom")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110, metadata={"Software": None})


def _box(axes: Axes, x: float, y: float, title: str, text: str, colour: str) -> None:
    shape = FancyBboxPatch((x, y), 3.0, 0.95, "round,pad=0,rounding_size=0.08", facecolor=colour, edgecolor="#8a96a3")
    axes.add_patch(shape)
    axes.text(x + 0.12, y + 0.72, title, fontsize=10, va="center", fontweight="bold")
    axes.text(x + 0.12, y + 0.31, text, fontsize=8.5, va="center", linespacing=1.15)


def _arrow(axes: Axes, start: Point, end: Point, text: str = "", where: Point = (0, 0)) -> None:
    line = {"arrowstyle": "-|>", "color": _LINE, "linewidth": 1.3, "shrinkA": 0, "shrinkB": 0}
    axes.annotate("", end, start, arrowprops=line)
    axes.text(*where, text, fontsize=8.5, ha="center", color=_LINE)
