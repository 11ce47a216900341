"""Running a piece of Python in a process of its own."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest


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


def run_bare(command: list, work: str | os.PathLike, *read_only: str | os.PathLike, **variables: str) -> str:
    """Run a program in the barest environment that can be made here, and return what it printed.

    It has no environment variables but those given, an empty current folder which it cannot write, and no rights to
    write where permissions forbid it; ``read_only`` cannot be written meanwhile. ``work`` is where that one is made.
    """
    prefix = []
    if os.geteuid() == 0:  # Permissions do not hold root back, unless it gives up the right to ignore them.
        prefix = ["setpriv", "--bounding-set=-dac_override,-dac_read_search", "--inh-caps=-all"]
        if shutil.which("setpriv") is None:
            pytest.skip("running as root, and there is no setpriv")
    empty = Path(work) / "nothing"
    empty.mkdir(exist_ok=True)
    try:
        subprocess.run(["chmod", "-R", "a-w", empty, *read_only], check=True)
        done = subprocess.run(
            [*prefix, *map(str, command)], cwd=empty, env=variables, capture_output=True, text=True, check=False,
            timeout=300,
        )  # fmt: skip
    finally:
        subprocess.run(["chmod", "-R", "u+w", empty, *read_only], check=True)
    assert done.returncode == 0, f"exit status {done.returncode}\n{done.stderr}"
    return done.stdout
