"""What is made with TorchScript: traces, layers for ``torch.jit.script``, and what others make of graphs of it.

That is torch's exporter to ONNX before the one on ``torch.export``, and fvcore's counter of operations. TorchScript's
compiler reads source in its subset of Python, and annotations as objects: they are not put off here.
"""

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from na_compiler import operands
from na_compiler.operands import PARAMETER, PARAMETERS, SAME, SCALAR, Operand
from na_compiler.ops.operators import flops
from na_compiler.ops.schema import FORWARD

__all__ = ["Scriptable", "fvcore_handles", "is_tracing", "refuse_scripting", "register_symbolics"]

# Whether torch.jit.trace is recording: what torch.jit.is_tracing asks, in a third of the time. Dynamo cannot trace it.
is_tracing = torch._C._is_tracing

# From this version of ONNX's operators on, which is the first that the exporter knows all of.
_OPSET = 9


class Scriptable(nn.Module):
    """A layer of `na_compiler.modules`, with what that has inside, for ``torch.jit.script``."""

    if TYPE_CHECKING:  # TorchScript finds these by what they are.
        qkv: nn.Linear
        proj: nn.Linear
        proj_drop: nn.Dropout
    rank: int
    embed_dim: int
    num_heads: int
    head_dim: int
    scale: float
    kernel_size: list[int]
    stride: list[int]
    dilation: list[int]
    is_causal: list[int]
    border_words: str

    def forward(self, x: Tensor, key_mask: Tensor | None = None) -> Tensor:
        """Attend."""
        if x.dim() != self.rank + 2 or x.shape[-1] != self.embed_dim:
            raise ValueError(f"the input must be [batch, *layout, {self.embed_dim}], got shape {x.shape}")
        qkv = self.qkv(x).unflatten(-1, [3, self.num_heads, self.head_dim])
        query, key, value = qkv.unbind(-3)
        if self.rank == 1:
            attended, _ = torch.ops.na_compiler.na1d(
                query, key, value, self.kernel_size, self.stride, self.dilation, self.is_causal, self.scale,
                relative_position_bias=self.rpb, key_mask=key_mask, border=self.border_words,
            )  # fmt: skip
        elif self.rank == 2:
            attended, _ = torch.ops.na_compiler.na2d(
                query, key, value, self.kernel_size, self.stride, self.dilation, self.is_causal, self.scale,
                relative_position_bias=self.rpb, key_mask=key_mask, border=self.border_words,
            )  # fmt: skip
        else:
            attended, _ = torch.ops.na_compiler.na3d(
                query, key, value, self.kernel_size, self.stride, self.dilation, self.is_causal, self.scale,
                relative_position_bias=self.rpb, key_mask=key_mask, border=self.border_words,
            )  # fmt: skip
        return self.proj_drop(self.proj(attended.flatten(-2)))  # type: ignore[no-any-return]


def refuse_scripting(function: Any, said: str) -> None:
    """Have ``torch.jit.script`` refuse a function by a sentence, where it would tell what it cannot read."""
    function.__script_unsupported = said


def register_symbolics() -> None:
    """Tell ``torch.onnx.export(..., dynamo=False)`` what our operators become: those of the domain na_compiler."""
    from torch.onnx import register_custom_op_symbolic  # type: ignore[attr-defined]  # noqa: PLC0415

    for rank in (1, 2, 3):
        register_custom_op_symbolic(f"na_compiler::na{rank}d", functools.partial(_symbolic, rank), _OPSET)


def _symbolic(rank: int, graph: Any, *values: Any) -> Any:
    """Add a node for a call of the operator of a rank; values are those of the graph that was traced."""
    from torch.onnx import symbolic_helper  # noqa: PLC0415

    given = dict(zip(FORWARD.names, values, strict=False))
    inputs = [given.get(operand.name) for operand in operands.inputs()]
    while inputs and (inputs[-1] is None or symbolic_helper._is_none(inputs[-1])):
        inputs.pop()
    attributes: dict[str, Any] = {}
    for place, name in enumerate(FORWARD.names):
        operand = FORWARD.operands[place]
        kind = _KINDS[operand.dtype] if isinstance(operand, Operand) and operand.role in {SCALAR, PARAMETER} else "is"
        if name in given and (kind != "is" or name in PARAMETERS):
            value = _constant(symbolic_helper, given[name], kind, name)
            if value is not None and (kind != "s" or value != operand.default):  # type: ignore[union-attr]
                attributes[f"{name}_{kind[0]}"] = value
    results = graph.op(f"na_compiler::NA{rank}D", *inputs, **attributes, outputs=len(operands.outputs()))
    for operand, result in zip(operands.outputs(), results, strict=True):
        # The rank alone: sizes here are those of the example, also of axes that are dynamic.
        made = given["query"].type().with_sizes([None] * (len(operand.shape) - 1 + rank))
        result.setType(made if operand.dtype == SAME else made.with_dtype(getattr(torch, operand.dtype)))
    return results


# As torch calls the kinds of attributes.
_KINDS = {"float32": "f", "int64": "i", "str": "s"}


def _constant(helper: Any, value: Any, kind: str, name: str) -> Any:
    """Return what an attribute of a node is; raises torch's error, with the name, for what is not a constant."""
    read: Callable[..., Any] = helper._parse_arg
    return None if helper._is_none(value) else read(value, kind, name, "na_compiler")


def fvcore_handles() -> dict[str, Callable[..., int] | None]:
    """Return what fvcore's ``FlopCountAnalysis.set_op_handle`` takes, for it to count our operators.

    It counts a multiply and an add as one, as fvcore does: half of `Problem.flops`. It knows torch's operators by a
    table of its own, which has no place for those of others, and says of one that is not there that it is unsupported.

    Examples
    --------
    >>> from fvcore.nn import FlopCountAnalysis  # doctest: +SKIP
    >>> FlopCountAnalysis(model, x).set_op_handle(**fvcore_handles()).total()  # doctest: +SKIP
    """
    handles: dict[str, Callable[..., int] | None] = {f"na_compiler::na{rank}d": _multiply_adds for rank in (1, 2, 3)}
    handles["aten::unflatten"] = None  # It computes nothing, and fvcore does not know so.
    return handles


def _multiply_adds(inputs: list[Any], outputs: list[Any]) -> int:
    """Return the useful operations of a call in a traced graph, of which the values know shapes and constants."""
    arguments = []
    for name, value in zip(FORWARD.names, inputs, strict=False):
        sizes = value.type().sizes() if isinstance(value.type(), torch.TensorType) else None
        known = sizes if sizes is not None or name not in _WORDS else value.toIValue()
        arguments.append(_list(value) if name in PARAMETERS else known)
    return flops(FORWARD, *arguments) // 2


_WORDS = {operand.name for operand in operands.words()}


def _list(value: Any) -> list[int]:
    """Return a list of ints, which a graph has as a constant or as a list of constants."""
    known = value.toIValue()
    return list(known) if known is not None else [one.toIValue() for one in value.node().inputs()]
