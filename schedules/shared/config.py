"""Configs: the choices that a family leaves open, as plain data that can be compared, printed and sent to workers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar

from na_compiler.problem import Problem
from na_compiler.workspace import Workspace

__all__ = ["Config"]


class Config(ABC):
    """What every family's config has: frozen dataclasses of plain data.

    Attributes
    ----------
    family
        Name of the family, which is its folder's.
    """

    family: ClassVar[str]

    @abstractmethod
    def plan(self, problem: Problem) -> Any:
        """Return what follows from a problem and this config: extents, shared memory. Pure Python, and quick."""

    @abstractmethod
    def workspace(self, problem: Problem, direction: str) -> Workspace:
        """Return what kernels of this config need beside inputs and outputs."""

    def alignment(self, problem: Problem) -> int:
        """Return the bytes that addresses and strides of query, key, value and the like have to be multiples of."""
        return problem.element_bytes

    def has_adjacent_heads(self, problem: Problem) -> bool:  # noqa: ARG002
        """Return whether the heads of a token have to lie one after another in query, key, value and the like."""
        return False

    def visited_pairs(self, problem: Problem) -> int | None:  # noqa: ARG002
        """Return how many pairs of query and key one head of one batch entry computes; ``None`` if not counted."""
        return None
