"""What a planner ranks: configs of a problem, and what it counted of each."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import ClassVar

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
    terms
        What the time is made of, by name, in the unit of ``cycles``. Some hide behind others: `combined` says how.
    combined
        How the time follows from the terms, in a sentence.
    """

    config: Config
    cycles: float
    waste: float
    terms: Mapping[str, float]
    combined: ClassVar[str]

    @abstractmethod
    def __str__(self) -> str:
        """Return what it would do, in words."""

    @abstractmethod
    def columns(self) -> dict[str, str]:
        """Return what tells it from the others, for a table: by what it is called."""
