"""``na-compile torch-library``: builds the torch operators for programs without Python."""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

from na_compiler.cli.output import Commands, add_json, print_json, print_line

__all__ = ["add_parser"]


def add_parser(commands: Commands) -> None:
    """Add the command."""
    parser = commands.add_parser("torch-library", help="build the torch operators for programs without Python")
    parser.add_argument(
        "-o", "--output", type=Path, default=Path(), metavar="DIR", help="folder to put it in (default: this one)"
    )
    add_json(parser)
    parser.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> None:
    from na_compiler.aot.build import build_library, header_folder  # noqa: PLC0415

    library = build_library(options.output)
    header = shutil.copy(header_folder() / "na_compiler.h", options.output)
    if options.json:
        print_json(
            {
                "library": str(library),
                "bytes": library.stat().st_size,
                "for": "torch 2.11 and later",
                "header": str(header),
            }
        )
        return
    print_line(f"{library}: {library.stat().st_size / 1000:.0f} kB, for torch 2.11 and later; {header}")
