"""The host's part of a function for CUDA, interpreted: tensor maps that it encodes, kernels that it launches."""

from __future__ import annotations

import operator
from dataclasses import dataclass, field
from typing import Any

import tvm
from tvm.ir.instrument import pass_instrument

__all__ = ["HostProgram", "Launch", "TensorMapArguments"]

_OPERATIONS = {
    "Add": operator.add, "Sub": operator.sub, "Mul": operator.mul, "FloorDiv": operator.floordiv,
    "FloorMod": operator.mod, "Min": min, "Max": max, "LT": operator.lt, "LE": operator.le, "GT": operator.gt,
    "GE": operator.ge, "EQ": operator.eq, "NE": operator.ne, "And": operator.and_, "Or": operator.or_,
    "RShift": operator.rshift, "LShift": operator.lshift, "BitwiseAnd": operator.and_,
}  # fmt: skip
_GRID = ("blockIdx.x", "blockIdx.y", "blockIdx.z")
_BLOCK = ("threadIdx.x", "threadIdx.y", "threadIdx.z")


@dataclass(frozen=True)
class TensorMapArguments:
    """What a tensor map is encoded from, innermost axis first; extents in elements, strides in bytes."""

    tensor: str
    element: int
    extents: tuple[int, ...]
    strides: tuple[int, ...]
    box: tuple[int, ...]
    steps: tuple[int, ...]
    swizzle: int

    def __post_init__(self) -> None:
        # Limits of cuTensorMapEncodeTiled.
        assert 1 <= len(self.extents) <= 5, self
        assert all(0 < extent <= 2**32 for extent in self.extents), self
        assert all(stride % 16 == 0 and 0 <= stride < 2**40 for stride in self.strides), self
        assert all(0 < box <= 256 for box in self.box), self
        assert all(1 <= step <= 8 for step in self.steps), self
        assert self.box[0] * self.element % 16 == 0, self
        # A swizzle's span is that of a row.
        assert self.swizzle == 0 or self.box[0] * self.element <= 16 << self.swizzle, self


@dataclass
class Launch:
    """A kernel, its grid and block, and its arguments: a name of a tensor, a map, or a number."""

    kernel: str
    arguments: list[Any]
    extents: dict[str, int] = field(default_factory=dict)

    @property
    def grid(self) -> list[int]:
        """Blocks along x, y, z."""
        return [self.extents.get(axis, 1) for axis in _GRID]

    @property
    def block(self) -> list[int]:
        """Threads along x, y, z."""
        return [self.extents.get(axis, 1) for axis in _BLOCK]


class HostProgram:
    """A function lowered for CUDA: its device code as text, and its host code to interpret.

    Parameters
    ----------
    function
        Before lowering.
    target
        TVM's description of the target.
    pipeline
        TVM's lowering pipeline.
    """

    def __init__(self, function: Any, target: Any, pipeline: str, passes: Any = None) -> None:
        captured = []

        @pass_instrument
        class Capture:
            def run_after_pass(self, module: Any, info: Any) -> None:
                if info.name == "tirx.SplitHostDevice":
                    captured.append(module)

        target = tvm.target.Target(target)
        # Whatever is registered, no compiler of CUDA is called: what begins with a slash TVM takes for text.
        self.source = ""

        def keep(source: str, *_: Any) -> bytes:
            self.source = source
            return b"/"

        tvm.register_global_func("tvm_callback_cuda_compile", keep, override=True)
        with tvm.transform.PassContext(instruments=[Capture()], config=dict(passes or {})), target:
            module = tvm.compile(function, target=target, tir_pipeline=pipeline)
        if not self.source:
            self.source = module.mod.imports[0].inspect_source()
        functions = {str(name.name_hint): function for name, function in captured[-1].functions.items()}
        self.main = functions["main"]
        self.parameters = [parameter.name for parameter in self.main.params]

    def run(self, arguments: dict[str, Any]) -> list[Launch]:
        """Interpret the host code.

        Parameters
        ----------
        arguments
            By parameter name: ``(shape, strides)`` of tensors, numbers of scalars.
        """
        return _Interpreter(self.main, arguments).launches


