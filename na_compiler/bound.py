"""``torch.ops.na_compiler.bound``: attention by one kernel, named by its key. `na_compiler.passes.bind` writes it."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from na_compiler.ops.kernels import on_cuda, reading
from na_compiler.ops.operators import OPERATORS
from na_compiler.runtime.kernel import ForwardKernel

__all__: list[str] = []

_SCHEMA = (
    "bound(Tensor query, Tensor key, Tensor value, str kernel, float scale, int[] kernel_size, int[] stride, "
    "int[] dilation, bool[] is_causal, Tensor? additional_keys=None, Tensor? additional_values=None) "
    "-> (Tensor output, Tensor lse)"
)
_library = torch.library.Library("na_compiler", "FRAGMENT")


def _bound(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kernel: str,
    scale: float,
    kernel_size: list[int],  # noqa: ARG001
    stride: list[int],  # noqa: ARG001
    dilation: list[int],  # noqa: ARG001
    is_causal: list[bool],  # noqa: ARG001
    additional_keys: Tensor | None = None,
    additional_values: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    from na_compiler.compiler.kernels import kernel_by_key  # noqa: PLC0415

    found = kernel_by_key(kernel)
    assert isinstance(found, ForwardKernel)
    tensors = (query, key, value, additional_keys, additional_values)
    output, lse = reading(functools.partial(found, scale=scale), tensors)
    return output, lse


def _bound_fake(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kernel: str,  # noqa: ARG001
    scale: float,
    kernel_size: list[int],
    stride: list[int],
    dilation: list[int],
    is_causal: list[bool],
    additional_keys: Tensor | None = None,
    additional_values: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    operator = OPERATORS[query.dim() - 3]
    parameters = (kernel_size, stride, dilation, is_causal, scale)
    output, lse = operator(query, key, value, *parameters, additional_keys, additional_values)
    return output, lse


_library.define(_SCHEMA, tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides))
_library.impl("bound", _bound, "CompositeExplicitAutograd")
_library.impl("bound", functools.partial(on_cuda, _bound), "CUDA")
torch.library.register_fake("na_compiler::bound", _bound_fake, lib=_library)
