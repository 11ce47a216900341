"""Words of bits. CUDA leaves undefined what a shift by a negative number gives, or by as many bits as a word has."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tvm import tirx

from na_compiler.schedules.shared.trace import T, maximum, minimum, register

__all__ = ["stretch"]

Expr = Any


def stretch(
    first: Expr, end: Expr, most: int, dtype: str, place: Callable[[Expr], Expr] | None = None, *, keeps: bool = True
) -> Expr:
    """Return a word with the bits from one number to before another, whatever the numbers are.

    Parameters
    ----------
    first, end
        Numbers; below 0 they count as 0, and above ``most`` as that.
    most
        The largest number that has a place.
    dtype
        Of the word.
    place
        Which bit is a number's: rises with it, and is for ints an int. Default: the number itself.
    keeps
        Whether the numbers, once they are in their limits, are kept in registers.

    Returns
    -------
    Expr
        Without bits where ``end`` is not larger than ``first``.
    """
    place = place or (lambda number: number)
    width = int(dtype.lstrip("uint"))
    assert place(0) == 0, "bits begin at 0"
    assert place(most) <= width, f"{place(most)} bits do not fit {dtype}"
    numbers = [maximum(minimum(number, most), 0) for number in (first, end)]
    if keeps:
        numbers = [register(number) for number in numbers]
    one = tirx.IntImm(dtype, 1)
    powers = []
    for number in numbers:
        bit = place(number)
        if place(most) < width:
            powers.append(T.shift_left(one, T.Cast(dtype, bit)))
        else:
            # A shift by all bits, in two steps.
            half = bit // 2
            powers.append(T.shift_left(T.shift_left(one, T.Cast(dtype, half)), T.Cast(dtype, bit - half)))
    return powers[1] - powers[0]
