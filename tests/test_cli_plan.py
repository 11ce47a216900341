"""``na-compile plan`` and ``na-compile bench --suite hopper``, on a machine without a GPU."""

from __future__ import annotations

import re

import pytest
import torch

from na_compiler.cli import gpu_suites, main
from na_compiler.compiler.spec import KernelSpec
from na_compiler.problem import Problem
from na_compiler.runtime.bundle import read_bundle
from na_compiler.schedules.choose import candidates, choose
from na_compiler.schedules.simt.config import Simt
from na_compiler.target import Target

_ARGUMENTS = ["plan", "--layout", "128x128", "--heads", "8", "--head-dim", "128", "--kernel-size", "31"]
_HOPPER = [*_ARGUMENTS, "--target", "cuda:sm_90a"]


def test_plan_ranks_candidates(capsys):
    assert main([*_HOPPER, "--dtype", "bfloat16", "--count", "3"]) == 0
    printed = capsys.readouterr().out
    assert "scores computed for each one needed" in printed
    assert len(re.findall(r"│ +[23] x", printed)) == 3
    assert "1.00" in printed


def test_plan_says_why_another_schedule_is_chosen(capsys):
    assert main(_HOPPER) == 0
    printed = capsys.readouterr().out
    assert "takes float16 and bfloat16, not float32" in printed
    assert "Simt(" in printed


def test_plan_is_of_this_machine_as_other_commands_are(capsys):
    assert main([*_ARGUMENTS, "--count", "1"]) == 0
    assert f"forward for {Target.parse('llvm')}" in capsys.readouterr().out


def test_plan_of_a_cpu(capsys):
    assert main([*_ARGUMENTS, "--target", "llvm:x86-64-v3", "--count", "2"]) == 0
    printed = capsys.readouterr().out
    assert "QueriesInLanes(" in printed
    assert sum(line.startswith("│ 1x") for line in printed.splitlines()) == 2


@pytest.mark.parametrize("target", ["llvm:x86-64-v4", "llvm:x86-64-v3", "llvm:x86-64", "cuda:sm_90a", "cuda:sm_80"])
@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_the_first_candidate_is_what_is_chosen(target, direction):
    problem, parsed = Problem((20, 33), 2, 64, (5, 7), dilation=(1, 2), dtype="float16"), Target.parse(target)
    found = candidates(problem, parsed, direction, 3)
    chosen = choose(problem, parsed, direction).config
    assert isinstance(chosen, Simt) == (not found)
    if found:
        assert found[0].config == chosen
        assert found[0].cycles <= found[1].cycles <= found[2].cycles
        assert found[0].waste >= 1


def test_plan_refuses_no_candidates(capsys):
    assert main([*_ARGUMENTS, "--count", "0"]) == 1
    assert "--count" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU: the suite would run")
def test_suite_needs_a_gpu(capsys):
    assert main(["bench", "--suite", "hopper"]) == 1
    assert "--save" in capsys.readouterr().err


def test_suite_is_compiled_for_another_machine(monkeypatch, tmp_path):
    pytest.importorskip("tvm")
    row = gpu_suites.Row("small", Problem((16, 16), 1, 64, 5, dtype="bfloat16"))
    monkeypatch.setitem(gpu_suites.SUITES, "hopper", (row,))
    try:
        assert main(["bench", "--suite", "hopper", "--save", str(tmp_path / "bundle")]) == 0
    except RuntimeError as error:  # pragma: no cover
        pytest.skip(f"nothing to compile for CUDA with: {error}")
    (entry,) = read_bundle(tmp_path / "bundle").entries
    assert entry.info.problem == row.problem
    assert entry.info.target == "cuda:sm_90a"


@pytest.mark.parametrize("suite", gpu_suites.SUITES)
def test_suites_are_all_for_tensor_cores(suite):
    for row in gpu_suites.SUITES[suite]:
        for direction in ("forward", "backward"):
            config = KernelSpec.make(row.problem, "cuda:sm_90a", direction).config
            assert config.family in ("sm90", "mma"), f"{row.title}, {direction}"
        assert all(least < possible for least, possible in row.goals.values())


def test_flags_of_gpus_go_with_their_suites(capsys):
    assert main(["bench", "--suite", "cpu", "--backward"]) == 1
    assert "--backward goes with" in capsys.readouterr().err
