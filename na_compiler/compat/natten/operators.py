"""torch's operators over windows: ``torch.ops.na_compiler.window_*``, in plain torch, on any device.

========================  ====================================================================  =======================
operator                  what it returns                                                       its gradients
========================  ====================================================================  =======================
``window_scores``         products of queries with the keys of their windows                    sums, scatter
``window_sums``           sums of the values of windows, weighted                               scores, scatter
``window_scatter``        what windows give to each key: the sum over queries that see it       scores, sums
``window_bias``           biases by relative position, for each column of each window           bias_sums
``window_bias_sums``      sums over all that have one relative position                         bias
``window_hide``           scores with a number in the columns that have no key                  hide, with 0
========================  ====================================================================  =======================

Each is linear in every tensor, so that gradients of any order are made of these. Heads come first, and the columns of a
window are its keys in row-major order; a causal window has columns without a key, whose scores and weights are 0.
Products are `na_compiler.compat.natten.tiles`', in float32 or wider. Windows larger than the layout are refused when an
operator runs: while torch compiles, sizes may be symbols. What is not finite shows in results of queries that are near
those that see it as well. What a key gets from several tiles are sums that CUDA takes in any order, unless
``torch.use_deterministic_algorithms`` is on.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from na_compiler.compat.natten.tiles import Tiles, places, tiles, windows
from na_compiler.parameters import check_windows

__all__: list[str] = []

_PARAMETERS = "int[] kernel_size, int[] dilation, bool[] is_causal) -> Tensor"
Parameters = tuple[Sequence[int], Sequence[int], Sequence[bool]]


def _rows(tensor: Tensor) -> Tensor:
    """Return ``[batch * heads, tokens, ...]`` in a dtype to sum in."""
    wide = tensor.to(torch.promote_types(tensor.dtype, torch.float32))
    rows: Tensor = wide.flatten(2, -2).flatten(0, 1)
    return rows


def _tiles(like: Tensor, parameters: Parameters) -> Any:
    check_windows(like.shape[2:-1], *parameters[:2])
    return tiles(like.shape[2:-1], *parameters, math.prod(like.shape[:2]), like.device)


class _Result:
    """A row for each token of a layout, of which tiles write some at a time; what is beyond the end is left out."""

    def __init__(self, rows: Tensor, width: int, like: Tensor) -> None:
        self.tokens, self.like = rows.shape[1], like
        self.made = rows.new_empty(len(rows), self.tokens + 1, width)

    def write(self, tile: Tiles, rows: Tensor) -> None:
        self.made.index_copy_(1, tile.queries.flatten(), rows.flatten(1, 2))

    def tensor(self) -> Tensor:
        return _from_rows(self.made[:, : self.tokens], self.like)


def _from_rows(rows: Tensor, like: Tensor) -> Tensor:
    """Return ``[batch, heads, *layout, ...]`` in the dtype of a tensor of this layout."""
    result: Tensor = rows.to(like.dtype).reshape(*like.shape[:-1], rows.shape[-1]).contiguous()
    return result


def _picked(rows: Tensor, numbers: Tensor) -> Tensor:
    """Return the rows of tokens, ``[rows, tiles, tokens of each, ...]``; for what is none, any row."""
    found: Tensor = rows.index_select(1, numbers.flatten().clamp_max(rows.shape[1] - 1)).unflatten(1, numbers.shape)
    return found


def _spread(tile: Tiles, weights: Tensor, keys: int) -> Tensor:
    """Return weights of windows as those of all of a tile's keys, ``[rows, tiles, queries, keys]``."""
    picked = _picked(weights, tile.queries)
    if tile.is_seen is not None:
        picked = picked.masked_fill(~tile.is_seen, 0.0)
    spread = picked.new_zeros(*picked.shape[:-1], keys)
    return spread.scatter_(-1, tile.columns.expand_as(picked), picked)


def _scores(query: Tensor, key: Tensor, *parameters: Any) -> Tensor:
    queries, keys = _rows(query), _rows(key)
    result = _Result(queries, math.prod(parameters[0]), query)
    for tile in _tiles(query, parameters):
        products = _picked(queries, tile.queries) @ _picked(keys, tile.keys).mT
        scores = products.gather(-1, tile.columns.expand(len(products), *tile.columns.shape))
        result.write(tile, scores if tile.is_seen is None else scores.masked_fill(~tile.is_seen, 0.0))
    return result.tensor()


def _sums(weights: Tensor, value: Tensor, *parameters: Any) -> Tensor:
    given, values = _rows(weights), _rows(value)
    result = _Result(values, value.shape[-1], value)
    for tile in _tiles(value, parameters):
        result.write(tile, _spread(tile, given, tile.keys.shape[1]) @ _picked(values, tile.keys))
    return result.tensor()


def _scatter(weights: Tensor, rows: Tensor, *parameters: Any) -> Tensor:
    given, source = _rows(weights), _rows(rows)
    sums = torch.zeros_like(source)
    for tile in _tiles(rows, parameters):
        picked = _picked(source, tile.queries).masked_fill((tile.queries == source.shape[1])[..., None], 0.0)
        added = _spread(tile, given, tile.keys.shape[1]).mT @ picked
        sums.index_add_(1, tile.keys.flatten(), added.flatten(1, 2))
    return _from_rows(sums, rows)


def _bias(bias: Tensor, layout: Sequence[int], *parameters: Any) -> Tensor:
    check_windows(layout, *parameters[:2])
    found, rank = bias, len(layout)
    for axis, (extent, size, step, causal) in enumerate(zip(layout, *parameters, strict=True)):
        relative, _ = places(windows(extent, size, step, causal, bias.device), size)
        # Each axis of the table becomes two: tokens, and columns.
        found = found.index_select(2 * axis + 1, relative.flatten()).unflatten(2 * axis + 1, (extent, size))
    return _interleaved(found, rank).contiguous()


