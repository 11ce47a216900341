"""Running a piece of Python in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap


def environment(**variables: str | os.PathLike | None) -> dict[str, str]:
    """This process' environment with some variables changed; ``None`` unsets one."""
    changed = {**os.environ, **{name: str(value) for name, value in variables.items() if value is not None}}
    return {name: value for name, value in changed.items() if variables.get(name, "") is not None}


def run_python(code: str, *arguments: str, prefix: tuple[str, ...] = (), timeout: float = 120, **variables) -> str:
    """Run code and return what it printed; fails with its standard error if it fails."""
    done = start_python(code, *arguments, prefix=prefix, **variables)
    output, errors = done.communicate(timeout=timeout)
    assert done.returncode == 0, f"exit status {done.returncode}\n{errors}"
    return output


def start_python(code: str, *arguments: str, prefix: tuple[str, ...] = (), **variables) -> subprocess.Popen:
    """Start a process that runs code."""
    command = [*prefix, sys.executable, "-c", textwrap.dedent(code), *arguments]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment(**variables)
    )


# For a process in which torch is not installed.
WITHOUT_TORCH = """
import sys

class NoTorch:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "torch":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, NoTorch())
"""
