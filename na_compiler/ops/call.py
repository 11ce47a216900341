"""`call`: an operator by the shortest way that gives the same result as torch's dispatcher.

The dispatcher and the way back into Python take more time than a small kernel. They are for autocast, modes (FLOP
counters, fakes), functorch, profiling, tracing and unusual tensors: without any of them the implementation is called
directly, within an ``autograd.Function`` of its own where a gradient is wanted.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from na_compiler.ops.kernels import Launch, find
from na_compiler.ops.operators import OPERATORS, differentiate, save_for_backward
from na_compiler.ops.schema import BACKWARD, FORWARD

__all__ = ["PLAIN", "call"]


def _keys(*names: str) -> int:
    keys = torch._C.DispatchKeySet.from_raw_repr(0)
    for name in names:
        keys = keys.add(getattr(torch._C.DispatchKey, name))
    return int(keys.raw_repr())


# What the dispatcher knows of an ordinary dense tensor of a device; of one made in inference mode. Sparse, nested,
# negated, quantised, wrapped tensors have other keys, and so have those of other devices.
PLAIN = frozenset(
    keys
    for device in ("CPU", "CUDA")
    for keys in (
        _keys(device, f"Autocast{device}"),
        _keys(device, f"Autocast{device}", "ADInplaceOrView", f"Autograd{device}"),
    )
)


# Of the arguments of a forward: the tensors that have to be given, and all that has to be.
_FIRST, _GIVEN = FORWARD.parameters, FORWARD.later


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
    if not torch.compiler.is_compiling() and _are_plain(tensors) and _is_quiet():
        launch = find(FORWARD, rank, arguments)
        if torch.is_grad_enabled():
            for one in tensors:
                if one.requires_grad:
                    return _Attention.apply((launch, rank, return_lse, arguments), *tensors)  # type: ignore[attr-defined]
        results: Any = launch(arguments)
    else:
        results = OPERATORS[rank](*arguments)
    return results if return_lse else results[0]


# torch's state that says so, looked up once: half of what asking costs.
_dispatch_keys = torch._C._dispatch_keys
_asked = (
    torch._C._len_torch_dispatch_stack,
    torch._C._len_torch_function_stack,
    torch._C._is_any_autocast_enabled,
    torch._C._autograd._profiler_enabled,
    torch._C._functorch.peek_interpreter_stack,
    torch._C._get_tracing_state,
)
_TYPES = frozenset({Tensor, torch.nn.Parameter})


def _is_quiet() -> bool:
    """Return whether torch is in no mode in which the dispatcher does more than to differentiate."""
    for ask in _asked:
        if ask():
            return False
    return forward_ad._current_level < 0


def _are_plain(tensors: tuple[Any, ...]) -> bool:
    """Return whether the dispatcher would do nothing with some tensors but differentiate."""
    for one in tensors:  # noqa: SIM110 - a generator takes longer
        if type(one) not in _TYPES or _dispatch_keys(one).raw_repr() not in PLAIN:
            return False
    return True


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
        launch, rank, return_lse, arguments = called
        results = launch(arguments)
        save_for_backward(ctx, arguments, results)
        # Hooks may give back other tensors than were saved.
        ctx.call = launch if _hooks(True) is None else None, rank
        return results if return_lse else results[0]

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor | None, grad_lse: Tensor | None = None) -> tuple[Any, ...]:
        """Return the gradients of all tensors."""
        launch, rank = ctx.call

        def run(*arguments: Any) -> Any:
            grads = (grad_output,) if grad_lse is None else arguments[:_OUTPUTS]
            # What differentiates a gradient goes through the operator.
            if launch is None or torch.is_grad_enabled() or not _are_plain(grads) or not _is_quiet():
                return getattr(torch.ops.na_compiler, f"na{rank}d_backward").default(*arguments)
            at = (launch, *[one.stride() for one in arguments if isinstance(one, Tensor)])
            found = _backwards.get(at)
            if found is None:
                if len(_backwards) >= _MOST:
                    _backwards.clear()
                found = _backwards[at] = find(BACKWARD, rank, arguments)
            return found(arguments)

        gradients = differentiate(run, ctx, grad_output, grad_lse)
        if len(gradients) > _FIRST:  # Of the numbers there are none.
            gradients = (*gradients[:_FIRST], *[gradients[_FIRST + place] for place in ctx.places])
        return (None, *gradients)


_hooks = torch._C._autograd._top_saved_tensors_default_hooks
_OUTPUTS = len(FORWARD.results)
