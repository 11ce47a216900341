"""Arithmetic that writes ONNX nodes: so that formulas read as such, and `na_compiler.window` serves here as well."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from onnx_ir.tape import Tape

from na_compiler import operands
from na_compiler.onnx.signature import ATTRIBUTES, DOMAIN, INPUTS, OUTPUTS

__all__ = ["Expression", "Interface", "Writer"]


@dataclass(frozen=True)
class Interface:
    """What a body takes and returns: it cannot tell whether an input is there, or an output read.

    Parameters
    ----------
    options
        What there is beside query, key and value, of `na_compiler.operands.options`.
    lse
        Whether lse is returned.
    border
        What windows do at the ends of each axis; none, which is NATTEN's rule, where nodes do not say it. A function
        cannot tell words apart in opset 18, so that it computes one.
    """

    options: frozenset[str] = frozenset()
    lse: bool = True
    border: tuple[str, ...] = ()

    @property
    def given(self) -> tuple[str, ...]:
        """Names of the inputs that there are."""
        return tuple(one.name for one in operands.inputs() if one.option is None or one.option in self.options)

    @property
    def inputs(self) -> tuple[str, ...]:
        """Names of the inputs up to the last one that there is: nodes have them by their places."""
        return INPUTS[: INPUTS.index(self.given[-1]) + 1]

    @property
    def outputs(self) -> tuple[str, ...]:
        """Names of the outputs."""
        return OUTPUTS if self.lse else OUTPUTS[:1]


class Expression:
    """A value in a function body, with the arithmetic that Python's numbers have.

    ``//`` is ONNX's Div, which truncates: it is only used on what is not negative. ``%`` has the divisor's sign.
    """

    def __init__(self, writer: Writer, value: ir.Value) -> None:
        self.writer = writer
        self.value = value

    def __add__(self, other: object) -> Expression:
        return self.writer("Add", self, other)

    def __sub__(self, other: object) -> Expression:
        return self.writer("Sub", self, other)

    def __rsub__(self, other: object) -> Expression:
        return self.writer("Sub", other, self)

    def __mul__(self, other: object) -> Expression:
        return self.writer("Mul", self, other)

    def __floordiv__(self, other: object) -> Expression:
        return self.writer("Div", self, other)

    def __mod__(self, other: object) -> Expression:
        return self.writer("Mod", self, other)

    def __le__(self, other: object) -> Expression:
        return self.writer("LessOrEqual", self, other)

    def __and__(self, other: object) -> Expression:
        return self.writer("And", self, other)

    def __or__(self, other: object) -> Expression:
        return self.writer("Or", self, other)

    def minimum(self, other: object) -> Expression:
        """Return the smaller one."""
        return self.writer("Min", self, other)

    def maximum(self, other: object) -> Expression:
        """Return the larger one."""
        return self.writer("Max", self, other)


# Declared where nodes have them: a function's attributes are all asked for.
_WORDS = frozenset(operand.name for operand in operands.words())


class Writer:
    """Writes nodes one after another.

    Parameters
    ----------
    opset
        Version of ONNX's own operators.
    interface
        What the function takes and returns.
    """

    def __init__(self, opset: int, interface: Interface) -> None:
        self._tape = Tape()
        self._opset = opset
        self._given = interface.given
        self._has_border = bool(interface.border)
        self._inputs = {name: Expression(self, ir.Value(name=name)) for name in interface.inputs}
        self._constants: dict[tuple[object, ...], Expression] = {}

    def __call__(self, operator: str, *operands: object, **attributes: int | Sequence[int]) -> Expression:
        """Write a node; operands that are numbers or arrays become constants."""
        values = [self.constant(operand).value for operand in operands]
        return Expression(self, self._tape.op(operator, values, attributes or None))

    def inputs(self, *names: str) -> list[Expression]:
        """Return those of the function's inputs that there are, by their names."""
        return [self._inputs[name] for name in names if name in self._given]

    def constant(self, value: object) -> Expression:
        """Return a constant: integers are int64, other numbers float32. The same one is written once."""
        if isinstance(value, Expression):
            return value
        array = np.array(value)
        if array.dtype != np.bool_:
            array = array.astype(np.int64 if array.dtype.kind in "iu" or not array.size else np.float32)
        key = (array.dtype.str, array.shape, array.tobytes())
        if key not in self._constants:
            tensor = ir.tensor(array)
            self._constants[key] = Expression(self, self._tape.op("Constant", [], {"value": tensor}))
        return self._constants[key]

    def attribute(self, name: str, kind: ir.AttributeType) -> Expression:
        """Return an attribute of the function as a tensor: of Constant, which every reader knows it from."""
        field = {ir.AttributeType.INTS: "value_ints", ir.AttributeType.FLOAT: "value_float"}[kind]
        return Expression(self, self._tape.op("Constant", [], {field: ir.RefAttr(field, name, kind)}))

    def shape(self, *parts: object) -> Expression:
        """Return a shape, for Reshape, of numbers and of tensors with one or more sizes; 0 keeps a size."""
        return self("Concat", *([part] if isinstance(part, int) else part for part in parts), axis=0)

    def function(self, operator: str, overload: str, *outputs: Expression) -> ir.Function:
        """Return the function of what was written: for an operator, with its attributes and leading outputs."""
        for name, expression in zip(OUTPUTS, outputs, strict=False):
            expression.value.name = name
        graph = ir.Graph(
            [expression.value for expression in self._inputs.values()],
            [expression.value for expression in outputs],
            nodes=self._tape.nodes,
            opset_imports={"": self._opset},
            name=operator,
        )
        declared = [
            ir.Attr(attribute, ir.AttributeType.UNDEFINED, None)
            for attribute in ATTRIBUTES
            if attribute not in _WORDS or self._has_border
        ]
        return ir.Function(DOMAIN, operator, overload, graph=graph, attributes=declared)
