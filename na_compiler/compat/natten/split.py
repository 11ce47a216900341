"""Neighborhood attention in two operators: scores of each query's window, and weighted sums over it.

What lies between them is a tensor of tokens by window, ``[batch, heads, *layout, window]``, that a model may do with
what it likes: add a bias, drop weights, look at it. It costs the memory that fused kernels exist to save, and several
times their time. Heads come first here, as NATTEN's split operators had them; the window's keys are in row-major order.

The operators are `na_compiler.compat.natten.operators`'. Where a graph has both and nothing but a softmax between them,
`na_compiler.passes` put one kernel in their place.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from na_compiler.compat.natten import operators  # noqa: F401 - which torch has from then on
from na_compiler.parameters import flags_per_axis, ints_per_axis
from na_compiler.problem import Problem

__all__ = ["attend", "av", "qk"]

Ints = int | Sequence[int]
Flags = bool | Sequence[bool]


def qk(
    query: Tensor,
    key: Tensor,
    kernel_size: Ints,
    dilation: Ints = 1,
    is_causal: Flags = False,
    bias: Tensor | None = None,
    additional_keys: Tensor | None = None,
) -> Tensor:
    """Return each query's products with the keys of its window.

    Parameters
    ----------
    query, key
        ``[batch, heads, *layout, head_dim]``; scale the query before, where a scale is wanted.
    kernel_size, dilation, is_causal
        An int (or bool), or one for each axis: see `na_compiler.na2d`.
    bias
        ``[heads, 2 kernel_size - 1, ...]``: added by relative position, ``key - query + kernel_size - 1`` on each axis,
        counted within the dilation group.
    additional_keys
        ``[batch, heads, additional, head_dim]``.

    Returns
    -------
    Tensor
        ``[batch, heads, *layout, window]``, where the window has ``prod(kernel_size)`` keys in row-major order and then
        the additional ones. Minus infinity where a causal window has no key.

    Raises
    ------
    ValueError
        If arguments do not fit each other.

    Examples
    --------
    >>> query, key, value = torch.randn(3, 1, 2, 8, 8, 16)
    >>> weights = qk(query, key, kernel_size=3).softmax(-1)
    >>> weights.shape
    torch.Size([1, 2, 8, 8, 9])
    >>> av(weights, value, kernel_size=3).shape
    torch.Size([1, 2, 8, 8, 16])
    """
    if query.shape != key.shape or query.dtype != key.dtype:
        raise ValueError(
            f"query and key must have one shape and dtype, got {tuple(query.shape)} of {query.dtype} and "
            f"{tuple(key.shape)} of {key.dtype}"
        )
    sizes, steps, causal = _parameters("query", query, kernel_size, dilation, is_causal)
    scores: Tensor = torch.ops.na_compiler.window_scores(query, key, sizes, steps, causal)
    if bias is not None:
        _check_bias(bias, query.shape[1], sizes)
        added: Tensor = torch.ops.na_compiler.window_bias(bias, query.shape[2:-1], sizes, steps, causal)
        scores = scores + (added if added.dtype == scores.dtype else added.to(scores.dtype))
    if any(causal):
        scores = torch.ops.na_compiler.window_hide(scores, -math.inf, sizes, steps, causal)
    if additional_keys is not None:
        _check_additional("additional_keys", additional_keys, query.shape)
        others = query.flatten(2, -2) @ additional_keys.to(query.dtype).mT
        scores = torch.cat([scores, others.unflatten(2, query.shape[2:-1])], -1)
    return scores


def av(
    weights: Tensor,
    value: Tensor,
    kernel_size: Ints,
    dilation: Ints = 1,
    is_causal: Flags = False,
    additional_values: Tensor | None = None,
) -> Tensor:
    """Return sums of the values of each query's window, weighted.

    Parameters
    ----------
    weights
        ``[batch, heads, *layout, window]``, as `qk` returns scores; what a causal window has no key for is ignored.
    value
        ``[batch, heads, *layout, head_dim]``; decides the dtype.
    kernel_size, dilation, is_causal
        As for `qk`.
    additional_values
        ``[batch, heads, additional, head_dim]``, weighted by the last columns.

    Returns
    -------
    Tensor
        ``[batch, heads, *layout, head_dim]``.

    Raises
    ------
    ValueError
        If arguments do not fit each other.
    """
    sizes, steps, causal = _parameters("value", value, kernel_size, dilation, is_causal)
    window = math.prod(sizes)
    additional = 0 if additional_values is None else additional_values.shape[-2]
    if weights.shape != (*value.shape[:-1], window + additional):
        raise ValueError(
            f"weights must have shape {(*value.shape[:-1], window + additional)}, that of value with a window of "
            f"{window} and {additional} additional keys for head_dim, got {tuple(weights.shape)}"
        )
    if weights.dtype != value.dtype:
        weights = weights.to(value.dtype)
    inside = weights[..., :window] if additional else weights
    sums: Tensor = torch.ops.na_compiler.window_sums(inside, value, sizes, steps, causal)
    if additional_values is not None:
        _check_additional("additional_values", additional_values, value.shape)
        others = weights[..., window:].flatten(2, -2) @ additional_values.to(value.dtype)
        sums = sums + others.unflatten(2, value.shape[2:-1])
    return sums


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kernel_size: Ints,
    dilation: Ints,
    is_causal: Flags,
    scale: float,
    bias: Tensor | None,
    dropout: torch.nn.Module | None = None,
) -> Tensor:
    """Attend by `qk`, a softmax and `av`, with a bias and dropout; heads last, as `na_compiler.na2d` has them."""
    query, key, value = (tensor.movedim(-2, 1) for tensor in (query, key, value))
    weights = qk(query * scale, key, kernel_size, dilation, is_causal, bias).softmax(-1)
    if dropout is not None:
        weights = dropout(weights)
    return av(weights, value, kernel_size, dilation, is_causal).movedim(1, -2)


def _parameters(
    name: str, tensor: Tensor, kernel_size: Ints, dilation: Ints, is_causal: Flags
) -> tuple[list[int], list[int], list[bool]]:
    """Return the parameters with a value for each axis, checked."""
    rank = tensor.dim() - 3
    if not 1 <= rank <= 3:
        raise ValueError(
            f"{name} must have 4, 5 or 6 dimensions, [batch, heads, *layout, head_dim], got shape {tuple(tensor.shape)}"
        )
    if torch.compiler.is_compiling():  # Sizes may be symbols; the operators look at them when they run.
        sizes = ints_per_axis("kernel_size", kernel_size, rank), ints_per_axis("dilation", dilation, rank)
        return [*sizes[0]], [*sizes[1]], [*flags_per_axis("is_causal", is_causal, rank)]
    _, heads, *layout, head_dim = tensor.shape
    problem = Problem(layout, heads, head_dim, kernel_size, 1, dilation, is_causal)
    return [*problem.kernel_size], [*problem.dilation], [*problem.is_causal]


def _check_bias(bias: Tensor, heads: int, sizes: Sequence[int]) -> None:
    wanted = (heads, *(2 * size - 1 for size in sizes))
    if bias.shape != wanted:
        raise ValueError(f"the bias must have shape {wanted}, [heads, 2 kernel_size - 1, ...], got {tuple(bias.shape)}")


def _check_additional(name: str, tensor: Tensor, shape: Sequence[int]) -> None:
    batch, heads, *_, head_dim = shape
    if tensor.dim() != 4 or (*tensor.shape[:2], tensor.shape[3]) != (batch, heads, head_dim):
        raise ValueError(
            f"{name} must have shape ({batch}, {heads}, additional, {head_dim}), got {tuple(tensor.shape)}"
        )
