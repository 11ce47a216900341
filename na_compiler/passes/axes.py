"""What one axis of a mask says: kernel size, stride, dilation, causality and border are read off its rows."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from na_compiler.window import CUT, SHIFT, WRAP, group_length, window_bounds

__all__ = ["AxisRule", "AxisSearch", "Mask", "axis_mask", "divisors"]

Mask = NDArray[np.bool_]
Numbers = NDArray[np.int64]


class AxisRule(NamedTuple):
    """The parameters of one axis, in the order of `axis_mask`'s."""

    kernel_size: int
    stride: int = 1
    dilation: int = 1
    is_causal: bool = False
    border: str = SHIFT


def axis_mask(
    tokens: int,
    kernel_size: int,
    stride: int = 1,
    dilation: int = 1,
    is_causal: bool = False,
    border: str = SHIFT,
) -> Mask:
    """Return which keys (columns) the queries (rows) of one axis attend to."""
    mask = np.zeros((tokens, tokens), bool)
    for query in range(tokens):
        group, index = query % dilation, query // dilation
        length = group_length(tokens, dilation, group)
        start, end = window_bounds(index, length, kernel_size, stride, is_causal, border)
        if border == WRAP:
            mask[query, group + np.arange(start, end) % length * dilation] = True
        else:
            mask[query, group + start * dilation : group + (end - 1) * dilation + 1 : dilation] = True
    return mask


class AxisSearch:
    """The search for the rule of an axis.

    A rule is made of some rows, and what it says of all is compared with the mask in the end.

    Parameters
    ----------
    mask
        ``[tokens, tokens]``: True where a query (row) attends to a key (column). Everyone attends to itself.

    Attributes
    ----------
    compared
        Elements of the mask that were looked at so far.
    """

    def __init__(self, mask: Mask) -> None:
        self.mask, self.tokens = mask, len(mask)
        self.counts, self.first = mask.sum(1), mask.argmax(1)
        self.compared = 2 * mask.size

    def run(self) -> AxisRule | None:
        """Return the rule of the axis, or ``None``: one whose windows are shifted, where there is one."""
        for rules in (self._shifted, self._cut, self._wrapping):
            for rule in rules():
                self.compared += self.mask.size
                if np.array_equal(axis_mask(self.tokens, *rule), self.mask):
                    return rule
        return None

    def _shifted(self) -> Iterator[AxisRule]:
        """Yield rules whose windows are shifted, that have the mask's first and last keys.

        The last query of a group sees exactly ``kernel_size`` keys, causal or not, ``dilation`` apart. What is left is
        the stride: windows of a group move at multiples of it only.
        """
        last = np.flatnonzero(self.mask[-1])
        kernel_size = len(last)
        dilation = int(last[1] - last[0]) if kernel_size > 1 else 1
        if kernel_size * dilation > self.tokens or (np.diff(last) != dilation).any():
            return
        is_causal = bool((self.counts != kernel_size).any())
        starts, _ = self._bounds(dilation)
        for stride in _strides(starts[::dilation], kernel_size):
            yield from self._fitting(AxisRule(kernel_size, stride, dilation, is_causal))

    def _cut(self) -> Iterator[AxisRule]:
        """Yield rules whose windows are cut, that have the mask's first and last keys.

        A window that is not cut off begins and ends as far from its stride group's first query as any. Where all are
        cut off at one end, they may be as long as that needs.
        """
        dilation = self._dilation()
        starts, ends = self._bounds(dilation)
        index = np.arange(self.tokens) // dilation
        is_causal = bool((ends == index + 1).all())
        moving = starts if is_causal else starts + ends  # Neither moves back.
        for stride in _strides(moving[::dilation], self.tokens):
            first = index // stride * stride
            left = int((first - starts).max())
            kernel_size = left + (stride if is_causal else int((ends - first).max()))
            if stride > kernel_size:
                continue
            is_led = is_causal or left == kernel_size // 2 - stride // 2
            if is_led or stride == 1:
                border = CUT if is_led else f"{CUT}:{left}"
                yield from self._fitting(AxisRule(kernel_size, stride, dilation, is_causal, border))

    def _wrapping(self) -> Iterator[AxisRule]:
        """Yield rules whose windows wrap, and begin where the mask's do.

        All windows have as many keys. The first of them is the one that has none before it.
        """
        kernel_size = int(self.counts[0])
        dilation = self._dilation(is_circle=True)
        length = self.tokens // dilation
        if self.tokens % dilation or (self.counts != kernel_size).any() or not 1 < kernel_size < length:
            return
        group = self.mask[::dilation, ::dilation]
        is_first = group & ~np.roll(group, 1, axis=1)
        self.compared += 2 * group.size
        if (is_first.sum(1) != 1).any():
            return
        begin = (is_first.argmax(1) - np.arange(length)) % length
        # From query to query of a stride group windows stay, so that they begin one key nearer.
        changes = np.flatnonzero((np.roll(begin, -1) - begin + 1) % length) + 1
        for stride in divisors(math.gcd(length, *map(int, changes))):
            if stride <= kernel_size and begin[0] == (stride // 2 - kernel_size // 2) % length:
                yield AxisRule(kernel_size, stride, dilation, border=WRAP)

    def _dilation(self, *, is_circle: bool = False) -> int:
        """Return how far the keys of the query that sees most are apart."""
        keys = np.flatnonzero(self.mask[self.counts.argmax()])
        gaps = np.diff(keys, append=keys[0] + self.tokens) if is_circle else np.diff(keys)
        return int(gaps.min()) if len(keys) > 1 else 1

    def _bounds(self, dilation: int) -> tuple[Numbers, Numbers]:
        """Return the first key and one past the last one of each query, counted in its group."""
        return self.first // dilation, (self.first + (self.counts - 1) * dilation) // dilation + 1

    def _fitting(self, rule: AxisRule) -> Iterator[AxisRule]:
        """Yield a rule if its windows begin and end where the mask's do."""
        kernel_size, stride, dilation, is_causal, border = rule
        self.compared += self.tokens
        query = np.arange(self.tokens)
        group, index = query % dilation, query // dilation
        bounds = window_bounds(
            index,
            group_length(self.tokens, dilation, group),
            kernel_size,
            stride,
            is_causal,
            border,
            minimum=np.minimum,
            maximum=np.maximum,
        )
        if all(np.array_equal(one, other) for one, other in zip(bounds, self._bounds(dilation), strict=True)):
            yield rule


def divisors(number: int) -> list[int]:
    """Return the divisors of a number, in order."""
    low = [divisor for divisor in range(1, math.isqrt(number) + 1) if number % divisor == 0]
    return sorted({*low, *(number // divisor for divisor in low)})


def _strides(starts: Numbers, longest: int) -> list[int]:
    """Return the strides that where one group's windows are may come from: divisors of where that changes."""
    changes = np.flatnonzero(np.diff(starts)) + 1
    if not len(changes):
        return [1]  # One window for all.
    common = int(np.gcd.reduce(changes))
    return [stride for stride in divisors(common) if stride <= longest]
