"""The checks that only a GPU can run can at least be started: what they import of the package is there."""

import subprocess
import sys
from pathlib import Path

CHECKS = sorted((Path(__file__).parent / "gpu").glob("check*.py"))
# Each in the same process, as `python FILE --help`: imports are what takes the time, and most are the same.
STARTED = """
import contextlib, io, runpy, sys
sys.path.insert(0, sys.argv[1].rpartition("/")[0])  # As a script has it: they import one another.
for path in sys.argv[1:]:
    sys.argv = [path, "--help"]
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            runpy.run_path(path, run_name="__main__")
    except SystemExit as end:
        assert not end.code, (path, end.code)
"""


def test_checks_for_a_gpu_can_be_started():
    assert len(CHECKS) > 4
    done = subprocess.run(
        [sys.executable, "-c", STARTED, *map(str, CHECKS)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
