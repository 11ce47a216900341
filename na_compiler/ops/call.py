"""`call`: an operator by the shortest way that gives the same result as torch's dispatcher.

The dispatcher and the way back into Python take more time than a small kernel. They are for autocast, modes (FLOP
counters, fakes), functorch, profiling, tracing and unusual tensors: without any of them the implementation is called
directly, within an ``autograd.Function`` of its own where a gradient is wanted.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from na_compiler.ops.kernels import run, run_on_cuda
from na_compiler.ops.operators import OPERATORS, differentiate, save_for_backward
from na_compiler.ops.schema import BACKWARD, FORWARD, Signature

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


def call(rank: int, *arguments: Any) -> tuple[Tensor, Tensor]:
    """Call the operator of a rank; or its implementation, where nothing in between has anything to do."""
    if not torch.compiler.is_compiling() and _is_plain(FORWARD, arguments):
        if torch.is_grad_enabled() and _is_wanted(arguments):
            return _Attention.apply(rank, *arguments)  # type: ignore[no-any-return,no-untyped-call]
        return _run(FORWARD, rank, arguments)  # type: ignore[no-any-return]
    return OPERATORS[rank](*arguments)  # type: ignore[no-any-return]


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


def _is_plain(signature: Signature, arguments: tuple[Any, ...]) -> bool:
    """Return whether the dispatcher would do nothing but differentiate, and call the implementation."""
    for argument in arguments[: signature.parameters]:
        if type(argument) not in _TYPES or _dispatch_keys(argument).raw_repr() not in PLAIN:
            return False
    for argument in arguments[signature.later :]:
        is_tensor = argument is not None and isinstance(argument, Tensor)
        if is_tensor and (type(argument) not in _TYPES or _dispatch_keys(argument).raw_repr() not in PLAIN):
            return False
    for ask in _asked:
        if ask():
            return False
    return forward_ad._current_level < 0


def _is_wanted(arguments: tuple[Any, ...]) -> bool:
    return any(isinstance(argument, Tensor) and argument.requires_grad for argument in arguments)


def _run(signature: Signature, rank: int, arguments: tuple[Any, ...]) -> Any:
    return (run if arguments[0].is_cpu else run_on_cuda)(signature, rank, arguments)


class _Attention(torch.autograd.Function):
    """The operator of a rank on plain tensors. It has no ``setup_context``, with which torch is slower."""

    @staticmethod
    def forward(ctx: Any, rank: int, *arguments: Any) -> tuple[Tensor, ...]:
        """Attend."""
        results: tuple[Tensor, ...] = _run(FORWARD, rank, arguments)
        save_for_backward(ctx, arguments, results)
        ctx.rank = rank
        return results

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Any, ...]:
        """Return the gradients of all arguments."""
        return (None, *differentiate(functools.partial(_backward, ctx.rank), ctx, *grads))


def _backward(rank: int, *arguments: Any) -> Any:
    # What differentiates a gradient is refused by the operator.
    if not torch.is_grad_enabled() and _is_plain(BACKWARD, arguments):
        return _run(BACKWARD, rank, arguments)
    return getattr(torch.ops.na_compiler, f"na{rank}d_backward").default(*arguments)
