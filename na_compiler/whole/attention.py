"""Neighborhood attention in Relax: a call of the scheduled function of its problem, in the same module."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tvm import relax, tirx

from na_compiler import operands
from na_compiler.checks import given_options
from na_compiler.compiler.build import lowered
from na_compiler.compiler.spec import KernelSpec
from na_compiler.operands import PARAMETERS
from na_compiler.problem import Problem
from na_compiler.target import Target
from na_compiler.window import SHIFT

__all__ = ["Attention"]

_OPAQUE = 8  # OpPatternKind: nothing is fused with it.


class Attention:
    """Emits calls of attention into a Relax function that is being made."""

    def __init__(self, target: Target) -> None:
        self.target = target
        self.problems: dict[Problem, int] = {}
        self._functions: dict[tuple[Problem, float], Any] = {}

    def emit(self, builder: relax.BlockBuilder, given: Mapping[str, Any]) -> Any:
        """Emit a call; returns the tuple of output and lse.

        Parameters
        ----------
        builder
            Of the function.
        given
            By the names that the operators' arguments have: expressions of Relax, numbers, values for each axis.

        Raises
        ------
        ValueError
            If a layout is dynamic.
        """
        query, scale = given["query"], given.get("scale")
        tensors = [given[one.name] for one in operands.inputs() if given.get(one.name) is not None]
        problem = _problem(given)
        self.problems[problem] = self.problems.get(problem, 0) + 1
        scale = problem.head_dim**-0.5 if scale is None else float(scale)
        at = problem, scale
        if at not in self._functions:
            self._functions[at] = builder.add_func(self._function(problem, scale), f"na{problem.rank}d")
        shape = list(query.ty.shape)
        outputs = [
            relax.TensorType([*shape[:-1], problem.head_dim_v], problem.dtype),
            relax.TensorType(shape[:-1], "float32"),
        ]
        return builder.emit(relax.call_tir(self._functions[at], tuple(tensors), outputs))

    def _function(self, problem: Problem, scale: float) -> Any:
        spec = KernelSpec.make(problem, self.target)
        if spec.info.workspace.buffers:
            raise NotImplementedError(f"{problem}: kernels with a workspace are not for whole models")
        function = lowered(spec).function
        (parameter,) = [parameter for parameter in function.params if parameter.name == "scale"]
        function = function.specialize({parameter: tirx.const(scale, "float32")})
        return function.without_attr("global_symbol").with_attr({"op_pattern": _OPAQUE, "tirx.is_scheduled": True})


def _problem(given: Mapping[str, Any]) -> Problem:
    query = given["query"]
    options = given_options({operand.name: given.get(operand.name) for operand in operands.later()})
    parameters: dict[str, Any] = {name: tuple(map(int, given[name])) for name in PARAMETERS}
    sizes = list(query.ty.shape)
    try:
        layout = tuple(int(size) for size in sizes[1:-2])
    except TypeError:
        raise ValueError(f"the layout must be fixed, got {sizes[1:-2]}; export the model with a fixed layout") from None
    return Problem(
        layout,
        int(sizes[-2]),
        int(sizes[-1]),
        heads_kv=int(given["key"].ty.shape[-2]),
        head_dim_v=int(given["value"].ty.shape[-1]),
        additional_kv=operands.ADDITIONAL_KV in options,
        operands=tuple(option for option in options if option != operands.ADDITIONAL_KV),
        dtype=str(query.ty.dtype),
        border=given.get("border") or SHIFT,
        # Operators take flags as ints.
        **{**parameters, "is_causal": tuple(map(bool, parameters["is_causal"]))},
    )
