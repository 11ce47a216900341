"""Where nothing can be written, or loaded from: kernels and libraries of the host work, or it is said what to set."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest
import torch
from onnx_models import one_node
from processes import run_python

from na_compiler import KernelSpec, NeighborhoodAttention1D, Problem, save_bundle
from na_compiler.onnx.ort.build import build_library
from na_compiler.whole import compile_whole

USE = """
    import logging, sys
    logging.basicConfig(format="%(message)s", level=logging.WARNING, stream=sys.stdout)
    import torch
    from na_compiler import na2d
    from na_compiler.reference import neighborhood_attention
    from na_compiler.runtime import threads
    from na_compiler.runtime.host import HostLibrary
    query = torch.randn(1, 6, 7, 2, 8)
    output, expected = na2d(query, query, query, 3), neighborhood_attention(query, query, query, 3)[0]
    assert (output - expected).norm() < 1e-5 * expected.norm()
    assert threads._launcher() is not None, "kernels run on torch's threads"
    from na_compiler.onnx.ort.build import build_library
    import ctypes
    ctypes.CDLL(str(build_library()))
    print("works")
"""


def mounted(folder, options):
    """Return a prefix for a command that runs with a file system of its own in a folder."""
    script = f'mount -t tmpfs -o {options} none "{folder}" && exec "$@"'
    prefix = ("unshare", "-rm", "sh", "-c", script, "sh")
    if subprocess.run([*prefix, "true"], capture_output=True, check=False).returncode:
        pytest.skip("this machine lets no test mount a file system")
    return prefix


@pytest.mark.parametrize("options", ["noexec", "size=12k", "ro"])
def test_a_cache_on_such_a_file_system(options, tmp_path):
    folder = tmp_path / "disk"
    folder.mkdir()
    output = run_python(USE, prefix=mounted(folder, options), NA_COMPILER_CACHE=folder / "cache")
    assert output.splitlines()[-1] == "works"
    if options == "noexec":
        assert output == "works\n", "what was compiled is kept, and loaded from a copy"
    else:
        assert output.count("cannot be used, kernels are kept for this process only") == 1, output


def test_nowhere_to_load_from(tmp_path):
    folder = tmp_path / "disk"
    folder.mkdir()
    code = """
        import os, sys
        os.mkdir(sys.argv[1])
        from na_compiler import Problem, compile
        try:
            compile(Problem((6, 7), 2, 8, 3))
        except OSError as error:
            print(error)
    """
    temporary = folder / "tmp"
    variables = {"NA_COMPILER_CACHE": folder / "cache", "TMPDIR": temporary}
    output = run_python(code, str(temporary), prefix=mounted(folder, "noexec"), **variables)
    assert "both are mounted noexec; set NA_COMPILER_CACHE or TMPDIR to a folder that is not" in output


def test_programs_without_python_say_what_to_do(tmp_path):
    """The C++ reader has no place to copy to."""
    folder = tmp_path / "disk"
    folder.mkdir()
    problem = Problem(8, 1, 8, 3)
    save_bundle(tmp_path / "kernels", [KernelSpec.make(problem)])
    (tmp_path / "model.onnx").write_bytes(one_node(problem, dynamic_layout=False).SerializeToString())
    code = """
        import shutil, sys, onnxruntime
        bundle, model, library, disk = sys.argv[1:]
        shutil.copytree(bundle, disk + "/kernels")
        options = onnxruntime.SessionOptions()
        options.add_session_config_entry("na_compiler.bundle", disk + "/kernels")
        options.register_custom_ops_library(library)
        try:
            onnxruntime.InferenceSession(model, options)
        except Exception as error:
            print(error)
    """
    arguments = [tmp_path / "kernels", tmp_path / "model.onnx", build_library(), folder]
    output = run_python(code, *map(str, arguments), prefix=mounted(folder, "noexec"))
    assert "is mounted noexec, from which no library can be loaded: copy the folder to one that is not" in output


def test_a_whole_model(tmp_path):
    """One that lies where nothing can be run is loaded from a copy; or it is said what to set."""
    folder = tmp_path / "disk"
    folder.mkdir()
    model = NeighborhoodAttention1D(16, 2, 3).eval()
    compile_whole(torch.export.export(model, (torch.randn(1, 9, 16),)), tmp_path / "model.so")
    code = """
        import os, shutil, sys
        import numpy as np
        from na_compiler.runtime.whole import load_whole
        shutil.copy(sys.argv[1], sys.argv[2])
        os.makedirs(os.environ["TMPDIR"], exist_ok=True)
        try:
            print(np.from_dlpack(load_whole(sys.argv[2] + "/model.so")(np.ones((1, 9, 16), np.float32))).shape)
        except OSError as error:
            print(error)
    """
    arguments = (str(tmp_path / "model.so"), str(folder))
    nowhere = "both are mounted noexec; set NA_COMPILER_CACHE"
    for temporary, said in ((tmp_path, "(1, 9, 16)\n"), (folder / "tmp", nowhere)):
        assert said in run_python(code, *arguments, prefix=mounted(folder, "noexec"), TMPDIR=temporary)


def test_a_user_without_a_home(request):
    """Nor an entry in the list of users, as in containers that run as a number."""
    if os.geteuid() != 0 or shutil.which("setpriv") is None:
        pytest.skip("only root, with setpriv, can be somebody else")
    # pytest's own folders are for one user alone.
    place = Path(tempfile.mkdtemp(prefix="na_compiler-test-"))
    place.chmod(0o777)
    request.addfinalizer(lambda: shutil.rmtree(place))
    code = "import os; os.chdir(os.environ['TMPDIR'])\n" + USE.replace("\n    ", "\n")
    prefix = ("setpriv", "--reuid=54321", "--clear-groups")
    variables = {"NA_COMPILER_CACHE": None, "HOME": None, "XDG_CACHE_HOME": None, "TMPDIR": place}
    if subprocess.run([*prefix, os.sys.executable, "-c", "import na_compiler"], check=False).returncode:
        pytest.skip("other users cannot read this installation")
    output = run_python(code, prefix=prefix, **variables)
    assert output.count("this user has no home folder: kernels are kept for this process only") == 1, output
    assert output.splitlines()[-1] == "works"
    left = [path.name for path in place.iterdir() if not path.name.startswith("torch")]
    assert left == [], "nothing is left, least of all a folder called ~"
