"""Every model of ``examples/models`` on every route: outputs equal to eager's, and exactly the problems it declares."""

import shutil
import subprocess
import sys
import venv
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
import tvm_ffi
from draws import some
from models.audio import Encoder
from models.nat import Classifier
from models.video import Denoiser
from processes import run_bare
from torch.export import Dim

import na_compiler
from na_compiler import aot, cli, passes
from na_compiler.passes.views import copies
from na_compiler.runtime import bundle as bundle_module
from na_compiler.runtime.folders import runtime_library

EXAMPLES = Path(__file__).parent.parent / "examples"
# Model, inputs for a batch, what to declare the problems of.
MODELS = {
    "nat": (lambda: Classifier("dinat_pocket"), lambda batch: (torch.randn(batch, 3, 64, 64),), (64, 64)),
    "audio": (lambda: Encoder("pocket"), lambda batch: (torch.randn(batch, 50, 16),), (50,)),
    "video": (
        lambda: Denoiser("pocket"),
        lambda batch: (torch.randn(batch, 4, 6, 5, 4), torch.randn(batch, 32), torch.randn(batch, 7, 24)),
        (4, 6, 5),
    ),
}


# Inductor takes a minute for the classifier: that one runs with --full, and one of the others is drawn.
TAKES_LONG = pytest.mark.parametrize(
    "case",
    [*some(["audio", "video"], 1, "models"), pytest.param("nat", marks=pytest.mark.full)],
    indirect=True,
    scope="module",
)


class Case:
    def __init__(self, name):
        torch.manual_seed(torch.initial_seed() % 2**31)
        make, draw, sizes = MODELS[name]
        self.name, self.model, self.draw = name, make().eval(), draw
        self.problems = self.model.problems(*sizes)
        self.inputs = draw(2)
        with torch.no_grad():
            self.expected = self.model(*self.inputs)

    def export(self):
        shapes = tuple({0: Dim("batch", min=1, max=16)} for _ in self.inputs)
        with torch.no_grad():
            return torch.export.export(self.model, self.inputs, dynamic_shapes=shapes)

    def check(self, output):
        output = torch.as_tensor(output)
        error = ((output.double() - self.expected.double()).norm() / self.expected.double().norm()).item()
        assert error < 1e-5


@pytest.fixture(scope="module", params=MODELS)
def case(request):
    return Case(request.param)


@pytest.fixture(scope="module")
def program(case, tmp_path_factory):
    path = tmp_path_factory.mktemp("programs") / f"{case.name}.pt2"
    torch.export.save(case.export(), path)
    return path


@pytest.fixture(scope="module")
def onnx_file(case, tmp_path_factory):
    pytest.importorskip("onnxscript", reason="needs the extra onnx")
    import na_compiler.onnx

    path = tmp_path_factory.mktemp("onnx") / f"{case.name}.onnx"
    shapes = tuple({0: Dim("batch", min=1, max=16)} for _ in case.inputs)
    na_compiler.onnx.export(case.model, case.inputs, path, dynamic_shapes=shapes)
    return path


def as_counter(sites):
    return Counter(site.problem for site in sites)


def test_eager_agrees_with_the_reference(case, monkeypatch):
    from na_compiler.reference import neighborhood_attention

    def reference(rank, return_lse, query, key, value, *parameters):
        tensors = [tensor.double() for tensor in (query, key, value)]
        extra = [None if tensor is None else tensor.double() for tensor in parameters[5:]]
        output, lse = neighborhood_attention(*tensors, *parameters[:5], *extra)
        return (output.to(query.dtype), lse.float()) if return_lse else output.to(query.dtype)

    monkeypatch.setattr("na_compiler.functional.call", reference)
    with torch.no_grad():
        case.check(case.model(*case.inputs))


@TAKES_LONG
def test_torch_compile(case):
    torch._dynamo.reset()
    with torch.no_grad():
        compiled = torch.compile(case.model, backend="na_compiler", fullgraph=True)
        case.check(compiled(*case.inputs))


def test_export(case, program):
    loaded = torch.export.load(program)
    assert passes.canonicalise(loaded) == 0, "our modules are canonical"
    sites = passes.collect(loaded)
    assert as_counter(sites) == case.problems
    assert all("batch" in site.dynamic for site in sites)
    assert copies(loaded.graph_module) == []
    case.check(loaded.module()(*case.inputs).detach())


def test_onnx(case, onnx_file):
    import onnx_ir
    import onnxruntime

    assert as_counter(passes.collect(onnx_ir.load(onnx_file))) == case.problems
    session = onnxruntime.InferenceSession(onnx_file, providers=["CPUExecutionProvider"])
    names = [given.name for given in session.get_inputs()]
    (output,) = session.run(None, dict(zip(names, (x.numpy() for x in case.inputs), strict=True)))
    case.check(output)


