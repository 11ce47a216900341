"""What a problem is made of, taken as people spell it and refused with the limit and a value that would work."""

from __future__ import annotations

import numbers
import reprlib
from collections.abc import Sequence
from typing import Any

from na_compiler import operands
from na_compiler.checks import MAX_RANK

__all__ = [
    "DTYPES",
    "LONGEST_HEAD",
    "check_strides",
    "check_windows",
    "dtype_name",
    "flag",
    "flags_per_axis",
    "head_length",
    "ints_per_axis",
    "is_int",
    "layout_of",
    "optional_operands",
    "positive",
    "shown",
]

DTYPES = ("float32", "bfloat16", "float16")
# ONNX, torch and TensorIR count in 64 bits.
_LARGEST = 2**63 - 1
# Kernels keep a row of a head in registers, and are as long as it: at this one compiling takes a minute.
LONGEST_HEAD = 8192


def dtype_name(dtype: object) -> str:
    """Return the name of a dtype given as a string, a ``torch.dtype`` or a ``numpy.dtype``.

    Raises
    ------
    ValueError
        If the kernels do not have it.
    """
    name = str(getattr(dtype, "name", dtype)).rpartition(".")[2]
    if name not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype}; convert the tensors, e.g. to float32")
    return name


def shown(value: object) -> str:
    """Return a value as messages show it: short, whatever was given."""
    return reprlib.repr(value)


def is_int(value: object) -> bool:
    """Return whether a value is an integer, of Python's or of NumPy's; a bool is none."""
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def _is_flag(value: object) -> bool:
    # NumPy's are no bools, and this module does without NumPy.
    kind = type(value)
    return kind is bool or (kind.__module__ == "numpy" and kind.__name__ in {"bool", "bool_"})


def positive(name: str, value: object) -> int:
    """Return an int of at least 1 that fits 64 bits.

    Raises
    ------
    ValueError
        If it is none.
    """
    if not isinstance(value, numbers.Integral) or isinstance(value, bool):
        raise ValueError(f"{name} must be an int, got {shown(value)}; e.g. {name}=4")
    number = int(value)
    if number < 1:
        raise ValueError(f"{name} must be at least 1, got {shown(number)}; e.g. {name}=4")
    if number > _LARGEST:
        raise ValueError(f"{name} must be less than 2**63, got {shown(number)}; e.g. {name}=4")
    return number


def head_length(name: str, value: object) -> int:
    """Return the length of a row of a head.

    Raises
    ------
    ValueError
        If it is no int from 1 to `LONGEST_HEAD`.
    """
    length = positive(name, value)
    if length > LONGEST_HEAD:
        raise ValueError(f"{name} must be at most {LONGEST_HEAD}, got {length}; {name}={LONGEST_HEAD} would work")
    return length


def flag(name: str, value: object) -> bool:
    """Return a bool.

    Raises
    ------
    ValueError
        If it is none.
    """
    if not isinstance(value, bool):
        raise ValueError(f"{name} must be True or False, got {shown(value)}")
    return value


def optional_operands(value: object) -> tuple[str, ...]:
    """Return names of optional operands, each once, in the table's order.

    Raises
    ------
    ValueError
        If one is no name of an option.
    """
    known = [option for option in operands.options() if option != operands.ADDITIONAL_KV]
    if isinstance(value, str) or not isinstance(value, Sequence) or not set(value) <= set(known):
        raise ValueError(f"operands must be names among {', '.join(known) or 'none'}, got {value!r}")
    return tuple(name for name in known if name in value)


def layout_of(value: object) -> tuple[int, ...]:
    """Return the tokens along each axis of a layout, given as an int or as 1 to 3 of them; or as ``None`` on each axis.

    Raises
    ------
    ValueError
        If it is neither, or an axis has no token or more than 64 bits count.
    """
    axes = (value,) if is_int(value) else value
    if not isinstance(axes, Sequence) or isinstance(axes, str) or not 1 <= len(axes) <= MAX_RANK:
        raise ValueError(f"layout must have 1, 2 or 3 axes, got {shown(value)}; e.g. (56, 56)")
    if all(extent is None for extent in axes):
        return tuple(axes)
    if not all(map(is_int, axes)) or min(axes) < 1:
        raise ValueError(f"layout must have at least one token on each axis, got {shown(tuple(axes))}; e.g. (56, 56)")
    if max(axes) > _LARGEST:
        raise ValueError(
            f"layout must have less than 2**63 tokens on each axis, got {shown(tuple(axes))}; e.g. (56, 56)"
        )
    return tuple(map(int, axes))


def ints_per_axis(name: str, value: object, rank: int) -> tuple[int, ...]:
    """Return a parameter that is an int, or a sequence of one an axis, as a tuple.

    Raises
    ------
    ValueError
        If it is neither, or less than 1.
    """
    example = (3,) * rank if name == "kernel_size" else (1,) * rank
    if is_int(value):
        axes: tuple[Any, ...] = (value,) * rank
    elif isinstance(value, Sequence) and not isinstance(value, str) and len(value) == rank and all(map(is_int, value)):
        axes = tuple(value)
    else:
        raise ValueError(f"{name} must be an int or {rank} ints (one per axis of the layout), got {shown(value)}; "
                         f"e.g. {example}")  # fmt: skip
    for axis, extent in enumerate(axes):
        if extent < 1:
            raise ValueError(f"{name} must be at least 1, got {shown(extent)} on axis {axis}; e.g. {example}")
        if extent > _LARGEST:
            raise ValueError(f"{name} must be less than 2**63, got {shown(extent)} on axis {axis}; e.g. {example}")
    return tuple(map(int, axes))


def flags_per_axis(name: str, value: object, rank: int) -> tuple[bool, ...]:
    """Return a parameter that is a bool, or a sequence of one an axis, as a tuple.

    Raises
    ------
    ValueError
        If it is neither.
    """
    if _is_flag(value):
        return (bool(value),) * rank
    if isinstance(value, Sequence) and len(value) == rank and all(map(_is_flag, value)):
        return tuple(map(bool, value))
    raise ValueError(f"{name} must be a bool or {rank} bools (one per axis of the layout), got {shown(value)}; "
                     f"e.g. {(True,) * rank}")  # fmt: skip


def check_strides(kernel_size: Sequence[int], stride: Sequence[int]) -> None:
    """Check that no stride is longer than its window.

    Raises
    ------
    ValueError
        If one is.
    """
    for axis, (kernel, step) in enumerate(zip(kernel_size, stride, strict=True)):
        if step > kernel:
            raise ValueError(
                f"stride must be at most kernel_size={kernel} on axis {axis}, got {step}; stride={kernel} would work"
            )


def check_windows(layout: Sequence[int], kernel_size: Sequence[int], dilation: Sequence[int]) -> None:
    """Check that every window, as its dilation spreads it, fits its axis.

    Raises
    ------
    ValueError
        If one does not.
    """
    for axis, (tokens, kernel, dil) in enumerate(zip(layout, kernel_size, dilation, strict=True)):
        if kernel * dil > tokens:
            if dil > tokens:
                advice = f"dilation={max(tokens // kernel, 1)} would work" if kernel <= tokens else "neither fits"
            else:
                advice = f"kernel_size={tokens // dil} would work"
            raise ValueError(
                f"kernel_size * dilation must be at most the layout's {tokens} tokens on axis {axis}, "
                f"got kernel_size={kernel} * dilation={dil} = {kernel * dil}; {advice}"
            )