def _interleaved(found: Tensor, rank: int) -> Tensor:
    """Return ``[heads, *layout, window]`` of ``[heads, tokens, columns, tokens, columns, ...]``."""
    tokens, columns = range(1, 2 * rank, 2), range(2, 2 * rank + 1, 2)
    return found.permute(0, *tokens, *columns).flatten(rank + 1)


def _bias_sums(gradient: Tensor, *parameters: Any) -> Tensor:
    """Sum by products with zeros and ones, one axis after the other: in one order, on every device."""
    layout, rank = gradient.shape[1:-1], gradient.dim() - 2
    check_windows(layout, *parameters[:2])
    wide: Tensor = gradient.to(torch.promote_types(gradient.dtype, torch.float32)).unflatten(-1, tuple(parameters[0]))
    tokens, columns, places_of = "xyz"[:rank], "abc"[:rank], "pqr"[:rank]
    for axis, (extent, size, step, causal) in enumerate(zip(layout, *parameters, strict=True)):
        relative, _ = places(windows(extent, size, step, causal, gradient.device), size)
        is_there = torch.nn.functional.one_hot(relative, 2 * size - 1).to(wide.dtype)
        before = f"h{places_of[:axis]}{tokens[axis:]}{columns[axis:]}"
        after = f"h{places_of[: axis + 1]}{tokens[axis + 1 :]}{columns[axis + 1 :]}"
        wide = torch.einsum(f"{before},{tokens[axis]}{columns[axis]}{places_of[axis]}->{after}", wide, is_there)
    return wide.to(gradient.dtype).contiguous()


def _hide(scores: Tensor, by: float, *parameters: Any) -> Tensor:
    layout, rank = scores.shape[2:-1], scores.dim() - 3
    check_windows(layout, *parameters[:2])
    is_seen = torch.ones((), dtype=torch.bool, device=scores.device)
    for axis, (extent, size, step, causal) in enumerate(zip(layout, *parameters, strict=True)):
        _, seen = places(windows(extent, size, step, causal, scores.device), size)
        shape = [1] * (2 * rank)
        shape[axis], shape[rank + axis] = seen.shape
        is_seen = is_seen & seen.reshape(shape)
    return scores.masked_fill(~is_seen.flatten(rank), by).contiguous()


# ---- Shapes and gradients ------------------------------------------------------------------------------------------


def _scores_fake(query: Tensor, key: Tensor, kernel_size: Sequence[int], *_: Any) -> Tensor:
    return query.new_empty((*query.shape[:-1], math.prod(kernel_size)))


def _sums_fake(weights: Tensor, rows: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(rows, memory_format=torch.contiguous_format)


def _bias_fake(bias: Tensor, layout: Sequence[int], kernel_size: Sequence[int], *_: Any) -> Tensor:
    return bias.new_empty((bias.shape[0], *layout, math.prod(kernel_size)))


def _bias_sums_fake(gradient: Tensor, kernel_size: Sequence[int], *_: Any) -> Tensor:
    return gradient.new_empty((gradient.shape[0], *(2 * size - 1 for size in kernel_size)))


def _hide_fake(scores: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(scores, memory_format=torch.contiguous_format)


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


def _save_bias(ctx: Any, inputs: Any, output: Any) -> None:
    _, _, *ctx.parameters = inputs


def _bias_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    return _ops().window_bias_sums(grad, *ctx.parameters), None, None, None, None


def _save_bias_sums(ctx: Any, inputs: Any, output: Any) -> None:
    gradient, *ctx.parameters = inputs
    ctx.layout = gradient.shape[1:-1]


def _bias_sums_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    return _ops().window_bias(grad, ctx.layout, *ctx.parameters), None, None, None


def _save_hide(ctx: Any, inputs: Any, output: Any) -> None:
    _, _, *ctx.parameters = inputs


def _hide_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    return _ops().window_hide(grad, 0.0, *ctx.parameters), None, None, None, None


def _ops() -> Any:
    return torch.ops.na_compiler


_library = torch.library.Library("na_compiler", "FRAGMENT")


def _define(
    name: str,
    tensors: str,
    function: Callable[..., Tensor],
    fake: Callable[..., Tensor],
    backward: Callable[..., Any],
    save: Callable[..., None],
) -> None:
    _library.define(f"{name}({tensors}, {_PARAMETERS}", tags=(torch.Tag.pt2_compliant_tag,))
    _library.impl(name, function, "CompositeExplicitAutograd")
    torch.library.register_fake(f"na_compiler::{name}", fake, lib=_library)
    torch.library.register_autograd(f"na_compiler::{name}", backward, setup_context=save, lib=_library)


_define("window_scores", "Tensor query, Tensor key", _scores, _scores_fake, _scores_backward, _save)
_define("window_sums", "Tensor weights, Tensor value", _sums, _sums_fake, _sums_backward, _save)
_define("window_scatter", "Tensor weights, Tensor rows", _scatter, _sums_fake, _scatter_backward, _save)
_define("window_bias", "Tensor bias, SymInt[] layout", _bias, _bias_fake, _bias_backward, _save_bias)
_define("window_bias_sums", "Tensor gradient", _bias_sums, _bias_sums_fake, _bias_sums_backward, _save_bias_sums)
_define("window_hide", "Tensor scores, float by", _hide, _hide_fake, _hide_backward, _save_hide)
