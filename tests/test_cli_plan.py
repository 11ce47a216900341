"""``na-compile plan`` and ``na-compile bench --suite hopper``, on a machine without a GPU."""

from __future__ import annotations

import pytest
import torch

from na_compiler.cli import bench_hopper, main
from na_compiler.compiler.spec import KernelSpec
from na_compiler.problem import Problem
from na_compiler.runtime.bundle import read_bundle
from na_compiler.schedules.sm90.config import Sm90

_ARGUMENTS = ["plan", "--layout", "64x64", "--heads", "8", "--head-dim", "64", "--kernel-size", "13"]


def test_plan_ranks_candidates(capsys):
    assert main([*_ARGUMENTS, "--dtype", "bfloat16", "--count", "3"]) == 0
    printed = capsys.readouterr().out
    assert "scores computed for each one needed" in printed
    assert printed.count("│ 2 x") + printed.count("│ 3 x") == 3
    assert "1.00" in printed


def test_plan_says_why_another_schedule_is_chosen(capsys):
    assert main(_ARGUMENTS) == 0
    printed = capsys.readouterr().out
    assert "takes float16 and bfloat16, not float32" in printed
    assert "Simt(" in printed


def test_plan_of_a_cpu(capsys):
    assert main([*_ARGUMENTS, "--target", "llvm:x86-64-v3"]) == 0
    assert "QueriesInLanes(" in capsys.readouterr().out


def test_plan_refuses_no_candidates(capsys):
    assert main([*_ARGUMENTS, "--count", "0"]) == 1
    assert "--count" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU: the suite would run")
def test_suite_needs_a_gpu(capsys):
    assert main(["bench", "--suite", "hopper"]) == 1
    assert "--save" in capsys.readouterr().err


def test_suite_is_compiled_for_another_machine(monkeypatch, tmp_path):
    pytest.importorskip("tvm")
    row = bench_hopper.Row("small", Problem((16, 16), 1, 64, 5, dtype="bfloat16"), 1, 2)
    monkeypatch.setattr(bench_hopper, "SUITE", (row,))
    try:
        assert main(["bench", "--suite", "hopper", "--save", str(tmp_path / "bundle")]) == 0
    except RuntimeError as error:  # pragma: no cover
        pytest.skip(f"nothing to compile for CUDA with: {error}")
    (entry,) = read_bundle(tmp_path / "bundle")[0].entries
    assert entry.info.problem == row.problem
    assert entry.info.target == "cuda:sm_90a"


def test_suite_is_all_for_tensor_cores():
    for row in bench_hopper.SUITE:
        assert isinstance(KernelSpec.make(row.problem, "cuda:sm_90a").config, Sm90), row.title
        assert row.floor < row.goal
