"""What the compiler makes of `na_compiler.schedules.mma`: registers, shared memory. Needs nvcc, and no GPU."""

from __future__ import annotations

import itertools
import re

import pytest
from draws import some
from nvcc import disassemble, needs_nvcc

from na_compiler.compiler import cuda
from na_compiler.compiler.spec import KernelSpec
from na_compiler.problem import Problem
from na_compiler.schedules.mma.backward import planner as backward_planner
from na_compiler.schedules.mma.planner import candidates
from na_compiler.target import Target

pytestmark = needs_nvcc

_ARCHITECTURES = ("sm_80", "sm_86", "sm_89", "sm_90a", "sm_100", "sm_120")
_PROBLEMS = (
    Problem((56, 56), 4, 32, 7, dtype="float16"),
    Problem((28, 28), 8, 64, 7, 2, 2, (True, False), 4, 48, dtype="bfloat16"),
    Problem((32, 32, 32), 4, 32, 3, dtype="float16"),
    Problem((64, 64), 8, 64, 13, dtype="float16"),
    Problem((64, 64), 8, 128, 31, additional_kv=True, dtype="bfloat16"),
    Problem(4096, 4, 256, 255, dtype="bfloat16"),
)
# Heads that share keys lie side by side.
_PACKED = (
    Problem((56, 56), 8, 64, 7, heads_kv=2, dtype="float16"),
    Problem(4096, 32, 64, 255, is_causal=True, heads_kv=8, dtype="bfloat16"),
)
# In TF32.
_ROUNDED = (
    Problem((56, 56), 4, 32, 7),
    Problem((64, 64), 8, 64, 13),
    Problem(4096, 4, 128, 255),
)
_MASKED = (
    Problem((56, 56), 4, 32, 7, dtype="float16", operands=("key_mask",)),
    Problem((64, 64), 8, 64, 13, dtype="bfloat16", operands=("key_mask",)),
    Problem(4096, 4, 64, 255, dtype="bfloat16", operands=("key_mask",)),
)
_BOTH = ("relative_position_bias", "key_mask")
_WITH_OPERANDS = (
    Problem((56, 56), 4, 32, 7, dtype="float16", operands=_BOTH[:1]),
    Problem((56, 56), 4, 32, 7, dtype="float16", operands=_BOTH, border="cut"),
    Problem((64, 64), 8, 64, 13, dtype="bfloat16", operands=_BOTH),
    Problem((64, 64), 8, 128, 31, additional_kv=True, dtype="bfloat16", operands=_BOTH),
    Problem(4096, 4, 64, 255, dtype="bfloat16", operands=_BOTH[1:], border="cut"),
)


# What ptxas may keep in local memory of code without a loop, as a share of the instructions. It takes all registers
# that it is given for loads of later steps, and is one to seven short in one of twenty kernels (all 114: 2 of 1923 to
# 14 of 3517 instructions, each issued once).
_SPILLED = 1 / 200


def spills_at_no_cost(config, library):
    """Whether a kernel has no loop over keys, and nearly no instruction that is for want of registers."""
    if config.key_tile is not None:
        return False
    code = re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z]\w*)", disassemble(library), re.MULTILINE)
    assert "HMMA" in code
    return sum(name in {"LDL", "STL"} for name in code) <= _SPILLED * len(code)


@pytest.mark.parametrize(
    ("problem", "architecture"),
    some(itertools.product(_PROBLEMS + _PACKED + _ROUNDED + _MASKED + _WITH_OPERANDS, _ARCHITECTURES), 3, "registers"),
)
def test_no_spills(problem, architecture, tmp_path):
    """And no more registers and shared memory than so many blocks of a multiprocessor have."""
    target = Target.parse(f"cuda:{architecture}")
    chosen = candidates(problem, target.shared_memory, 1)[0]
    built = cuda.build_library(KernelSpec(problem, "forward", target, chosen.config), tmp_path / "kernel.so")
    frame = re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", built.log)
    assert frame.groups() == ("0", "0", "0") or spills_at_no_cost(chosen.config, tmp_path / "kernel.so"), (
        f"{chosen.config}: {frame[0]}"
    )
    registers = int(re.search(r"Used (\d+) registers", built.log)[1])
    plan = chosen.config.plan(problem)
    assert chosen.config.blocks * plan.threads * registers <= 65536
    assert plan.shared_bytes <= target.shared_memory


@pytest.mark.parametrize(
    ("problem", "architecture"),
    some([(p, a) for p in _PROBLEMS + _WITH_OPERANDS for a in _ARCHITECTURES], 2, "backward registers"),
)
def test_no_spills_in_the_backward(problem, architecture, tmp_path):
    """And as many blocks of each kernel fit as are asked for."""
    target = Target.parse(f"cuda:{architecture}")
    config = backward_planner.candidates(problem, target.shared_memory, 1)[0].config
    built = cuda.build_library(KernelSpec(problem, "backward", target, config), tmp_path / "kernel.so")
    frames = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", built.log)
    assert set(frames) == {("0", "0", "0")}, f"{config}: {frames}"
    plan = config.plan(problem)
    assert plan.shared_bytes <= target.shared_memory
    for sweep in plan.sweeps:
        assert sweep.config.blocks * (sweep.shared_bytes + 1024) <= target.shared_memory + 1024
