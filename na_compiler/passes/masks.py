"""Recognising a neighborhood in a mask: which layout, window, stride, dilation and causality make it, if any do."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from na_compiler.problem import MAX_RANK
from na_compiler.window import group_length, window_bounds

__all__ = ["Neighborhood", "axis_mask", "mask_of_bias", "recognize"]

Mask = NDArray[np.bool_]


@dataclass(frozen=True)
class Neighborhood:
    """Parameters that make a mask, with a value for each axis."""

    layout: tuple[int, ...]
    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    is_causal: tuple[bool, ...]


def axis_mask(tokens: int, kernel_size: int, stride: int = 1, dilation: int = 1, is_causal: bool = False) -> Mask:
    """Return which keys (columns) the queries (rows) of one axis attend to."""
    mask = np.zeros((tokens, tokens), bool)
    for query in range(tokens):
        group, index = query % dilation, query // dilation
        start, end = window_bounds(index, group_length(tokens, dilation, group), kernel_size, stride, is_causal)
        mask[query, group + start * dilation : group + (end - 1) * dilation + 1 : dilation] = True
    return mask


def mask_of_bias(bias: NDArray[Any], lowest: float) -> Mask | None:
    """Return which scores a bias leaves as they are, where it hides the others; ``None`` where it does more.

    Parameters
    ----------
    bias
        What is added to scores, in a dtype of NumPy's own.
    lowest
        The lowest number of the dtype that it came in: it stands for minus infinity as well.
    """
    hidden = np.isneginf(bias) | (bias == lowest)
    return ~hidden if bool((hidden | (bias == 0)).all()) else None


def recognize(mask: Mask) -> Neighborhood | None:
    """Return the neighborhood that a mask is, or ``None`` if it is none.

    Parameters
    ----------
    mask
        ``[tokens, tokens]``: True where a query (row) attends to a key (column).

    Returns
    -------
    Neighborhood or None
        Of the lowest rank. None as well for a mask that hides nothing: dense attention has better kernels.

    Notes
    -----
    A mask is a neighborhood when it is the product of one mask for each axis of some layout and each of these follows
    the window rule. All ways to factor the number of tokens are tried; the whole mask is compared in the end, so that
    one wrong element is enough to refuse it.

    Examples
    --------
    >>> recognize(np.kron(axis_mask(6, 3), axis_mask(5, 3)))
    Neighborhood(layout=(6, 5), kernel_size=(3, 3), stride=(1, 1), dilation=(1, 1), is_causal=(False, False))
    """
    tokens = mask.shape[0]
    if mask.shape != (tokens, tokens) or tokens < 2 or mask.all() or not mask.diagonal().all():
        return None
    for layout in _layouts(tokens):
        axes = _factor(mask, layout)
        if axes is None:
            continue
        found = [_axis(axis) for axis in axes]
        if all(parameters is not None for parameters in found):
            columns = zip(*(parameters for parameters in found if parameters is not None), strict=True)
            kernel_size, stride, dilation, is_causal = columns
            return Neighborhood(layout, kernel_size, stride, dilation, is_causal)
    return None


def _layouts(tokens: int) -> Iterator[tuple[int, ...]]:
    """Yield the layouts of some tokens, low ranks first; axes of one token are for lower ranks."""
    divisors = [extent for extent in range(2, tokens + 1) if tokens % extent == 0]
    for rank in range(1, MAX_RANK + 1):
        for leading in itertools.product(divisors, repeat=rank - 1):
            last, rest = divmod(tokens, math.prod(leading))
            if not rest and last > 1:
                yield (*leading, last)


def _factor(mask: Mask, layout: tuple[int, ...]) -> list[Mask] | None:
    """Return the masks of the axes whose product a mask is, or ``None``."""
    if len(layout) == 1:
        return [mask]
    shaped = mask.reshape(layout + layout)
    # What an axis sees is seen where all other coordinates of query and key are the same: everyone sees itself.
    axes = []
    for axis in range(len(layout)):
        index = [0] * (2 * len(layout))
        selected: list[int | slice] = list(index)
        selected[axis] = selected[axis + len(layout)] = slice(None)
        axes.append(shaped[tuple(selected)])
    # A row of the product tells most wrong layouts apart; the whole is compared for those that are left.
    for query in (0, mask.shape[0] // 2):
        row = np.array([True])
        for one, coordinate in zip(axes, np.unravel_index(query, layout), strict=True):
            row = np.kron(row, one[coordinate])
        if not np.array_equal(row, mask[query]):
            return None
    product = axes[0]
    for axis_ in axes[1:]:
        product = np.kron(product, axis_)
    return axes if np.array_equal(product, mask) else None


def _axis(mask: Mask) -> tuple[int, int, int, bool] | None:
    """Return ``(kernel_size, stride, dilation, is_causal)`` of one axis, or ``None``."""
    tokens = mask.shape[0]
    counts = mask.sum(1)
    for is_causal in (False, True):
        if is_causal and np.triu(mask, 1).any():
            return None
        if not is_causal and (counts != counts[0]).any():
            continue
        largest = int(counts.max())
        for dilation in _dilations(mask):
            # With a stride, causal windows are shorter than the kernel size for all but the last of a group.
            for kernel_size in range(largest, min(tokens // dilation, 2 * largest if is_causal else largest) + 1):
                for stride in range(1, kernel_size + 1):
                    made = axis_mask(tokens, kernel_size, stride, dilation, is_causal)
                    if np.array_equal(made, mask):
                        return kernel_size, stride, dilation, is_causal
    return None


def _dilations(mask: Mask) -> list[int]:
    """Return the dilation that the distances of a row's keys show; 1 where no row has two keys."""
    steps = {int(step) for row in (0, mask.shape[0] - 1) for step in np.diff(np.flatnonzero(mask[row]))}
    return sorted(steps) if len(steps) == 1 else [1] if not steps else []
