"""Numbers of a call as they are while torch compiles, exports or traces it, when what they are may not be known."""

from __future__ import annotations

import functools
import math
import numbers
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from na_compiler.ops.torchscript import is_tracing
from na_compiler.parameters import flags_per_axis, ints_per_axis

__all__ = ["canonical", "canonical_parameters", "checked_scale", "default_scale", "is_array", "is_unknown"]


def default_scale(query: Tensor) -> float:
    """Return what the scale is where none is given: ``head_dim ** -0.5``."""
    head_dim = query.shape[-1] if query.dim() else 1
    if _is_recording():
        with warnings.catch_warnings():  # That it becomes a constant, as a kernel's head_dim is.
            warnings.simplefilter("ignore", torch.jit.TracerWarning)  # type: ignore[attr-defined]
            head_dim = int(head_dim)
    return head_dim**-0.5 if head_dim else 1.0  # A head_dim of 0 is refused with the rest of the shape.


def checked_scale(scale: object) -> float:
    """Return a scale as a float; one that torch does not know while it compiles or exports, as it is.

    Raises
    ------
    ValueError
        If it is not a finite number.
    """
    if isinstance(scale, torch.SymFloat) or (torch.compiler.is_compiling() and is_unknown(scale)):
        return scale  # type: ignore[return-value]
    if isinstance(scale, Tensor) and not scale.dim() and _is_recording():
        return float(scale)  # A size is a tensor to torch.jit.trace, and so is what is made of one.
    # Where layers of different scales were compiled, Dynamo makes the scale an input, of which it knows no value.
    is_known = not torch.compiler.is_compiling()
    # NumPy's are numbers.Real only.
    is_bool = isinstance(scale, bool)
    if isinstance(scale, (float, int, numbers.Real)) and not is_bool and (not is_known or math.isfinite(scale)):
        return float(scale)
    given = repr(scale) if is_known else type(scale).__name__  # Dynamo has no repr of a tensor.
    raise ValueError(f"scale must be a finite number, got {given}; None is head_dim ** -0.5")


def is_unknown(scale: object) -> bool:
    """Return whether a scale is a number of which nothing is known while torch compiles or exports.

    An operator has a plain number there, which would be the one of the example inputs. Dynamo compiles anew where a
    size has another value; an exported program has to be right for all.
    """
    if is_array(scale):
        return True
    if not torch.compiler.is_exporting() or not isinstance(scale, (float, int, torch.SymFloat, torch.SymInt)):
        return False
    from torch.fx.experimental.symbolic_shapes import has_static_value  # noqa: PLC0415 - it brings sympy

    return not has_static_value(scale)


def is_array(value: object) -> bool:
    """Return whether a value is what Dynamo takes a number of NumPy's for."""
    return isinstance(value, np.ndarray) and not value.ndim


def _is_recording() -> bool:
    """Return whether ``torch.jit.trace`` is recording; Dynamo cannot trace the question."""
    return not torch.compiler.is_compiling() and is_tracing()


def canonical(rank: int, *parameters: object) -> tuple[Any, ...]:
    """Return what `canonical_parameters` does, which has done so before for most calls.

    Raises
    ------
    ValueError
        If a parameter is not what it must be.
    """
    if torch.compiler.is_compiling():  # Dynamo traces through a cache, and warns that it does.
        if any(map(_has_array, parameters)):
            raise ValueError(
                "kernel_size, stride, dilation and is_causal must be Python's ints and bools where torch compiles: "
                "NumPy's are arrays to it; int(...) of each would work"
            )
        return canonical_parameters(rank, *parameters)
    if is_tracing():
        return canonical_parameters(rank, *map(_recorded, parameters))
    try:
        return _cached(rank, *parameters)
    except TypeError:  # A list is not hashable.
        return canonical_parameters(rank, *parameters)


def _has_array(parameter: object) -> bool:
    return any(map(is_array, parameter if isinstance(parameter, tuple | list) else (parameter,)))


def _recorded(parameter: object) -> object:
    """Return a parameter with numbers for sizes, which are tensors to ``torch.jit.trace``; torch says that it does."""
    if isinstance(parameter, tuple | list):
        return tuple(map(_recorded, parameter))
    return int(parameter) if isinstance(parameter, Tensor) and not parameter.dim() else parameter


def canonical_parameters(
    rank: int, kernel_size: object, stride: object, dilation: object, is_causal: object
) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...], tuple[bool, ...]]:
    """Return kernel_size, stride, dilation and is_causal, checked, with a value for each axis.

    Raises
    ------
    ValueError
        If one is not what it must be.
    """
    return (
        _ints("kernel_size", kernel_size, rank),
        _ints("stride", 1 if stride is None else stride, rank),
        _ints("dilation", 1 if dilation is None else dilation, rank),
        flags_per_axis("is_causal", False if is_causal is None else is_causal, rank),
    )


def _ints(name: str, value: object, rank: int) -> tuple[int, ...]:
    """Return a parameter with a value for each axis; symbols, of a program whose layout is dynamic, as they are."""
    axes = (value,) * rank if isinstance(value, torch.SymInt) else value
    if isinstance(axes, Sequence) and any(isinstance(extent, torch.SymInt) for extent in axes):
        known = ints_per_axis(name, [1 if isinstance(extent, torch.SymInt) else extent for extent in axes], rank)
        return tuple(own if isinstance(own, torch.SymInt) else one for own, one in zip(axes, known, strict=True))  # type: ignore[misc]
    return ints_per_axis(name, value, rank)


# Equal keys may differ in type: True == 1, and kernel_size=True is refused.
_cached = functools.lru_cache(maxsize=1024, typed=True)(canonical_parameters)
