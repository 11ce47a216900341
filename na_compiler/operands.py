"""The operands of kernels, each said once: its name, shape, dtype and strides, and whether it has a gradient.

What follows from `TABLE`: torch's operators (`na_compiler.ops`: schemas, fakes, autograd, autocast, vmap), ONNX's
(`na_compiler.onnx`: schemas, signatures, the exporter), the nodes that passes read and write, the checks of tensors
(`na_compiler.checks`), what a kernel is called with and where that may lie (`arguments`), and the operands in a
bundle's manifest, by which the C++ operators call kernels.

A new operand goes to the end of the table and has an option, or a default: whatever was made before it was there, a
program, a model, a call, goes on meaning the same.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from na_compiler.window import SHIFT
from na_compiler.workspace import ADDITIONAL, Workspace

if TYPE_CHECKING:
    from na_compiler.problem import Problem

__all__ = [
    "ADDITIONAL_KV",
    "BATCH",
    "COMPACT",
    "DIRECTIONS",
    "FREE",
    "GIVEN",
    "INPUT",
    "KEY_MASK",
    "OUTPUT",
    "PARAMETER",
    "PARAMETERS",
    "PLACE",
    "PLACE_NUMBER",
    "RELATIVE_POSITION_BIAS",
    "SAME",
    "SCALAR",
    "TABLE",
    "WORKSPACE",
    "Argument",
    "Operand",
    "arguments",
    "check_direction",
    "defaults",
    "differentiable",
    "inputs",
    "later",
    "options",
    "outputs",
    "place_names",
    "scalars",
    "together",
    "words",
]

# Roles.
INPUT, SCALAR, OUTPUT, WORKSPACE = "input", "scalar", "output", "workspace"
# A word that is part of the problem, and that no kernel is called with.
PARAMETER = "parameter"
# Strides: any but the last one, which is 1; or those of a contiguous tensor.
FREE, COMPACT = "free", "compact"
# The dtype of the problem.
SAME = "same"
# The extent of a shape that a kernel learns when it is called, beside `na_compiler.workspace.ADDITIONAL`.
BATCH = "batch"
# The batch of an operand that may have no entries, which stand for zeros: 0 then.
GIVEN = "given"
# The role of a number that says where in a larger layout tensors lie, which kernels for an open layout take.
PLACE_NUMBER = "place"
# For each axis: tokens of the whole, and the first query and the first key that there are.
PLACE = ("length", "first_query", "first_key")
# The option of the additional keys and values, for which `Problem` has a field of its own.
ADDITIONAL_KV = "additional_kv"
# The options of a table of biases by relative position, and of keys that are hidden from all queries.
RELATIVE_POSITION_BIAS, KEY_MASK = "relative_position_bias", "key_mask"
# What else an operator is given: a value for each axis, which the problem holds.
PARAMETERS = ("kernel_size", "stride", "dilation", "is_causal")


@dataclass(frozen=True)
class Operand:
    """A tensor or number that kernels take.

    Parameters
    ----------
    name
        As everybody calls it.
    role
        `INPUT`, `SCALAR`, `OUTPUT` or `PARAMETER`.
    text
        What it is, in a few words, for documentation.
    shape
        In the problem's terms: ``"batch"``, ``"layout"`` (an extent for each axis), ``"heads"``, ``"heads_kv"``,
        ``"head_dim"``, ``"head_dim_v"``, ``"additional"``, ``"offsets"`` (for each axis, the differences between the
        places of a query and of its keys: ``2 * kernel_size - 1``).
    dtype
        `SAME`, or the name of one. Of a scalar: ``"float32"`` or ``"int64"``; of a parameter ``"str"``.
    strides
        `FREE` or `COMPACT`.
    option
        What a problem has the operand for; operands of one option come together. ``None``: every problem has it.
    default
        Of a scalar or parameter that every problem has, where it is not given; ``None``: it must be given.
    differentiable
        Whether it has a gradient. The gradient of an input without a batch is what it gets from each batch entry, in
        float32, with the batch in front; `na_compiler.ops` sums over it.
    gradient_strides
        Strides that the gradient may have: as kernels read that of an output, and as they write that of an input with
        a batch. Written with strides, gradients of views of one tensor are views of its gradient.
    gradient_is_optional
        Of an output, whether its gradient may be left out: kernels read one of no batch entries as 0. Nothing has to
        be allocated and filled then, which takes longer than a small kernel.
    is_of_keys
        Whether its layout is that of the keys: another one than that of the queries where tensors hold a part of a
        larger layout, see `na_compiler.place`.
    """

    name: str
    role: str
    text: str
    shape: tuple[str, ...] = ()
    dtype: str = SAME
    strides: str = COMPACT
    option: str | None = None
    default: float | int | str | None = None
    differentiable: bool = False
    gradient_strides: str = COMPACT
    gradient_is_optional: bool = False
    is_of_keys: bool = False

    @property
    def is_batched(self) -> bool:
        """Whether each batch entry has its own."""
        return BATCH in self.shape or GIVEN in self.shape

    @property
    def is_nullable(self) -> bool:
        """Whether nothing may be given in its place, though every problem has it."""
        return GIVEN in self.shape

    @property
    def is_later(self) -> bool:
        """Whether a call may leave it out."""
        return self.option is not None or self.default is not None

    def gradient(self) -> Operand:
        """Return its gradient, as the backward takes or returns it."""
        name, text = f"grad_{self.name}", f"gradient of {self.name}"
        if self.role == OUTPUT:
            shape = tuple(GIVEN if term == BATCH and self.gradient_is_optional else term for term in self.shape)
            return Operand(name, INPUT, text, shape, self.dtype, self.gradient_strides, self.option)
        if self.is_batched:
            strides = self.gradient_strides
            return Operand(name, OUTPUT, text, self.shape, self.dtype, strides, self.option, is_of_keys=self.is_of_keys)
        return Operand(name, OUTPUT, text, (BATCH, *self.shape), "float32", COMPACT, self.option)

    def tangent(self) -> Operand:
        """Return its tangent, as forward mode takes it of an input, or returns it of an output."""
        text = f"tangent of {self.name}"
        name = f"tangent_{self.name}"
        return Operand(
            name, self.role, text, self.shape, self.dtype, self.strides, self.option, is_of_keys=self.is_of_keys
        )


_TOKENS = (BATCH, "layout")
_MORE = (BATCH, ADDITIONAL)

TABLE: tuple[Operand, ...] = (
    Operand(
        "query", INPUT, "heads is a multiple of heads_kv", (*_TOKENS, "heads", "head_dim"), SAME, FREE,
        differentiable=True, gradient_strides=FREE,
    ),
    Operand(
        "key", INPUT, "", (*_TOKENS, "heads_kv", "head_dim"), SAME, FREE, differentiable=True, gradient_strides=FREE,
        is_of_keys=True,
    ),
    Operand(
        "value", INPUT, "", (*_TOKENS, "heads_kv", "head_dim_v"), SAME, FREE, differentiable=True,
        gradient_strides=FREE, is_of_keys=True,
    ),
    Operand(
        "additional_keys", INPUT, "seen by every query beside its window", (*_MORE, "heads_kv", "head_dim"), SAME,
        FREE, ADDITIONAL_KV, differentiable=True,
    ),
    Operand(
        "additional_values", INPUT, "there if and only if additional_keys is", (*_MORE, "heads_kv", "head_dim_v"),
        SAME, FREE, ADDITIONAL_KV, differentiable=True,
    ),
    Operand("scale", SCALAR, "of the scores; default 1 / sqrt(head_dim); 0 is 0", dtype="float32"),
    Operand(
        "output", OUTPUT, "", (*_TOKENS, "heads", "head_dim_v"), differentiable=True, gradient_strides=FREE,
    ),
    Operand(
        "lse", OUTPUT, "natural logarithm of the sum of exponentials of the scaled scores", (*_TOKENS, "heads"),
        "float32", differentiable=True, gradient_is_optional=True,
    ),
    Operand(
        "relative_position_bias", INPUT,
        "added to the scaled scores; its place kernel_size - 1 is that of a query itself, and places count the tokens "
        "of a dilation group", ("heads", "offsets"), "float32", COMPACT, RELATIVE_POSITION_BIAS, differentiable=True,
    ),
    Operand(
        "key_mask", INPUT, "False hides a key of the layout from all queries", _TOKENS, "bool", COMPACT, KEY_MASK,
        is_of_keys=True,
    ),
    Operand(
        "border", PARAMETER,
        "what windows do at the ends of axes: 'shift', 'cut', 'cut:LEFT' (LEFT keys before a query) or 'wrap', one for "
        "all axes or, with commas between them, one for each", dtype="str", default=SHIFT,
    ),
)  # fmt: skip


def inputs() -> tuple[Operand, ...]:
    """Return the tensors that are read, in the order of the table."""
    return tuple(operand for operand in TABLE if operand.role == INPUT)


def scalars() -> tuple[Operand, ...]:
    """Return the numbers."""
    return tuple(operand for operand in TABLE if operand.role == SCALAR)


def words() -> tuple[Operand, ...]:
    """Return the parameters that are words; `PARAMETERS` are numbers, a value for each axis."""
    return tuple(operand for operand in TABLE if operand.role == PARAMETER)


def defaults() -> dict[str, float | int | str]:
    """Return the numbers and words that a call may leave out although every problem has them."""
    return {one.name: one.default for one in (*scalars(), *words()) if one.default is not None}


def outputs() -> tuple[Operand, ...]:
    """Return the tensors that the forward writes."""
    return tuple(operand for operand in TABLE if operand.role == OUTPUT)


def later() -> tuple[Operand, ...]:
    """Return what a call may leave out: the last arguments of torch's operators, in this order."""
    return tuple(operand for operand in TABLE if operand.role in {INPUT, SCALAR, PARAMETER} and operand.is_later)


