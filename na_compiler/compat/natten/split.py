"""Neighborhood attention in two operators: scores of each query's window, and weighted sums over it.

What lies between them is a tensor of tokens by window, ``[batch, heads, *layout, window]``, that a model may do with
what it likes: add a bias, drop weights, look at it. It costs the memory that fused kernels exist to save. Heads come
first here, as NATTEN's split operators had them; the window's keys are in row-major order, from `na_compiler.window`.

The operators are plain torch, on any device, one column of the window at a time: nothing is as large as the window
times a key. There are three, each linear in both tensors, and the gradients of each are the two others:
``torch.ops.na_compiler.window_scores``, ``window_sums`` and ``window_scatter``. Gradients of keys, values and biases
are sums that CUDA takes in any order, unless ``torch.use_deterministic_algorithms`` is on.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from na_compiler.parameters import flags_per_axis, ints_per_axis
from na_compiler.problem import Problem
from na_compiler.window import group_length, window_bounds

__all__ = ["Neighbors", "attend", "av", "neighbors", "qk"]

Ints = int | Sequence[int]
Flags = bool | Sequence[bool]


class Neighbors(NamedTuple):
    """The window of every query, each ``[tokens, window]``.

    Parameters
    ----------
    keys
        Numbers of the keys, counted over the layout. Where a causal window has fewer, its last key again.
    relative
        Place of each key in a table of biases by relative position, ``[2 k - 1, ...]`` flattened.
    is_seen
        Where there is a key; None where there always is.
    """

    keys: Tensor
    relative: Tensor
    is_seen: Tensor | None


def neighbors(
    layout: Sequence[int],
    kernel_size: Sequence[int],
    dilation: Sequence[int],
    is_causal: Sequence[bool],
    device: torch.device,
) -> Neighbors:
    """Return the window of every query.

    Examples
    --------
    >>> neighbors([5], [3], [1], [False], torch.device("cpu")).keys
    tensor([[0, 1, 2],
            [0, 1, 2],
            [1, 2, 3],
            [2, 3, 4],
            [2, 3, 4]])
    """
    keys = relative = torch.zeros(1, 1, dtype=torch.int64, device=device)
    seen = torch.ones(1, 1, dtype=torch.bool, device=device)
    for extent, size, step, causal in zip(layout, kernel_size, dilation, is_causal, strict=True):
        token = torch.arange(extent, device=device)
        group, index = token % step, token // step
        bounds = window_bounds(
            index, group_length(extent, step, group), size, is_causal=causal, minimum=_minimum, maximum=_maximum
        )
        start, end = (bound[:, None] for bound in bounds)
        wanted = start + torch.arange(size, device=device)
        place = torch.minimum(wanted, end - 1)
        keys = _outer(keys * extent, place * step + group[:, None])
        relative = _outer(relative * (2 * size - 1), place - index[:, None] + (size - 1))
        seen = _outer(seen, wanted < end)
    return Neighbors(keys, relative, seen if any(is_causal) else None)


def _outer(before: Tensor, along: Tensor) -> Tensor:
    """Combine what axes before say with what one more says."""
    first, second = before[:, None, :, None], along[None, :, None, :]
    both = first & second if before.dtype == torch.bool else first + second
    flat: Tensor = both.flatten(2).flatten(0, 1)
    return flat


def _minimum(first: Any, second: Any) -> Tensor:
    like = first if isinstance(first, Tensor) else second
    return torch.minimum(torch.as_tensor(first, device=like.device), torch.as_tensor(second, device=like.device))


def _maximum(first: Any, second: Any) -> Tensor:
    like = first if isinstance(first, Tensor) else second
    return torch.maximum(torch.as_tensor(first, device=like.device), torch.as_tensor(second, device=like.device))


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
    if bias is not None or any(causal):
        found = neighbors(query.shape[2:-1], sizes, steps, causal, query.device)
        if bias is not None:
            scores = scores + _bias(bias, found, query.shape[1], sizes, query.shape[2:-1]).to(scores.dtype)
        if found.is_seen is not None:
            is_seen = found.is_seen.unflatten(0, query.shape[2:-1])
            scores = scores.masked_fill(~is_seen, -math.inf)
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
    weights = weights.to(value.dtype)
    sums: Tensor = torch.ops.na_compiler.window_sums(weights[..., :window], value, sizes, steps, causal)
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
    if torch.compiler.is_compiling():  # Sizes may be symbols, and are looked at by the operators.
        sizes = ints_per_axis("kernel_size", kernel_size, rank), ints_per_axis("dilation", dilation, rank)
        return [*sizes[0]], [*sizes[1]], [*flags_per_axis("is_causal", is_causal, rank)]
    _, heads, *layout, head_dim = tensor.shape
    problem = Problem(layout, heads, head_dim, kernel_size, 1, dilation, is_causal)
    return [*problem.kernel_size], [*problem.dilation], [*problem.is_causal]


def _bias(bias: Tensor, found: Neighbors, heads: int, sizes: Sequence[int], layout: Sequence[int]) -> Tensor:
    wanted = (heads, *(2 * size - 1 for size in sizes))
    if bias.shape != wanted:
        raise ValueError(f"the bias must have shape {wanted}, [heads, 2 kernel_size - 1, ...], got {tuple(bias.shape)}")
    picked: Tensor = bias.flatten(1)[:, found.relative].unflatten(1, [*layout])
    return picked


def _check_additional(name: str, tensor: Tensor, shape: Sequence[int]) -> None:
    batch, heads, *_, head_dim = shape
    if tensor.dim() != 4 or (*tensor.shape[:2], tensor.shape[3]) != (batch, heads, head_dim):
        raise ValueError(
            f"{name} must have shape ({batch}, {heads}, additional, {head_dim}), got {tuple(tensor.shape)}"
        )


# ---- The three operators -------------------------------------------------------------------------------------------

_PARAMETERS = "int[] kernel_size, int[] dilation, bool[] is_causal) -> Tensor"


class _Columns(NamedTuple):
    """A window column by column: the keys that queries have there, and where they have one (None: everywhere)."""

    keys: tuple[Tensor, ...]
    seen: tuple[Tensor, ...] | None


def _columns(tensor: Tensor, parameters: Sequence[Any]) -> _Columns:
    kernel_size, dilation, is_causal = parameters
    found = neighbors(tensor.shape[2:-1], kernel_size, dilation, is_causal, tensor.device)
    seen = None if found.is_seen is None else found.is_seen.T[:, :, None, None].unbind()
    return _Columns(found.keys.T.contiguous().unbind(), seen)


def _rows(tensor: Tensor) -> Tensor:
    """Return ``[tokens, batch, heads, ...]``, so that a token's rows are one piece, in a dtype to sum in."""
    wide = tensor.to(torch.promote_types(tensor.dtype, torch.float32))
    return wide.flatten(2, -2).permute(2, 0, 1, 3).contiguous()


