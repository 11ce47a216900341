"""Configs: the choices that a schedule leaves open, as plain data that keys and manifests can hold."""

from __future__ import annotations

from dataclasses import dataclass

from na_compiler.tensorir.tiling import Tiling

__all__ = ["QueriesInLanes"]


@dataclass(frozen=True)
class QueriesInLanes:
    """Config of `na_compiler.schedules.queries_in_lanes`.

    Parameters
    ----------
    tiling
        How the problem is cut; its ``vector`` is the vector width.
    accumulators
        Vectors accumulated at once in the weighted sums and in the gradients of keys and values.
    row_block
        Keys of the last axis that the weighted sums of all patches visit before the next ones, so that they stay in
        the innermost cache; ``None`` for all.
    """

    tiling: Tiling
    accumulators: int
    row_block: int | None = None

    module = "na_compiler.schedules.queries_in_lanes"
