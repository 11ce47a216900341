"""Files made by a version of before (tests/data/c2b49c4/make.py): they load, or it is said how to make them again."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

import na_compiler
from na_compiler import passes
from na_compiler.problem import Problem

FOLDER = Path(__file__).parent / "data" / "c2b49c4"
PROBLEMS = [
    Problem(9, 2, 4, 3, dilation=2),
    Problem(9, 4, 2, 4, stride=2, is_causal=True, heads_kv=2, additional_kv=True),
]


@pytest.fixture(scope="module")
def given():
    """Inputs, and what the version of before made of them."""
    with np.load(FOLDER / "net.npz") as data:
        return {name: torch.from_numpy(data[name]) for name in data.files}


def test_an_exported_program(given):
    program = torch.export.load(FOLDER / "net.pt2")
    output = program.module()(given["x"], given["extra"])
    torch.testing.assert_close(output, given["output"])
    assert [site.problem for site in passes.collect(program)] == PROBLEMS
    assert passes.bind(program) == 2


def test_a_model(given):
    import onnx
    import onnxruntime

    import na_compiler.onnx

    path = str(FOLDER / "net.onnx")
    onnx.checker.check_model(path, full_check=True)
    assert list(na_compiler.onnx.problems(path)) == PROBLEMS
    session = onnxruntime.InferenceSession(path)
    (output,) = session.run(None, {"x": given["x"].numpy(), "extra": given["extra"].numpy()})
    torch.testing.assert_close(torch.from_numpy(output), given["output"])


def test_a_model_with_the_operator_library(given, tmp_path):
    if shutil.which("c++") is None:
        pytest.skip("no C++ compiler")
    import onnxruntime

    import na_compiler.onnx

    na_compiler.save_bundle(tmp_path / "bundle", [na_compiler.KernelSpec.make(problem) for problem in PROBLEMS])
    options = onnxruntime.SessionOptions()
    na_compiler.onnx.register(options, tmp_path / "bundle")
    session = onnxruntime.InferenceSession(str(FOLDER / "net.onnx"), options)
    (output,) = session.run(None, {"x": given["x"].numpy(), "extra": given["extra"].numpy()})
    torch.testing.assert_close(torch.from_numpy(output), given["output"])


def test_a_bundle_is_refused_with_the_command_that_makes_it_again(tmp_path):
    """Its kernels may be called in another way."""
    with pytest.raises(ValueError, match="its format is 3") as error:
        na_compiler.load_bundle(FOLDER / "bundle")
    command = (
        "na-compile problem --layout 9 --heads 2 --head-dim 4 --kernel-size 3 --dilation 2 --target llvm:x86-64 -o "
    )
    assert command in str(error.value)
    assert str(FOLDER / "bundle") in str(error.value)
