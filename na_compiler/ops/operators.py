"""The torch operators: ``torch.ops.na_compiler.na1d``, ``na2d``, ``na3d``, and the backward of each.

One implementation serves the three: the rank is the tensors'. The operators read query, key and value where they are
and return contiguous tensors. What they do below autograd is in `na_compiler.ops.kernels`; everything else that torch
wants to know of an operator (shapes, gradients, autocast, batching, FLOPs) is registered here.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch._library.autograd import Info, make_autograd_impl
from torch.autograd import forward_ad
from torch.utils.flop_counter import register_flop_formula

from na_compiler.ops.kernels import backward, check_rank, forward, on_cuda
from na_compiler.problem import Problem

__all__ = [
    "OPERATORS",
    "batched",
    "call",
    "differentiate",
    "differentiate_twice",
    "refuse_tangents",
    "refuse_unless_dense",
    "save_for_backward",
]

_PARAMETERS = "int[] kernel_size, int[] stride, int[] dilation, bool[] is_causal, float scale"
_ADDITIONAL = "Tensor? additional_keys=None, Tensor? additional_values=None"
_FORWARD = f"(Tensor query, Tensor key, Tensor value, {_PARAMETERS}, {_ADDITIONAL}) -> (Tensor output, Tensor lse)"
# The last two gradients are empty where there are no additional keys.
_BACKWARD = (
    f"(Tensor grad_output, Tensor grad_lse, Tensor query, Tensor key, Tensor value, Tensor output, Tensor lse, "
    f"{_PARAMETERS}, {_ADDITIONAL}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)

if hasattr(torch.ops.na_compiler, "na1d"):
    raise ImportError(
        "libna_compiler_torch.so has defined na_compiler's operators in this process: import torch and na_compiler "
        "before it is loaded, or do not load it, since Python does not need it"
    )
_library = torch.library.Library("na_compiler", "DEF")


def _keys(*names: str) -> int:
    keys = torch._C.DispatchKeySet.from_raw_repr(0)
    for name in names:
        keys = keys.add(getattr(torch._C.DispatchKey, name))
    return int(keys.raw_repr())


# What the dispatcher knows of an ordinary dense tensor on the CPU; of one made in inference mode. Sparse, nested,
# negated, quantised, wrapped tensors have other keys, and so have those of other devices.
_PLAIN = {_keys("CPU", "AutocastCPU"), _keys("CPU", "AutocastCPU", "ADInplaceOrView", "AutogradCPU")}


def call(rank: int, *arguments: Any) -> tuple[Tensor, Tensor]:
    """Call the operator of a rank; or its implementation, where nothing in between has anything to do.

    torch's dispatcher and the way back into Python take more time than a small kernel. They are for autograd, autocast,
    modes (FLOP counters, fakes), functorch, profiling, tracing and unusual tensors: without any of them the result is
    the same.
    """
    if not torch.compiler.is_compiling():
        if torch.is_inference_mode_enabled() and _is_plain(arguments):
            return forward(rank, *arguments)
        if torch._C._functorch.peek_interpreter_stack() is not None:
            from na_compiler.ops.func import Attention  # noqa: PLC0415

            device = arguments[0].device.type
            if torch.is_autocast_enabled(device):  # What is saved for backward has the dtype of the output.
                arguments = _cast(device, arguments)
            return Attention.apply(rank, *arguments)  # type: ignore[no-any-return,no-untyped-call]
    return OPERATORS[rank](*arguments)  # type: ignore[no-any-return]


def _is_plain(arguments: tuple[Any, ...]) -> bool:
    """Return whether the dispatcher would do nothing but call the implementation."""
    torch_c = torch._C
    keys = torch_c._dispatch_keys
    query, key, value, *_, additional_keys, additional_values = arguments
    return (
        type(query) is type(key) is type(value) is Tensor
        and keys(query).raw_repr() in _PLAIN
        and keys(key).raw_repr() in _PLAIN
        and keys(value).raw_repr() in _PLAIN
        and (
            additional_keys is None or (type(additional_keys) is Tensor and keys(additional_keys).raw_repr() in _PLAIN)
        )
        and (
            additional_values is None
            or (type(additional_values) is Tensor and keys(additional_values).raw_repr() in _PLAIN)
        )
        and not torch_c._len_torch_dispatch_stack()
        and not torch_c._len_torch_function_stack()
        and not torch_c._is_any_autocast_enabled()
        and not torch_c._autograd._profiler_enabled()
        and torch_c._functorch.peek_interpreter_stack() is None
        and torch_c._get_tracing_state() is None
    )


def _unsupported(rank: int, *arguments: Any) -> Any:
    """Refuse tensors that no kernel takes."""
    tensors = [argument for argument in arguments if isinstance(argument, Tensor)]
    for tensor in tensors:
        refuse_unless_dense(rank, tensor)
    devices = ", ".join(sorted({str(tensor.device) for tensor in tensors}))
    raise NotImplementedError(
        f"na_compiler has kernels for the CPU and for CUDA, got tensors on {devices}; move them, e.g. with .cpu()"
    )


def refuse_unless_dense(rank: int, tensor: Tensor) -> None:
    """Refuse nested, sparse and quantised tensors.

    Raises
    ------
    NotImplementedError
        If it is one of these.
    """
    if tensor.is_nested:
        raise NotImplementedError(f"na{rank}d takes dense tensors, got a nested one; pad it, or call per component")
    if tensor.layout is not torch.strided:
        raise NotImplementedError(f"na{rank}d takes dense tensors, got a {tensor.layout} one; use .to_dense()")
    if tensor.is_quantized:
        raise NotImplementedError(f"na{rank}d takes floating-point tensors, got a {tensor.dtype}; use .dequantize()")


def _sizes_are_known(*tensors: Tensor) -> bool:
    return all(isinstance(size, int) for tensor in tensors for size in tensor.shape)


def _forward_fake(
    rank: int,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kernel_size: list[int],
    stride: list[int],
    dilation: list[int],
    is_causal: list[bool],
    scale: float,
    additional_keys: Tensor | None = None,
    additional_values: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    check_rank(rank, query)
    if _sizes_are_known(query, key, value):  # A problem cannot be made of symbols.
        Problem.of_tensors(
            query, key, value, kernel_size, stride, dilation, is_causal, additional_keys, additional_values
        )
    output = query.new_empty((*query.shape[:-1], value.shape[-1]))
    return output, query.new_empty(query.shape[:-1], dtype=torch.float32)


def _backward_fake(
    grad_output: Tensor,
    grad_lse: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    lse: Tensor,
    kernel_size: list[int],
    stride: list[int],
    dilation: list[int],
    is_causal: list[bool],
    scale: float,
    additional_keys: Tensor | None = None,
    additional_values: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    extra = [query.new_empty(0) if t is None else t.new_empty(t.shape) for t in (additional_keys, additional_values)]
    query_grad, key_grad, value_grad = (tensor.new_empty(tensor.shape) for tensor in (query, key, value))
    return query_grad, key_grad, value_grad, extra[0], extra[1]


def save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    """Keep what backward needs of a forward's inputs and outputs."""
    query, key, value, *parameters, additional_keys, additional_values = inputs
    ctx.save_for_backward(query, key, value, *output, additional_keys, additional_values)
    ctx.parameters = parameters
    ctx.set_materialize_grads(False)


