"""What NATTEN checks arguments with: ``natten.utils.checks``."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from na_compiler.parameters import flags_per_axis, ints_per_axis
from na_compiler.problem import Problem
from na_compiler.traced import canonical_parameters

__all__ = ["LATEST", "OLD"]


def check_kernel_size_arg(na_dim: int, kernel_size: Any) -> tuple[int, ...]:
    """Return the kernel size with a value for each axis."""
    return ints_per_axis("kernel_size", kernel_size, na_dim)


def check_input_size_arg(na_dim: int, input_size: Any) -> tuple[int, ...]:
    """Return the layout with a value for each axis."""
    return ints_per_axis("input_size", input_size, na_dim)


def check_stride_arg(na_dim: int, stride: Any) -> tuple[int, ...]:
    """Return the stride with a value for each axis."""
    return ints_per_axis("stride", 1 if stride is None else stride, na_dim)


def check_dilation_arg(na_dim: int, dilation: Any) -> tuple[int, ...]:
    """Return the dilation with a value for each axis."""
    return ints_per_axis("dilation", 1 if dilation is None else dilation, na_dim)


def check_causal_arg(na_dim: int, is_causal: Any) -> tuple[bool, ...]:
    """Return causality with a value for each axis."""
    return flags_per_axis("is_causal", False if is_causal is None else is_causal, na_dim)


def check_all_args(
    na_dim: int,
    kernel_size: Any,
    stride: Any,
    dilation: Any,
    is_causal: Any,
) -> tuple[Any, ...]:
    """Return all four with a value for each axis."""
    return canonical_parameters(na_dim, kernel_size, stride, dilation, is_causal)


def check_args_against_input(
    input_tensor: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    dilation: Sequence[int],
    is_causal: Sequence[bool],
) -> None:
    """Raise ValueError where a window does not fit ``[batch, *layout, heads, head_dim]``."""
    layout, heads, head_dim = input_tensor.shape[1:-2], input_tensor.shape[-2], input_tensor.shape[-1]
    Problem(layout, heads, head_dim, kernel_size, stride, dilation, is_causal)


def get_device_cc(device: Any = None) -> int:
    """Return ten times a GPU's compute capability; 0 where there is none."""
    if not torch.cuda.is_available() or (device is not None and torch.device(device).type != "cuda"):
        return 0
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def get_num_na_weights(kernel_size: Sequence[int]) -> int:
    """Return how many keys a window has."""
    return math.prod(kernel_size)


def _check_all_args_017(na_dim: int, kernel_size: Any, dilation: Any, is_causal: Any) -> tuple[Any, ...]:
    """Return all three with a value for each axis."""
    sizes, _, steps, flags = canonical_parameters(na_dim, kernel_size, 1, dilation, is_causal)
    return sizes, steps, flags


_COMMON: dict[str, Any] = {
    function.__name__: function
    for function in (check_kernel_size_arg, check_input_size_arg, check_dilation_arg, check_causal_arg)
}
LATEST: dict[str, Any] = {
    **_COMMON,
    "check_stride_arg": check_stride_arg,
    "check_all_args": check_all_args,
    "check_args_against_input": check_args_against_input,
}
OLD: dict[str, Any] = {
    **_COMMON,
    "check_all_args": _check_all_args_017,
    "get_num_na_weights": get_num_na_weights,
    "get_device_cc": get_device_cc,
}
