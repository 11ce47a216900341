"""``python -m na_compiler.compat.natten script.py``: runs a script to which ``import natten`` means this package."""

from __future__ import annotations

import argparse
import os
import runpy
import sys
from pathlib import Path

from na_compiler.compat.natten import VARIABLE, install
from na_compiler.compat.natten.finder import RELEASES

_STARTUP = Path(__file__).parent / "startup"


def main(arguments: list[str] | None = None) -> None:
    """Run a script, or a module, with its own arguments."""
    parser = argparse.ArgumentParser(
        prog="python -m na_compiler.compat.natten",
        description="Run a script to which `import natten` means na_compiler.",
        epilog="Processes that it starts with the same Python get the same, unless --force was given.",
    )
    parser.add_argument("--version", default="0.21", help=f"whose names: {', '.join(RELEASES)} (default: 0.21)")
    parser.add_argument("--force", action="store_true", help="shadow a NATTEN that is installed")
    parser.add_argument("-m", dest="is_module", action="store_true", help="SCRIPT is a module's name")
    parser.add_argument("script", metavar="SCRIPT", help="a file, or with -m a module")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="the script's own")
    given = parser.parse_args(arguments)
    try:
        is_ours = install(given.version, force=given.force)
    except ValueError as error:
        parser.error(str(error))
    if is_ours and not given.force:
        os.environ[VARIABLE] = given.version
        paths = [str(_STARTUP), *filter(None, [os.environ.get("PYTHONPATH")])]
        os.environ["PYTHONPATH"] = os.pathsep.join(paths)
    sys.argv = [given.script, *given.arguments]
    if given.is_module:
        runpy.run_module(given.script, run_name="__main__", alter_sys=True)
    else:
        if not Path(given.script).exists():
            parser.error(f"there is no file {given.script}; a module's name goes with -m")
        sys.path[0] = str(Path(given.script).resolve().parent)
        runpy.run_path(given.script, run_name="__main__")


if __name__ == "__main__":
    main()
