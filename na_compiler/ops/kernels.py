"""Attention on torch tensors by compiled kernels, below autograd: what the operators of `na_compiler.ops.operators` do.

The kernel is found, or compiled, by what the tensors are. Tensors are read where they are, and copied only where a
kernel cannot read them.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from na_compiler.devices import CUDA
from na_compiler.problem import Problem
from na_compiler.runtime.kernel import Kernel, MisplacedError
from na_compiler.target import target_of

__all__ = ["backward", "check_rank", "forward", "on_cuda", "reading"]

_LOG = logging.getLogger("na_compiler")
# Kernels by what decides which one it is, with tensors of one element that have the shapes of output and lse: to make
# tensors like these is the quickest way to make them. A look-up takes a microsecond, and making a Problem thirty.
_kernels: dict[tuple[Any, ...], tuple[Kernel, Tensor, Tensor]] = {}
_KERNELS = 4096
_said: set[str] = set()


def forward(
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
    """Compute output and lse; arguments are those of the operators."""
    extra = (additional_keys, additional_values)
    kernel, like_output, like_lse = _find(
        "forward", rank, query, key, value, kernel_size, stride, dilation, is_causal, *extra
    )
    output = torch.empty_like(like_output, memory_format=torch.contiguous_format)
    lse = torch.empty_like(like_lse, memory_format=torch.contiguous_format)
    rest = (scale, output, lse, *kernel.spaces(query, additional_keys))
    reading(kernel.function, (query, key, value, *extra), rest)
    return output, lse


def backward(
    rank: int,
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
    """Compute the gradients of query, key, value and additional keys and values; empty ones where these are not."""
    extra = (additional_keys, additional_values)
    kernel, _, _ = _find("backward", rank, query, key, value, kernel_size, stride, dilation, is_causal, *extra)
    output, lse, grad_lse = _compact(output), _compact(lse), _compact(grad_lse)

    def run(query: Tensor, key: Tensor, value: Tensor, grad_output: Tensor, *extra: Tensor) -> tuple[Tensor, ...]:
        gradients: tuple[Tensor, ...] = kernel(  # type: ignore[operator]
            query, key, value, output, lse, grad_output, grad_lse, *extra, scale=scale
        )
        return gradients

    gradients = reading(run, (query, key, value, grad_output, *extra))
    if additional_keys is None:
        gradients += (query.new_empty(0), query.new_empty(0))
    grad_query, grad_key, grad_value, grad_additional_keys, grad_additional_values = gradients
    return grad_query, grad_key, grad_value, grad_additional_keys, grad_additional_values


def on_cuda(implementation: Callable[..., Any], query: Tensor, *arguments: Any) -> Any:
    """Call an implementation with the tensors' device as the current one, which launching a kernel makes it."""
    device = query.get_device()
    if device == torch.cuda.current_device():
        return implementation(query, *arguments)
    with CUDA.guard(device):
        return implementation(query, *arguments)


def reading(run: Callable[..., Any], tensors: Iterable[Tensor | None], rest: tuple[Any, ...] = ()) -> Any:
    """Call what runs a kernel with the tensors that there are, or copies that the kernel can read, and the rest."""
    given = [_with_rows(tensor) for tensor in tensors if tensor is not None]
    try:
        return run(*given, *rest)
    except MisplacedError as error:
        if str(error) not in _said:
            _said.add(str(error))
            _LOG.warning("copying what the operator was given: %s", error)
    return run(*[tensor.clone(memory_format=torch.contiguous_format) for tensor in given], *rest)


def _with_rows(tensor: Tensor) -> Tensor:
    """Kernels take any strides but the last: rows of head_dim elements lie together in anything that is usual."""
    # Not contiguous(): it returns a tensor as it is whose last dimension has one element, at whatever stride.
    return tensor if tensor.stride(-1) == 1 else tensor.clone(memory_format=torch.contiguous_format)


def _compact(tensor: Tensor) -> Tensor:
    return _with_rows(tensor if tensor.is_contiguous() else tensor.contiguous())


def check_rank(rank: int, query: Tensor) -> None:
    """Refuse a query of another number of axes.

    Raises
    ------
    ValueError
        If it has another.
    """
    if query.dim() != rank + 3:
        axes = ", ".join("XYZ"[:rank])
        raise ValueError(
            f"query must have {rank + 3} dimensions for na{rank}d, [batch, {axes}, heads, head_dim], "
            f"got shape {tuple(query.shape)}"
        )


def _find(
    direction: str, rank: int, query: Tensor, key: Tensor, value: Tensor, *parameters: Any
) -> tuple[Kernel, Tensor, Tensor]:
    """Return kernel, and what output and lse are like, for some tensors; checks them when such ones are first seen."""
    kernel_size, stride, dilation, is_causal, additional_keys, additional_values = parameters
    at = (
        direction,
        query.get_device(),
        key.get_device(),
        value.get_device(),
        query.shape,
        key.shape,
        value.shape,
        query.dtype,
        key.dtype,
        value.dtype,
        tuple(kernel_size),
        tuple(stride),
        tuple(dilation),
        tuple(is_causal),
        None if additional_keys is None else additional_keys.shape,
        None if additional_values is None else additional_values.shape,
    )
    found = _kernels.get(at)
    if found is None:
        check_rank(rank, query)
        problem = Problem.of_tensors(query, key, value, *parameters)
        from na_compiler.compiler.kernels import find_kernel  # noqa: PLC0415

        if len(_kernels) >= _KERNELS:
            _kernels.clear()
        tokens = query.shape[:-1]
        with torch.inference_mode(mode=False):
            output = query.new_empty(1).expand(*tokens, value.shape[-1])
            lse = query.new_empty(1, dtype=torch.float32).expand(tokens)
        found = _kernels[at] = (find_kernel(problem, direction, target_of(query.device)), output, lse)
    return found
