"""What torch's operators take and return, in which order: made of `na_compiler.operands`, as everything in `ops` is.

The forward takes query, key and value, kernel_size, stride, dilation and is_causal, the scale, and then whatever may be
left out; it returns output and lse. The backward takes first the gradients of these, and the outputs after value; it
returns a gradient for each input that has one, empty where the input is not there. The tangent takes the tangents of
query, key and value after value, and those of what may be left out at the end; it returns the tangents of output and
lse after these.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from na_compiler import operands
from na_compiler.operands import PARAMETER, PARAMETERS, SCALAR, Operand
from na_compiler.place import Place
from na_compiler.problem import Problem

__all__ = [
    "BACKWARD",
    "BOUND",
    "FORWARD",
    "PART",
    "PART_BACKWARD",
    "PLACE",
    "TANGENT",
    "Signature",
    "flags",
    "place_of",
    "problem_of",
]

# As torch writes the types of parameters: a kernel size may come from a size that is a symbol while torch traces; and
# flags are ints, since torch.jit.trace, and all that is made with it, cannot record a list of bools.
_PARAMETERS = "SymInt[] kernel_size, SymInt[] stride, SymInt[] dilation, int[] is_causal"
# What operators of a part of a layout are given last: `na_compiler.place.Place.numbers`.
PLACE = "place"
# What there is beside operands and parameters, as torch writes it. A place comes behind what may be left out, so torch
# wants a default; one that is left out is refused.
_NAMED = {"kernel": "str kernel", PLACE: f"SymInt[] {PLACE}=[]"}
_NUMBERS = {"float32": "float", "int64": "int", "str": "str"}


@dataclass(frozen=True)
class Signature:
    """The arguments of an operator.

    Parameters
    ----------
    direction
        Of `na_compiler.operands.DIRECTIONS`.
    operands
        What is at each place; names of parameters where it is not an operand.
    results
        What is returned.

    Attributes
    ----------
    names
        Of the arguments.
    tensors
        Places of the tensors that have to be given.
    parameters
        Where kernel_size, stride, dilation and is_causal begin.
    defaults
        What each argument is that is left out, with ``None`` for those that have to be given.
    later
        Where what may be left out begins.
    """

    direction: str
    operands: tuple[Operand | str, ...]
    results: tuple[Operand, ...]
    names: tuple[str, ...] = field(init=False)
    tensors: tuple[int, ...] = field(init=False)
    parameters: int = field(init=False)
    defaults: tuple[float | int | str | None, ...] = field(init=False)
    later: int = field(init=False)

    def __post_init__(self) -> None:
        named = [(place, o) for place, o in enumerate(self.operands) if isinstance(o, Operand)]
        parameters = self.operands.index(PARAMETERS[0])
        made = {
            "names": tuple(o.name if isinstance(o, Operand) else o for o in self.operands),
            "tensors": tuple(place for place, o in named if o.role not in {SCALAR, PARAMETER} and not o.is_later),
            "parameters": parameters,
            "defaults": tuple(o.default if isinstance(o, Operand) else None for o in self.operands),
            "later": next((place for place, o in named if o.is_later), len(self.operands)),
        }
        for name, value in made.items():
            object.__setattr__(self, name, value)

    def text(self) -> str:
        """Return the schema, without the operator's name."""
        arguments, parameters = self.operands[: self.parameters], self.operands[self.parameters + len(PARAMETERS) :]
        taken = [*map(_declared, arguments), _PARAMETERS, *map(_declared, parameters)]
        named = (f"Tensor {o.name}" if self.direction == "forward" else "Tensor" for o in self.results)
        return f"({', '.join(taken)}) -> ({', '.join(named)})"

    def complete(self, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        """Return the arguments with those that were left out."""
        return arguments + self.defaults[len(arguments) :] if len(arguments) < len(self.names) else arguments

    def by_name(self, arguments: tuple[Any, ...]) -> dict[str, Any]:
        """Return the arguments, by their names."""
        return dict(zip(self.names, self.complete(arguments), strict=True))


def _declared(operand: Operand | str) -> str:
    if isinstance(operand, str):
        return _NAMED[operand]
    kind = _NUMBERS[operand.dtype] if operand.role in {SCALAR, PARAMETER} else "Tensor"
    if operand.option is not None:
        return f"{kind}? {operand.name}=None"
    if operand.is_nullable:
        return f"{kind}? {operand.name}"
    return f"{kind} {operand.name}" + ("" if operand.default is None else f"={_literal(operand.default)}")


def _literal(default: object) -> str:
    return f'"{default}"' if isinstance(default, str) else str(default)


def _given(wanted: Iterable[Operand]) -> tuple[Operand, ...]:
    return tuple(operand for operand in wanted if not operand.is_later)


_REST: tuple[Operand | str, ...] = (*PARAMETERS, *_given(operands.scalars()), *operands.later())
_INPUTS, _OUTPUTS = _given(operands.inputs()), operands.outputs()
FORWARD = Signature("forward", (*_INPUTS, *_REST), _OUTPUTS)
BACKWARD = Signature(
    "backward",
    (*(output.gradient() for output in _OUTPUTS), *_INPUTS, *_OUTPUTS, *_REST),
    tuple(operand.gradient() for operand in operands.differentiable()),
)
# Of the operators whose tensors hold a part of a layout.
PART, PART_BACKWARD = (
    Signature(whole.direction, (*whole.operands, PLACE), whole.results) for whole in (FORWARD, BACKWARD)
)
_MOVING = [(operand, operand.tangent()) for operand in operands.differentiable()]
TANGENT = Signature(
    "tangent",
    (
        *_INPUTS,
        *(tangent for operand, tangent in _MOVING if not operand.is_later),
        *_REST,
        *(tangent for operand, tangent in _MOVING if operand.is_later),
    ),
    (*_OUTPUTS, *(output.tangent() for output in _OUTPUTS)),
)
# Of ``torch.ops.na_compiler.bound``: the key of a kernel comes before the scale.
BOUND = Signature(
    "forward", (*_INPUTS, "kernel", *_given(operands.scalars()), *PARAMETERS, *operands.later()), _OUTPUTS
)


def flags(is_causal: Iterable[Any]) -> tuple[bool, ...]:
    """Return the flags of an operator, which are ints to it.

    Raises
    ------
    ValueError
        If one is neither 0 nor 1.
    """
    given = tuple(is_causal)
    if any(flag not in {0, 1} for flag in given):
        raise ValueError(f"is_causal must be 0 or 1 for each axis, got {list(given)}; 1 sees no key after itself")
    return tuple(map(bool, given))


def place_of(given: dict[str, Any]) -> Place | None:
    """Return the place that an operator's arguments name; ``None`` where they are those of the whole."""
    return Place.of_numbers(given[PLACE] or ()) if PLACE in given else None


def problem_of(given: dict[str, Any]) -> Problem:
    """Return the problem that an operator's arguments pose, by name; raises as `Problem.of_tensors`.

    Where tensors hold a part of a layout it is that of the whole.
    """
    parameters = {name: given[name] for name in PARAMETERS[:-1]}
    named = ("query", "key", "value", *(operand.name for operand in operands.later()))
    tensors = {name: given[name] for name in named}
    return Problem.of_tensors(**tensors, **parameters, is_causal=flags(given["is_causal"]), place=place_of(given))
