"""``na-compile plan`` and ``na-compile bench --suite hopper``, on a machine without a GPU."""

from __future__ import annotations

import json
import re

import pytest
import torch

from na_compiler.cli import gpu_suites, main
from na_compiler.compiler.spec import KernelSpec
from na_compiler.problem import Problem
from na_compiler.runtime.bundle import read_bundle
from na_compiler.schedules import choose as choose_module
from na_compiler.schedules.choose import candidates, choose
from na_compiler.schedules.shared import gpus
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


@pytest.mark.parametrize("target", ["llvm:x86-64-v4", "cuda:sm_90a", "cuda:sm_80"])
@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_terms_are_what_the_time_is_made_of(target, direction):
    """Each is a part of it, and together they are all of it, or more where some hide behind others."""
    small, large = Problem((64, 64), 8, 64, 13, dtype="float16"), Problem((256, 256), 24, 128, 80, dtype="bfloat16")
    for problem in (small, large):
        for family in ("sm90", "mma", "cpu"):
            one = choose_module._load(family)
            machine = Target.parse(target)
            for candidate in one.candidates(problem, machine, direction, 3) if one.is_for(machine) else ():
                assert candidate.combined
                assert len(candidate.terms) >= 3
                assert all(0 <= cycles <= 1.0001 * candidate.cycles for cycles in candidate.terms.values())
                assert sum(candidate.terms.values()) >= 0.999 * candidate.cycles
                if candidate.combined == "one after another":
                    assert sum(candidate.terms.values()) == pytest.approx(candidate.cycles)


def test_plan_shows_the_terms_that_decided(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")  # A narrow table breaks its heads between words.
    problem = ["--layout", "64x64", "--heads", "8", "--head-dim", "64", "--kernel-size", "13", "--dtype", "float16"]
    arguments = ["plan", *problem, "--count", "2"]
    assert main([*arguments, "--target", "cuda:sm_90a"]) == 0
    printed = capsys.readouterr().out
    for part in ("estimates, a batch entry among many: sm90", "tensor cores", "latency", "H100 SXM, to which models"):
        assert part in printed
    assert main([*arguments, "--target", "cuda:sm_80", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["floors"]["gpu"] == "A100 80GB SXM, of which nothing was measured"
    assert set(found["floors"]["microseconds"]) == {"DRAM", "products", "exponentials"}
    assert found["candidates"][0]["terms"]["latency"] > 0
    assert set(found["families"]) == {"mma", "simt"}
    assert main([*arguments, "--target", "llvm", "--json"]) == 0
    assert not json.loads(capsys.readouterr().out)["floors"]


def test_each_generation_has_a_line():
    for target in Target.several("cuda:all"):
        gpu = gpus.gpu_of(target)
        assert f"cuda:{gpu.architecture}" == target.name
        assert gpu.is_measured == (gpu is gpus.H100)
    assert gpus.gpu_of(Target.parse("cuda:sm_103")).architecture == "sm_100"
    # An elementwise count by hand: four tensors of 2 bytes and lse, and 4 operations a pair and element.
    problem = Problem((8, 8), 2, 16, 3, dtype="float16")
    least = gpus.floors(problem, "forward", gpus.H100, has_tensor_cores=True)
    assert least["DRAM"] == pytest.approx((4 * 64 * 2 * 16 * 2 + 64 * 2 * 4) / 3350e3)
    assert least["products"] == pytest.approx(64 * 9 * 2 * 4 * 16 / (132 * 1700 * 4096))
    assert least["exponentials"] == pytest.approx(64 * 9 * 2 / (132 * 1700 * 16))


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
