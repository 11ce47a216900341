"""`Family`: a way to compute neighborhood attention on a kind of machine. Pure Python: no TVM is loaded.

A family is a folder beside this file, whose name it has, and a line in `na_compiler.schedules.choose`. Its module
``family`` has ``FAMILY``, an instance of its subclass of `Family`; whatever else is in the folder is its own affair:
nothing outside imports it but its tests. What is done for a family is this: it is asked whether it takes a problem
(`Family.refusal`), for its choices (`Family.choose`, `Family.candidates`), how long they take (`Family.estimate`), for
what they need from the caller (`Config`), and for the code (`Family.lower`).

A family promises

- to take every problem that it gives no reason against: what `Family.choose` returns can be lowered, and the kernel
  computes what `na_compiler.reference` computes, the window rule being that of `na_compiler.window`;
- that answers depend on nothing but the arguments: neither on this machine, nor on its cores, files, environment.
  Kernels are cached by problem, direction and target, without asking the family;
- answers within milliseconds, however large the layout is: nothing is counted token by token;
- not to load TVM before `Family.lower`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from na_compiler.problem import Problem
from na_compiler.schedules.shared.candidate import Candidate
from na_compiler.schedules.shared.config import Config
from na_compiler.schedules.shared.config_text import parse
from na_compiler.schedules.shared.visit import Visit
from na_compiler.target import Target
from na_compiler.window import SHIFT

__all__ = ["Family", "Lowered", "without_tangents"]


@dataclass(frozen=True)
class Lowered:
    """A kernel as TensorIR, and how TVM is to compile it.

    Parameters
    ----------
    function
        A PrimFunc ``main``. Its arguments are those of the direction, then the workspace's buffers.
    pipeline
        Name of TVM's lowering pipeline for it: ``"s_tir"`` for scheduled blocks, ``"tirx"``, or one of the family's.
    options
        Options of TVM's passes, by their names.
    skipped
        Names of TVM's passes that are left out.
    nvcc
        Further options of nvcc, for GPUs.
    """

    function: Any
    pipeline: str = "s_tir"
    options: Mapping[str, Any] = field(default_factory=dict)
    skipped: tuple[str, ...] = ()
    nvcc: tuple[str, ...] = ()


def without_tangents(problem: Problem, direction: str) -> str | None:
    """Return in a sentence that further operands have no tangents, if that is what a problem has and wants."""
    if direction != "tangent" or not problem.operands:
        return None
    return f"Forward mode takes no {', '.join(problem.operands)} yet: use backward."


class Family(ABC):
    """A way to compute neighborhood attention on a kind of machine.

    Attributes
    ----------
    name
        That of its folder, and what its configs say as `Config.family`.
    operands
        Optional operands of `na_compiler.operands`, beside the additional keys and values, that its kernels take. A
        problem with any other is not put to it.
    borders
        What its windows may do at the ends of axes, see `na_compiler.window`; likewise.
    has_tensor_cores
        Whether products run on tensor cores.
    configs
        The dataclasses that its configs are made of, so that one can be read back from a text.
    """

    name: str
    operands: frozenset[str] = frozenset()
    borders: frozenset[str] = frozenset({SHIFT})
    has_tensor_cores: bool = False
    configs: tuple[type, ...] = ()

    @abstractmethod
    def is_for(self, target: Target) -> bool:
        """Return whether the family is for a kind of machine at all; where not it is asked nothing more."""

    @abstractmethod
    def refusal(self, problem: Problem, target: Target, direction: str) -> str | None:
        """Return in a sentence why the family does not take a problem; ``None`` if it does.

        Parameters
        ----------
        problem
            What to compute.
        target
            A machine that the family is for.
        direction
            ``"forward"``, ``"backward"`` or ``"tangent"``.
        """

    def refusal_of_open(self, problem: Problem, direction: str) -> str | None:  # noqa: ARG002
        """Return in a sentence why the family does not take a problem whose layout is open; ``None`` if it does.

        It is asked before all else of such a problem, and nothing more where it refuses.
        """
        return f"{self.name} has no kernels for an open layout."

    @abstractmethod
    def choose(self, problem: Problem, target: Target, direction: str) -> Config:
        """Return the config to compile a problem with that the family takes; parameters are those of `refusal`."""

    def rounded(self, problem: Problem, target: Target, direction: str) -> Config | None:  # noqa: ARG002
        """Return a config whose products round float32 to TF32, for callers who allow it; ``None`` without one.

        Parameters are those of `refusal`.
        """
        return None

    def choose_steps(self, problem: Problem, target: Target, direction: str) -> Config | None:  # noqa: ARG002
        """Return the config for calls of a few queries, steps of a stream, with a problem whose layout is open.

        ``None`` where it is the one of all calls.
        """
        return None

    def candidates(
        self,
        problem: Problem,  # noqa: ARG002
        target: Target,  # noqa: ARG002
        direction: str,  # noqa: ARG002
        count: int,  # noqa: ARG002
    ) -> tuple[Candidate, ...]:
        """Return what `choose` chose from, at most ``count``, the best first: the first has the config it returns.

        Nothing where there is nothing to rank, because every choice follows from the problem by a rule of its own.
        """
        return ()

    def contenders(self, problem: Problem, target: Target, direction: str, count: int) -> tuple[Config, ...]:
        """Return configs that are worth timing, at most ``count``: the one that `choose` returns first.

        By default the best candidates. A tuned choice is used as long as it is among them.
        """
        found = tuple(candidate.config for candidate in self.candidates(problem, target, direction, count))
        return found or (self.choose(problem, target, direction),)

    def parse(self, text: str) -> Config:
        """Return the config of which ``repr`` writes a text.

        Raises
        ------
        ValueError
            If it is none of this family.
        """
        config = parse(text, self.configs)
        if not isinstance(config, Config) or config.family != self.name:
            raise ValueError(f"{text} is no config of {self.name}")
        return config

    def visit(self, problem: Problem, config: Config, token: Sequence[int]) -> Visit | None:  # noqa: ARG002
        """Return what is computed together with a query, for pictures; ``None`` if the family does not say.

        Of a backward that is what the gradient of queries takes, where that is a sweep of its own.

        Parameters
        ----------
        problem
            What to compute.
        config
            One of this family.
        token
            The query's place along each axis of the layout.
        """
        return None

    def estimate(self, problem: Problem, target: Target, direction: str) -> float | None:  # noqa: ARG002
        """Return about how long the kernel of `choose` takes; parameters are those of `refusal`.

        In microseconds a batch entry, where there are many. Among families of one kind of machine that say it for a
        problem the quickest is chosen; ``None``, which leaves it to the order of families, where it cannot be said.
        """
        return None

    @abstractmethod
    def lower(self, problem: Problem, config: Config, direction: str) -> Lowered:
        """Return the kernel of a problem and a config; loads TVM.

        Parameters
        ----------
        problem
            What to compute.
        config
            One of this family: the one that `choose` returned, or another that a caller tries.
        direction
            ``"forward"``, ``"backward"`` or ``"tangent"``.
        """