def differentiate(operator: Any, ctx: Any, grad_output: Tensor | None, grad_lse: Tensor | None) -> tuple[Any, ...]:
    """Return the gradients of a forward's inputs, by its backward operator."""
    query, key, value, output, lse, *additional = ctx.saved_tensors
    if grad_output is None and grad_lse is None:
        return (None,) * 10
    grad_output = torch.zeros_like(output) if grad_output is None else grad_output
    grad_lse = torch.zeros_like(lse) if grad_lse is None else grad_lse
    grads = operator(grad_output, grad_lse, query, key, value, output, lse, *ctx.parameters, *additional)
    extra = (None, None) if additional[0] is None else grads[3:]
    return (*grads[:3], None, None, None, None, None, *extra)


def differentiate_twice(ctx: Any, *grads: Tensor) -> Any:
    """Refuse.

    Raises
    ------
    NotImplementedError
        Always.
    """
    raise NotImplementedError("neighborhood attention cannot be differentiated twice")


def _refuse_forward_mode(differentiable: Callable[..., Any], keyset: Any, *arguments: Any, **named: Any) -> Any:
    """Differentiate, or refuse: torch would drop tangents in silence."""
    if forward_ad._current_level >= 0:
        for argument in arguments:
            if isinstance(argument, Tensor) and forward_ad.unpack_dual(argument).tangent is not None:
                refuse_tangents()
    return differentiable(keyset, *arguments, **named)


def refuse_tangents() -> NoReturn:
    """Refuse forward mode.

    Raises
    ------
    NotImplementedError
        Always.
    """
    raise NotImplementedError("neighborhood attention has no forward-mode derivative; use backward")


