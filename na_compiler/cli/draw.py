"""``na-compile draw``: a picture of a problem: what its queries see, and what a plan visits. Needs no GPU."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from na_compiler.cli.model import add_problem_arguments, extents, problem_of
from na_compiler.cli.output import Commands, add_json, print_json, print_line
from na_compiler.operands import DIRECTIONS
from na_compiler.problem import Problem
from na_compiler.target import Target

__all__ = ["add_parser"]

# More than a picture can show.
_MOST = 4096


def add_parser(commands: Commands) -> None:
    """Add the command."""
    parser = commands.add_parser("draw", help="draw what queries see, and the tiles that a plan visits")
    add_problem_arguments(parser)
    parser.add_argument(
        "--query", type=extents, action="append", metavar="AxB", help="a query to show; again for several (default: "
        "in a corner, on a border, in the middle)"
    )  # fmt: skip
    parser.add_argument("--target", default="llvm", help="whose plan is drawn (default: llvm, this machine)")
    parser.add_argument(
        "--direction", choices=DIRECTIONS, default="forward",
        help="of a backward, what the gradient of queries visits (default: forward)",
    )  # fmt: skip
    parser.add_argument(
        "-o", "--output", type=Path, default=Path("neighborhood.png"), metavar="FILE",
        help=".png, .svg or .pdf (default: neighborhood.png)",
    )  # fmt: skip
    add_json(parser)
    parser.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> None:
    from na_compiler.schedules.choose import choose  # noqa: PLC0415

    problem, target = problem_of(options), Target.parse(options.target)
    if max(problem.layout) > _MOST or problem.tokens > _MOST**2 // 64:
        raise ValueError(
            f"layout has {problem.tokens} tokens, more than a picture shows; draw a smaller one with the same window, "
            "e.g. of three windows an axis"
        )
    queries = [_checked(query, problem) for query in options.query or _chosen(problem)]
    from na_compiler.cli.picture import draw  # noqa: PLC0415

    config = choose(problem, target, options.direction).config
    visits = draw(problem, target, config, queries, options.output, options.direction)
    if options.json:
        listed = [
            {"query": query, "what": visit.what, "pairs": visit.pairs(), "needed": visit.needed(problem)}
            for query, visit in zip(queries, visits, strict=True)
        ]
        print_json({"picture": str(options.output), "visits": listed})
    else:
        print_line(f"{options.output}: {problem} on {target}")


def _chosen(problem: Problem) -> list[tuple[int, ...]]:
    """Return a query in a corner, one on a border, and one in the middle; each once."""
    middle = tuple(tokens // 2 for tokens in problem.layout)
    found = [(0,) * problem.rank, (*middle[:-1], problem.layout[-1] - 1), middle]
    return list(dict.fromkeys(found))


def _checked(query: Sequence[int], problem: Problem) -> tuple[int, ...]:
    fits = len(query) == problem.rank and all(
        0 <= place < tokens for place, tokens in zip(query, problem.layout, strict=True)
    )
    if not fits:
        last = "x".join(str(tokens - 1) for tokens in problem.layout)
        zeros = "x".join("0" for _ in problem.layout)
        raise ValueError(f"--query must lie between {zeros} and {last}, got {'x'.join(map(str, query))}")
    return tuple(query)
