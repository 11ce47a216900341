"""`call`: an operator by the shortest way that gives the same result as torch's dispatcher.

The dispatcher and the way back into Python take more time than a small kernel. They are for autocast, modes (FLOP
counters, fakes), functorch, profiling, tracing and unusual tensors: without any of them the implementation is called
directly, within an ``autograd.Function`` of its own where a gradient is wanted.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from na_compiler.ops.kernels import Launch, find
from na_compiler.ops.operators import OPERATORS, differentiate, save_for_backward
from na_compiler.ops.parts import PARTS
from na_compiler.ops.plain import are_plain, is_quiet
from na_compiler.ops.projection import are_one_projection
from na_compiler.ops.schema import BACKWARD, FORWARD, PART, PART_BACKWARD

__all__ = ["call"]


# Of the arguments of a forward: the tensors that have to be given, all that has to be, and all that there may be. What
# comes after that is the place of a part.
_FIRST, _GIVEN, _ALL = FORWARD.parameters, FORWARD.later, len(FORWARD.names)


def call(rank: int, return_lse: bool, *arguments: Any) -> Any:
    """Call the operator of a rank; or its implementation, where nothing in between has anything to do.

    Returns
    -------
    Tensor or (Tensor, Tensor)
        Output, or output and lse.
    """
    tensors = arguments[:_FIRST]
    if len(arguments) > _GIVEN:
        tensors += tuple([one for one in arguments[_GIVEN:] if isinstance(one, Tensor)])
    if not torch.compiler.is_compiling() and are_plain(tensors) and is_quiet():
        launch = find(FORWARD if len(arguments) <= _ALL else PART, rank, arguments)
        if torch.is_grad_enabled():
            for one in tensors:
                if one.requires_grad:
                    called = launch, rank, return_lse, arguments, are_one_projection(*tensors[:_FIRST])
                    return _Attention.apply(called, *tensors)  # type: ignore[attr-defined]
        results: Any = launch(arguments)
    else:
        results = (OPERATORS if len(arguments) <= _ALL else PARTS)[rank](*arguments)
    return results if return_lse else results[0]


# What calls the backward of a forward's kernel on tensors of some strides. All else that decides it is the forward's.
_backwards: dict[tuple[Any, ...], Launch] = {}
_MOST = 4096


class _Attention(torch.autograd.function._SingleLevelFunction):
    """The operator of a rank on plain tensors.

    A ``torch.autograd.Function`` without what that does for ``torch.func``, of which there is nothing here, and without
    ``setup_context``: with either torch is slower.
    """

    @staticmethod
    def forward(ctx: Any, called: tuple[Any, ...], *tensors: Tensor) -> Any:  # noqa: ARG004 - autograd looks at them
        """Attend."""
        launch, rank, return_lse, arguments, is_one = called
        results = launch(arguments)
        save_for_backward(ctx, arguments, results)
        # Hooks may give back other tensors than were saved.
        ctx.call = launch if _hooks(True) is None else None, rank, is_one, len(arguments) > _ALL
        return results if return_lse else results[0]

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor | None, grad_lse: Tensor | None = None) -> tuple[Any, ...]:
        """Return the gradients of all tensors."""
        launch, rank, is_one, is_part = ctx.call

        def run(*arguments: Any) -> Any:
            grads = (grad_output,) if grad_lse is None else arguments[:_OUTPUTS]
            # What differentiates a gradient goes through the operator.
            if launch is None or torch.is_grad_enabled() or not are_plain(grads) or not is_quiet():
                name = f"na{rank}d_part_backward" if is_part else f"na{rank}d_backward"
                return getattr(torch.ops.na_compiler, name).default(*arguments)
            at = (launch, is_one, *[one.stride() for one in arguments if isinstance(one, Tensor)])
            found = _backwards.get(at)
            if found is None:
                if len(_backwards) >= _MOST:
                    _backwards.clear()
                found = _backwards[at] = find(PART_BACKWARD if is_part else BACKWARD, rank, arguments, is_one)
            return found(arguments)

        gradients = differentiate(run, ctx, grad_output, grad_lse)
        if len(gradients) > _FIRST:  # Of the numbers there are none.
            gradients = (*gradients[:_FIRST], *[gradients[_FIRST + place] for place in ctx.places])
        return (None, *gradients)


_hooks = torch._C._autograd._top_saved_tensors_default_hooks
_OUTPUTS = len(FORWARD.results)
