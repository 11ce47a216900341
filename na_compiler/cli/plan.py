"""``na-compile plan``: which schedule and which tiles a problem gets, and what else there is. Needs no GPU."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from na_compiler.cli.model import add_problem_arguments, problem_of
from na_compiler.cli.output import Commands, add_json, print_json, print_line, print_table
from na_compiler.operands import DIRECTIONS
from na_compiler.target import Target

if TYPE_CHECKING:
    from na_compiler.compiler.tuned import Record

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
    from na_compiler.schedules.choose import candidates  # noqa: PLC0415

    if options.count < 1:
        raise ValueError(f"--count must be at least 1, got {options.count}")
    problem, target = problem_of(options), Target.parse(options.target)
    spec = KernelSpec.make(problem, target, options.direction)
    record = tuned.find(problem, target, options.direction)
    found = candidates(problem, target, options.direction, options.count)
    if options.json:
        listed = [{**one.columns(), "waste": one.waste, "time": one.cycles / found[0].cycles} for one in found]
        about = {"problem": problem.to_dict(), "direction": options.direction, "target": target.name}
        about |= {"config": repr(spec.config), "reason": spec.reason, "is_tuned": spec.is_tuned}
        print_json({**about, "candidates": listed})
        return
    print_line(f"{problem} {options.direction} for {target}")
    if spec.reason:
        print_line(spec.reason)
    print_line(repr(spec.config))
    if spec.is_tuned and record is not None:
        print_line(_told(record))
    if not found:
        return
    print_line(f"{found[0]}.")
    columns = (*found[0].columns(), "computed / needed", "time")
    rows = [(*one.columns().values(), f"{one.waste:.2f}", f"{one.cycles / found[0].cycles:.2f}") for one in found]
    print_table(columns, rows, "candidates, the best first", numbers=columns)
