"""``na-compile MODEL``, ``problem`` and ``inspect``: what users type, and what they read when it cannot be."""

import json
import os
import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.export import Dim

from na_compiler import NeighborhoodAttention2D, Problem, cli, load_bundle
from na_compiler.compiler.spec import KernelSpec
from na_compiler.runtime import bundle as bundle_module

PROBLEM = ["problem", "--layout", "9x10", "--heads", "2", "--head-dim", "8", "--kernel-size", "3"]


@pytest.fixture(autouse=True)
def none_loaded(monkeypatch):
    monkeypatch.setattr(bundle_module, "_loaded", [])


class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([NeighborhoodAttention2D(16, 2, 3, dilation=d) for d in (1, 2, 1)])

    def forward(self, image):
        for layer in self.layers:
            image = image + layer(image)
        return image


def make():
    """What ``package.module:function`` names: a model and inputs of two resolutions."""
    return Encoder(), [(torch.randn(1, 9, 10, 16),), {"image": torch.randn(1, 12, 10, 16)}]


def make_nothing():
    return nn.Linear(3, 3), (torch.randn(1, 3),)


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    path = tmp_path_factory.mktemp("programs") / "model.pt2"
    dims = {0: Dim("B", min=1, max=64), 1: Dim("X", min=6, max=64)}
    torch.export.save(torch.export.export(Encoder(), (torch.randn(2, 9, 10, 16),), dynamic_shapes=(dims,)), path)
    return path


def run(capsys, *arguments, status=0):
    assert cli.main([str(argument) for argument in arguments]) == status
    said = capsys.readouterr()
    if status:
        assert said.out == ""
        assert said.err.startswith("na-compile: ")
        assert said.err.count("\n") == 1, "one sentence"
        return said.err
    return said.out


def test_compiles_a_program(program, tmp_path, capsys):
    said = run(capsys, program, "-o", tmp_path / "kernels", "--target", "llvm", "--target", "llvm:x86-64", "--training")
    assert "3 neighborhood attentions" in said
    assert "16 kernels" in said
    near, far = Problem((9, 10), 2, 8, 3), Problem((9, 10), 2, 8, 3, dilation=2)
    # The layout is dynamic: beside that of the example there is a kernel for every other one.
    every = [near, far, near.opened(), far.opened()]
    assert {(info.problem, info.direction) for info in load_bundle(tmp_path / "kernels")} == {
        (problem, direction) for problem in every for direction in ("forward", "backward")
    }
    again = json.loads(run(capsys, program, "-o", tmp_path / "kernels", "--json"))
    assert (again["compiled"], again["cached"]) == (0, 4)
    said = run(capsys, "inspect", tmp_path / "kernels")
    assert "4 kernels" in said
    assert "layout=any" in said
    listed = json.loads(run(capsys, "inspect", tmp_path / "kernels", "--json"))
    assert [Problem.from_dict(kernel["problem"]) for kernel in listed["kernels"]] == every


def test_several_resolutions_and_the_table(program, capsys):
    shapes = ["--shape", "image=1x12x10x16", "--shape", "image=4x20x10x16"]
    said = run(capsys, program, *shapes, "--dry-run")
    for part in (
        "6 problems, 6 kernels",
        "layout=any",
        "layout=12x10",
        "layout=20x10",
        "2x: layers.0, layers.2",
        "%",
        "tile=",
    ):
        assert part in said
    rows = json.loads(run(capsys, program, *shapes, "--dry-run", "--json"))["kernels"]
    assert [row["count"] for row in rows] == [2, 1, 2, 1, 4, 2]
    assert rows[2]["flops"] == Problem((20, 10), 2, 8, 3).flops(4)
    assert all(0 <= row["wasted"] < 1 and row["dynamic"] == ["batch", "layout[0]"] for row in rows[:4])
    assert all(row["wasted"] is row["flops"] is None for row in rows[4:]), "of no layout there are none"


def test_compiles_what_a_function_returns(tmp_path, capsys):
    rows = json.loads(run(capsys, f"{__name__}:make", "--dry-run", "--json"))["kernels"]
    assert [tuple(row["problem"]["layout"]) for row in rows] == [(9, 10), (9, 10), (12, 10), (12, 10)]


def test_compiles_an_onnx_model(tmp_path, capsys):
    pytest.importorskip("onnxscript", reason="needs the extra onnx")
    import na_compiler.onnx

    path = tmp_path / "model.onnx"
    dims = {0: Dim("B", min=1, max=64), 1: Dim("X", min=6, max=64)}
    na_compiler.onnx.export(Encoder(), (torch.randn(2, 9, 10, 16),), path, dynamic_shapes=(dims,))
    run(capsys, path, "-o", tmp_path / "kernels", "--shape", "image=1x9x10x16")
    assert len(load_bundle(tmp_path / "kernels")) == 4
    # Nobody said a layout: there is one kernel for all, where the target has such.
    run(capsys, path, "-o", tmp_path / "kernels")
    assert [info.problem.is_open for info in load_bundle(tmp_path / "kernels")] == [True, True]
    assert "--shape" in run(capsys, path, "-o", tmp_path / "kernels", "--target", "cuda:sm_80", status=1)


