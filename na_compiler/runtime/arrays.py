"""Tensors of torch and arrays of NumPy, made alike, whichever of the two libraries a call is made with."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray

__all__ = ["Array", "compact_if_empty", "empty_like", "zero_tangent"]

# What a call is given and returns: tensors of one library, torch's or NumPy's.
Array = TypeVar("Array", "torch.Tensor", "NDArray[np.generic]")


def _is_torch(tensor: object) -> bool:
    return type(tensor).__module__.partition(".")[0] == "torch"


def compact_if_empty(tensor: Any) -> Any:  # noqa: ANN401 - a number, or a tensor of either library
    """Return a tensor without elements with the strides that TVM's check expects, which are not torch's nor NumPy's.

    Numbers, and tensors with elements, are returned as they are.
    """
    shape = getattr(tensor, "shape", ())
    if math.prod(shape):
        return tensor
    strides = [math.prod(shape[axis + 1 :]) for axis in range(len(shape))]
    if _is_torch(tensor):
        return tensor.as_strided(shape, strides)
    import numpy as np  # noqa: PLC0415

    return np.lib.stride_tricks.as_strided(tensor, strides=[stride * tensor.itemsize for stride in strides])


def empty_like(like: Any, shape: tuple[int, ...], dtype: str | None = None) -> Any:  # noqa: ANN401 - of like's library
    """Return a tensor of a shape and a dtype, default ``like``'s, where ``like`` is; nothing is written to it."""
    if _is_torch(like):
        import torch  # noqa: PLC0415

        return torch.empty(shape, dtype=getattr(torch, dtype) if dtype else like.dtype, device=like.device)
    import numpy as np  # noqa: PLC0415

    return np.empty(shape, dtype or like.dtype)


def zero_tangent(like: Any) -> Any:  # noqa: ANN401 - of like's library
    """Return a tensor of zeros of a tensor's shape, all of whose rows are one row in memory."""
    row = like.shape[-1:]
    if _is_torch(like):
        return like.new_zeros(row).expand(like.shape)
    import numpy as np  # noqa: PLC0415

    # Not broadcast_to, whose result cannot be written, and which a kernel therefore does not take.
    strides = (0,) * (len(like.shape) - 1) + (like.itemsize,)
    return np.lib.stride_tricks.as_strided(np.zeros(row, like.dtype), like.shape, strides)
