"""`tune`: the best candidates of all families, timed on the device present; the winner is recorded for the planner."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from na_compiler.compiler import serving, tuned
from na_compiler.compiler.spec import KernelSpec
from na_compiler.operands import check_direction
from na_compiler.problem import Problem
from na_compiler.schedules.choose import MOST_CONTENDERS, contenders
from na_compiler.target import Target
from na_compiler.tuning import measure

__all__ = ["Timed", "Tuning", "tune"]

_LOG = logging.getLogger("na_compiler")
# How much quicker than the planner's choice another has to be: less is not told from noise. Assumed.
_MARGIN = 0.02


@dataclass(frozen=True)
class Timed:
    """A config, and how long its kernel took.

    Parameters
    ----------
    family, config
        The family's name, and the text of the config.
    seconds
        The median.
    """

    family: str
    config: str
    seconds: float


@dataclass(frozen=True)
class Tuning:
    """What came of tuning.

    Parameters
    ----------
    record
        What was recorded.
    file
        Where.
    timed
        All that was timed, the fastest first.
    failed
        What was not, with the reason: by the text of its config.
    """

    record: tuned.Record
    file: Path
    timed: tuple[Timed, ...]
    failed: dict[str, str]


def tune(
    problem: Problem,
    target: str | Target = "llvm",
    direction: str = "forward",
    *,
    batch: int = 1,
    count: int = 8,
    seconds: float = 10.0,
    jobs: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Tuning:
    """Time the best candidates for a problem on this machine's device, and record the fastest.

    From then on the record takes the planner's place: in kernels that are compiled on machines with such a device, and
    in bundles that are made for its target where there is none. It is a line of JSON in the file that
    ``NA_COMPILER_TUNED`` names, which may be shared; by default ``tuned.jsonl`` in the cache's folder, and with ``0``
    none is read.

    Parameters
    ----------
    problem
        What to compute.
    target
        ``"llvm"`` for this machine's CPU, ``"cuda"`` for its GPU, or another name of what runs here.
    direction
        ``"forward"``, ``"backward"`` or ``"tangent"``.
    batch
        Batch entries.
    count
        Candidates of each family, at most 64.
    seconds
        Time for all of them together, beside compiling.
    jobs
        Processes that compile; default: one for each core.
    progress
        Called with how many are compiled, and how many there are.

    Returns
    -------
    Tuning
        What was recorded, and what was timed.

    Raises
    ------
    ValueError
        If the target does not run here, the problem's layout is open, or a number is out of its limits.
    NotImplementedError
        If no family takes the problem.
    RuntimeError
        If no candidate compiles and computes what the others do, or there is no torch, which times them.
    OSError
        If the record cannot be written.

    Notes
    -----
    Candidates run in turn, on a GPU in CUDA graphs by its own clock, and medians are compared. Another than the
    planner's choice has to be 2% quicker. Results of another config differ in their last bits.

    Examples
    --------
    >>> tuning = tune(Problem((56, 56), heads=4, head_dim=32, kernel_size=7))  # doctest: +SKIP
    >>> tuning.record.config  # doctest: +SKIP
    """
    check_direction(direction)
    if problem.is_open:
        raise ValueError(f"problem must have a layout to be timed, got {problem}; problem.replace(layout=...) has one")
    limits = {"batch": (batch, 1, 1 << 20), "count": (count, 1, MOST_CONTENDERS), "seconds": (seconds, 0.01, 86400)}
    for name, (given, least, most) in limits.items():
        if not least <= given <= most:
            raise ValueError(f"{name} must be from {least} to {most}, got {given}")
    machine = Target.parse(target)
    device = measure.device_of(machine)
    configs = contenders(problem, machine, direction, count)
    specs = [KernelSpec(problem, direction, machine, tuned=(one.family, repr(one))) for one in configs]
    times, failed = measure.seconds_of(specs, batch, seconds, jobs, progress)
    for spec, reason in failed.items():
        _LOG.warning("%s is left out: %s", spec.config, reason)
    if not times:
        raise RuntimeError(f"none of {len(specs)} candidates for {problem} {direction} on {machine} can be timed")
    planned = specs[0]
    best = min(times, key=lambda spec: times[spec])
    if planned in times and times[best] > (1 - _MARGIN) * times[planned]:
        best = planned
    # Where the planner's choice cannot be timed, the winner is beside itself.
    before = times.get(planned, times[best])
    family, config = _chosen(best)
    nanoseconds, planned_nanoseconds = (max(1, round(1e9 * value)) for value in (times[best], before))
    record = tuned.Record(
        device, machine.name, direction, problem, family, config, nanoseconds, repr(planned.config),
        planned_nanoseconds, batch,
    )  # fmt: skip
    file = tuned.store(record)
    # Calls of this process look their kernels up anew.
    serving.forget(problem, direction, machine)
    operators = sys.modules.get("na_compiler.ops.kernels")
    if operators is not None:
        operators.forget()
    listed = sorted((Timed(*_chosen(spec), value) for spec, value in times.items()), key=lambda one: one.seconds)
    return Tuning(record, file, tuple(listed), {repr(spec.config): reason for spec, reason in failed.items()})


def _chosen(spec: KernelSpec) -> tuple[str, str]:
    assert spec.tuned is not None
    return spec.tuned
