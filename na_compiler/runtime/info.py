"""`KernelInfo`: what a compiled function computes, and what it has to be called with."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from typing import Any

from na_compiler import operands
from na_compiler.operands import Argument
from na_compiler.problem import Problem
from na_compiler.workspace import Workspace

__all__ = ["ABI", "KernelInfo"]

# Changed whenever the compiled functions' arguments do.
ABI = 3


@dataclass(frozen=True)
class KernelInfo:
    """What a library computes, as its manifest says.

    Parameters
    ----------
    problem
        What it computes.
    direction
        ``"forward"``, ``"backward"`` or ``"tangent"``.
    target
        Name of the target that it was compiled for.
    workspace
        What it needs beside its inputs and outputs.
    alignment
        Bytes that the addresses and strides of query, key, value and the like are multiples of, on a GPU.
    adjacent_heads
        Whether the heads of a token must lie one after another in query, key, value and the like.
    """

    problem: Problem
    direction: str
    target: str
    workspace: Workspace = field(default_factory=Workspace)
    alignment: int = 1
    adjacent_heads: bool = False

    @functools.cached_property
    def arguments(self) -> tuple[Argument, ...]:
        """What the compiled function is called with, in order."""
        return operands.arguments(self.problem, self.direction, self.workspace)

    def to_dict(self) -> dict[str, Any]:
        """Return plain data, fit for JSON."""
        return {
            "problem": self.problem.to_dict(),
            "direction": self.direction,
            "target": self.target,
            "workspace": self.workspace.to_dict(),
            "operands": [argument.to_dict() for argument in self.arguments],
            "alignment": self.alignment,
            "adjacent_heads": self.adjacent_heads,
        }

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> KernelInfo:
        """Make an info of what `to_dict` returned.

        Raises
        ------
        KeyError, TypeError, ValueError
            If the data is none, or a kernel's that takes other operands than this version gives it.
        """
        workspace = Workspace.from_dict(data["workspace"])
        problem = Problem.from_dict(data["problem"])
        wants = (data["alignment"], data["adjacent_heads"])
        info = cls(problem, data["direction"], data["target"], workspace, *wants)
        if data["operands"] != info.to_dict()["operands"]:
            raise ValueError(
                f"its kernel for {problem} {info.direction} takes other operands than those of this version"
            )
        return info
