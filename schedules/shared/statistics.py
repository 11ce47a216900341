"""What a backward wants to know of each query: ``lse`` in units of the exponent, and ``delta``.

``delta = sum(grad_output * output) - grad_lse`` is what all gradients of a query's weights are less.
"""

from __future__ import annotations

from typing import Any

from na_compiler.schedules.shared.trace import T, register

__all__ = ["LOG2_E", "exponent_of", "widened"]

Expr = Any
LOG2_E = 1.4426950408889634
_COARSE, _LESS = 2.0**24, 2.0**-22


def exponent_of(lse: Expr) -> Expr:
    """Return lse in units of the exponent.

    Where it is so large that its rounding decides the weights, a little less, so that none of the highest scores falls
    short of it: see `docs/numerics.md`.
    """
    exponent = register(lse * T.float32(LOG2_E), "float32")
    size = T.max(exponent, T.float32(0) - exponent)
    return T.Select(size >= T.float32(_COARSE), exponent - size * T.float32(_LESS), exponent)


def widened(word: Expr, half: int, dtype: str) -> Expr:
    """Return one of the two numbers in a register, in float32."""
    if dtype == "bfloat16":
        bits = T.bitwise_and(word, T.uint32(0xFFFF0000)) if half else T.shift_left(word, T.uint32(16))
        return T.reinterpret("float32", bits)
    bits = T.shift_right(word, T.uint32(16)) if half else T.bitwise_and(word, T.uint32(0xFFFF))
    return T.Cast("float32", T.reinterpret("float16", T.Cast("uint16", bits)))