def differentiable() -> tuple[Operand, ...]:
    """Return the inputs that have gradients: what torch's backward operators return, in this order."""
    return tuple(operand for operand in inputs() if operand.differentiable)


def options() -> tuple[str, ...]:
    """Return what a problem may have beside query, key and value."""
    return tuple(dict.fromkeys(operand.option for operand in TABLE if operand.option is not None))


def together(option: str) -> tuple[str, ...]:
    """Return the names of the tensors of an option, which come together."""
    return tuple(operand.name for operand in inputs() if operand.option == option)


@dataclass(frozen=True)
class Argument:
    """What a kernel is called with at one place: an operand in one problem, or a buffer of its workspace.

    Parameters
    ----------
    name, role, dtype, strides
        As of an `Operand`; the role may be `WORKSPACE` or `PLACE_NUMBER` as well.
    shape
        Extents, of which `BATCH`, `GIVEN` and ``"additional"`` are known when it is called, and where the layout is
        open ``"queries0"``, ``"keys0"`` and so on, what the tensors hold along each axis. Those of a workspace have
        the number of additional keys rounded up, see `Workspace`.
    has_layout
        Whether it has the axes of the layout.
    """

    name: str
    role: str
    dtype: str
    shape: tuple[int | str, ...] = ()
    strides: str = COMPACT
    has_layout: bool = False

    def sizes(self, known: Mapping[str, int]) -> tuple[int, ...]:
        """Return the shape of a call, of which the extents are known that are known only then."""
        return tuple(known[extent] if isinstance(extent, str) else extent for extent in self.shape)

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for a manifest."""
        data: dict[str, Any] = {"name": self.name, "role": self.role, "dtype": self.dtype}
        if self.role not in {SCALAR, PLACE_NUMBER}:
            data |= {"shape": list(self.shape), "strides": self.strides}
        return data


def arguments(problem: Problem, direction: str, workspace: Workspace | None = None) -> tuple[Argument, ...]:
    """Return what a kernel is called with, in order. Every family of kernels takes its arguments so.

    Parameters
    ----------
    problem
        What it computes. Where its layout is open the numbers of a place follow the scalars, see `place_names`.
    direction
        ``"forward"``: inputs, scalars, outputs. ``"backward"``: inputs, each output followed by its gradient, scalars,
        the gradients of the inputs. ``"tangent"``: inputs, their tangents, scalars, outputs, their tangents.
    workspace
        The buffers that come last; default none.

    Raises
    ------
    ValueError
        For another direction.

    Examples
    --------
    >>> from na_compiler import Problem
    >>> [argument.name for argument in arguments(Problem((8, 8), 2, 16, 3), "forward")]
    ['query', 'key', 'value', 'scale', 'output', 'lse']
    """
    check_direction(direction)
    present = [operand for operand in _ORDERS[direction]() if operand.option is None or problem.has(operand.option)]
    extents = _extents(problem)
    made = [
        Argument(
            operand.name,
            operand.role,
            problem.dtype if operand.dtype == SAME else operand.dtype,
            tuple(extent for name in operand.shape for extent in extents[_term(name, operand)]),
            operand.strides,
            "layout" in operand.shape,
        )
        for operand in present
    ]
    numbers = [Argument(name, PLACE_NUMBER, "int64") for name in place_names(problem)]
    first = max(at for at, argument in enumerate(made) if argument.role == SCALAR) + 1
    made[first:first] = numbers
    buffers = () if workspace is None else workspace.buffers
    made += [Argument(f"workspace{i}", WORKSPACE, "float32", (BATCH, *shape)) for i, shape in enumerate(buffers)]
    return tuple(made)


def place_names(problem: Problem) -> tuple[str, ...]:
    """Return the names of the numbers that say where in a larger layout tensors lie; none unless the layout is open."""
    return tuple(f"{name}{axis}" for axis in range(problem.rank) for name in PLACE) if problem.is_open else ()


def _term(name: str, operand: Operand) -> str:
    return "keys" if name == "layout" and operand.is_of_keys else name


def _forward() -> tuple[Operand, ...]:
    return (*inputs(), *scalars(), *outputs())


def _backward() -> tuple[Operand, ...]:
    read = [one for output in outputs() for one in (_read(output), output.gradient())]
    return (*inputs(), *read, *scalars(), *(operand.gradient() for operand in differentiable()))


def _tangent() -> tuple[Operand, ...]:
    given = (operand.tangent() for operand in differentiable())
    return (*inputs(), *given, *scalars(), *outputs(), *(output.tangent() for output in outputs()))


_ORDERS: Mapping[str, Callable[[], tuple[Operand, ...]]] = {
    "forward": _forward,
    "backward": _backward,
    "tangent": _tangent,
}
DIRECTIONS = tuple(_ORDERS)


def check_direction(direction: str) -> None:
    """Check the name of a direction.

    Raises
    ------
    ValueError
        If it is none of `DIRECTIONS`.
    """
    if direction not in DIRECTIONS:
        *first, last = map(repr, DIRECTIONS)
        raise ValueError(f"direction must be {', '.join(first)} or {last}, got {direction!r}")


def _read(output: Operand) -> Operand:
    """Return an output of the forward, which the backward reads."""
    return Operand(output.name, INPUT, output.text, output.shape, output.dtype, COMPACT, output.option)


def _extents(problem: Problem) -> dict[str, tuple[int | str, ...]]:
    """Return what the terms of a shape stand for."""
    return {
        BATCH: (BATCH,),
        GIVEN: (GIVEN,),
        ADDITIONAL: (ADDITIONAL,),
        "layout": _layout(problem, "queries"),
        "keys": _layout(problem, "keys"),
        "heads": (problem.heads,),
        "heads_kv": (problem.heads_kv,),
        "head_dim": (problem.head_dim,),
        "head_dim_v": (problem.head_dim_v,),
        "offsets": tuple(2 * extent - 1 for extent in problem.kernel_size),
    }


def _layout(problem: Problem, kind: str) -> tuple[int | str, ...]:
    return tuple(f"{kind}{axis}" for axis in range(problem.rank)) if problem.is_open else problem.layout
