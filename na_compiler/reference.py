"""The oracle: neighborhood attention in plain PyTorch, on any device, in any floating dtype, differentiable.

As direct as it can be: a mask from the window rule, and a softmax over what it lets through. Slow on purpose; what
is compiled is judged by it, also where numbers are not finite: what a query does not see has no influence on it,
whatever it holds, and what it sees always has.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd.function import FunctionCtx
from torch.utils.checkpoint import checkpoint

from na_compiler.borders import CLAMP, borders_per_axis, clamped, middle_of_bias
from na_compiler.parameters import ints_per_axis
from na_compiler.place import Place
from na_compiler.problem import Problem
from na_compiler.window import SHIFT, WRAP, group_length, window_bounds, window_start

__all__ = ["Held", "neighborhood_attention", "neighborhood_mask", "relative_places"]

# Scores computed at once, which bounds the memory.
_SCORES = 2**25


@dataclass(frozen=True)
class Held:
    """Which queries and keys tensors hold of a layout.

    Parameters
    ----------
    queries, keys
        How many along each axis.
    first_query, first_key
        The first ones.
    """

    queries: tuple[int, ...]
    keys: tuple[int, ...]
    first_query: tuple[int, ...]
    first_key: tuple[int, ...]

    @classmethod
    def whole(cls, layout: tuple[int, ...]) -> Held:
        """All of a layout."""
        return cls(layout, layout, (0,) * len(layout), (0,) * len(layout))

    def positions(self, tokens: torch.Tensor) -> list[torch.Tensor]:
        """Return the positions in the layout, along each axis, of queries counted over those that are held."""
        places = torch.unravel_index(tokens, self.queries)
        return [place + first for place, first in zip(places, self.first_query, strict=True)]

    def key_positions(self, problem: Problem, device: torch.device) -> list[torch.Tensor]:
        """Return the positions in the layout, along each axis, of the keys that are held, modulo it."""
        ranges = zip(self.first_key, self.keys, problem.layout, strict=True)
        return [torch.arange(first, first + count, device=device) % layout for first, count, layout in ranges]


def neighborhood_mask(problem: Problem, tokens: torch.Tensor | None = None, held: Held | None = None) -> torch.Tensor:
    """Return which keys each query sees.

    Parameters
    ----------
    problem
        Its layout, kernel_size, stride, dilation, is_causal and border are looked at.
    tokens
        Numbers of queries, counted over the layout in row-major order, or over the queries that are held; default all.
        Decides the device.
    held
        Which queries and keys there are of a larger layout, that of the problem. Default: all.

    Returns
    -------
    Tensor
        bool, ``[queries, keys]``; the keys are all of the layout, or those that are held.

    Examples
    --------
    >>> neighborhood_mask(Problem(5, 1, 1, 3)).int()
    tensor([[1, 1, 1, 0, 0],
            [1, 1, 1, 0, 0],
            [0, 1, 1, 1, 0],
            [0, 0, 1, 1, 1],
            [0, 0, 1, 1, 1]], dtype=torch.int32)
    """
    held = Held.whole(problem.layout) if held is None else held
    if tokens is None:
        tokens = torch.arange(math.prod(held.queries))
    mask = torch.ones(len(tokens), 1, dtype=torch.bool, device=tokens.device)
    axes = zip(
        held.positions(tokens),
        held.key_positions(problem, tokens.device),
        problem.layout,
        problem.kernel_size,
        problem.stride,
        problem.dilation,
        problem.is_causal,
        problem.border,
        strict=True,
    )
    for place, key, layout, kernel_size, stride, dilation, is_causal, border in axes:
        group = place % dilation
        length = group_length(layout, dilation, group)
        start, end = window_bounds(
            place // dilation, length, kernel_size, stride, is_causal, border, minimum=_minimum, maximum=_maximum
        )
        number = key // dilation
        if border == WRAP:
            number = start[:, None] + (number - start[:, None]) % (layout // dilation)
        same_group = key % dilation == group[:, None]
        along = same_group & (number >= start[:, None]) & (number < end[:, None])
        mask = (mask[:, :, None] & along[:, None, :]).flatten(1)
    return mask


def relative_places(problem: Problem, tokens: torch.Tensor, held: Held | None = None) -> torch.Tensor:
    """Return where in a flattened table of biases the one of each query and key is.

    Parameters
    ----------
    problem
        Its layout, kernel_size, dilation and, where windows wrap, stride are looked at.
    tokens, held
        As for `neighborhood_mask`.

    Returns
    -------
    Tensor
        int64, ``[queries, keys]``. Along an axis the place is ``key - query + kernel_size - 1``, with
        the positions that the two have in their dilation groups, where windows wrap those before the modulo. Of keys
        that no window could have, any.

    Examples
    --------
    >>> relative_places(Problem(5, 1, 1, 3), torch.arange(5))[2]
    tensor([0, 1, 2, 3, 4])
    """
    found = torch.zeros(len(tokens), 1, dtype=torch.int64, device=tokens.device)
    held = Held.whole(problem.layout) if held is None else held
    for place, token, layout, kernel_size, stride, dilation, border in zip(
        held.positions(tokens),
        held.key_positions(problem, tokens.device),
        problem.layout,
        problem.kernel_size,
        problem.stride,
        problem.dilation,
        problem.border,
        strict=True,
    ):
        key, query = token // dilation, (place // dilation)[:, None]
        if border == WRAP:
            start = window_start(query, layout // dilation, kernel_size, stride, border=border)
            key = start + (key - start) % (layout // dilation)
        along = key - query + kernel_size - 1
        extent = 2 * kernel_size - 1
        found = (found[:, :, None] * extent + along.clamp(0, extent - 1)[:, None, :]).flatten(1)
    return found


def neighborhood_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    kernel_size: int | Sequence[int],
    stride: int | Sequence[int] = 1,
    dilation: int | Sequence[int] = 1,
    is_causal: bool | Sequence[bool] = False,
    scale: float | None = None,
    additional_keys: torch.Tensor | None = None,
    additional_values: torch.Tensor | None = None,
    *,
    relative_position_bias: torch.Tensor | None = None,
    key_mask: torch.Tensor | None = None,
    border: str | Sequence[str] = SHIFT,
    place: Place | None = None,
    tokens: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute neighborhood attention as it is defined.

    Parameters
    ----------
    query, key, value, kernel_size, stride, dilation, is_causal, scale, additional_keys, additional_values
        As for `na_compiler.na2d`, with a layout of 1, 2 or 3 axes and any floating dtype; float64 for an oracle.
    relative_position_bias, key_mask, border
        As for `na_compiler.na2d`; the bias in any floating dtype.
    place
        Where in a larger layout the tensors lie: the result is that part of what the whole would give. Default: they
        hold all of it.
    tokens
        Numbers of the queries to compute, counted over the layout, or over the queries of the place, in row-major
        order; default all.

    Returns
    -------
    output
        ``[batch, *layout, heads, head_dim_v]``, or ``[batch, queries, heads, head_dim_v]`` where ``tokens`` are given.
    lse
        Likewise without the last dimension: the logarithm of the sum of exponentials of scaled scores. NaN where the
        softmax is: where a score is NaN or plus infinity, or all are minus infinity. Minus infinity only for a query
        that sees no key, whose output is 0.

    Raises
    ------
    ValueError
        As `Problem`.
    """
    if relative_position_bias is not None and CLAMP in borders_per_axis(border, query.dim() - 3):
        given = _per_axis(query, kernel_size, stride, dilation, border)
        kernel_size, stride, border = clamped(query.shape[1:-2] if place is None else place.layout, *given)
        relative_position_bias = relative_position_bias[middle_of_bias(given[0], kernel_size)]
    problem = Problem.of_tensors(
        query,
        key,
        value,
        kernel_size,
        stride,
        dilation,
        is_causal,
        additional_keys,
        additional_values,
        dtype="float32",
        relative_position_bias=None if relative_position_bias is None else relative_position_bias.detach().float(),
        key_mask=key_mask,
        border=border,
        place=place,
    )
    held = Held.whole(problem.layout)
    if place is not None:
        held = Held(tuple(query.shape[1:-2]), tuple(key.shape[1:-2]), place.queries, place.keys)
    scale = problem.head_dim**-0.5 if scale is None else scale
    rows = torch.arange(math.prod(held.queries), device=query.device) if tokens is None else tokens
    queries = query.flatten(1, -3)[:, rows].transpose(1, 2) * scale
    keys, values = key.flatten(1, -3), value.flatten(1, -3)
    if additional_keys is not None and additional_values is not None:
        keys, values = torch.cat([keys, additional_keys], 1), torch.cat([values, additional_values], 1)
    keys, values = (t.transpose(1, 2).repeat_interleave(problem.group_size, 1) for t in (keys, values))
    additional = keys.shape[2] - math.prod(held.keys)

    def attend(
        queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, rows: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        mask = neighborhood_mask(problem, rows, held)
        if key_mask is not None:
            mask = mask & key_mask.flatten(1)[:, None, None]
        mask = torch.nn.functional.pad(mask, (0, additional), value=True)
        scores = _apply(_Scores, queries, keys, mask)
        if relative_position_bias is not None:
            bias = relative_position_bias.flatten(1)[:, relative_places(problem, rows, held)]
            scores = scores + torch.where(mask, torch.nn.functional.pad(bias, (0, additional)), 0.0)
        highest = scores.detach().amax(-1, keepdim=True)
        weights = torch.where(mask, (scores - highest).exp(), 0.0)
        total = weights.sum(-1, keepdim=True)
        output, lse = _apply(_Means, weights, total, values, mask), (highest + total.log()).squeeze(-1)
        sees = mask.any(-1)
        return torch.where(sees[..., None], output, 0.0), torch.where(sees, lse, -math.inf)

    step = max(1, _SCORES // max(1, query.shape[0] * problem.heads * keys.shape[2]))
    parts = [
        checkpoint(attend, some, keys, values, some_rows, use_reentrant=False)
        for some, some_rows in zip(queries.split(step, 2), rows.split(step), strict=True)
    ]
    output = torch.cat([part for part, _ in parts], 2).transpose(1, 2)
    lse = torch.cat([part for _, part in parts], 2).transpose(1, 2)
    if tokens is None:
        output, lse = output.unflatten(1, held.queries), lse.unflatten(1, held.queries)
    return output, lse


def _per_axis(query: torch.Tensor, *parameters: Any) -> list[Any]:  # noqa: ANN401 - as `Problem` takes them
    *numbers, border = parameters
    rank, names = query.dim() - 3, ("kernel_size", "stride", "dilation")
    made: list[Any] = [ints_per_axis(name, value, rank) for name, value in zip(names, numbers, strict=True)]
    return [*made, borders_per_axis(border, rank)]


def _apply(function: type[torch.autograd.Function], *tensors: torch.Tensor) -> torch.Tensor:
    return function.apply(*tensors)  # type: ignore[no-any-return]


class _Scores(torch.autograd.Function):
    """Products of queries with the keys that they see; minus infinity for the others."""

    @staticmethod
    def forward(queries: torch.Tensor, keys: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return torch.where(mask, queries @ keys.mT, -math.inf)

    @staticmethod
    def setup_context(ctx: FunctionCtx, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:  # noqa: ARG004
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:  # noqa: ANN401 - torch says no type
        queries, keys, mask = ctx.saved_tensors
        slopes = torch.where(mask, grad, 0.0)
        return _apply(_Sums, slopes, keys, mask), _apply(_Sums, slopes.mT, queries, mask.mT), None

    @staticmethod
    def jvp(
        ctx: Any,  # noqa: ANN401
        queries: torch.Tensor,
        keys: torch.Tensor,
        mask: None,  # noqa: ARG004
    ) -> torch.Tensor:
        own_queries, own_keys, own_mask = ctx.saved_tensors
        return torch.where(own_mask, queries @ own_keys.mT + own_queries @ keys.mT, 0.0)


class _Sums(torch.autograd.Function):
    """Weighted sums of the rows that are seen: a weight of 0 that hides a row hides a NaN and an infinity as well."""

    @staticmethod
    def forward(weights: torch.Tensor, rows: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return _sums(weights, rows, mask)

    @staticmethod
    def setup_context(ctx: FunctionCtx, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:  # noqa: ARG004
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:  # noqa: ANN401 - torch says no type
        weights, rows, mask = ctx.saved_tensors
        return torch.where(mask, grad @ rows.mT, 0.0), _apply(_Sums, weights.mT, grad, mask.mT), None

    @staticmethod
    def jvp(
        ctx: Any,  # noqa: ANN401
        weights: torch.Tensor,
        rows: torch.Tensor,
        mask: None,  # noqa: ARG004
    ) -> torch.Tensor:
        own_weights, own_rows, own_mask = ctx.saved_tensors
        return _sums(weights, own_rows, own_mask) + _sums(own_weights, rows, own_mask)


class _Means(torch.autograd.Function):
    """Weighted sums over the total of the weights.

    Forward mode multiplies a value with the derivative of its weight over the total: with an infinite value that is
    infinite, where the derivative of a quotient would be a difference of two infinities.
    """

    @staticmethod
    def forward(weights: torch.Tensor, total: torch.Tensor, rows: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return _sums(weights, rows, mask) / total

    @staticmethod
    def setup_context(ctx: FunctionCtx, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        ctx.save_for_backward(*inputs, output)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(
        ctx: Any,  # noqa: ANN401
        grad: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, None]:
        weights, total, rows, mask, output = ctx.saved_tensors
        slopes = grad / total
        by_weights = torch.where(mask, slopes @ rows.mT, 0.0)
        by_total = -(slopes * output).sum(-1, keepdim=True)
        return by_weights, by_total, _apply(_Sums, weights.mT, slopes, mask.mT), None

    @staticmethod
    def jvp(
        ctx: Any,  # noqa: ANN401
        weights: torch.Tensor,
        total: torch.Tensor,
        rows: torch.Tensor,
        mask: None,  # noqa: ARG004
    ) -> torch.Tensor:
        own_weights, own_total, own_rows, own_mask = ctx.saved_tensors
        change = torch.where(own_mask, weights - own_weights * (total / own_total), 0.0)
        sums = _sums(change, own_rows, own_mask) + _sums(own_weights, rows, own_mask)
        return torch.div(sums, own_total)


def _sums(weights: torch.Tensor, rows: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Return ``sum_j weights[i, j] rows[j]`` over the ``j`` that ``mask`` has; the other weights are 0."""
    if rows.isfinite().all():
        return weights @ rows
    # Finite numbers of the same sign, and then what a sum with the others would be: found by counting them.
    sums = weights @ rows.nan_to_num(1.0, 1.0, -1.0)
    up, down = rows == math.inf, rows == -math.inf
    is_lost = mask & ((weights == 0) | weights.isnan())

    def some(pairs: torch.Tensor, those: torch.Tensor) -> torch.Tensor:
        return pairs.to(rows.dtype) @ those.to(rows.dtype) > 0

    found = (
        (some(weights > 0, up) | some(weights < 0, down), math.inf),
        (some(weights > 0, down) | some(weights < 0, up), -math.inf),
        (some(mask.expand_as(weights), rows.isnan()) | some(is_lost, up | down), math.nan),
    )
    for where, what in found:
        sums = sums + torch.where(where, what, 0.0)
    return sums


def _minimum(first: torch.Tensor | int, second: torch.Tensor | int) -> torch.Tensor:
    return torch.minimum(*_both_tensors(first, second))


def _maximum(first: torch.Tensor | int, second: torch.Tensor | int) -> torch.Tensor:
    return torch.maximum(*_both_tensors(first, second))


def _both_tensors(first: torch.Tensor | int, second: torch.Tensor | int) -> tuple[torch.Tensor, torch.Tensor]:
    like = first if isinstance(first, torch.Tensor) else second
    assert isinstance(like, torch.Tensor)
    return torch.as_tensor(first, device=like.device), torch.as_tensor(second, device=like.device)
