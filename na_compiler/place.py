"""`Place`: the part of a larger layout that tensors hold, and the check that it is enough."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from na_compiler.checks import MAX_RANK
from na_compiler.counting import keys_needed
from na_compiler.parameters import is_int, shown
from na_compiler.problem import Problem
from na_compiler.window import WRAP

__all__ = ["LONGEST_AXIS", "Place", "numbers_of_call"]

# Kernels count positions in 32 bits, and add windows to them.
LONGEST_AXIS = 2**30


@dataclass(frozen=True)
class Place:
    """Where in a larger layout the tensors of a call lie: query in one box of it, key and value in another.

    Windows are those of the whole layout: what a query gets is what it would get of the whole computed at once. How
    many queries and keys there are along each axis, the tensors' shapes say.

    Parameters
    ----------
    layout
        Tokens of the whole along each axis; an int for one axis. Of a stream whose windows are causal, any number that
        it will not pass, if with a stride a multiple of that.
    queries
        The first token, along each axis, that query holds; an int for all. Default 0.
    keys
        The first token that key and value hold. Default 0. Where windows wrap their tokens go on after the last one
        with the first.

    Raises
    ------
    ValueError
        Naming the argument, the value given, and the limit.

    Examples
    --------
    The lower half of an image of 64 x 64, whose windows of 7 reach three rows further up:

    >>> Place((64, 64), queries=(32, 0), keys=(29, 0))
    Place(layout=(64, 64), queries=(32, 0), keys=(29, 0))
    """

    layout: tuple[int, ...]
    queries: tuple[int, ...] = 0  # type: ignore[assignment]
    keys: tuple[int, ...] = 0  # type: ignore[assignment]

    if TYPE_CHECKING:
        # Fields are what `__post_init__` makes of the arguments.
        def __init__(
            self, layout: int | Sequence[int], queries: int | Sequence[int] = 0, keys: int | Sequence[int] = 0
        ) -> None: ...

    def __post_init__(self) -> None:
        axes: object = (self.layout,) if is_int(self.layout) else self.layout
        if not isinstance(axes, Sequence) or not 1 <= len(axes) <= MAX_RANK or not all(map(_is_length, axes)):
            raise ValueError(
                f"place.layout must be 1, 2 or 3 ints (one per axis) from 1 to {LONGEST_AXIS - 1}, got "
                f"{shown(self.layout)}; e.g. (512, 512)"
            )
        layout = tuple(map(int, axes))
        object.__setattr__(self, "layout", layout)
        for name in ("queries", "keys"):
            object.__setattr__(self, name, _firsts(name, getattr(self, name), layout))

    def numbers(self) -> tuple[int, ...]:
        """Return the layout, the first queries and the first keys as one row: what operators and kernels are told.

        Examples
        --------
        >>> Place((64, 48), (32, 0), (29, 0)).numbers()
        (64, 48, 32, 0, 29, 0)
        """
        return (*self.layout, *self.queries, *self.keys)

    @classmethod
    def of_numbers(cls, numbers: Sequence[int]) -> Place:
        """Make a place of what `numbers` returned.

        Raises
        ------
        ValueError
            If it is no place.
        """
        axes, rest = divmod(len(numbers), 3)
        if rest or not axes:
            raise ValueError(f"place must be three numbers for each axis of the layout, got {shown(list(numbers))}")
        layout, queries, keys = (tuple(numbers[part * axes : (part + 1) * axes]) for part in range(3))
        return cls(layout, queries, keys)

    def check_queries(self, queries: Sequence[int]) -> None:
        """Check that the queries that there are have the place's axes, and at least one token on each.

        Raises
        ------
        ValueError
            If not.
        """
        if len(queries) != len(self.layout) or min(queries) < 1:
            raise ValueError(
                f"query must have the {len(self.layout)} axes of place.layout, with at least one token on each, got "
                f"{tuple(queries)}"
            )

    def check(self, problem: Problem, queries: Sequence[int], keys: Sequence[int]) -> None:
        """Check that tensors of some sizes fit the place, and that the keys are all that the queries see.

        Parameters
        ----------
        problem
            Of the whole: its layout is the place's.
        queries, keys
            Tokens along each axis that query, and that key and value hold; at least one query.

        Raises
        ------
        ValueError
            Naming the axis, the tokens that are needed, and those that are held.
        """
        axes = zip(
            self.layout,
            self.queries,
            self.keys,
            queries,
            keys,
            problem.kernel_size,
            problem.stride,
            problem.dilation,
            problem.is_causal,
            problem.border,
            strict=True,
        )
        for axis, (tokens, first_query, first_key, held_queries, held_keys, *rule) in enumerate(axes):
            self._check_range("queries", "query", axis, first_query, held_queries)
            self._check_range("keys", "key", axis, first_key, held_keys, wraps=problem.border[axis] == WRAP)
            self._check_needed(axis, held_queries, held_keys, keys_needed(tokens, first_query, held_queries, *rule))

    def _check_range(self, name: str, tensor: str, axis: int, first: int, held: int, *, wraps: bool = False) -> None:
        tokens = self.layout[axis]
        if held > tokens:
            raise ValueError(
                f"{tensor} must hold at most the {tokens} tokens of place.layout on axis {axis}, got {held}"
            )
        if first + held > tokens and not wraps:
            raise ValueError(
                f"place.{name} must be at most {tokens - held} of the {tokens} tokens on axis {axis} for a {tensor} "
                f"that holds {held}, got {first}"
            )

    def _check_needed(self, axis: int, queries: int, keys: int, needed: tuple[int, int]) -> None:
        tokens, first_query, first_key = self.layout[axis], self.queries[axis], self.keys[axis]
        begin, end = needed
        if end - begin >= tokens:  # A circle is needed as a whole.
            begin, end = 0, tokens
            holds = keys == tokens
        else:
            # Modulo the axis: where windows do not wrap nothing is before 0 or beyond the end.
            holds = (begin - first_key) % tokens + (end - begin) <= keys
        if not holds:
            raise ValueError(
                f"key must hold the tokens from {begin} up to {end} of the {tokens} on axis {axis}, which the queries "
                f"from {first_query} up to {first_query + queries} see; it holds those from {first_key} up to "
                f"{first_key + keys}; place.keys={begin % tokens} and {end - begin} tokens would work"
            )


def _is_length(value: object) -> bool:
    return is_int(value) and 1 <= int(value) < LONGEST_AXIS  # type: ignore[call-overload]


def _firsts(name: str, value: object, layout: tuple[int, ...]) -> tuple[int, ...]:
    rank = len(layout)
    axes = (value,) * rank if is_int(value) else value
    if not isinstance(axes, Sequence) or isinstance(axes, str) or len(axes) != rank or not all(map(is_int, axes)):
        raise ValueError(
            f"place.{name} must be an int or {rank} ints (one per axis of place.layout), got {shown(value)}; "
            f"e.g. {(0,) * rank}"
        )
    for axis, (first, tokens) in enumerate(zip(axes, layout, strict=True)):
        if not 0 <= first < tokens:
            raise ValueError(
                f"place.{name} must be from 0 to {tokens - 1} on axis {axis}, the tokens of place.layout, got "
                f"{shown(first)}"
            )
    return tuple(map(int, axes))


def numbers_of_call(
    problem: Problem, queries: Sequence[int], keys: Sequence[int], place: Place | None = None
) -> tuple[int, ...]:
    """Return what a kernel for an open layout is told of where its tensors lie, checked.

    Parameters
    ----------
    problem
        What the kernel computes.
    queries, keys
        Tokens along each axis that query, and that key and value hold.
    place
        Where they lie. Default: they hold all of a layout.

    Returns
    -------
    tuple of int
        For each axis the numbers of `na_compiler.operands.PLACE`.

    Raises
    ------
    ValueError
        If windows do not fit the layout, or the keys are not all that the queries see.
    """
    if place is None:
        place = Place(tuple(queries))
    place.check_queries(queries)
    place.check(problem.replace(layout=place.layout), queries, keys)
    axes = zip(place.layout, place.queries, place.keys, strict=True)
    return tuple(number for axis in axes for number in axis)
