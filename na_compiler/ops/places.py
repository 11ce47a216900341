"""What a kernel for an open layout is told of where a call's tensors lie, beside what it reads."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

from na_compiler.ops.schema import PLACE, Signature
from na_compiler.place import Place, numbers_of_call
from na_compiler.runtime.kernel import Kernel

__all__ = ["Pick", "with_place"]

# Takes what a kernel reads from an operator's arguments.
Pick = Callable[[tuple[Any, ...]], tuple[Any, ...]]
# Places that are remembered to be right, of tensors of the same sizes.
_PLACES = 256


def with_place(pick: Pick, kernel: Kernel, signature: Signature, known: Mapping[str, int]) -> Pick:
    """Return what picks the numbers of a place as well.

    Parameters
    ----------
    pick
        Picks the rest.
    kernel
        Whose layout is open.
    signature
        Of the operator. One that is given no place has tensors that hold all of a layout.
    known
        The sizes that a call says, by their names.

    Raises
    ------
    ValueError
        If windows do not fit the layout; and what is returned, if the keys are not all that the queries see.
    """
    problem = kernel.problem
    queries, keys = ([known[f"{kind}{axis}"] for axis in range(problem.rank)] for kind in ("queries", "keys"))
    if PLACE not in signature.names:
        return _with_whole(pick, kernel, queries, numbers_of_call(problem, queries, keys))
    at = signature.names.index(PLACE)

    # Places of one tile after another come again and again, and checking one takes longer than a small kernel.
    @functools.lru_cache(maxsize=_PLACES)
    def numbers(place: tuple[int, ...]) -> tuple[int, ...]:
        return numbers_of_call(problem, queries, keys, Place.of_numbers(place))

    return lambda arguments: pick(arguments) + numbers(tuple(arguments[at]))


def _with_whole(pick: Pick, kernel: Kernel, layout: list[int], numbers: tuple[int, ...]) -> Pick:
    """Return the same where tensors hold all of a layout; it tells how often that is met."""
    from na_compiler.compiler.serving import OFTEN, met_often  # noqa: PLC0415 - it brings the compiler

    calls = 0

    def picking(arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        nonlocal calls
        calls += 1
        if calls == OFTEN:
            met_often(kernel.problem.replace(layout=layout), kernel.info.direction, kernel.target)
        return pick(arguments) + numbers

    return picking
