"""Float32 functions written so that they vectorise: LLVM has no vector ``exp2f`` or ``log2f`` to call."""

from __future__ import annotations

import functools
import math
from typing import Any

import numpy as np
from tvm.tirx.script import builder as T

__all__ = ["LN2", "LOG2_E", "LOWEST", "exp2", "log2"]

Expr = Any  # tvm.ir.Expr, which has no types.

LOG2_E = math.log2(math.e)
LN2 = math.log(2.0)
# The score of a masked key. Not -inf: -inf minus -inf is NaN. It is also the identity that TVM's rfactor knows for max.
LOWEST = float(np.finfo(np.float32).min)

_EXPONENT_BITS = 23
_ROUNDER = 1.5 * 2**_EXPONENT_BITS
_EXP2_DEGREE = 5


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
    """Return ``2**x`` for ``x <= 0``, and exactly 0 for ``x <= -127``.

    ``x = n + f`` with ``n`` the nearest integer; ``2**f`` by a polynomial, and ``n`` added to the exponent field.
    At -127 the polynomial is exactly 1, so that taking 127 from its exponent field leaves the bits of zero: a
    masked key has no weight at all, whatever its value holds.
    """
    # Adding 1.5 * 2**23 rounds to the nearest integer, and leaves it in the last bits of the sum. The sum goes through
    # its bits so that TVM does not take the addition and the subtraction for nothing.
    clamped = T.max(x, T.float32(-127.0))
    shifted = T.reinterpret("int32", clamped + T.float32(_ROUNDER))
    fraction = clamped - (T.reinterpret("float32", shifted) - T.float32(_ROUNDER))
    *lower, power = map(T.float32, _exp2_coefficients())
    for coefficient in reversed(lower):
        power = power * fraction + coefficient
    bits = T.reinterpret("int32", power) + T.shift_left(shifted, T.int32(_EXPONENT_BITS))
    return T.reinterpret("float32", bits)


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
