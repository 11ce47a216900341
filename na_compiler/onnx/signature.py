"""What the operators are called, what they take, and what a node of one says: the one place that knows.

Everything here works on plain Python data (shapes, attribute values), so that the schemas, the exporter, the bodies
and whoever reads a model agree.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from na_compiler import operands
from na_compiler.borders import borders_per_axis
from na_compiler.operands import PARAMETERS, SAME, Operand
from na_compiler.parameters import shown
from na_compiler.problem import Problem
from na_compiler.window import SHIFT

__all__ = [
    "ATTRIBUTES",
    "DOMAIN",
    "DTYPES",
    "INPUTS",
    "OPERATORS",
    "OUTPUTS",
    "VERSION",
    "Signature",
    "default_attribute",
]

DOMAIN = "na_compiler"
VERSION = 1
# Operator to the rank of its layout.
OPERATORS = {"NA1D": 1, "NA2D": 2, "NA3D": 3}
# As in `na_compiler.operands`: numbers are attributes, and what is later may be left out.
INPUTS = tuple(operand.name for operand in operands.inputs())
OUTPUTS = tuple(operand.name for operand in operands.outputs())
ATTRIBUTES = (*PARAMETERS, *(operand.name for operand in (*operands.scalars(), *operands.words())))
_OPERANDS = {operand.name: operand for operand in operands.TABLE}
_REQUIRED = sum(not operand.is_later for operand in operands.inputs())
# Problem's name of a dtype to ONNX's of a tensor of it.
DTYPES = {"float32": "tensor(float)", "float16": "tensor(float16)", "bfloat16": "tensor(bfloat16)"}

# A size: known, or not (a symbol, or nothing at all).
Size = int | None
Shape = Sequence[Size]


def default_attribute(name: str, rank: int) -> list[int]:
    """Return the value that an attribute has where a node does not give it.

    Raises
    ------
    ValueError
        For kernel_size, which has none, and scale, whose default depends on head_dim.
    """
    if name in {"stride", "dilation"}:
        return [1] * rank
    if name == "is_causal":
        return [0] * rank
    raise ValueError(f"{name} has no default of its own")


@dataclass(frozen=True)
class Signature:
    """A node's attributes and the shapes and dtypes of its inputs, as far as they are known.

    Parameters
    ----------
    operator
        ``"NA1D"``, ``"NA2D"`` or ``"NA3D"``.
    shapes
        Of the inputs in their order, ``None`` for a size that is not known, or for a whole shape.
    dtypes
        Of the inputs, as `Problem` names them; ``None`` where it is not known.
    attributes
        As the node has them.
    names
        Of the inputs, where it is not the first ones that there are.
    """

    operator: str
    shapes: tuple[Shape | None, ...]
    dtypes: tuple[str | None, ...]
    attributes: Mapping[str, Any]
    names: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.names:
            object.__setattr__(self, "names", INPUTS[: len(self.shapes)])

    @property
    def rank(self) -> int:
        """Axes of the layout."""
        return OPERATORS[self.operator]

    def problem(self) -> Problem | None:
        """Return the problem that the node poses; ``None`` where the layout, a head count or a width is not known.

        An input additional_keys without a single key poses the problem that there is without it.

        Raises
        ------
        ValueError
            If attributes and inputs do not fit each other, whatever the sizes are that are not known.
        """
        problem = self._completed()
        required = self.shapes[:_REQUIRED]
        return problem if all(shape is not None and None not in shape[1:] for shape in required) else None

    def open_problem(self) -> Problem | None:
        """Return the problem with an open layout, where the layout is not known and all else is; or else ``None``.

        Raises
        ------
        ValueError
            As `problem`.
        """
        problem = self._completed()
        required = [shape or (None,) for shape in self.shapes[:_REQUIRED]]
        if all(None not in shape[1:-2] for shape in required) or any(None in shape[-2:] for shape in required):
            return None
        # Of a layout that stands for all, other borders may be the same as "shift"; of all layouts they are not.
        is_shifted = set(borders_per_axis(self._words()["border"], self.rank)) == {SHIFT}
        return problem.opened() if is_shifted else None

    def _completed(self) -> Problem:
        """Return the problem with sizes that fit for those that are not known."""
        self._check_inputs()
        shapes = dict(zip(self.names, self.shapes, strict=True))
        parameters = self._parameters()
        stand_ins = _complete(self.rank, shapes, parameters)
        dtype = next((dtype for dtype in self.dtypes if dtype is not None), "float32")
        tensors = {
            name: _StandIn(
                shape=stand_ins[name],
                dtype=own or (dtype if _OPERANDS[name].dtype == SAME else _OPERANDS[name].dtype),
                device="one",
            )
            for name, own in zip(self.names, self.dtypes, strict=True)
        }
        numbers = {name: self.attributes.get(name) for name in ATTRIBUTES if _is_later_number(name)}
        named: dict[str, Any] = {**tensors, **parameters, **numbers, **self._words()}
        problem = Problem.of_tensors(**named)
        # An input of additional keys without a single one.
        if problem.additional_kv and stand_ins["additional_keys"][1] == 0:
            problem = problem.replace(additional_kv=False)
        return problem

    def _words(self) -> dict[str, str]:
        found: dict[str, str] = {}
        for operand in operands.words():
            value = self.attributes.get(operand.name)
            if isinstance(value, bytes):  # As onnx's own functions give a string.
                value = value.decode(errors="replace")
            if value is not None and not isinstance(value, str):
                raise ValueError(f"{operand.name} must be a string, got {shown(value)}")
            found[operand.name] = str(operand.default) if value is None else value
        return found

    def border(self) -> tuple[str, ...]:
        """Return what windows do at the ends of each axis, as the node says it."""
        return borders_per_axis(self._words()["border"], self.rank)

    def scale(self) -> float | None:
        """Return the scale; ``None`` where it depends on a head_dim that is not known."""
        given = self.attributes.get("scale")
        if given is not None:
            return float(given)
        head_dims = [shape[-1] for shape in self.shapes[:2] if shape]
        return next((float(dim) ** -0.5 for dim in head_dims if dim is not None), None)

    def _check_inputs(self) -> None:
        count = len(self.names)
        groups = [group for group in map(operands.together, operands.options()) if group]
        is_partial = any(0 < len(set(group) & set(self.names)) < len(group) for group in groups)
        if len(self.shapes) != count or len(self.dtypes) != count or is_partial:
            more = (f" or {INPUTS.index(group[-1]) + 1} (and {', '.join(group)})" for group in groups)
            raise ValueError(
                f"{self.operator} takes {_REQUIRED} inputs ({', '.join(INPUTS[:_REQUIRED])}){','.join(more)}, "
                f"got {len(self.shapes)}"
            )
        for name, shape, dtype in zip(self.names, self.shapes, self.dtypes, strict=True):
            operand = _OPERANDS[name]
            terms = _terms(operand, self.rank)
            if shape is not None and len(shape) != len(terms):
                described = ["width" if term.startswith("head_dim") else term for term in terms]
                described = ["heads" if term == "heads_kv" else term for term in described]
                described = ["XYZ"[int(term[-1])] if term.startswith("layout") else term for term in described]
                raise ValueError(
                    f"{name} must have {len(terms)} dimensions for {self.operator}, [{', '.join(described)}], "
                    f"got {len(shape)}"
                )
            if dtype is not None and operand.dtype == SAME and dtype not in DTYPES:
                raise ValueError(f"{name} must be one of {', '.join(DTYPES)}, got {dtype}")

    def _parameters(self) -> dict[str, Any]:
        parameters: dict[str, Any] = {}
        for name in PARAMETERS:
            value = self.attributes.get(name)
            if value is None:
                if name == "kernel_size":
                    raise ValueError(f"{self.operator} needs the attribute kernel_size, {self.rank} ints")
                value = default_attribute(name, self.rank)
            if not isinstance(value, Iterable) or isinstance(value, (str, bytes)):
                raise ValueError(f"{name} must be {self.rank} ints, got {shown(value)}")
            parameters[name] = tuple(value)
        flags = parameters["is_causal"]
        if any(flag not in {0, 1} for flag in flags):
            raise ValueError(f"is_causal must be {self.rank} ints that are 0 or 1, got {shown(list(flags))}")
        parameters["is_causal"] = tuple(map(bool, flags))
        scale = self.attributes.get("scale")
        # NumPy's float32, which the evaluator of onnx gives, is a number and no float.
        if scale is not None and not isinstance(scale, numbers.Real):
            raise ValueError(f"scale must be a float, got {shown(scale)}")
        if scale is not None and not math.isfinite(scale):
            raise ValueError(f"scale must be finite, got {scale}")
        return parameters


@dataclass(frozen=True)
class _StandIn:
    """What checks look at of a tensor."""

    shape: tuple[int, ...]
    dtype: str
    device: str


def _is_later_number(name: str) -> bool:
    return name in _OPERANDS and _OPERANDS[name].is_later and _OPERANDS[name].role == operands.SCALAR


def _terms(operand: Operand, rank: int) -> list[str]:
    """Return the terms of a shape, an axis each."""
    axes = {"layout", "offsets"}
    return [
        name
        for term in operand.shape
        for name in ([f"{term}{axis}" for axis in range(rank)] if term in axes else [term])
    ]


def _complete(rank: int, shapes: dict[str, Shape | None], parameters: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Return shapes in which what is not known is what it must be for the rest to fit, or else something that fits."""
    terms = {name: _terms(_OPERANDS[name], rank) for name in shapes}
    known: dict[str, int] = {}
    for name, shape in shapes.items():
        for term, size in zip(terms[name], shape or [None] * len(terms[name]), strict=True):
            if size is not None:
                known.setdefault(term, size)
    kernel_size, dilation = parameters["kernel_size"], parameters["dilation"]
    is_whole = len(kernel_size) == len(dilation) == rank
    for axis in range(rank):
        window = [kernel_size[axis], dilation[axis]] if is_whole else [1]
        fits = math.prod(extent for extent in window if isinstance(extent, int))
        known.setdefault(f"layout{axis}", max(fits, 1))
        known.setdefault(f"offsets{axis}", 2 * window[0] - 1 if isinstance(window[0], int) else 1)
    known.setdefault("heads", known.get("heads_kv", 1))
    known.setdefault("heads_kv", known["heads"])
    result: dict[str, tuple[int, ...]] = {}
    for name, shape in shapes.items():
        own = shape or [None] * len(terms[name])
        sizes = zip(terms[name], own, strict=True)
        result[name] = tuple(known.setdefault(term, 1) if size is None else size for term, size in sizes)
    return result
