"""Configs: the choices that a schedule leaves open, as plain data that keys and manifests can hold."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

from na_compiler.problem import Problem
from na_compiler.workspace import Workspace

__all__ = ["Config"]


class Config(ABC):
    """What every schedule's config has: frozen dataclasses, whose `repr` goes into the kernel's key.

    Attributes
    ----------
    module
        The schedule's module, with functions ``schedule_forward(plan, config)`` and ``schedule_backward(plan, config)``
        that return a TensorIR function; it alone may import TVM.
    pipeline
        TVM's lowering pipeline for what they return: ``"s_tir"`` for scheduled blocks, ``"tirx"``.
    passes
        Options of TVM's passes.
    options
        Further options of nvcc.
    """

    module: ClassVar[str]
    pipeline: ClassVar[str] = "s_tir"
    passes: ClassVar[Mapping[str, Any]] = {}
    options: ClassVar[tuple[str, ...]] = ()

    @abstractmethod
    def plan(self, problem: Problem) -> Any:
        """Return what follows from a problem and this config: what the schedule's functions take."""

    @abstractmethod
    def workspace(self, problem: Problem, direction: str) -> Workspace:
        """Return what kernels of this config need beside inputs and outputs."""

    def alignment(self, problem: Problem) -> int:
        """Return the bytes that addresses and strides of query, key, value and the like have to be multiples of."""
        return problem.element_bytes

    def has_adjacent_heads(self, problem: Problem) -> bool:  # noqa: ARG002
        """Return whether the heads of a token have to lie one after another in query, key, value and the like."""
        return False
