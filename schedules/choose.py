"""Chooses a family and its config for a problem on a target. Knows no family. Pure Python: no TVM is loaded."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Iterator
from dataclasses import dataclass

from na_compiler.problem import Problem
from na_compiler.schedules.family import Family
from na_compiler.schedules.shared.candidate import Candidate
from na_compiler.schedules.shared.config import Config
from na_compiler.target import Target
from na_compiler.window import border_kind

__all__ = [
    "FAMILIES",
    "MOST_CONTENDERS",
    "Choice",
    "candidates",
    "choose",
    "choose_rounded",
    "choose_steps",
    "contenders",
    "estimates",
    "family_of",
    "recorded",
    "takes",
]

# The families, by the names of their folders, in the order in which they are asked. Of two for one kind of machine, the
# one that is faster comes first; where each is at times, both say how long they take.
FAMILIES = (
    "sm90",
    "mma",
    "simt",
    "cpu",
)
# Configs of a family that may be timed, and among which one that was must be: further down none has ever been fastest.
MOST_CONTENDERS = 64


@dataclass(frozen=True)
class Choice:
    """A config, and why it is not one of a faster family.

    Parameters
    ----------
    config
        Of the family that was chosen.
    reason
        Why no faster one was, in a sentence; ``None`` where this is the fastest.
    """

    config: Config
    reason: str | None = None


def choose(problem: Problem, target: Target, direction: str) -> Choice:
    """Return the config to compile a problem with.

    Parameters
    ----------
    problem
        What to compute.
    target
        What to compile for.
    direction
        ``"forward"``, ``"backward"`` or ``"tangent"``.

    Raises
    ------
    NotImplementedError
        If no family takes the problem; says why.
    """
    family, reasons = _best(problem, target, direction)
    return Choice(family.choose(problem, target, direction), " ".join(reasons) or None)


def candidates(problem: Problem, target: Target, direction: str, count: int = 8) -> tuple[Candidate, ...]:
    """Return what `choose` chose from, the best first; nothing where a family has no choices to rank.

    Parameters
    ----------
    problem
        What to compute.
    target
        What to compile for.
    direction
        ``"forward"``, ``"backward"`` or ``"tangent"``.
    count
        How many at most.

    Raises
    ------
    NotImplementedError
        If no family takes the problem; says why.
    """
    family, _ = _best(problem, target, direction)
    return family.candidates(problem, target, direction, count)


def choose_rounded(problem: Problem, target: Target, direction: str) -> Config | None:
    """Return a config whose products round float32 to TF32, which is never chosen unasked; ``None`` without one."""
    for family in map(_load, FAMILIES):
        if problem.is_open and family.refusal_of_open(problem, direction) is not None:
            continue
        borders = set(map(border_kind, problem.border))
        if family.is_for(target) and set(problem.operands) <= family.operands and borders <= family.borders:
            config = family.rounded(problem, target, direction)
            if config is not None:
                return config
    return None


def choose_steps(problem: Problem, target: Target, direction: str) -> Config | None:
    """Return the config for calls of a few queries, with an open layout; ``None`` where it is the one of all calls.

    Raises
    ------
    NotImplementedError
        If no family takes the problem; says why.
    """
    family, _ = _best(problem, target, direction)
    return family.choose_steps(problem, target, direction)


def contenders(problem: Problem, target: Target, direction: str, count: int = 8) -> tuple[Config, ...]:
    """Return configs that are worth timing, of each family that takes the problem: the one of `choose` first.

    Parameters
    ----------
    problem
        What to compute.
    target
        What to compile for.
    direction
        ``"forward"``, ``"backward"`` or ``"tangent"``.
    count
        How many of a family at most.

    Raises
    ------
    NotImplementedError
        If no family takes the problem; says why.
    """
    best, _ = _best(problem, target, direction)
    found = list(best.contenders(problem, target, direction, count))
    for family, reason in _asked(problem, target, direction):
        if reason is None and family is not best:
            # One that does not say how long it takes is there for what the others leave: one look will do.
            most = 1 if family.estimate(problem, target, direction) is None else count
            found += family.contenders(problem, target, direction, most)
    return tuple(found)


def estimates(problem: Problem, target: Target, direction: str) -> dict[str, float | str | None]:
    """Return, of each family for a target, the microseconds that it estimates for a batch entry among many.

    ``None`` of one that takes the problem and does not say; of one that does not take it, why, in a sentence.
    """
    return {
        family.name: reason or family.estimate(problem, target, direction)
        for family, reason in _asked(problem, target, direction)
    }


def recorded(problem: Problem, target: Target, direction: str, family: str, text: str) -> Config:
    """Return a config that was timed before, of what was written of it: its family's name, and its ``repr``.

    Raises
    ------
    ValueError
        If this version knows no such config, or would not time it: kernels of others are not known to work.
    """
    for one, reason in _asked(problem, target, direction):
        if one.name == family:
            if reason is not None:
                raise ValueError(reason)
            config = one.parse(text)
            if config not in one.contenders(problem, target, direction, MOST_CONTENDERS):
                raise ValueError(f"{text} is none of the {MOST_CONTENDERS} configs that {family} would try first")
            return config
    raise ValueError(f"no family for {target} is called {family!r}")


def takes(problem: Problem, target: Target, direction: str) -> bool:
    """Return whether any family takes a problem; parameters are those of `choose`."""
    return any(reason is None for _, reason in _asked(problem, target, direction))


def family_of(config: Config) -> Family:
    """Return the family that a config belongs to."""
    return _load(config.family)


def _best(problem: Problem, target: Target, direction: str) -> tuple[Family, list[str]]:
    """Return the family that is chosen for a problem, and why none of those before it is."""
    reasons: list[str] = []
    best: tuple[Family, float | None] | None = None
    for family, reason in _asked(problem, target, direction):
        if reason is not None:
            if best is None:
                reasons.append(reason)
            continue
        time = family.estimate(problem, target, direction)
        if best is None:
            best = family, time
        elif best[1] is not None and time is not None and time < best[1]:
            reasons.append(f"{best[0].name} takes it, and is estimated at {best[1] / time:.1f} times as long.")
            best = family, time
    if best is not None:
        return best[0], reasons
    why = " ".join(reasons) or f"none of {', '.join(FAMILIES)} is for it."
    raise NotImplementedError(f"no family of kernels takes {problem} {direction} on {target}: {why}")


def _asked(problem: Problem, target: Target, direction: str) -> Iterator[tuple[Family, str | None]]:
    """Yield the families for a target, each with why it does not take a problem; ``None`` if it does."""
    for family in map(_load, FAMILIES):
        if family.is_for(target):
            unknown = sorted(set(problem.operands) - family.operands)
            borders = sorted(set(map(border_kind, problem.border)) - family.borders)
            unknown += [f"border={border!r}" for border in borders]
            refused = family.refusal_of_open(problem, direction) if problem.is_open else None
            if refused is not None:
                yield family, refused
            elif unknown:
                yield family, f"{family.name} has no kernels with {', '.join(unknown)}."
            else:
                yield family, family.refusal(problem, target, direction)


@functools.cache
def _load(name: str) -> Family:
    family: Family = importlib.import_module(f"{__package__}.{name}.family").FAMILY
    return family