def test_products_round_where_that_is_asked_for(capsys):
    """Forwards for GPUs alone: there are no other kernels that round, and float16 has products of its own."""
    flags = ["--target", "cuda:sm_80", "--target", "llvm", "--training", "--dry-run"]
    problem = [*PROBLEM, "--head-dim", "32"]
    exact = json.loads(run(capsys, *problem, *flags, "--json"))["kernels"]
    assert not any(row["tf32"] for row in exact)
    rounds = json.loads(run(capsys, *problem, *flags, "--tf32", "--json"))["kernels"]
    assert [row["tf32"] for row in rounds] == [True, False, False, False]
    assert [(one["key"] != other["key"]) for one, other in zip(exact, rounds, strict=True)] == [
        True,
        False,
        False,
        False,
    ]
    assert rounds[0]["key"] == KernelSpec.make(Problem((9, 10), 2, 32, 3), "cuda:sm_80", rounds=True).key
    assert "forward in TF32, cuda:sm_80" in run(capsys, *problem, *flags, "--tf32")
    halves = json.loads(run(capsys, *problem, *flags, "--tf32", "--dtype", "float16", "--json"))["kernels"]
    assert not any(row["tf32"] for row in halves)


def test_a_problem_by_flags(tmp_path, capsys):
    flags = ["--heads-kv", "1", "--head-dim-v", "4", "--stride", "2x1", "--dilation", "2", "--causal", "0x1"]
    run(capsys, *PROBLEM, *flags, "--additional-kv", "--dtype", "bfloat16", "-o", tmp_path / "kernels")
    (info,) = load_bundle(tmp_path / "kernels")
    parameters = {"heads_kv": 1, "head_dim_v": 4, "additional_kv": True, "dtype": "bfloat16"}
    assert info.problem == Problem((9, 10), 2, 8, 3, (2, 1), 2, (False, True), **parameters)


def test_what_cannot_be_is_told_in_one_sentence(program, tmp_path, capsys):
    out = ["-o", tmp_path / "kernels"]
    for arguments, told in [
        ([tmp_path / "none.pt2", *out], "no file"),
        ([tmp_path / "none.onnx", *out], "no file"),
        ([__file__, *out], "is no exported program"),
        (["nowhere.module:make", *out], "cannot be found: No module named 'nowhere'"),
        ([f"{__name__}:missing", *out], "has no attribute 'missing'"),
        ([f"{__name__}:Encoder", *out], "must return a torch.nn.Module and its example inputs"),
        ([f"{__name__}:make_nothing", *out], "has no neighborhood attention in it"),
        ([program, *out, "--shape", "picture=1x9x10x16"], "no input 'picture'; its inputs are image"),
        ([program, *out, "--shape", "image=1x9x10"], "input image has 4 dimensions"),
        ([program, *out, "--shape", "image"], "--shape must be NAME=AxBxC"),
        ([program, *out, "--shape", "image=1x5x10x16"], "layers.1: kernel_size * dilation must be at most"),
        ([program, *out, "--target", "abacus"], "target must be"),
        ([program, *out, "--jobs", "0"], "jobs must be at least 1, got 0"),
        ([program], "name the bundle to write with -o BUNDLE"),
        ([program, "-o", tmp_path], "is there and no bundle"),
        (["inspect", tmp_path], "no bundle in"),
        ([*PROBLEM[:-1], "11", *out], "kernel_size=11 * dilation=1 = 11; kernel_size=9 would work"),
    ]:
        assert told in run(capsys, *arguments, status=1)
    assert list(tmp_path.iterdir()) == []
    damaged = tmp_path / "damaged.pt2"
    damaged.write_bytes(program.read_bytes()[: 4 * program.stat().st_size // 5])
    assert "is no exported program" in run(capsys, damaged, *out, status=1)


def test_a_missing_compiler_is_told(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("NA_COMPILER_CACHE", str(tmp_path / "empty"))
    out = ["-o", tmp_path / "kernels"]
    with monkeypatch.context() as patch:
        patch.setattr("na_compiler.compiler.parallel.c_compiler", lambda: None)
        assert "no C compiler to link kernels with; install gcc or clang, or set CC" in run(
            capsys, *PROBLEM, *out, status=1
        )
    with monkeypatch.context() as patch:
        patch.setattr("importlib.util.find_spec", lambda *_: None)
        assert "apache-tvm is not installed" in run(capsys, *PROBLEM, *out, status=1)


def test_bad_flags_and_help():
    for arguments in (["problem", "--layout", "axb"], [*PROBLEM, "--causal", "2"], []):
        with pytest.raises(SystemExit) as caught:
            cli.main(arguments)
        assert caught.value.code == 2
    done = subprocess.run(
        [sys.executable, "-m", "na_compiler.cli", "model", "--help"], capture_output=True, text=True, check=True
    )
    assert "na-compile model.onnx -o kernels --target" in done.stdout
    assert "trusts its author" in done.stdout


def test_a_program_that_is_known_needs_no_torch(program, tmp_path):
    """So that building again what has not changed takes no time."""
    code = "import sys; from na_compiler import cli; assert cli.main(sys.argv[1:]) == 0; print('torch' in sys.modules)"
    command = [sys.executable, "-c", code, str(program), "--dry-run", "--json"]
    environment = {**os.environ, "NA_COMPILER_CACHE": str(tmp_path)}
    for loads in ("True", "False"):
        done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
        assert done.stdout.split()[-1] == loads
