"""``na-compile plan``: which schedule and which tiles a problem gets, and what else there is. Needs no GPU."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from na_compiler.cli.model import add_problem_arguments, problem_of
from na_compiler.cli.output import Commands, add_json, print_json, print_line, print_table
from na_compiler.operands import DIRECTIONS
from na_compiler.target import CudaTarget, Target

if TYPE_CHECKING:
    from na_compiler.compiler.spec import KernelSpec
    from na_compiler.compiler.tuned import Record
    from na_compiler.schedules.shared.candidate import Candidate

__all__ = ["add_parser"]


def add_parser(commands: Commands) -> None:
    """Add the command."""
    parser = commands.add_parser("plan", help="show how a problem would be compiled, and why")
    add_problem_arguments(parser)
    parser.add_argument("--target", default="llvm", help="llvm (this machine, the default), cuda:sm_90a, ...")
    parser.add_argument("--direction", choices=DIRECTIONS, default="forward", help="default: forward")
    parser.add_argument("--count", type=int, default=8, help="candidates to list (default: 8)")
    add_json(parser)
    parser.set_defaults(run=_run)


def _told(record: Record) -> str:
    times = f"{record.nanoseconds / 1e3:.1f} us, batch {record.batch}"
    if record.config == record.planned:
        return f"tuned on {record.device}: the planner's choice was the fastest, {times}"
    return (
        f"tuned on {record.device}: {times}, where the planner's choice took "
        f"{record.planned_nanoseconds / 1e3:.1f} us: {record.planned}"
    )


def _run(options: argparse.Namespace) -> None:
    from na_compiler.compiler import tuned  # noqa: PLC0415
    from na_compiler.compiler.spec import KernelSpec  # noqa: PLC0415
    from na_compiler.schedules.choose import candidates, estimates  # noqa: PLC0415

    if options.count < 1:
        raise ValueError(f"--count must be at least 1, got {options.count}")
    problem, target = problem_of(options), Target.parse(options.target)
    spec = KernelSpec.make(problem, target, options.direction)
    record = tuned.find(problem, target, options.direction)
    found = candidates(problem, target, options.direction, options.count)
    families = estimates(problem, target, options.direction)
    gpu, floors = _floors(spec)
    if options.json:
        print_json({
            "problem": problem.to_dict(), "direction": options.direction, "target": target.name,
            "config": repr(spec.config), "reason": spec.reason, "is_tuned": spec.is_tuned, "families": families,
            "floors": floors and {"gpu": gpu, "microseconds": floors},
            "candidates": [_listed(one, found[0].cycles) for one in found],
        })  # fmt: skip
        return
    print_line(f"{problem} {options.direction} for {target}")
    if spec.reason:
        print_line(spec.reason)
    print_line(repr(spec.config))
    if spec.is_tuned and record is not None:
        print_line(_told(record))
    said = [f"{name} {value:.1f} us" for name, value in families.items() if isinstance(value, float)]
    if said:
        print_line(f"estimates, a batch entry among many: {', '.join(said)}")
    if floors:
        least = ", ".join(f"{name} {value:.1f} us" for name, value in floors.items())
        print_line(f"at least, a batch entry on {gpu}: {least}")
    if found:
        _print_candidates(found)


def _floors(spec: KernelSpec) -> tuple[str, dict[str, float]]:
    """Return a GPU of the target's generation, and the least time there; nothing of a CPU."""
    from na_compiler.schedules.choose import family_of  # noqa: PLC0415
    from na_compiler.schedules.shared.gpus import floors, gpu_of  # noqa: PLC0415

    if not isinstance(spec.target, CudaTarget):
        return "", {}
    gpu = gpu_of(spec.target)
    basis = "to which models of time are fitted" if gpu.is_measured else "of which nothing was measured"
    has_tensor_cores = family_of(spec.config).has_tensor_cores
    least = floors(spec.problem, spec.direction, gpu, has_tensor_cores=has_tensor_cores)
    return f"{gpu.name}, {basis}", least


def _listed(candidate: Candidate, best: float) -> dict[str, Any]:
    shares = {name: cycles / best for name, cycles in candidate.terms.items()}
    return {**candidate.columns(), "waste": candidate.waste, "time": candidate.cycles / best, "terms": shares}


def _print_candidates(found: Sequence[Candidate]) -> None:
    best = found[0].cycles
    print_line(f"{found[0]}.")
    columns = (*found[0].columns(), "computed / needed", "time")
    rows = [(*one.columns().values(), f"{one.waste:.2f}", f"{one.cycles / best:.2f}") for one in found]
    print_table(columns, rows, "candidates, the best first", numbers=columns)
    # One form of a kernel may be made of other terms than another.
    names = list(dict.fromkeys(name for one in found for name in one.terms))
    cells = [
        (*(f"{one.terms[name] / best:.2f}" if name in one.terms else "" for name in names), f"{one.cycles / best:.2f}")
        for one in found
    ]
    ways = " or ".join(dict.fromkeys(one.combined for one in found))
    print_table((*names, "time"), cells, f"what their times are made of: {ways}", numbers=(*names, "time"))
