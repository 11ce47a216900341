"""Arguments of the backward."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tvm import tirx

from na_compiler.operands import KEY_MASK, RELATIVE_POSITION_BIAS
from na_compiler.problem import Problem
from na_compiler.schedules.mma.backward.plan import BackwardPlan, statistics_shape
from na_compiler.schedules.mma.block import strided, wide
from na_compiler.schedules.shared.trace import I, T, flat, index64, register
from na_compiler.schedules.shared.work import Work

__all__ = ["BackwardArguments", "Statistics", "number_of"]

Expr = Any


class BackwardArguments:
    """The function's arguments.

    ``main(query, key, value, [additional_keys, additional_values,] [relative_position_bias,] [key_mask,] output,
    grad_output, lse, grad_lse, scale, grad_query, grad_key, grad_value, [grad_additional_keys, grad_additional_values,]
    [grad_relative_position_bias,] statistics, [additional_key_space, additional_value_space,] [bias_space])``: inputs
    before the table of biases, ``grad_output`` and the first three gradients may have any strides that are multiples of
    16 bytes, all others are contiguous. ``grad_lse`` may have no batch entries, and is 0 then. The last ones are
    workspace.
    """

    def __init__(self, plan: BackwardPlan) -> None:
        self.plan = plan
        problem = plan.problem
        self.batch = tirx.Var("batch", "int64")
        self.additional: Expr = tirx.Var("additional", "int64") if problem.additional_kv else None
        # The batch, or 0 where there is no gradient of lse.
        self.given = tirx.Var("given", "int64")
        tokens = (self.batch, *problem.layout)
        shapes: dict[str, Sequence[Expr]] = {
            "query": (*tokens, problem.heads, problem.head_dim),
            "key": (*tokens, problem.heads_kv, problem.head_dim),
            "value": (*tokens, problem.heads_kv, problem.head_dim_v),
        }
        if problem.additional_kv:
            extra = (self.batch, self.additional, problem.heads_kv)
            shapes["additional_keys"] = (*extra, problem.head_dim)
            shapes["additional_values"] = (*extra, problem.head_dim_v)
        self.tensors = {name: strided(name, shape, problem.dtype) for name, shape in shapes.items()}
        output = (*tokens, problem.heads, problem.head_dim_v)
        table = (problem.heads, *(2 * extent - 1 for extent in problem.kernel_size))
        if problem.has(RELATIVE_POSITION_BIAS):
            self._contiguous(RELATIVE_POSITION_BIAS, table, "float32", 4)
        if problem.has(KEY_MASK):
            self._contiguous(KEY_MASK, tokens, "bool", 1)
        self._contiguous("output", output, problem.dtype)
        self.tensors["grad_output"] = strided("grad_output", output, problem.dtype)
        self._contiguous("lse", output[:-1], "float32", 4)
        self._contiguous("grad_lse", (self.given, *output[1:-1]), "float32", 4)
        self.scale = I.arg("scale", tirx.Var("scale", "float32"))
        for name, shape in shapes.items():
            if name.startswith("additional"):
                self._contiguous(f"grad_{name}", shape, problem.dtype)
            else:
                self.tensors[f"grad_{name}"] = strided(f"grad_{name}", shape, problem.dtype)
        if problem.has(RELATIVE_POSITION_BIAS):
            self._contiguous(f"grad_{RELATIVE_POSITION_BIAS}", (self.batch, *table), "float32", 4)
        self._contiguous("statistics", (self.batch, *statistics_shape(problem)), "float32")
        if problem.additional_kv:
            parts = (self.batch, problem.heads_kv, plan.strips, self.additional)
            self._contiguous("additional_key_space", (*parts, problem.head_dim), "float32")
            self._contiguous("additional_value_space", (*parts, problem.head_dim_v), "float32")
        if problem.has(RELATIVE_POSITION_BIAS):
            self._contiguous("bias_space", (self.batch, *plan.bias_space), "float32", 4)

    def _contiguous(self, name: str, shape: Sequence[Expr], dtype: str, align: int = 16) -> None:
        self.tensors[name] = I.arg(name, I.buffer(wide(shape), dtype, align=align))

    def __getitem__(self, name: str) -> Any:
        return self.tensors[name]

    @property
    def count(self) -> Expr:
        """Number of additional keys, as the device counts; ``None`` without them."""
        return None if self.additional is None else T.Cast("int32", self.additional)


def number_of(work: Work, positions: Sequence[Expr], head: Expr) -> Expr:
    """Return the number of a token's head in ``[batch, *layout, heads]``."""
    problem = work.plan.problem
    number = index64(work.batch)
    for token, extent in zip(work.tokens(positions), problem.layout, strict=True):
        number = number * extent + index64(token)
    return number * problem.heads + index64(head)


class Statistics:
    """One head of one batch entry of the workspace, of one dilation group: pairs at positions along the layout's axes.

    Parameters
    ----------
    problem
        What is computed.
    buffer
        ``[batch, heads, *layout, 2]``.
    batch, head, group
        Which ones.
    """

    def __init__(self, problem: Problem, buffer: Any, batch: Expr, head: Expr, group: Sequence[Expr]) -> None:
        pitches = [1]
        for extent in reversed(problem.layout):
            pitches.insert(0, pitches[0] * extent)
        start = (index64(register(batch)) * problem.heads + index64(register(head))) * pitches[0]
        for place, pitch in zip(group, pitches[1:], strict=True):
            start = start + index64(place) * pitch
        self.buffer = I.decl_buffer([2**62], "float32", data=I.Bind(flat(buffer).ptr_to([start * 2])), scope="global")
        self.steps = [pitch * dilation for pitch, dilation in zip(pitches[1:], problem.dilation, strict=True)]

    def at(self, positions: Sequence[Expr]) -> Expr:
        """Return the element where a query's pair begins."""
        offset: Expr = 0
        for position, step in zip(positions, self.steps, strict=True):
            offset = offset + position * step
        return index64(register(offset)) * 2
