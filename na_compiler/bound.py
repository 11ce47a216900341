"""``torch.ops.na_compiler.bound``: attention by one kernel, named by its key. `na_compiler.passes.bind` writes it."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from na_compiler import operands
from na_compiler.operands import PARAMETERS
from na_compiler.ops.kernels import on_cuda, reading
from na_compiler.ops.operators import OPERATORS
from na_compiler.ops.schema import bound_schema
from na_compiler.runtime.kernel import ForwardKernel

__all__: list[str] = []

_library = torch.library.Library("na_compiler", "FRAGMENT")
_INPUTS = ("query", "key", "value")
# Of the arguments: the tensors, the key of the kernel, the scale, the parameters, and what may be left out.
_FIRST, _LATER = len(_INPUTS) + 2, len(_INPUTS) + 2 + len(PARAMETERS)


def _bound(*arguments: Any) -> tuple[Tensor, Tensor]:
    from na_compiler.compiler.kernels import kernel_by_key  # noqa: PLC0415

    key, scale = arguments[len(_INPUTS) : _FIRST]
    found = kernel_by_key(key)
    assert isinstance(found, ForwardKernel)
    given = dict(zip(_INPUTS, arguments, strict=False))
    later = dict(zip((operand.name for operand in operands.later()), arguments[_LATER:], strict=False))
    tensors = given | {name: value for name, value in later.items() if isinstance(value, Tensor)}
    numbers = {name: value for name, value in later.items() if value is not None and name not in tensors}

    def run(*read: Tensor) -> Any:
        return found(**dict(zip(tensors, read, strict=True)), **numbers, scale=scale)

    output, lse = reading(run, tensors.values())
    return output, lse


def _bound_fake(*arguments: Any) -> tuple[Tensor, Tensor]:
    query, key, value, _, scale = arguments[:_FIRST]
    parameters, later = arguments[_FIRST:_LATER], arguments[_LATER:]
    output, lse = OPERATORS[query.dim() - 3](query, key, value, *parameters, scale, *later)
    return output, lse


_library.define("bound" + bound_schema(), tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides))
_library.impl("bound", _bound, "CompositeExplicitAutograd")
_library.impl("bound", functools.partial(on_cuda, _bound), "CUDA")
torch.library.register_fake("na_compiler::bound", _bound_fake, lib=_library)
