"""The three axes that descriptions are written with; problems of rank 1 and 2 get leading axes of one token."""

from __future__ import annotations

__all__ = ["AXES", "Extents", "round_up"]

AXES = 3
Extents = tuple[int, int, int]


def round_up(value: int, multiple: int) -> int:
    """Return the smallest multiple of ``multiple`` that is at least ``value``."""
    return -(-value // multiple) * multiple
