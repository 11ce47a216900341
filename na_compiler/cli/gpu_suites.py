"""Problems that ``na-compile bench`` times on a GPU, and what is known of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from na_compiler.problem import Problem

__all__ = ["SUITES", "Row"]

Ints = int | tuple[int, ...]


@dataclass(frozen=True)
class Row:
    """A problem, and figures to see a measurement beside.

    Parameters
    ----------
    title
        What it is.
    problem
        What to compute.
    batch
        Batch entries.
    goals
        By direction: useful TFLOP/s, the least that is asked for and what should be possible.
    natten
        By direction: useful TFLOP/s of NATTEN 0.21.6's Hopper kernels on an H100, of the whole operation with its
        permutation of tokens, measured beside this package.
    """

    title: str
    problem: Problem
    batch: int = 1
    goals: dict[str, tuple[float, float]] = field(default_factory=dict)
    natten: dict[str, float] = field(default_factory=dict)

    @property
    def flops(self) -> dict[str, int]:
        """Useful operations, by direction."""
        return {name: self.problem.flops(self.batch, direction=name) for name in ("forward", "backward")}


def _large(
    title: str,
    layout: Ints,
    heads: int,
    kernel: Ints,
    stride: Ints,
    forward: Sequence[float],
    backward: Sequence[float],
) -> Row:
    """Make a row; figures are the least, what should be possible, and NATTEN's."""
    problem = Problem(layout, heads, 128, kernel, stride, dtype="bfloat16")
    figures = {"forward": forward, "backward": backward}
    goals = {name: (least, possible) for name, (least, possible, _) in figures.items()}
    return Row(title, problem, 1, goals, {name: natten for name, (*_, natten) in figures.items()})


def _small(title: str, batch: int, layout: Ints, heads: int, head_dim: int, kernel: Ints, dilation: int = 1) -> Row:
    return Row(title, Problem(layout, heads, head_dim, kernel, 1, dilation, dtype="float16"), batch)


def _decoder(layout: tuple[int, int, int], kernel: tuple[int, int, int]) -> Row:
    title = f"video decoder {'x'.join(map(str, layout))}, window {'x'.join(map(str, kernel))}"
    return Row(title, Problem(layout, 8, 64, kernel, dtype="bfloat16"))


_IMAGE, _VIDEO, _COSMOS = (256, 256), (30, 48, 80), (24, 44, 80)
_LARGE = (
    _large("image, window 80x80, stride 16", _IMAGE, 24, 80, 16, (500, 600, 506), (500, 600, 248)),
    _large("image, window 80x80", _IMAGE, 24, 80, 1, (380, 480, 268), (390, 450, 205)),
    _large("video, window 18x24x24, stride 16x8x8", _VIDEO, 24, (18, 24, 24), (16, 8, 8), (500, 600, 502),
           (500, 580, 253)),
    _large("video, window 18x24x24", _VIDEO, 24, (18, 24, 24), 1, (270, 370, 190), (290, 350, 139)),
    _large("sequence, window 2048", 32768, 1, 2048, 1, (370, 520, 285), (410, 460, 170)),
    _large("sequence, window 2048, stride 256", 32768, 1, 2048, 256, (480, 560, 350), (430, 490, 175)),
    _large("video, window 24x12x24, stride 1x4x8", _COSMOS, 16, (24, 12, 24), (1, 4, 8), (450, 580, 516),
           (500, 580, 244)),
    _large("video, window 24x12x24", _COSMOS, 16, (24, 12, 24), 1, (270, 490, 173), (290, 370, 127)),
)  # fmt: skip
_SMALL = (
    _small("image model, window 7", 64, (56, 56), 4, 32, 7),
    _small("image model, window 7, second level", 64, (28, 28), 8, 32, 7),
    _small("image model, window 7, dilated", 64, (14, 14), 16, 32, 7, 2),
    _small("volume, window 3", 2, (32, 32, 32), 4, 32, 3),
    _small("volume, window 5", 8, (16, 16, 16), 4, 64, 5),
    _small("image, window 13", 4, (64, 64), 8, 64, 13),
    _decoder((8, 32, 48), (3, 7, 7)),
    _decoder((8, 32, 48), (3, 5, 5)),
    _decoder((12, 32, 48), (11, 11, 11)),
    _decoder((69, 64, 96), (3, 5, 5)),
)
SUITES = {"hopper": _LARGE, "small": _SMALL}
