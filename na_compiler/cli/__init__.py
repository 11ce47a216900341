"""The command line: ``na-compile``."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Container, Sequence

from na_compiler.cli import bench, cache, inspect, model, ort_library, plan, torch_library

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit status.

    Parameters
    ----------
    arguments
        Default: those of the process.
    """
    parser = argparse.ArgumentParser(prog="na-compile", description="A compiler for neighborhood attention.")
    parser.add_argument("-v", "--verbose", action="store_true", help="log what is compiled and why")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    model.add_problem_parser(commands)
    for module in (model, inspect, plan, bench, cache, ort_library, torch_library):
        module.add_parser(commands)
    options = parser.parse_args(_with_command(list(sys.argv[1:] if arguments is None else arguments), commands.choices))
    logging.basicConfig(level=logging.INFO if options.verbose else logging.WARNING, format="%(message)s")
    try:
        return int(options.run(options) or 0)
    except (ValueError, OSError, RuntimeError, NotImplementedError, ImportError) as error:
        sentence, *rest = str(error).strip().splitlines() or [type(error).__name__]
        print(f"na-compile: {sentence}", file=sys.stderr)
        if rest:
            logging.getLogger("na_compiler").info("%s", "\n".join(rest))
        return 1
    except KeyboardInterrupt:
        return 130


def _with_command(arguments: list[str], known: Container[str]) -> list[str]:
    """Complete ``na-compile MODEL ...`` with the command's name."""
    for place, argument in enumerate(arguments):
        if not argument.startswith("-"):
            return arguments if argument in known else [*arguments[:place], "model", *arguments[place:]]
    return arguments
