"""Neighborhood attention under ``torch.func``: ``grad``, ``vjp``, ``jacrev``, and ``vmap`` of these.

torch differentiates an operator that is registered from Python outside of its functional transforms only. Within them
it wants an ``autograd.Function``, whose methods are made of the operators here.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from na_compiler.ops.batching import batched
from na_compiler.ops.operators import differentiate, differentiate_twice, refuse_tangents, save_for_backward
from na_compiler.ops.schema import BACKWARD, FORWARD

__all__ = ["Attention"]


def _operator(rank: int, direction: str = "") -> Any:
    return getattr(torch.ops.na_compiler, f"na{rank}d{direction}").default


class Attention(torch.autograd.Function):
    """The operator of a rank, which is the first argument."""

    @staticmethod
    def forward(rank: int, *arguments: Any) -> tuple[Tensor, Tensor]:
        """Attend."""
        return _operator(rank)(*arguments)  # type: ignore[no-any-return]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        """Save what backward needs."""
        rank, *arguments = inputs
        ctx.rank, ctx.count = rank, len(arguments)
        save_for_backward(ctx, tuple(arguments), output)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Any, ...]:
        """Return the gradients of all arguments."""
        gradients = differentiate(functools.partial(_Backward.apply, ctx.rank), ctx, *grads)
        return (None, *gradients[: ctx.count])

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:  # noqa: ARG004
        """Refuse."""
        refuse_tangents()

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], rank: int, *arguments: Any) -> Any:
        """Fold the new dimension into the batch."""
        return batched(functools.partial(Attention.apply, rank), FORWARD, info, in_dims[1:], *arguments)


class _Backward(torch.autograd.Function):
    """The backward operator of a rank."""

    @staticmethod
    def forward(rank: int, *arguments: Any) -> tuple[Tensor, ...]:
        return _operator(rank, "_backward")(*arguments)  # type: ignore[no-any-return]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return differentiate_twice(ctx, *grads)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:  # noqa: ARG004
        refuse_tangents()

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], rank: int, *arguments: Any) -> Any:
        return batched(functools.partial(_Backward.apply, rank), BACKWARD, info, in_dims[1:], *arguments)
