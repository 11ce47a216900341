"""``na-compile ort-library``: builds the operator library for ONNX Runtime."""

from __future__ import annotations

import argparse
from pathlib import Path

from na_compiler.cli.output import Commands, add_json, print_json, print_line

__all__ = ["add_parser"]


def add_parser(commands: Commands) -> None:
    """Add the command."""
    parser = commands.add_parser("ort-library", help="build the operator library for ONNX Runtime")
    parser.add_argument(
        "-o", "--output", type=Path, default=Path(), metavar="DIR", help="folder to put it in (default: this one)"
    )
    add_json(parser)
    parser.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> None:
    from na_compiler.onnx.ort.build import build_library  # noqa: PLC0415

    library = build_library(options.output)
    if options.json:
        print_json({"library": str(library), "bytes": library.stat().st_size, "for": "ONNX Runtime 1.21 and later"})
        return
    print_line(f"{library}: {library.stat().st_size / 1000:.0f} kB, for ONNX Runtime 1.21 and later")
