"""``na-compile cache``: what has been compiled on this machine."""

from __future__ import annotations

import argparse
import time

from na_compiler.cli.output import Commands, add_json, counted, print_json, print_line, print_table
from na_compiler.compiler import cache
from na_compiler.runtime.folders import cache_folder

__all__ = ["add_parser"]


def add_parser(commands: Commands) -> None:
    """Add the command."""
    parser = commands.add_parser("cache", help="list or clear the compiled kernels")
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    listing = actions.add_parser("list", help="list the kernels, those used last first")
    add_json(listing)
    listing.set_defaults(run=_list)
    clearing = actions.add_parser("clear", help="delete all kernels")
    add_json(clearing)
    clearing.set_defaults(run=_clear)


def _list(options: argparse.Namespace) -> None:
    found = list(cache.entries())
    folder = cache_folder()
    if options.json:
        data = [{"key": e.key, "bytes": e.bytes, "used": e.used, **e.info.to_dict()} for e in found]
        print_json({"folder": str(folder), "kernels": data})
        return
    rows = []
    for entry in found:
        used = time.strftime("%Y-%m-%d %H:%M", time.localtime(entry.used))
        info = entry.info
        rows.append((str(info.problem), info.direction, info.target, f"{entry.bytes / 1024:.0f} KiB", used))
    columns = ("problem", "direction", "target", "size", "last used")
    print_table(columns, rows, f"{counted(len(found), 'kernel')} in {folder}", numbers=("size",))


def _clear(options: argparse.Namespace) -> None:
    count = cache.clear()
    if options.json:
        print_json({"folder": str(cache_folder()), "deleted": count})
    else:
        print_line(f"deleted {counted(count, 'kernel')} from {cache_folder()}")