def test_onnx_with_the_operator_library(case, onnx_file, tmp_path):
    import onnxruntime

    assert cli.main([str(onnx_file), "-o", str(tmp_path / "kernels")]) == 0
    options = onnxruntime.SessionOptions()
    na_compiler.onnx.register(options, tmp_path / "kernels")
    session = onnxruntime.InferenceSession(onnx_file, options, providers=["CPUExecutionProvider"])
    names = [given.name for given in session.get_inputs()]
    (output,) = session.run(None, dict(zip(names, (x.numpy() for x in case.inputs), strict=True)))
    case.check(output)


@TAKES_LONG
def test_aotinductor_in_python_and_without(case, tmp_path, monkeypatch, cpp_program):
    """One package, run by torch in Python, and by the C++ program of ``examples/aot_cpp``."""
    aot.package(case.export(), tmp_path / "model.pt2", bundle=tmp_path / "kernels")
    monkeypatch.setattr(bundle_module, "_loaded", [])
    assert Counter(info.problem for info in na_compiler.load_bundle(tmp_path / "kernels")) == Counter(
        set(case.problems)
    )
    monkeypatch.setattr(na_compiler.ops.kernels, "_kernels", {})
    with na_compiler.compiling(False):
        case.check(torch._inductor.aoti_load_package(str(tmp_path / "model.pt2"))(*case.inputs))
    command = [cpp_program, tmp_path / "model.pt2", tmp_path / "kernels", tmp_path / "output.bin"]
    case.check(run_with_files(command, case, tmp_path))
    missing = subprocess.run(
        [*command[:2], tmp_path, *command[3:], tmp_path / "input0.bin", "2x1"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert missing.returncode == 1
    assert "it has no manifest.json" in missing.stderr


@pytest.mark.parametrize("source", some(["pt2", "onnx"], 1, "whole"))
def test_whole_in_an_environment_that_has_nothing_else(case, source, request, bare_python, tmp_path):
    model = request.getfixturevalue("program" if source == "pt2" else "onnx_file")
    library = tmp_path / "deployment" / "model.so"
    assert cli.main([str(model), "--whole", "--with-runtime", "-o", str(library)]) == 0
    command = [bare_python, EXAMPLES / "whole_model" / "run.py", library, tmp_path / "output.bin"]
    case.check(run_with_files(command, case, tmp_path))


@TAKES_LONG
def test_whole_beside_torch(case, program, tmp_path):
    from na_compiler.runtime.whole import load_whole
    from na_compiler.whole import compile_whole

    assert compile_whole(torch.export.load(program), tmp_path / "model.so") == case.problems
    model = load_whole(tmp_path / "model.so")
    case.check(torch.from_dlpack(model(*case.inputs)))
    one = [tensor[:1].contiguous() for tensor in case.inputs]
    torch.testing.assert_close(torch.from_dlpack(model(*one)), case.expected[:1], rtol=1e-4, atol=1e-5)


def run_with_files(command, case, folder):
    """Run a program that reads inputs from files, with nothing around it, and return the output it writes."""
    command = list(command)
    for number, tensor in enumerate(case.inputs):
        path = folder / f"input{number}.bin"
        np.asarray(tensor).tofile(path)
        command += [path, "x".join(map(str, tensor.shape))]
    run_bare(command, folder, *filter(Path.exists, (folder / "kernels", folder / "deployment")))
    return torch.from_numpy(np.fromfile(folder / "output.bin", np.float32)).reshape(case.expected.shape)


@pytest.fixture(scope="module")
def cpp_program(tmp_path_factory):
    """The program of ``examples/aot_cpp``, built as its ``export.py`` says."""
    if shutil.which("cmake") is None:
        pytest.skip("cmake is not installed")
    folder = tmp_path_factory.mktemp("aot_cpp")
    aot.build_library(folder)
    shutil.copy(aot.header_folder() / "na_compiler.h", folder)
    prefix = f"-DCMAKE_PREFIX_PATH={torch.utils.cmake_prefix_path}"
    subprocess.run(
        ["cmake", "-S", EXAMPLES / "aot_cpp", "-B", folder / "build", f"-DNA_COMPILER={folder}", prefix],
        check=True, capture_output=True,
    )  # fmt: skip
    subprocess.run(["cmake", "--build", folder / "build"], check=True, capture_output=True)
    return folder / "build" / "main"


@pytest.fixture(scope="module")
def bare_python(tmp_path_factory):
    """A Python with apache-tvm-ffi and what that needs, and nothing else."""
    folder = tmp_path_factory.mktemp("bare")
    venv.create(folder, with_pip=False)
    (packages,) = folder.glob("lib/python*/site-packages")
    shutil.copytree(Path(tvm_ffi.__file__).parent, packages / "tvm_ffi")
    import typing_extensions

    shutil.copy(typing_extensions.__file__, packages)
    python = folder / "bin" / "python"
    for name in ("torch", "tvm", "onnxruntime", "numpy", "na_compiler"):
        done = subprocess.run([python, "-c", f"import {name}"], capture_output=True, check=False, cwd=folder)
        assert b"ModuleNotFoundError" in done.stderr
    assert runtime_library().is_file()
    assert sys.version_info[:2] == tuple(map(int, packages.parent.name.removeprefix("python").split(".")))
    return python
