"""The functions of 0.21: neighborhood attention, dense attention, and merging of what attended to parts of the keys."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.checkpoint import checkpoint

from na_compiler.functional import Flags, Ints, na1d, na2d, na3d
from na_compiler.reference import neighborhood_attention

__all__ = ["attention", "functions", "merge_attentions", "neighborhood_attention_generic", "references"]

_FUNCTIONS: dict[int, Callable[..., Any]] = {1: na1d, 2: na2d, 3: na3d}
# Scores computed at once where lse is wanted, which bounds the memory.
_SCORES = 2**25


def _function(rank: int) -> Callable[..., Any]:
    """Make ``na1d``, ``na2d`` or ``na3d`` with NATTEN's arguments in NATTEN's order."""

    def attend(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kernel_size: Ints,
        stride: Ints | None = 1,
        dilation: Ints | None = 1,
        is_causal: Flags | None = False,
        scale: float | None = None,
        additional_keys: Tensor | None = None,
        additional_values: Tensor | None = None,
        attention_kwargs: dict[str, Any] | None = None,
        backend: str | None = None,
        q_tile_shape: Sequence[int] | None = None,
        kv_tile_shape: Sequence[int] | None = None,
        backward_q_tile_shape: Sequence[int] | None = None,
        backward_kv_tile_shape: Sequence[int] | None = None,
        backward_kv_splits: Ints | None = None,
        backward_use_pt_reduction: bool = False,
        run_persistent_kernel: bool = True,
        kernel_schedule: Any = None,
        torch_compile: bool = False,
        return_lse: bool = False,
    ) -> Any:
        tuning = {
            "attention_kwargs": attention_kwargs,
            "backend": backend,
            "q_tile_shape": q_tile_shape,
            "kv_tile_shape": kv_tile_shape,
            "backward_q_tile_shape": backward_q_tile_shape,
            "backward_kv_tile_shape": backward_kv_tile_shape,
            "backward_kv_splits": backward_kv_splits,
            "backward_use_pt_reduction": backward_use_pt_reduction or None,
            "run_persistent_kernel": None if run_persistent_kernel else False,
            "kernel_schedule": kernel_schedule,
            "torch_compile": torch_compile or None,
        }
        return _FUNCTIONS[rank](
            query,
            key,
            value,
            kernel_size,
            stride,
            dilation,
            is_causal,
            scale,
            additional_keys,
            additional_values,
            return_lse=return_lse,
            **{name: given for name, given in tuning.items() if given is not None},
        )

    attend.__name__ = attend.__qualname__ = f"na{rank}d"
    attend.__doc__ = f"Call `na_compiler.na{rank}d`; what tunes NATTEN's kernels is ignored, with a line in the log."
    return attend


def _reference(rank: int) -> Callable[..., Any]:
    def attend(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kernel_size: Ints,
        stride: Ints = 1,
        dilation: Ints = 1,
        is_causal: Flags = False,
        scale: float | None = None,
        additional_keys: Tensor | None = None,
        additional_values: Tensor | None = None,
        return_lse: bool = False,
    ) -> Any:
        if query.dim() != rank + 3:
            raise ValueError(
                f"query must have {rank + 3} dimensions, [batch, *layout, heads, head_dim], got shape "
                f"{tuple(query.shape)}"
            )
        wide = torch.promote_types(query.dtype, torch.float32)
        tensors = (None if t is None else t.to(wide) for t in (query, key, value, additional_keys, additional_values))
        query_, key_, value_, *additional = tensors
        assert query_ is not None
        assert key_ is not None
        assert value_ is not None
        output, lse = neighborhood_attention(
            query_, key_, value_, kernel_size, stride, dilation, is_causal, scale, *additional
        )
        output = output.to(query.dtype)
        return (output, lse) if return_lse else output

    attend.__name__ = attend.__qualname__ = f"na{rank}d_reference"
    attend.__doc__ = f"Compute what `na_compiler.na{rank}d` does by `na_compiler.reference`: slowly, on any device."
    return attend


functions = {f"na{rank}d": _function(rank) for rank in _FUNCTIONS}
references = {f"na{rank}d_reference": _reference(rank) for rank in _FUNCTIONS}


def neighborhood_attention_generic(query: Tensor, *arguments: Any, **others: Any) -> Any:
    """Call ``na1d``, ``na2d`` or ``na3d``, by the rank of the query."""
    name = f"na{query.dim() - 3}d"
    if name not in functions:
        raise ValueError(f"query must have 4, 5 or 6 dimensions, got shape {tuple(query.shape)}")
    return functions[name](query, *arguments, **others)


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    is_causal: bool = False,
    scale: float | None = None,
    seqlens_Q: Tensor | None = None,
    seqlens_KV: Tensor | None = None,
    cumulative_seqlen_Q: Tensor | None = None,
    cumulative_seqlen_KV: Tensor | None = None,
    max_seqlen_Q: int | None = None,
    max_seqlen_KV: int | None = None,
    backend: str | None = None,
    q_tile_size: int | None = None,
    kv_tile_size: int | None = None,
    backward_q_tile_size: int | None = None,
    backward_kv_tile_size: int | None = None,
    backward_kv_splits: int | None = None,
    backward_use_pt_reduction: bool = False,
    run_persistent_kernel: bool = True,
    kernel_schedule: Any = None,
    torch_compile: bool = False,
    return_lse: bool = False,
) -> Any:
    """Attend densely: every query to every key, by torch's own attention.

    Parameters
    ----------
    query
        ``[batch, queries, heads, head_dim]``.
    key, value
        ``[batch, keys, heads_kv, head_dim]`` and ``[..., head_dim_v]``.
    is_causal
        Whether query ``i`` sees no key after key ``i``.
    scale
        Of the scores; default ``head_dim ** -0.5``.
    seqlens_Q, seqlens_KV
        Lengths of sequences that are packed one after another in a batch of one, integers: each attends to its own.
    cumulative_seqlen_Q, cumulative_seqlen_KV, max_seqlen_Q, max_seqlen_KV
        The same as sums from 0 on, and the longest of each.
    return_lse
        Whether to return lse as well, with its gradient; its scores are then computed in plain torch.

    Returns
    -------
    Tensor or (Tensor, Tensor)
        Output, ``[batch, queries, heads, head_dim_v]``, and lse, ``[batch, queries, heads]`` in float32.

    Raises
    ------
    ValueError
        If shapes do not fit each other.

    Notes
    -----
    What tunes NATTEN's kernels is ignored.

    Examples
    --------
    >>> query, key, value = torch.randn(1, 5, 2, 16), torch.randn(1, 9, 2, 16), torch.randn(1, 9, 2, 16)
    >>> output, lse = attention(query, key, value, return_lse=True)
    >>> output.shape, lse.shape
    (torch.Size([1, 5, 2, 16]), torch.Size([1, 5, 2]))
    """
    _check_dense(query, key, value)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    packed = _packed(
        query,
        key,
        (seqlens_Q, seqlens_KV),
        (cumulative_seqlen_Q, cumulative_seqlen_KV),
        (max_seqlen_Q, max_seqlen_KV),
    )
    if packed is None:
        output, lse = _dense(query, key, value, is_causal, scale, return_lse)
    else:
        parts = [
            _dense(some_queries, some_keys, some_values, is_causal, scale, return_lse)
            for some_queries, some_keys, some_values in zip(
                query.split(packed[0], 1), key.split(packed[1], 1), value.split(packed[1], 1), strict=True
            )
        ]
        output = torch.cat([part for part, _ in parts], 1)
        lse = torch.cat([part for _, part in parts if part is not None], 1) if return_lse else None
    return (output, lse) if return_lse else output


def _check_dense(query: Tensor, key: Tensor, value: Tensor) -> None:
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if tensor.dim() != 4:
            raise ValueError(f"{name} must have shape [batch, tokens, heads, head_dim], got {tuple(tensor.shape)}")
    if key.shape[:-1] != value.shape[:-1]:
        raise ValueError(f"key and value must agree but for head_dim, got {tuple(key.shape)} and {tuple(value.shape)}")
    if query.shape[0] != key.shape[0] or query.shape[-1] != key.shape[-1] or query.shape[2] % key.shape[2]:
        raise ValueError(
            f"query and key must have one batch and head_dim, and query's heads be a multiple of key's, got "
            f"{tuple(query.shape)} and {tuple(key.shape)}"
        )


def _packed(
    query: Tensor,
    key: Tensor,
    lengths: tuple[Tensor | None, Tensor | None],
    cumulative: tuple[Tensor | None, Tensor | None],
    longest: tuple[int | None, int | None],
) -> tuple[list[int], list[int]] | None:
    """Return the lengths of packed sequences, if there are."""
    given = [one is not None for one in (*lengths, *cumulative, *longest)]
    if not any(given):
        return None
    if given == [True, True, False, False, False, False]:
        found = tuple([int(length) for length in one.tolist()] for one in lengths if one is not None)
    elif given == [False, False, True, True, True, True]:
        ends = [one.tolist() for one in cumulative if one is not None]
        if any(end[:1] != [0] for end in ends):
            raise ValueError(f"cumulative_seqlen_Q and cumulative_seqlen_KV must begin with 0, got {ends}")
        found = tuple([after - before for before, after in itertools.pairwise(end)] for end in ends)
    else:
        raise ValueError(
            "packed sequences need seqlens_Q and seqlens_KV, or cumulative_seqlen_Q, cumulative_seqlen_KV, "
            "max_seqlen_Q and max_seqlen_KV: all of one kind, and none of the other"
        )
    queries, keys = found
    fits = len(queries) == len(keys) and (sum(queries), sum(keys)) == (query.shape[1], key.shape[1])
    if query.shape[0] != 1 or not fits or min(queries + keys, default=0) < 0:
        raise ValueError(
            f"packed sequences must be as many of queries as of keys, and fill a batch of 1: {tuple(query.shape)} and "
            f"{tuple(key.shape)} hold other lengths than {queries} and {keys}"
        )
    return queries, keys


def _dense(
    query: Tensor, key: Tensor, value: Tensor, is_causal: bool, scale: float, wants_lse: bool
) -> tuple[Tensor, Tensor | None]:
    queries, keys, values = (tensor.transpose(1, 2) for tensor in (query, key, value))
    repeats = queries.shape[1] // keys.shape[1]
    if not wants_lse and keys.shape[2]:
        output = scaled_dot_product_attention(
            queries, keys, values, is_causal=is_causal, scale=scale, enable_gqa=repeats > 1
        )
        return output.transpose(1, 2), None
    wide = torch.promote_types(query.dtype, torch.float32)
    keys, values = (tensor.repeat_interleave(repeats, 1).to(wide) for tensor in (keys, values))
    step = max(1, _SCORES // max(1, queries.shape[0] * queries.shape[1] * keys.shape[2]))
    parts = [
        checkpoint(_with_lse, rows.to(wide) * scale, keys, values, first if is_causal else None, use_reentrant=False)
        for first, rows in zip(range(0, max(queries.shape[2], 1), step), queries.split(step, 2), strict=True)
    ]
    output = torch.cat([part for part, _ in parts], 2).transpose(1, 2).to(query.dtype)
    return output, torch.cat([part for _, part in parts], 2).transpose(1, 2)


def _with_lse(queries: Tensor, keys: Tensor, values: Tensor, first: int | None) -> tuple[Tensor, Tensor]:
    """Attend for some queries; causally, ``first`` is the number of the first one."""
    scores = queries @ keys.mT
    if first is not None:
        row = torch.arange(first, first + queries.shape[2], device=queries.device)
        scores = scores.masked_fill(torch.arange(keys.shape[2], device=queries.device) > row[:, None], -math.inf)
    if not keys.shape[2]:
        lse = torch.full_like(queries[..., 0], -math.inf)
        return queries.new_zeros((*queries.shape[:-1], values.shape[-1])), lse
    return scores.softmax(-1) @ values, scores.logsumexp(-1)


def merge_attentions(
    outputs: list[Tensor],
    lse_tensors: list[Tensor],
    torch_compile: bool = True,
    use_autograd_fix: bool = True,
) -> tuple[Tensor, Tensor]:
    """Return what attention to all keys would have, from attentions of the same queries to parts of them.

    Parameters
    ----------
    outputs
        Two or more, each ``[batch, *layout, heads, head_dim]``.
    lse_tensors
        As many, ``[batch, *layout, heads]``: the logarithms of the sums of exponentials of scores.
    torch_compile, use_autograd_fix
        NATTEN's; ignored. Gradients reach outputs and lse as they are: both have one.

    Returns
    -------
    (Tensor, Tensor)
        Output, in the outputs' dtype, and lse.

    Raises
    ------
    ValueError
        If they are fewer than two, or shapes do not fit.

    Notes
    -----
    ``lse = log sum_i exp(lse_i)`` and ``output = sum_i exp(lse_i - lse) output_i``. A part in which a query saw no key,
    lse minus infinity, has no weight, whatever its output holds; a query that saw no key in any has output 0 and lse
    minus infinity.

    Examples
    --------
    >>> query, key, value = torch.randn(3, 1, 6, 2, 16)
    >>> parts = [attention(query, key[:, keys], value[:, keys], return_lse=True) for keys in (slice(2), slice(2, 6))]
    >>> output, lse = merge_attentions(*zip(*parts))
    >>> torch.allclose(output, attention(query, key, value), atol=1e-5)
    True
    """
    outputs, lse_tensors = list(outputs), list(lse_tensors)
    if len(outputs) < 2 or len(outputs) != len(lse_tensors):
        raise ValueError(
            f"merge_attentions takes two or more outputs and as many lse_tensors, got {len(outputs)} and "
            f"{len(lse_tensors)}"
        )
    shapes = {(tuple(output.shape[:-1]), output.shape[-1]) for output in outputs}
    if len(shapes) > 1 or any(lse.shape != outputs[0].shape[:-1] for lse in lse_tensors):
        raise ValueError(
            f"outputs must have one shape and lse_tensors the same without head_dim, got "
            f"{[tuple(output.shape) for output in outputs]} and {[tuple(lse.shape) for lse in lse_tensors]}"
        )
    wide = torch.promote_types(outputs[0].dtype, torch.float32)
    lse = torch.stack([one.to(wide) for one in lse_tensors])
    is_seen = lse != -math.inf
    sees = is_seen.any(0)
    # Of no consequence for the result, so no gradient goes through it.
    highest = torch.where(sees, lse.detach().amax(0), 0.0)
    weights = torch.where(is_seen, (torch.where(is_seen, lse, 0.0) - highest).exp(), 0.0)
    total = torch.where(sees, weights.sum(0), 1.0)
    merged = sum(
        torch.where(seen[..., None], output.to(wide), 0.0) * (weight / total)[..., None]
        for seen, output, weight in zip(is_seen, outputs, weights, strict=True)
    )
    assert isinstance(merged, Tensor)
    return merged.to(outputs[0].dtype), torch.where(sees, total.log() + highest, -math.inf)
