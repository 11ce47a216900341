"""The command line: ``na-compile``."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence

from na_compiler.cli import bench, cache

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
    for module in (bench, cache):
        module.add_parser(commands)
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO if options.verbose else logging.WARNING, format="%(message)s")
    try:
        return int(options.run(options) or 0)
    except (ValueError, OSError, RuntimeError, NotImplementedError, ImportError) as error:
        print(f"na-compile: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
