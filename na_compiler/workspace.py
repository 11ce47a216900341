"""`Workspace`: what a kernel needs beside its inputs and outputs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

__all__ = ["ADDITIONAL", "Workspace", "parts_of"]

# Stands for the number of additional keys in a shape.
ADDITIONAL = "additional"


def parts_of(extent: str, size: int) -> str:
    """Return what stands in a shape for how many parts of a size an extent has that is known when a kernel is called.

    Examples
    --------
    >>> parts_of("queries0", 56)
    'queries0/56'
    """
    return f"{extent}/{size}"


@dataclass(frozen=True)
class Workspace:
    """Shapes of the float32 buffers that follow a kernel's outputs among its arguments.

    Parameters
    ----------
    buffers
        A shape for each, without the batch, which is in front; an extent may be `ADDITIONAL`, or what `parts_of`
        returned.
    multiple
        The number of additional keys is rounded up to a multiple of it.

    Examples
    --------
    >>> Workspace(((4, "additional"),), multiple=8).shapes(batch=2, additional=5)
    [(2, 4, 8)]
    """

    buffers: tuple[tuple[int | str, ...], ...] = ()
    multiple: int = 1

    def shapes(
        self, batch: int, additional: int = 0, extents: Mapping[str, int] | None = None
    ) -> list[tuple[int, ...]]:
        """Return the shapes to allocate, for a batch, a number of additional keys, and other extents by their names."""
        padded = -(-additional // self.multiple) * self.multiple

        def size(extent: int | str) -> int:
            if isinstance(extent, int):
                return extent
            name, _, part = extent.partition("/")
            return padded if name == ADDITIONAL else -(-(extents or {})[name] // int(part))

        return [(batch, *map(size, shape)) for shape in self.buffers]

    def to_dict(self) -> dict[str, Any]:
        """Return plain data, fit for JSON."""
        return {"buffers": [list(shape) for shape in self.buffers], "multiple": self.multiple}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Workspace:
        """Make a workspace of what `to_dict` returned."""
        return cls(tuple(tuple(shape) for shape in data["buffers"]), data["multiple"])
