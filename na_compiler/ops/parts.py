"""Operators whose tensors hold a part of a layout: ``na1d_part``, ``na2d_part`` and ``na3d_part``, and their backwards.

They take what ``na1d`` and the others take, and last the numbers of a `na_compiler.place.Place`. They are operators of
their own, so that whatever knows the others, a pass, an exporter, an operator in C++, takes none of these for one.
"""

from __future__ import annotations

import functools
from typing import Any

from torch import Tensor

from na_compiler.ops.kernels import part, part_backward
from na_compiler.ops.operators import (
    Rules,
    backward_fake,
    define,
    differentiate_operator,
    forward_fake,
    implement,
    implement_autocast,
    save_for_backward,
)
from na_compiler.ops.schema import PART, PART_BACKWARD

__all__ = ["PARTS"]

_ONCE = (
    "neighborhood attention of a part of a layout has first derivatives backwards, and no others: no tangents, and no "
    "second ones"
)


def _refuse_tangents(arguments: Any, tangents: Any) -> Any:
    raise NotImplementedError(_ONCE)


def _count(ctx: Any, inputs: tuple[Any, ...], results: tuple[Tensor, ...]) -> None:
    ctx.count = len(inputs)
    ctx.set_materialize_grads(False)


def _none(ctx: Any, *grads: Tensor | None) -> tuple[None, ...]:
    ctx.refuses = any(grad is not None for grad in grads)
    return (None,) * int(ctx.count)


def _register(rank: int) -> Any:
    operator = define(rank, "_part", PART)
    gradient = define(rank, "_part_backward", PART_BACKWARD)
    rules = Rules(save_for_backward, functools.partial(differentiate_operator, gradient), _refuse_tangents)
    implement(rank, operator, PART, part, functools.partial(forward_fake, rank, PART), rules)
    every = tuple(range(len(PART_BACKWARD.names)))
    once = Rules(_count, _none, _refuse_tangents, every, _ONCE)
    fake = functools.partial(backward_fake, PART_BACKWARD)
    implement(rank, gradient, PART_BACKWARD, part_backward, fake, once)
    implement_autocast(operator)
    return operator


PARTS = {rank: _register(rank) for rank in (1, 2, 3)}
