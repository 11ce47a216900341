"""What the backward of five products takes. Pure Python."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from na_compiler.problem import Problem
from na_compiler.schedules.sm90.plan import ROWS, SHARED_MEMORY, pieces_of

if TYPE_CHECKING:
    from na_compiler.schedules.sm90.backward.fused.config import Sm90Fused
    from na_compiler.schedules.sm90.backward.fused.plan import FusedPlan

__all__ = ["HEAD_DIM", "check_config", "check_room", "refusal"]

# A warpgroup makes half of the columns of the gradients of queries: one box of a swizzle's width, which is 64.
HEAD_DIM = 128
# Columns of scores that four threads share: the bits of a mask are made of these, along the last axis.
_COLUMNS = 8


def refusal(problem: Problem) -> str | None:
    """Return in a sentence why the form does not take a problem; ``None`` if it does."""
    dims = (problem.head_dim, problem.head_dim_v)
    reasons = {
        "takes float16 and bfloat16, not float32": problem.dtype == "float32",
        f"takes {HEAD_DIM} as head_dim, not {' and '.join(map(str, dims))}": dims != (HEAD_DIM, HEAD_DIM),
        "takes no additional keys: use the form of two sweeps": problem.additional_kv,
    }
    reason = next((reason for reason, holds in reasons.items() if holds), None)
    return reason and f"The backward of five products for Hopper {reason}."


def check_config(problem: Problem, config: Sm90Fused) -> None:
    """Raise an error that names what is wrong with a config, before anything follows from it.

    Raises
    ------
    NotImplementedError
        If the form does not take the problem.
    ValueError
        If a choice is none: names it, what was given, and what would do.
    """
    if reason := refusal(problem):
        raise NotImplementedError(reason)
    for name in ("key_tile", "query_tile"):
        tile = getattr(config, name)
        if len(tile) != problem.rank or math.prod(tile) != ROWS:
            works = (1,) * (problem.rank - 1) + (ROWS,)
            raise ValueError(f"{name} must be a box of {ROWS} tokens on {problem.rank} axes, as {works}, got {tile}")
        if pieces_of(tile, problem.dilation) is None:
            raise ValueError(f"{name} must be what tensor maps can fetch with dilation {problem.dilation}, got {tile}")
    if config.query_tile[-1] % _COLUMNS:
        raise ValueError(
            f"query_tile must have a multiple of {_COLUMNS} tokens on its last axis, got {config.query_tile}"
        )
    for name in ("order", "walk"):
        axes = getattr(config, name)
        if axes and sorted(axes) != list(range(problem.rank)):
            works = tuple(range(problem.rank))
            raise ValueError(f"{name} must name each of {problem.rank} axes once, as {works}, or none, got {axes}")
    for name, most in (("stages", None), ("slopes", None), ("parts", 3), ("together", None)):
        number = getattr(config, name)
        if number < 1 or (most and number > most):
            limit = f"between 1 and {most}, as there are warps to add" if most else "at least 1"
            raise ValueError(f"{name} must be {limit}, got {number}")


def check_room(plan: FusedPlan) -> None:
    """Raise an error if a plan needs more shared memory than there is, or has more tiles than queries.

    The kernel that sets turns to 0 has a few threads for each query.
    """
    problem = plan.problem
    tiles, queries = math.prod(plan.turns_shape), problem.tokens * problem.heads
    if tiles > queries:
        raise ValueError(
            f"query_tile={plan.stream_tile} cuts {queries} queries into {tiles} tiles, most of them of nothing: "
            f"with dilation {problem.dilation} its boxes have to be no longer than groups of tokens"
        )
    if plan.shared_bytes > SHARED_MEMORY:
        config = plan.fused
        raise ValueError(
            f"stages={config.stages}, slopes={config.slopes} and parts={config.parts} need {plan.shared_bytes} bytes "
            f"of shared memory, of which there are {SHARED_MEMORY}: 2, 2 and 2 fit"
        )
