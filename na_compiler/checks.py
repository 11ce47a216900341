"""What tensors must be for an operator or a kernel, and what is said of those that are not.

Tensors of any library: only shape, dtype and device are looked at.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from na_compiler import operands
from na_compiler.operands import BATCH, GIVEN, INPUT, PARAMETER, SAME, SCALAR, Argument, Operand
from na_compiler.workspace import ADDITIONAL

if TYPE_CHECKING:
    from na_compiler.problem import Problem

__all__ = [
    "MAX_RANK",
    "TensorLike",
    "check_call",
    "check_operands",
    "check_required",
    "check_scalar",
    "check_together",
    "given_options",
]

MAX_RANK = 3
# How a size is called that a tensor must have as another has it.
_PHRASES = {"heads_kv": "as many heads as {owner}, {size}"}


class TensorLike(Protocol):
    """A tensor of any library, or what stands for one: all that is looked at here."""

    @property
    def shape(self) -> Sequence[int]:
        """Its sizes."""

    @property
    def dtype(self) -> object:
        """Of its elements; written, or named, as `na_compiler.problem.DTYPES` are."""

    @property
    def device(self) -> object:
        """Where it is; one is equal to another."""


def check_required(tensors: Mapping[str, Any], *, lie_apart: bool = False) -> None:
    """Check that query, key and value, by name, fit each other: shapes, dtypes, devices.

    Parameters
    ----------
    tensors
        The three, by name.
    lie_apart
        Whether key and value have a layout of their own, as with a `na_compiler.place.Place`.

    Raises
    ------
    ValueError
        Naming the argument, what it must be, and what it is.
    """
    query = tensors["query"]
    rank = len(query.shape) - 3
    if not 1 <= rank <= MAX_RANK:
        raise ValueError(
            "query must have 4, 5 or 6 dimensions, [batch, *layout, heads, head_dim] with 1, 2 or 3 axes of layout, "
            f"got shape {tuple(query.shape)}"
        )
    first = "query"
    owners: dict[str, tuple[str, int]] = {}
    for operand in operands.inputs():
        if operand.option is None:
            tensor = tensors[operand.name]
            if lie_apart and operand.is_of_keys and first == "query":
                first = operand.name  # The first of those whose layout is that of the keys.
                _check_rank(operand, tensor, query)
            tokens = tuple(tensors[first].shape[: rank + 1])
            _check_size(operand, tensor, first, tokens, owners)
    for operand in operands.inputs():
        if operand.option is None:
            _check_kind(operand, tensors[operand.name], query)


def _check_rank(operand: Operand, tensor: TensorLike, query: TensorLike) -> None:
    shape, expected = tuple(tensor.shape), tuple(query.shape)
    if len(shape) != len(expected) or shape[0] != expected[0]:
        raise ValueError(
            f"{operand.name} must have query's batch, {expected[0]}, and {len(expected)} dimensions; got shape {shape}"
        )


def _check_size(
    operand: Operand, tensor: TensorLike, first: str, tokens: tuple[int, ...], owners: dict[str, tuple[str, int]]
) -> None:
    """Check a tensor of batch and layout against those before it, which own the sizes."""
    name, shape = operand.name, tuple(tensor.shape)
    rest = operand.shape[2:]
    if len(shape) != len(tokens) + len(rest) or shape[: len(tokens)] != tokens:
        raise ValueError(
            f"{name} must have {first}'s batch and layout, {tokens}, as its first dimensions, and "
            f"{('no', 'one', 'two')[len(rest)]} more; got shape {shape}"
        )
    sizes = dict(zip(rest, shape[len(tokens) :], strict=True))
    for term in reversed(rest):  # The length of rows first.
        owner, size = owners.setdefault(term, (name, sizes[term]))
        if sizes[term] != size:
            phrase = _PHRASES.get(term, "{owner}'s {term}, {size}").format(owner=owner, term=term, size=size)
            raise ValueError(f"{name} must have {phrase}, got {sizes[term]}")


def _check_kind(operand: Operand, tensor: TensorLike, query: TensorLike) -> None:
    name = operand.name
    if operand.dtype == SAME:
        if tensor.dtype != query.dtype:
            raise ValueError(f"{name} must have query's dtype, {query.dtype}, got {tensor.dtype}")
    elif _word(tensor.dtype) != operand.dtype:
        raise ValueError(f"{name} must be {operand.dtype}, got {tensor.dtype}")
    if tensor.device != query.device:
        raise ValueError(f"{name} must be on query's device, {query.device}, got {tensor.device}")


def given_options(given: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the options of operands that are given, by name; ``None`` is not given.

    Raises
    ------
    ValueError
        If only some of the operands are given that come together.
    TypeError
        For a name that is no operand's.
    """
    known = {operand.name: operand for operand in operands.later()}
    unknown = sorted(set(given) - set(known))
    if unknown:
        raise TypeError(f"unknown operand {unknown[0]!r}; there are {', '.join(known)}")
    found = []
    for option in operands.options():
        names = [name for name, operand in known.items() if operand.option == option]
        if check_together(names, given):
            found.append(option)
    return tuple(found)


