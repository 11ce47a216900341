"""``na-compile plan``: which schedule and which tiles a problem gets, and what else there is. Needs no GPU."""

from __future__ import annotations

import argparse

from na_compiler.cli.model import add_problem_arguments, problem_of
from na_compiler.cli.output import Commands, add_json, print_json, print_line, print_table
from na_compiler.operands import DIRECTIONS
from na_compiler.target import Target

__all__ = ["add_parser"]


def add_parser(commands: Commands) -> None:
    """Add the command."""
    parser = commands.add_parser("plan", help="show how a problem would be compiled, and why")
    add_problem_arguments(parser)
    parser.add_argument("--target", default="cuda:sm_90a", help="default: cuda:sm_90a")
    parser.add_argument("--direction", choices=DIRECTIONS, default="forward", help="default: forward")
    parser.add_argument("--count", type=int, default=8, help="candidates to list (default: 8)")
    add_json(parser)
    parser.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> None:
    from na_compiler.schedules.choose import candidates, choose  # noqa: PLC0415

    if options.count < 1:
        raise ValueError(f"--count must be at least 1, got {options.count}")
    problem, target = problem_of(options), Target.parse(options.target)
    choice = choose(problem, target, options.direction)
    found = candidates(problem, target, options.direction, options.count)
    if options.json:
        listed = [{**one.columns(), "waste": one.waste, "time": one.cycles / found[0].cycles} for one in found]
        about = {"problem": problem.to_dict(), "direction": options.direction, "target": target.name}
        print_json({**about, "config": repr(choice.config), "reason": choice.reason, "candidates": listed})
        return
    print_line(f"{problem} {options.direction} for {target}")
    if choice.reason:
        print_line(choice.reason)
    print_line(repr(choice.config))
    if not found:
        return
    print_line(f"{found[0]}.")
    columns = (*found[0].columns(), "computed / needed", "time")
    rows = [(*one.columns().values(), f"{one.waste:.2f}", f"{one.cycles / found[0].cycles:.2f}") for one in found]
    print_table(columns, rows, "candidates, the best first", numbers=columns)
