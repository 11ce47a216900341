"""Operators under vmap: the dimension that it adds is folded into the batch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from na_compiler.operands import Operand
from na_compiler.ops.schema import Signature

__all__ = ["batched"]


def batched(operator: Any, signature: Signature, info: Any, in_dims: tuple[Any, ...], *arguments: Any) -> Any:
    """Call an operator whose tensors may have a dimension more, and return its results and where they have it."""
    count = info.batch_size
    mapped = [
        place
        for place, (argument, dim) in enumerate(zip(arguments, in_dims, strict=True))
        if isinstance(argument, Tensor) and dim is not None
    ]
    if count and any(not _is_batched(signature, place) for place in mapped):
        return _one_by_one(operator, count, in_dims, mapped, arguments)
    folded = list(arguments)
    for place, argument in enumerate(arguments):
        if isinstance(argument, Tensor):
            dim = in_dims[place]
            if _is_batched(signature, place):
                folded[place] = _fold(argument, dim, count)
            elif dim is not None:  # Of nothing; any will do.
                folded[place] = argument.new_zeros([*argument.shape[:dim], *argument.shape[dim + 1 :]])
    places = signature.names.index("query")
    query, dim = arguments[places], in_dims[places]
    batch = query.shape[0 if dim is None or dim > 0 else 1]
    results = operator(*folded)
    absent = [result.dim() == 1 for result in results]  # The gradient of an input that is not there.
    unfolded = tuple(r if gone else r.unflatten(0, (count, batch)) for r, gone in zip(results, absent, strict=True))
    return unfolded, tuple(None if gone else 0 for gone in absent)


def _is_batched(signature: Signature, place: int) -> bool:
    operand = signature.operands[place]
    return isinstance(operand, Operand) and operand.is_batched


def _fold(tensor: Tensor, dim: int | None, count: int) -> Tensor:
    moved = tensor.unsqueeze(0).expand(count, *tensor.shape) if dim is None else tensor.movedim(dim, 0)
    return moved.flatten(0, 1)


def _one_by_one(
    operator: Any, count: int, in_dims: tuple[Any, ...], mapped: list[int], arguments: tuple[Any, ...]
) -> Any:
    """Call an operator for each place of the new dimension: what a batch shares cannot differ within one."""
    rows = []
    for i in range(count):
        each = list(arguments)
        for place in mapped:
            each[place] = arguments[place].select(in_dims[place], i)
        rows.append(operator(*each))
    results = tuple(torch.stack(column) for column in zip(*rows, strict=True))
    return results, (0,) * len(results)
