"""Recognising a neighborhood in a mask: which layout, and which rule of each axis, make it, if any do."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from na_compiler.checks import MAX_RANK
from na_compiler.passes.axes import AxisSearch, Mask, axis_mask, divisors

__all__ = ["LARGEST", "Mask", "Neighborhood", "Search", "axis_mask", "mask_of_bias", "recognize"]

# Beyond this many elements looking at a mask takes longer than it is worth.
LARGEST = 1 << 28
# Elements that a search looks at before it gives up: in sizes of the mask, and some more for the smallest ones. Masks
# of models take three to six; the rest is for layouts that look right until the whole is compared.
_EFFORT, _EFFORT_MORE = 16, 10_000
# -1e4 is -9984 in bfloat16.
_HIDING = -9984.0
_LOG = logging.getLogger("na_compiler")


@dataclass(frozen=True)
class Neighborhood:
    """Parameters that make a mask, with a value for each axis."""

    layout: tuple[int, ...]
    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    is_causal: tuple[bool, ...]
    border: tuple[str, ...]


def mask_of_bias(bias: NDArray[Any]) -> Mask | None:
    """Return which scores a bias leaves as they are, where it hides the others; ``None`` where it does more.

    Parameters
    ----------
    bias
        What is added to scores, in a dtype of NumPy's own.

    Notes
    -----
    Minus infinity hides, and so do finite numbers from -1e4 downwards, which models write in its place: the exponential
    of what is lower than others by that much is 0 in float32, unless scores themselves differ by nearly as much.
    """
    hidden = bias <= _HIDING
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
    one wrong element is enough to refuse it. The parameters of an axis are read off its rows, not searched for, and
    the time of all of it is linear in the mask's size; see `Search`.

    Examples
    --------
    >>> found = recognize(np.kron(axis_mask(6, 3), axis_mask(5, 3, border="cut")))
    >>> found.layout, found.kernel_size, found.border
    ((6, 5), (3, 3), ('shift', 'cut'))
    """
    return Search(mask).run()


class Search:
    """The search of `recognize`, which counts what it looks at.

    Attributes
    ----------
    compared
        Elements of masks that were looked at so far; at some 16 times the mask's size it gives up.
    """

    def __init__(self, mask: Mask) -> None:
        self.mask = mask
        self.compared = 0

    def run(self) -> Neighborhood | None:
        """Return the neighborhood that the mask is, or ``None``."""
        mask = self.mask
        tokens = mask.shape[0]
        self.compared += mask.size
        if mask.shape != (tokens, tokens) or tokens < 2 or mask.all() or not mask.diagonal().all():
            return None
        for layout in _layouts(tokens):
            if self.compared > _EFFORT * mask.size + _EFFORT_MORE:
                _LOG.info("a mask of %d tokens looks like too many neighborhoods: it is taken for none", tokens)
                return None
            found = self._with_layout(layout)
            if found is not None:
                return found
        return None

    def _with_layout(self, layout: tuple[int, ...]) -> Neighborhood | None:
        # Rows of the product tell most wrong layouts apart; the whole is compared for those that are left.
        tokens = self.mask.shape[0]
        if len(layout) > 1 and not all(self._is_product(layout, query) for query in (0, tokens // 2, tokens - 1)):
            return None
        found = []
        for axis in range(len(layout)):
            search = AxisSearch(self._along(layout, axis))
            rule = search.run()
            self.compared += search.compared
            if rule is None:
                return None
            found.append(rule)
        made = [axis_mask(tokens, *rule) for tokens, rule in zip(layout, found, strict=True)]
        if len(layout) > 1 and not self._is(made):
            return None
        return Neighborhood(layout, *zip(*found, strict=True))

    def _along(self, layout: tuple[int, ...], axis: int) -> Mask:
        """Return what an axis sees, where all other coordinates of query and key are 0: everyone sees itself."""
        if len(layout) == 1:
            return self.mask
        selected: list[int | slice] = [0] * (2 * len(layout))
        selected[axis] = selected[axis + len(layout)] = slice(None)
        return self.mask.reshape(layout + layout)[tuple(selected)]

    def _is_product(self, layout: tuple[int, ...], query: int) -> bool:
        """Return whether a row is the product of what it shows of each axis."""
        row = self.mask[query].reshape(layout)
        self.compared += row.size
        place = np.unravel_index(query, layout)
        lines = [row[(*place[:axis], slice(None), *place[axis + 1 :])] for axis in range(len(layout))]
        return bool(np.array_equal(_product(lines), row.reshape(-1)))

    def _is(self, axes: Sequence[Mask]) -> bool:
        """Return whether the mask is a product of masks, one for each axis: row by row of the first axis."""
        rest = _product_of_masks(axes[1:])
        for first, rows in zip(axes[0], self.mask.reshape(len(axes[0]), len(rest), -1), strict=True):
            self.compared += rows.size
            if not np.array_equal(np.kron(first, rest), rows):
                return False
        return True


def _layouts(tokens: int) -> Iterator[tuple[int, ...]]:
    """Yield the layouts of some tokens, low ranks first; axes of one token are for lower ranks."""
    leadings = divisors(tokens)[1:]

    def split(count: int, rank: int) -> Iterator[tuple[int, ...]]:
        if rank == 1:
            yield (count,)
            return
        for leading in leadings:
            if count % leading == 0 and count > leading:
                yield from ((leading, *rest) for rest in split(count // leading, rank - 1))

    for rank in range(1, MAX_RANK + 1):
        yield from split(tokens, rank)


def _product(lines: Sequence[Mask]) -> Mask:
    made = lines[0]
    for line in lines[1:]:
        made = np.logical_and.outer(made, line).reshape(-1)
    return made


def _product_of_masks(axes: Sequence[Mask]) -> Mask:
    made = axes[0]
    for axis in axes[1:]:
        made = np.kron(made, axis)
    return made
