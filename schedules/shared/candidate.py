"""What a planner ranks: configs of a problem, and what it counted of each."""

from __future__ import annotations

from abc import ABC, abstractmethod

from na_compiler.schedules.shared.config import Config

__all__ = ["Candidate"]


class Candidate(ABC):
    """A config, and what it would do; its text says so in words.

    Attributes
    ----------
    config
        The choices.
    cycles
        Estimated time; only their order means something, and only within one planner.
    waste
        Scores computed for each one that is needed.
    """

    config: Config
    cycles: float
    waste: float

    @abstractmethod
    def __str__(self) -> str:
        """Return what it would do, in words."""

    @abstractmethod
    def columns(self) -> dict[str, str]:
        """Return what tells it from the others, for a table: by what it is called."""
