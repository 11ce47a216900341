"""``torch.ops.na_compiler.bound``: attention by one kernel, named by its key. `na_compiler.passes.bind` writes it."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from na_compiler import operands
from na_compiler.operands import FREE
from na_compiler.ops.kernels import on_cuda, reading
from na_compiler.ops.operators import OPERATORS
from na_compiler.ops.schema import BOUND, FORWARD
from na_compiler.runtime.kernel import ForwardKernel

__all__: list[str] = []

_library = torch.library.Library("na_compiler", "FRAGMENT")


def _bound(*arguments: object) -> tuple[Tensor, Tensor]:
    from na_compiler.compiler.kernels import kernel_by_key  # noqa: PLC0415

    given = BOUND.by_name(arguments)
    found = kernel_by_key(given["kernel"])
    assert isinstance(found, ForwardKernel)
    there = [operand for operand in operands.inputs() if given[operand.name] is not None]
    tensors = {o.name: given[o.name] if o.strides == FREE else given[o.name].contiguous() for o in there}
    numbers = {o.name: given[o.name] for o in operands.scalars() if given[o.name] is not None}

    def run(*read: Tensor) -> tuple[Tensor, Tensor]:
        named: dict[str, Any] = {**dict(zip(tensors, read, strict=True)), **numbers}
        return found(**named)

    output, lse = reading(run, tensors.values())
    return output, lse


def _bound_fake(*arguments: object) -> tuple[Tensor, Tensor]:
    given = BOUND.by_name(arguments)
    output, lse = OPERATORS[given["query"].dim() - 3](*(given[name] for name in FORWARD.names))
    return output, lse


_library.define("bound" + BOUND.text(), tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides))
_library.impl("bound", _bound, "CompositeExplicitAutograd")
_library.impl("bound", functools.partial(on_cuda, _bound), "CUDA")
torch.library.register_fake("na_compiler::bound", _bound_fake, lib=_library)
