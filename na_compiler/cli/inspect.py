"""``na-compile inspect BUNDLE``: what is in a bundle, after checking all of it."""

from __future__ import annotations

import argparse

from na_compiler.cli.output import Commands, add_json, counted, print_json, print_line, print_table
from na_compiler.runtime.bundle import read_bundle

__all__ = ["add_parser"]


def add_parser(commands: Commands) -> None:
    """Add the command."""
    parser = commands.add_parser("inspect", help="check a bundle and list its kernels")
    parser.add_argument("bundle", metavar="BUNDLE", help="folder that na-compile -o or save_bundle wrote")
    add_json(parser)
    parser.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> None:
    bundle = read_bundle(options.bundle)
    kinds = {kind for kind, _, _ in bundle.files}
    total = sum(entry.bytes for entry in bundle.entries)
    if options.json:
        kernels = [
            {"key": e.key, "library": e.library.name, "bytes": e.bytes, "sha256": e.sha256, **e.info.to_dict()}
            for e in bundle.entries
        ]
        extra = {"launcher": "launcher" in kinds, "runtime": "runtime" in kinds}
        print_json({"bundle": options.bundle, "versions": bundle.versions, **extra, "kernels": kernels})
        return
    rows = []
    for entry in bundle.entries:
        here = "yes" if entry.runs_here else "no"
        size = f"{entry.bytes / 1024:.0f} KiB"
        rows.append((str(entry.info.problem), entry.info.direction, entry.info.target, here, size))
    title = f"{counted(len(bundle), 'kernel')}, {total / 1024:.0f} KiB, in {options.bundle}"
    print_table(("problem", "direction", "target", "runs here", "size"), rows, title, numbers=("size",))
    print_line(", ".join(f"{name} {version}" for name, version in bundle.versions.items()))
    print_line(f"TVM's runtime: {'in the bundle' if 'runtime' in kinds else 'not in the bundle'}")
