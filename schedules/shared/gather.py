"""The last kernels of a backward with additional keys: what the strips give to each of them, added up in order."""

from __future__ import annotations

from typing import Any

from na_compiler.problem import Problem
from na_compiler.schedules.shared.trace import I, T, flat, index64, let, local, put, when

__all__ = ["launch_gather"]

Expr = Any
_THREADS = 256


def launch_gather(problem: Problem, arguments: Any, strips: int, name: str) -> None:
    """Emit the kernel, inside a launch: a thread for each element.

    Parameters
    ----------
    problem
        What to compute.
    arguments
        The backward's arguments, by name; with ``batch``, ``additional`` and ``scale``.
    strips
        How many strips there are.
    name
        Of which gradients: those of additional ``"key"``s or ``"value"``s.
    """
    width, factor = (problem.head_dim, arguments.scale) if name == "key" else (problem.head_dim_v, T.float32(1))
    space, gradient = arguments[f"additional_{name}_space"], arguments[f"grad_additional_{name}s"]
    elements = arguments.batch * arguments.additional * (problem.heads_kv * width)
    block = I.cta_id([T.Cast("int32", (elements + (_THREADS - 1)) // _THREADS)])
    thread = I.thread_id([_THREADS])
    number = let(index64(block) * _THREADS + index64(thread))
    with when(number < elements):
        column, rest = number % width, number // width
        head, rest = rest % problem.heads_kv, rest // problem.heads_kv
        token, batch = rest % arguments.additional, rest // arguments.additional
        first = let((batch * problem.heads_kv + head) * strips * arguments.additional * width)
        place = let(token * width + column)
        sums = local(1)
        put(sums, 0, T.float32(0))
        strip = local(1, "int32")
        put(strip, 0, 0)
        parts = flat(space)
        with I.While(strip[0] < strips):
            at = first + index64(strip[0]) * arguments.additional * width + place
            put(sums, 0, sums[0] + parts[at])
            put(strip, 0, strip[0] + 1)
        I.buffer_store(flat(gradient), T.Cast(problem.dtype, sums[0] * factor), [number])
