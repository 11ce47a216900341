"""Float32 functions written so that they vectorise: LLVM has no vector ``exp2f`` or ``log2f`` to call.

All keep NaN, of whatever bits. TensorIR's ``max`` and ``min`` do not: which operand they return beside a NaN is the
target's choice. So limits are written as selections, whose comparisons a NaN fails.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
from tvm.tirx.script import builder as T

__all__ = ["HIDDEN", "LN2", "LOG2_E", "LOWEST", "below", "exp2", "log2", "log2_sum", "weight"]

Expr = Any  # tvm.ir.Expr, which has no types.

LOG2_E = math.log2(math.e)
LN2 = math.log(2.0)
# The score of a hidden key: its weight is exactly 0 beside any finite maximum.
HIDDEN = -math.inf
# What a maximum of scores begins with: no visible finite score is below it, and no hidden one as high. So the maximum
# of a query that has seen no key so far is finite, and minus infinity is never taken from itself. It is also the
# identity that TVM's rfactor knows.
LOWEST = float(np.finfo(np.float32).min)

_EXPONENT_BITS = 23
_BIAS = 127
_ROUNDER = 1.5 * 2**_EXPONENT_BITS + _BIAS
_EXP2_DEGREE = 5
# Beyond, whole numbers are all that float32 has.
_WHOLE = 2.0**24
# Of lse: what rounding it, and scores, may come to.
_ROUNDING = 2.0**-22


@functools.cache
def _exp2_coefficients() -> tuple[float, ...]:
    """Fit ``2**f`` on [-1/2, 1/2] by a polynomial whose constant term is exactly 1, for the least relative error.

    Least squares on Chebyshev nodes, which is within a few percent of the best uniform fit; degree 5 leaves
    2e-7, one unit in the last place of float32.
    """
    nodes = 0.5 * np.cos(np.pi * (np.arange(4000) + 0.5) / 4000)
    exact = 2.0**nodes
    powers = nodes[:, None] ** np.arange(1, _EXP2_DEGREE + 1)
    rest, *_ = np.linalg.lstsq(powers / exact[:, None], (exact - 1.0) / exact, rcond=None)
    return (1.0, *map(float, rest))


def exp2(x: Expr) -> Expr:
    """Return ``2**x`` for ``x <= 0``, exactly 0 for ``x <= -127``, and NaN for NaN.

    ``x = n + f`` with ``n`` the nearest integer; ``2**f`` by a polynomial, times ``2**n`` made of its exponent field.
    At -127 that field is 0, which are the bits of 0: a hidden key has no weight at all, however large its value.
    Times it, not added to the polynomial's bits: those of a NaN would become a number's.
    """
    # Adding 1.5 * 2**23 rounds to the nearest integer, and leaves it in the last bits of the sum, here with the bias of
    # exponents. The sum goes through its bits so that TVM does not take the addition and the subtraction for nothing.
    clamped = T.Select(x < T.float32(-_BIAS), T.float32(-_BIAS), x)
    shifted = T.reinterpret("int32", clamped + T.float32(_ROUNDER))
    fraction = clamped - (T.reinterpret("float32", shifted) - T.float32(_ROUNDER))
    *lower, power = map(T.float32, _exp2_coefficients())
    for coefficient in reversed(lower):
        power = power * fraction + coefficient
    return power * T.reinterpret("float32", T.shift_left(shifted, T.int32(_EXPONENT_BITS)))


def log2(x: Expr) -> Expr:
    """Return ``log2(x)`` for a normal ``x > 0``.

    ``x = m * 2**e`` with ``m`` in [sqrt(1/2), sqrt(2)); ``log(m)`` as the series of ``2 * atanh((m - 1) / (m + 1))``,
    whose argument is at most 0.172, so that five terms leave 1e-9.
    """
    bits = T.reinterpret("int32", x)
    sqrt_half_bits = T.int32(0x3F3504F3)
    exponent = T.shift_right(bits - sqrt_half_bits, T.int32(_EXPONENT_BITS))
    mantissa = T.reinterpret("float32", bits - T.shift_left(exponent, T.int32(_EXPONENT_BITS)))
    argument = (mantissa - T.float32(1)) / (mantissa + T.float32(1))
    square = argument * argument
    series = T.float32(1 / 9)
    for coefficient in (1 / 7, 1 / 5, 1 / 3, 1.0):
        series = series * square + T.float32(coefficient)
    return T.Cast("float32", exponent) + argument * series * T.float32(2 / LN2)


def log2_sum(highest: Expr, total: Expr, log2: Callable[[Expr], Expr] = log2) -> Expr:
    """Return the logarithm of a sum of weights relative to a highest score; NaN where there is no softmax.

    The highest score's own weight is 1. A total of 0 therefore means that all visible scores are minus infinity. (Every
    query sees a key; where one may not, that has to be counted.)
    """
    return T.Select(total > T.float32(0), highest + log2(total), T.float32(math.nan))


def below(lse: Expr) -> Expr:
    """Return lse, in units of ``log2(e)``, less what rounding may have added where weights cannot take that."""
    size = T.abs(lse)
    return T.Select(size >= T.float32(_WHOLE), lse - size * T.float32(_ROUNDING), lse)


def weight(score: Expr, lse: Expr, exp2: Callable[[Expr], Expr] = exp2) -> Expr:
    """Return ``2**(score - lse)``, at most 1; ``lse`` as `below` has it."""
    exponent = score - lse
    return exp2(T.Select(exponent > T.float32(0), T.float32(0), exponent))
