"""``na-compile inspect BUNDLE``: what is in a bundle, after checking all of it."""

from __future__ import annotations

import argparse
import json
from typing import Any

from rich.console import Console
from rich.table import Table

from na_compiler.runtime.bundle import read_bundle

__all__ = ["add_parser"]


def add_parser(commands: Any) -> None:
    """Add the command."""
    parser = commands.add_parser("inspect", help="check a bundle and list its kernels")
    parser.add_argument("bundle", metavar="BUNDLE")
    parser.add_argument("--json", action="store_true", help="as JSON")
    parser.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> None:
    bundle, launcher, runtime = read_bundle(options.bundle)
    total = sum(entry.bytes for entry in bundle.entries)
    if options.json:
        kernels = [
            {"key": e.key, "library": e.library.name, "bytes": e.bytes, "sha256": e.sha256, **e.info.to_dict()}
            for e in bundle.entries
        ]
        extra = {"launcher": launcher is not None, "runtime": runtime is not None}
        print(
            json.dumps({"bundle": options.bundle, "versions": bundle.versions, **extra, "kernels": kernels}, indent=1)
        )
        return
    title = f"{len(bundle)} kernels, {total / 1024:.0f} KiB, in {options.bundle}"
    table = Table("problem", "direction", "target", "runs here", "size", title=title)
    for entry in bundle.entries:
        here = "yes" if entry.target.runs_here else "no"
        table.add_row(
            str(entry.info.problem), entry.info.direction, entry.info.target, here, f"{entry.bytes / 1024:.0f} KiB"
        )
    console = Console()
    console.print(table)
    console.print(", ".join(f"{name} {version}" for name, version in bundle.versions.items()), highlight=False)
    console.print(f"TVM's runtime: {'in the bundle' if runtime else 'not in the bundle'}", highlight=False)