def check_together(names: Sequence[str], given: Mapping[str, Any]) -> bool:
    """Return whether operands that come together are given.

    Raises
    ------
    ValueError
        If only some are.
    """
    missing = [name for name in names if given.get(name) is None]
    if missing and len(missing) < len(names):
        raise ValueError(f"{' and '.join(names)} come together, and {missing[0]} is None")
    return not missing


def check_operands(
    problem: Problem, given: Mapping[str, Any], query: TensorLike, key: TensorLike | None = None
) -> None:
    """Check operands beside query, key and value, by name, against the problem that these pose.

    With ``key``, what has the layout of the keys has this tensor's, see `na_compiler.place.Place`.

    Raises
    ------
    ValueError
        Naming the argument, what it must be, and what it is.
    """
    known = {BATCH: query.shape[0]}
    arguments = {argument.name: argument for argument in operands.arguments(problem, "forward")}
    for operand in operands.later():
        value = given.get(operand.name)
        if value is None or operand.role == PARAMETER:  # Words are checked with the problem.
            continue
        if operand.role == SCALAR:
            check_scalar(operand, value)
            continue
        argument = arguments[operand.name]
        _learn(argument, value, known)
        expected = argument.sizes(known)
        if key is not None and operand.is_of_keys:
            expected = (expected[0], *key.shape[1:-2], *expected[1 + problem.rank :])
        if tuple(value.shape) != expected:
            terms = ", ".join(operand.shape)
            raise ValueError(f"{operand.name} must have shape [{terms}], here {expected}, got {tuple(value.shape)}")
        _check_kind(operand, value, query)


def check_scalar(operand: Operand, value: object) -> None:
    """Check a number.

    Raises
    ------
    ValueError
        If it is not one of its kind, or not finite.
    """
    if operand.dtype == "float32":
        is_right = isinstance(value, numbers.Real) and not isinstance(value, bool) and math.isfinite(value)
        kind = "a finite number"
    else:
        is_right, kind = isinstance(value, numbers.Integral) and not isinstance(value, bool), "an int"
    if not is_right:
        raise ValueError(f"{operand.name} must be {kind}, got {value!r}")


def check_call(problem: Problem, arguments: Sequence[Argument], given: Mapping[str, Any]) -> dict[str, int]:
    """Check what a kernel is given, by name, against its arguments; returns the extents that only a call knows.

    Raises
    ------
    ValueError
        Naming the argument, what it must be for the problem, and what it is.
    """
    for option in operands.options():
        names = [operand.name for operand in operands.later() if operand.option == option]
        is_given = check_together(names, given)
        if is_given != problem.has(option):
            state = "takes no" if is_given else "needs"
            raise ValueError(f"a kernel for {problem} {state} {' and '.join(names)}")
    for operand in operands.scalars():
        if given.get(operand.name) is not None:
            check_scalar(operand, given[operand.name])
    known: dict[str, int] = {}
    for argument in arguments:
        if argument.role != INPUT or argument.name not in given:
            continue
        if given[argument.name] is not None or GIVEN not in argument.shape:
            _check_argument(problem, argument, given[argument.name], known)
    return {BATCH: 0, ADDITIONAL: 0, GIVEN: 0, **known}


def _check_argument(problem: Problem, argument: Argument, tensor: TensorLike | None, known: dict[str, int]) -> None:
    if tensor is None:
        raise ValueError(f"{argument.name} must be a tensor for {problem}, got None")
    _learn(argument, tensor, known)
    shape = argument.sizes(known)
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{argument.name} must have shape {shape} for {problem}, got {tuple(tensor.shape)}")
    if _word(tensor.dtype) != argument.dtype:
        raise ValueError(f"{argument.name} must be {argument.dtype} for {problem}, got {_word(tensor.dtype)}")


def _learn(argument: Argument, tensor: TensorLike, known: dict[str, int]) -> None:
    """Take the extents that only a call knows from the first tensor that has them."""
    for axis, extent in enumerate(argument.shape):
        if isinstance(extent, str) and extent not in known:
            size = tensor.shape[axis] if axis < len(tensor.shape) else 0
            known[extent] = known[BATCH] if extent == GIVEN and size else size


def _word(dtype: object) -> str:
    return str(getattr(dtype, "name", dtype)).rpartition(".")[2]