class _Interpreter:
    def __init__(self, main: Any, arguments: dict[str, Any]) -> None:
        self.values: dict[Any, Any] = {}
        self.launches: list[Launch] = []
        self.views: dict[str, str] = {}
        for parameter in main.params:
            given = arguments[parameter.name]
            if not isinstance(given, tuple):
                self.values[parameter] = given
                continue
            shape, strides = given
            declared = [*zip(parameter.ty.shape, shape, strict=True)]
            declared += zip(parameter.ty.strides, strides, strict=False)
            for expression, value in declared:
                if type(expression).__name__ == "Var":
                    assert self.values.setdefault(expression, value) == value, f"{parameter.name}: {expression}"
                else:
                    assert self.number(expression) == value, f"{parameter.name}: {expression} is not {value}"
        self.statement(main.body)

    def statement(self, node: Any) -> None:  # noqa: C901  # A case for each kind.
        kind = type(node).__name__
        if kind == "SeqStmt":
            for part in node.seq:
                self.statement(part)
        elif kind == "Bind":
            is_map = type(node.value).__name__ == "Call" and "alloca" in node.value.op.name
            self.values[node.var] = {} if is_map else self.number(node.value)
        elif kind == "IfThenElse":
            if self.number(node.condition):
                self.statement(node.then_case)
            elif node.else_case is not None:
                self.statement(node.else_case)
        elif kind == "AttrStmt":
            self.statement(node.body)
        elif kind == "Evaluate":
            if type(node.value).__name__ == "Call":
                self.call(node.value)
        elif kind == "DeclBuffer":
            self.view(node)
        else:
            assert kind == "AllocBuffer", f"the host does something new: {kind}"

    def view(self, node: Any) -> None:
        """Remember what a declared buffer is a view of: the kernel's arguments have its name."""
        if type(node.data).__name__ == "Call" and "buffer_data" in node.data.op.name:
            self.views[str(node.buffer.name)] = self.tensor(node.data)

    def call(self, node: Any) -> None:
        name = node.op.name
        if name == "tirx.tvm_call_packed":
            function, *arguments = node.args
            assert function.value == "runtime.cuTensorMapEncodeTiled", function
            handle, dtype, rank, data, *numbers = arguments
            element = {"float32": 4, "bfloat16": 2, "float16": 2}[dtype.value]
            self.encode(handle, element, int(rank), data, [self.number(number) for number in numbers])
        elif "call_ffi_kernel" in name:
            kernel, *arguments = node.args
            parameters = list(node.attrs.launch_params)
            values, extents = arguments[: -len(parameters)], arguments[-len(parameters) :]
            self.launches.append(
                Launch(
                    kernel.value,
                    [self.argument(value) for value in values],
                    dict(zip(parameters, map(self.number, extents), strict=True)),
                )
            )
        else:
            assert "assert" in name or "device" in name, f"the host calls something new: {node}"

    def encode(self, handle: Any, element: int, rank: int, data: Any, numbers: list[int]) -> None:
        parts = [numbers[:rank], numbers[rank : 2 * rank - 1], numbers[2 * rank - 1 : 3 * rank - 1]]
        parts.append(numbers[3 * rank - 1 : 4 * rank - 1])
        _, swizzle, _, fill = numbers[4 * rank - 1 :]
        assert fill == 0
        self.values[handle]["map"] = TensorMapArguments(self.tensor(data), element, *map(tuple, parts), swizzle)

    def argument(self, node: Any) -> Any:
        if type(node).__name__ == "Var" and isinstance(self.values.get(node), dict):
            return self.values[node].get("map")
        return (
            self.tensor(node) if type(node).__name__ == "Call" and "buffer_data" in node.op.name else self.number(node)
        )

    def number(self, node: Any) -> Any:
        """Return the value of an expression."""
        if isinstance(node, int | float):
            return node
        if type(node).__name__ == "Var":
            return self.values[node]
        kind = type(node).__name__
        if kind in {"IntImm", "FloatImm"}:
            return node.value
        if kind == "Cast":
            return self.number(node.value)
        if kind == "Not":
            return not self.number(node.a)
        assert kind in _OPERATIONS, f"{kind} is new: {node}"
        return _OPERATIONS[kind](self.number(node.a), self.number(node.b))

    def tensor(self, node: Any) -> str:
        """Return the parameter that an address is of."""
        name = str(node.args[0].name)
        return self.views.get(name, name)
