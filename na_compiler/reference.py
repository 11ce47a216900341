"""The oracle: neighborhood attention in plain PyTorch, on any device, in any floating dtype, differentiable.

As direct as it can be: a mask from the window rule, and a softmax over what it lets through. Slow on purpose; what
is compiled is judged by it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch.utils.checkpoint import checkpoint

from na_compiler.problem import Problem
from na_compiler.window import group_length, window_bounds

__all__ = ["neighborhood_attention", "neighborhood_mask"]

# Scores computed at once, which bounds the memory.
_SCORES = 2**25


def neighborhood_mask(problem: Problem, tokens: torch.Tensor | None = None) -> torch.Tensor:
    """Return which keys each query sees.

    Parameters
    ----------
    problem
        Its layout, kernel_size, stride, dilation and is_causal are looked at.
    tokens
        Numbers of queries, counted over the layout in row-major order; default all. Decides the device.

    Returns
    -------
    Tensor
        bool, ``[queries, tokens of the layout]``.

    Examples
    --------
    >>> neighborhood_mask(Problem(5, 1, 1, 3)).int()
    tensor([[1, 1, 1, 0, 0],
            [1, 1, 1, 0, 0],
            [0, 1, 1, 1, 0],
            [0, 0, 1, 1, 1],
            [0, 0, 1, 1, 1]], dtype=torch.int32)
    """
    if tokens is None:
        tokens = torch.arange(problem.tokens)
    mask = torch.ones(len(tokens), 1, dtype=torch.bool, device=tokens.device)
    places = torch.unravel_index(tokens, problem.layout)
    axes = zip(
        places,
        problem.layout,
        problem.kernel_size,
        problem.stride,
        problem.dilation,
        problem.is_causal,
        strict=True,
    )
    for place, layout, kernel_size, stride, dilation, is_causal in axes:
        key = torch.arange(layout, device=tokens.device)
        group = place % dilation
        length = group_length(layout, dilation, group)
        start, end = window_bounds(
            place // dilation, length, kernel_size, stride, is_causal, minimum=_minimum, maximum=_maximum
        )
        same_group = key % dilation == group[:, None]
        along = same_group & (key // dilation >= start[:, None]) & (key // dilation < end[:, None])
        mask = (mask[:, :, None] & along[:, None, :]).flatten(1)
    return mask


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
    tokens: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute neighborhood attention as it is defined.

    Parameters
    ----------
    query, key, value, kernel_size, stride, dilation, is_causal, scale, additional_keys, additional_values
        As for `na_compiler.na2d`, with a layout of 1, 2 or 3 axes and any floating dtype; float64 for an oracle.
    tokens
        Numbers of the queries to compute, counted over the layout in row-major order; default all.

    Returns
    -------
    output
        ``[batch, *layout, heads, head_dim_v]``, or ``[batch, queries, heads, head_dim_v]`` where ``tokens`` are given.
    lse
        Likewise without the last dimension: the logarithm of the sum of exponentials of scaled scores.

    Raises
    ------
    ValueError
        As `Problem`.
    """
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
    )
    scale = problem.head_dim**-0.5 if scale is None else scale
    rows = torch.arange(problem.tokens, device=query.device) if tokens is None else tokens
    queries = query.flatten(1, -3)[:, rows].transpose(1, 2) * scale
    keys, values = key.flatten(1, -3), value.flatten(1, -3)
    if additional_keys is not None and additional_values is not None:
        keys, values = torch.cat([keys, additional_keys], 1), torch.cat([values, additional_values], 1)
    keys, values = (t.transpose(1, 2).repeat_interleave(problem.group_size, 1) for t in (keys, values))
    additional = keys.shape[2] - problem.tokens

    def attend(
        queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, rows: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        mask = torch.nn.functional.pad(neighborhood_mask(problem, rows), (0, additional), value=True)
        scores = (queries @ keys.transpose(-1, -2)).masked_fill(~mask, -math.inf)
        return scores.softmax(-1) @ values, scores.logsumexp(-1)

    step = max(1, _SCORES // max(1, query.shape[0] * problem.heads * keys.shape[2]))
    parts = [
        checkpoint(attend, some, keys, values, some_rows, use_reentrant=False)
        for some, some_rows in zip(queries.split(step, 2), rows.split(step), strict=True)
    ]
    output = torch.cat([part for part, _ in parts], 2).transpose(1, 2)
    lse = torch.cat([part for _, part in parts], 2).transpose(1, 2)
    if tokens is None:
        output, lse = output.unflatten(1, problem.layout), lse.unflatten(1, problem.layout)
    return output, lse


def _minimum(first: torch.Tensor | int, second: torch.Tensor | int) -> torch.Tensor:
    return torch.minimum(*_both_tensors(first, second))


def _maximum(first: torch.Tensor | int, second: torch.Tensor | int) -> torch.Tensor:
    return torch.maximum(*_both_tensors(first, second))


def _both_tensors(first: torch.Tensor | int, second: torch.Tensor | int) -> tuple[torch.Tensor, torch.Tensor]:
    like = first if isinstance(first, torch.Tensor) else second
    assert isinstance(like, torch.Tensor)
    return torch.as_tensor(first, device=like.device), torch.as_tensor(second, device=like.device)