def _autocast(operator: Any, device: str, keyset: Any, *arguments: Any) -> Any:
    """Cast to the dtype that autocast has now; torch's own registration would fix one."""
    key = torch._C.DispatchKey.AutocastCPU if device == "cpu" else torch._C.DispatchKey.AutocastCUDA
    with torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(key)):
        return operator(*_cast(device, arguments))


def _cast(device: str, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    dtype = torch.get_autocast_dtype(device)
    return tuple(a.to(dtype) if isinstance(a, Tensor) and a.is_floating_point() else a for a in arguments)


def batched(operator: Any, tensors: Iterable[int], info: Any, in_dims: tuple[Any, ...], *arguments: Any) -> Any:
    """Fold the dimension that vmap adds into the batch: of some arguments, and of the last two if they are tensors."""
    count = info.batch_size

    def fold(tensor: Tensor, dim: int | None) -> Tensor:
        moved = tensor.unsqueeze(0).expand(count, *tensor.shape) if dim is None else tensor.movedim(dim, 0)
        return moved.flatten(0, 1)

    folded = list(arguments)
    for i in (*tensors, len(arguments) - 2, len(arguments) - 1):
        if isinstance(folded[i], Tensor):
            folded[i] = fold(folded[i], in_dims[i])
    results = operator(*folded)
    absent = [result.dim() == 1 for result in results]  # The gradients of additional keys that there are not.
    unfolded = tuple(r if gone else r.unflatten(0, (count, -1)) for r, gone in zip(results, absent, strict=True))
    return unfolded, tuple(None if gone else 0 for gone in absent)


def _flops(query: Any, key: Any, value: Any, parameters: tuple[Any, ...], extra: Any, direction: str) -> int:
    kernel_size, stride, dilation, is_causal = parameters
    problem = Problem(
        tuple(query[1:-2]), query[-2], query[-1], kernel_size, stride, dilation, is_causal, key[-2], value[-1]
    )
    return problem.flops(query[0], 0 if extra is None else extra[1], direction)


def _forward_flops(
    query: Any, key: Any, value: Any, kernel_size: Any, stride: Any, dilation: Any, is_causal: Any, scale: Any,
    additional_keys: Any = None, additional_values: Any = None, **_: Any,
) -> int:  # fmt: skip
    return _flops(query, key, value, (kernel_size, stride, dilation, is_causal), additional_keys, "forward")


def _backward_flops(
    grad_output: Any, grad_lse: Any, query: Any, key: Any, value: Any, output: Any, lse: Any, kernel_size: Any,
    stride: Any, dilation: Any, is_causal: Any, scale: Any, additional_keys: Any = None, additional_values: Any = None,
    **_: Any,
) -> int:  # fmt: skip
    return _flops(query, key, value, (kernel_size, stride, dilation, is_causal), additional_keys, "backward")


def _register(rank: int) -> Any:
    """Define an operator and its backward, and tell torch about them; returns the operator."""
    names = (f"na{rank}d", f"na{rank}d_backward")
    for name, schema in zip(names, (_FORWARD, _BACKWARD), strict=True):
        # Inductor must hand the strides over as they are: it would copy views of a fused projection otherwise.
        tags = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides)
        _library.define(name + schema, tags=tags)
    operators = [getattr(torch.ops.na_compiler, name).default for name in names]
    derivatives = (functools.partial(differentiate, operators[1]), differentiate_twice)
    setup = (save_for_backward, lambda ctx, inputs, output: None)  # noqa: ARG005
    for i, (name, operator) in enumerate(zip(names, operators, strict=True)):
        implementation = functools.partial((forward, backward)[i], rank)
        _library.impl(name, implementation, "CPU")
        _library.impl(name, functools.partial(on_cuda, implementation), "CUDA")
        _library.impl(name, functools.partial(_unsupported, rank), "CompositeExplicitAutograd")
        torch.library.register_fake(
            f"na_compiler::{name}", (functools.partial(_forward_fake, rank), _backward_fake)[i], lib=_library
        )
        autograd = make_autograd_impl(operator, Info(derivatives[i], setup[i]))
        _library.impl(name, functools.partial(_refuse_forward_mode, autograd), "Autograd", with_keyset=True)
        tensors = (tuple(range(3)), tuple(range(7)))[i]
        torch.library.register_vmap(f"na_compiler::{name}", functools.partial(batched, operator, tensors), lib=_library)
        register_flop_formula(operator.overloadpacket)((_forward_flops, _backward_flops)[i])
    for device, key in (("cpu", "AutocastCPU"), ("cuda", "AutocastCUDA")):
        _library.impl(names[0], functools.partial(_autocast, operators[0], device), key, with_keyset=True)
    return operators[0]


OPERATORS = {rank: _register(rank) for rank in (1, 2, 3)}
