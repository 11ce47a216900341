"""``na-compile tune``: times the best candidates for a problem on the device present, and records the fastest."""

from __future__ import annotations

import argparse
from typing import Any

from rich.progress import Progress

from na_compiler.cli.model import add_problem_arguments, problem_of
from na_compiler.cli.output import Commands, add_json, counted, notes, print_json, print_line, print_table
from na_compiler.problem import Problem

__all__ = ["add_parser"]

_SECONDS = 10.0
_COUNT = 8


def add_parser(commands: Commands) -> None:
    """Add the command."""
    parser = commands.add_parser(
        "tune", help="time the best candidates for a problem on this machine; the fastest is used from then on"
    )
    add_problem_arguments(parser)
    parser.add_argument("--target", default="llvm", help="llvm (this CPU, the default), or cuda, the GPU present")
    parser.add_argument("--batch", type=int, default=1, help="batch entries (default: 1)")
    parser.add_argument("--training", action="store_true", help="the backward as well")
    parser.add_argument("--tangents", action="store_true", help="forward mode (jvp) as well")
    parser.add_argument(
        "--count", type=int, default=_COUNT, help=f"candidates of each family, at most (default: {_COUNT})"
    )
    parser.add_argument(
        "--seconds",
        type=float,
        default=_SECONDS,
        help=f"time for each direction, beside compiling (default: {_SECONDS})",
    )
    parser.add_argument("--threads", type=int, help="threads of kernels for CPUs (default: torch's)")
    parser.add_argument("--jobs", type=int, metavar="N", help="processes that compile (default: one for each core)")
    add_json(parser)
    parser.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> None:
    for flag in ("jobs", "threads"):
        given = getattr(options, flag)
        if given is not None and given < 1:
            raise ValueError(f"--{flag} must be at least 1, got {given}")
    if options.threads is not None:
        import torch  # noqa: PLC0415

        torch.set_num_threads(options.threads)
    problem = problem_of(options)
    directions = ["forward", *["backward"] * options.training, *["tangent"] * options.tangents]
    found = [_tune(options, problem, direction) for direction in directions]
    if options.json:
        print_json({"tuned": found})


def _tune(options: argparse.Namespace, problem: Problem, direction: str) -> dict[str, Any]:
    from na_compiler.tuning import tune  # noqa: PLC0415

    with Progress(console=notes(options), transient=True) as progress:
        task = progress.add_task("compiling", total=None)

        def show(done: int, total: int) -> None:
            is_last = done == total
            progress.update(task, completed=done, total=total, description="timing" if is_last else "compiling")

        tuning = tune(
            problem, options.target, direction, batch=options.batch, count=options.count, seconds=options.seconds,
            jobs=options.jobs, progress=show,
        )  # fmt: skip
    record = tuning.record
    if not options.json:
        print_line(f"{problem} {direction} for {record.target} on {record.device}")
        rows = [(f"{1e6 * one.seconds:.1f}", one.family, one.config) for one in tuning.timed]
        print_table(("us", "family", "config"), rows, f"timed: {counted(len(rows), 'candidate')}", numbers=("us",))
        same = record.config == record.planned
        verdict = (
            "the planner's choice" if same else f"{record.planned_nanoseconds / record.nanoseconds:.2f} times as fast"
        )
        print_line(f"recorded in {tuning.file}: {record.config}, {verdict}")
    return {
        **{name: value for name, value in vars(record).items() if name != "problem"},
        "problem": problem.to_dict(),
        "file": str(tuning.file),
        "timed": [vars(one) for one in tuning.timed],
        "failed": tuning.failed,
    }
