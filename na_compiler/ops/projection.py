"""Query, key and value as views of one projection, whose gradients are views of the projection's.

A layer projects its input once, to ``[..., 3 * heads * head_dim]``, and attends with three views of that. Autograd's
derivative of taking views apart lays their gradients side by side, which copies all of them. Kernels write gradients
at any strides, so those of such views are written where they belong, and there is nothing to copy.

That is so where tensors are plain and torch is in no mode (`na_compiler.ops.plain`). Under ``torch.compile``,
``torch.export``, autocast, ``torch.func``, forward mode or a profiler the views are those of ``unbind``, with its
derivative; and where a gradient is itself differentiated, or something else than one call of attention has used a view,
their gradients are put side by side by a copy.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from na_compiler.ops.plain import are_plain, is_quiet

__all__ = ["are_one_projection", "side_by_side", "split_projection"]

_PARTS = 3


def split_projection(projected: Tensor, heads: int, head_dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return query, key and value as views of one projection.

    Parameters
    ----------
    projected
        ``[batch, *layout, 3 * heads * head_dim]``: query's heads, key's heads, value's heads.
    heads, head_dim
        Of each.

    Returns
    -------
    (Tensor, Tensor, Tensor)
        ``[batch, *layout, heads, head_dim]`` each.
    """
    is_plain = not torch.compiler.is_compiling() and are_plain((projected,)) and is_quiet()
    if is_plain and torch.is_grad_enabled() and projected.requires_grad:
        return _Split.apply(projected, heads, head_dim)  # type: ignore[attr-defined, no-any-return]
    return _views(projected, heads, head_dim)


def _views(projected: Tensor, heads: int, head_dim: int) -> tuple[Tensor, Tensor, Tensor]:
    query, key, value = projected.unflatten(-1, (_PARTS, heads, head_dim)).unbind(-3)
    return query, key, value


class _Split(torch.autograd.function._SingleLevelFunction):
    """`split_projection`, whose gradient is that of the views where it lies, if their gradients lie side by side."""

    @staticmethod
    def forward(ctx: Any, projected: Tensor, heads: int, head_dim: int) -> tuple[Tensor, ...]:
        """Take the projection apart."""
        ctx.set_materialize_grads(False)
        ctx.like = projected.shape[:-1], heads, head_dim
        return _views(projected, heads, head_dim)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, None, None]:
        """Return the gradient of the projection."""
        given = [grad for grad in grads if grad is not None]
        if not given:
            return None, None, None
        # What differentiates a gradient has to see where it came from.
        whole = _whole(given) if len(given) == _PARTS and not torch.is_grad_enabled() else None
        if whole is None:
            tokens, heads, head_dim = ctx.like
            nothing = given[0].new_zeros(()).expand(*tokens, heads, head_dim)
            whole = torch.stack([nothing if grad is None else grad for grad in grads], -3)
        return whole.flatten(-3), None, None


def are_one_projection(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Return whether tensors are the three views that `split_projection` returned, as its derivative knows them."""
    node = query.grad_fn
    return (
        isinstance(node, _NODE)
        and key.grad_fn is node
        and value.grad_fn is node
        and (query.output_nr, key.output_nr, value.output_nr) == (0, 1, 2)
    )


_NODE: Any = _Split._backward_cls


def side_by_side(shape: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return shape and strides of the tensor of which gradients ``[batch, *layout, heads, head_dim]`` are the parts."""
    whole = (*shape[:-2], _PARTS, *shape[-2:])
    return whole, tuple(math.prod(whole[axis + 1 :]) for axis in range(len(whole)))


def _whole(parts: list[Tensor]) -> Tensor | None:
    """Return the tensor that parts lie in side by side; ``None`` if they do not."""
    first = parts[0]
    shape, strides = side_by_side(tuple(first.shape))
    apart = (*strides[:-3], *strides[-2:])
    begin, storage = first.storage_offset(), first.untyped_storage().data_ptr()
    for place, part in enumerate(parts):
        if (
            part.dtype != first.dtype
            or part.stride() != apart
            or part.shape != first.shape
            or part.storage_offset() != begin + place * strides[-3]
            or part.untyped_storage().data_ptr() != storage
        ):
            return None
    return first.as_strided(shape, strides)
