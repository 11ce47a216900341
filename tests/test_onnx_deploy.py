"""examples/onnx_deploy: every step of it as its README says, and that all of them give what torch gives."""

import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from processes import run_bare
from torch.export import Dim

from na_compiler.onnx import problems
from na_compiler.passes import collect
from na_compiler.problem import Problem

EXAMPLE = Path(__file__).parents[1] / "examples" / "onnx_deploy"
DECLARED = {
    Problem((56, 56), 1, 32, 13): 1,
    Problem((56, 56), 1, 32, 13, dilation=4): 1,
    Problem((28, 28), 2, 32, 9): 1,
    Problem((28, 28), 2, 32, 9, dilation=3): 1,
    Problem((14, 14), 4, 32, 7): 1,
    Problem((14, 14), 4, 32, 7, dilation=2): 1,
    Problem((7, 7), 8, 32, 7): 1,
}
pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")


def step(name, folder):
    command = ["make", "-C", str(EXAMPLE), name, f"PYTHON={sys.executable}", f"OUT={folder}"]
    result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert result.returncode == 0, f"{name}: {result.stdout[-2000:]}{result.stderr[-2000:]}"
    return result.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The folder after all steps, and what each of them said."""
    folder = tmp_path_factory.mktemp("deploy")
    steps = ("export", "bundle", "library", "run", "classify", "deploy")
    return folder, {name: step(name, folder) for name in steps}


def scores(path):
    return np.loadtxt(path)


def test_exporting_is_quick(built):
    seconds = float(built[1]["export"].split("exported in ")[1].split()[0])
    assert seconds < 30


def test_python_with_and_without_the_library_gives_torch_s_output(built):
    said = built[1]["run"]
    assert said.count("torch's output, relative error") == 2  # run.py ends with an error otherwise.


def test_the_program_without_python_gives_torch_s_output(built):
    folder, said = built
    expected = scores(folder / "torch.txt")
    result = scores(folder / "deploy" / "scores.txt")
    assert np.linalg.norm(result - expected) / np.linalg.norm(expected) < 1e-5
    best = [line for name in ("run", "deploy") for line in said[name].splitlines() if line.startswith("best classes:")]
    assert len(best) == 2
    assert best[0] == best[1]


def test_the_folder_needs_nothing_else(built, tmp_path):
    """Run it elsewhere, read-only, with an empty environment, and look at what the linker loads."""
    folder = tmp_path / "elsewhere"
    shutil.copytree(built[0] / "deploy", folder)
    files = ("classify", "classifier.onnx", "classifier.bundle", "libna_compiler_ort.so", "photograph.ppm")
    command = [folder / name for name in files]
    run_bare(command, tmp_path, folder, LD_DEBUG="files", LD_DEBUG_OUTPUT=str(tmp_path / "loaded"))
    (log,) = tmp_path.glob("loaded.*")
    loaded = {line.split("calling init: ")[1] for line in log.read_text().splitlines() if "calling init: " in line}
    names = {Path(path).name for path in loaded}
    assert {"libonnxruntime.so.1", "libna_compiler_ort.so", "libtvm_ffi.so", "libtvm_runtime.so"} <= names
    assert len([name for name in names if len(name) > 32 and name.endswith(".so")]) == len(
        DECLARED
    )  # Kernels, by keys.
    assert not any("python" in path for path in loaded)
    outside = [path for path in loaded if not path.startswith((str(folder), "./", "/lib", "/usr/lib"))]
    assert not outside


def test_the_program_refuses_with_a_sentence(built, tmp_path):
    folder = built[0] / "deploy"
    for bundle, said in ((tmp_path, "no manifest.json"), (tmp_path / "nowhere", "no such folder")):
        command = ["./classify", "classifier.onnx", bundle, "./libna_compiler_ort.so", "photograph.ppm"]
        result = subprocess.run(command, cwd=folder, env={}, capture_output=True, text=True, check=False)
        assert result.returncode == 1
        assert said in result.stderr


def test_the_file_has_the_problems_that_the_torch_model_has(built, monkeypatch):
    folder = built[0]
    assert problems(folder / "classifier.onnx") == DECLARED
    monkeypatch.syspath_prepend(str(EXAMPLE.parent))
    spec = importlib.util.spec_from_file_location("onnx_deploy_export", EXAMPLE / "export.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    program = torch.export.export(
        module.make_model(), (torch.zeros(2, 3, 224, 224),), dynamic_shapes=({0: Dim("batch", min=1, max=64)},)
    )
    assert {site.problem for site in collect(program)} == set(DECLARED)
