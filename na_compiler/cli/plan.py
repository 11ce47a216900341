"""``na-compile plan``: which schedule and which tiles a problem gets, and what else there is. Needs no GPU."""

from __future__ import annotations

import argparse
from typing import Any

from rich.console import Console
from rich.table import Table

from na_compiler.cli.model import add_problem_arguments, problem_of
from na_compiler.target import Target

__all__ = ["add_parser"]


def add_parser(commands: Any) -> None:
    """Add the command."""
    parser = commands.add_parser("plan", help="show how a problem would be compiled, and why")
    add_problem_arguments(parser)
    parser.add_argument("--target", default="cuda:sm_90a", help="default: cuda:sm_90a")
    parser.add_argument("--direction", choices=["forward", "backward"], default="forward")
    parser.add_argument("--count", type=int, default=8, help="candidates to list (default: 8)")
    parser.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> None:
    from na_compiler.schedules.choose import candidates, choose  # noqa: PLC0415

    if options.count < 1:
        raise ValueError(f"--count must be at least 1, got {options.count}")
    problem, target = problem_of(options), Target.parse(options.target)
    choice = choose(problem, target, options.direction)
    console = Console(soft_wrap=True, highlight=False)
    console.print(f"{problem} {options.direction} for {target}")
    if choice.reason:
        console.print(choice.reason)
    console.print(repr(choice.config))
    found = candidates(problem, target, options.direction, options.count)
    if not found:
        return
    console.print(f"{found[0]}.")
    table = Table(title="candidates, the best first")
    for name in (*found[0].columns(), "computed / needed", "time"):
        table.add_column(name, justify="right")
    for candidate in found:
        time = candidate.cycles / found[0].cycles
        table.add_row(*candidate.columns().values(), f"{candidate.waste:.2f}", f"{time:.2f}")
    Console(width=110).print(table)