def _from_rows(rows: Tensor, like: Tensor) -> Tensor:
    """Return ``[batch, heads, *layout, ...]`` in the dtype of a tensor of this layout."""
    result: Tensor = rows.to(like.dtype).permute(1, 2, 0, 3).contiguous().unflatten(2, like.shape[2:-1])
    return result


def _scores(query: Tensor, key: Tensor, *parameters: Any) -> Tensor:
    queries, keys, columns = _rows(query), _rows(key), _columns(query, parameters)
    scores = []
    for column, places in enumerate(columns.keys):
        products = torch.einsum("tbhd,tbhd->tbh", queries, keys.index_select(0, places))
        scores.append(products if columns.seen is None else products.masked_fill(~columns.seen[column], 0.0))
    return _from_rows(torch.stack(scores, -1), query)


def _weights(weights: Tensor, columns: _Columns) -> list[Tensor]:
    """Return the weights column by column, 0 where there is no key."""
    found = _rows(weights).split(1, -1)
    if columns.seen is None:
        return [*found]
    return [column.masked_fill(~seen[..., None], 0.0) for column, seen in zip(found, columns.seen, strict=True)]


def _sums(weights: Tensor, value: Tensor, *parameters: Any) -> Tensor:
    values, columns = _rows(value), _columns(value, parameters)
    sums = torch.zeros_like(values)
    for places, weight in zip(columns.keys, _weights(weights, columns), strict=True):
        sums.addcmul_(weight, values.index_select(0, places))
    return _from_rows(sums, value)


def _scatter(weights: Tensor, rows: Tensor, *parameters: Any) -> Tensor:
    source, columns = _rows(rows), _columns(rows, parameters)
    sums = torch.zeros_like(source)
    for places, weight in zip(columns.keys, _weights(weights, columns), strict=True):
        sums.index_add_(0, places, weight * source)
    return _from_rows(sums, rows)


def _scores_fake(query: Tensor, key: Tensor, kernel_size: Sequence[int], *_: Any) -> Tensor:
    return query.new_empty((*query.shape[:-1], math.prod(kernel_size)))


def _sums_fake(weights: Tensor, rows: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(rows, memory_format=torch.contiguous_format)


def _save(ctx: Any, inputs: Any, output: Any) -> None:
    first, second, *ctx.parameters = inputs
    ctx.save_for_backward(first, second)


def _scores_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    query, key = ctx.saved_tensors
    wants = ctx.needs_input_grad
    of_query = _ops().window_sums(grad, key, *ctx.parameters) if wants[0] else None
    of_key = _ops().window_scatter(grad, query, *ctx.parameters) if wants[1] else None
    return of_query, of_key, None, None, None


def _sums_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    weights, value = ctx.saved_tensors
    wants = ctx.needs_input_grad
    of_weights = _ops().window_scores(grad, value, *ctx.parameters) if wants[0] else None
    of_value = _ops().window_scatter(weights, grad, *ctx.parameters) if wants[1] else None
    return of_weights, of_value, None, None, None


def _scatter_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    weights, rows = ctx.saved_tensors
    wants = ctx.needs_input_grad
    of_weights = _ops().window_scores(rows, grad, *ctx.parameters) if wants[0] else None
    of_rows = _ops().window_sums(weights, grad, *ctx.parameters) if wants[1] else None
    return of_weights, of_rows, None, None, None


def _ops() -> Any:
    return torch.ops.na_compiler


_library = torch.library.Library("na_compiler", "FRAGMENT")
for _name, _tensors, _function, _fake, _backward in (
    ("window_scores", "Tensor query, Tensor key", _scores, _scores_fake, _scores_backward),
    ("window_sums", "Tensor weights, Tensor value", _sums, _sums_fake, _sums_backward),
    ("window_scatter", "Tensor weights, Tensor rows", _scatter, _sums_fake, _scatter_backward),
):
    _library.define(f"{_name}({_tensors}, {_PARAMETERS}", tags=(torch.Tag.pt2_compliant_tag,))
    _library.impl(_name, _function, "CompositeExplicitAutograd")
    torch.library.register_fake(f"na_compiler::{_name}", _fake, lib=_library)
    torch.library.register_autograd(f"na_compiler::{_name}", _backward, setup_context=_save, lib=_library)
