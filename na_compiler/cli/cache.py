"""``na-compile cache``: what has been compiled on this machine."""

from __future__ import annotations

import argparse
import json
import time
from typing import Any

from rich.console import Console
from rich.table import Table

from na_compiler.compiler import cache
from na_compiler.runtime.folders import cache_folder

__all__ = ["add_parser"]


def add_parser(commands: Any) -> None:
    """Add the command."""
    parser = commands.add_parser("cache", help="list or clear the compiled kernels")
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    listing = actions.add_parser("list", help="list the kernels, those used last first")
    listing.add_argument("--json", action="store_true", help="as JSON")
    listing.set_defaults(run=_list)
    clearing = actions.add_parser("clear", help="delete all kernels")
    clearing.set_defaults(run=_clear)


def _list(options: argparse.Namespace) -> None:
    found = list(cache.entries())
    folder = cache_folder()
    if options.json:
        data = [{"key": e.key, "bytes": e.bytes, "used": e.used, **e.info.to_dict()} for e in found]
        print(json.dumps({"folder": str(folder), "kernels": data}, indent=1))
        return
    table = Table("problem", "direction", "target", "size", "last used", title=f"{len(found)} kernels in {folder}")
    for entry in found:
        used = time.strftime("%Y-%m-%d %H:%M", time.localtime(entry.used))
        info = entry.info
        table.add_row(str(info.problem), info.direction, info.target, f"{entry.bytes / 1024:.0f} KiB", used)
    Console().print(table)


def _clear(options: argparse.Namespace) -> None:  # noqa: ARG001
    count = cache.clear()
    Console().print(f"deleted {count} kernel{'' if count == 1 else 's'} from {cache_folder()}")
