"""What the compiler makes of `na_compiler.schedules.sm90`: registers, order of instructions. Needs nvcc, and no GPU."""

from __future__ import annotations

import re

import pytest
from nvcc import disassemble, needs_nvcc

from na_compiler.compiler import cuda
from na_compiler.compiler.spec import KernelSpec
from na_compiler.problem import Problem
from na_compiler.schedules.sm90.config import Sm90
from na_compiler.schedules.sm90.planner import candidates, most_registers
from na_compiler.target import Target

TARGET = Target.parse("cuda:sm_90a")


pytestmark = needs_nvcc


def _build(problem, config, folder):
    library = folder / "kernel.so"
    built = cuda.build_library(KernelSpec(problem, "forward", TARGET, config), library)
    return built, library.read_bytes()


# Problems whose kernels have the most to keep in registers, for each width of head_dim.
_HEAD_DIMS = [(64, 64), (128, 128), (256, 256), (64, 256)]
_MORE = [(32, 32), (80, 96), (192, 192), (256, 64), (16, 8)]


def _check_registers(problem, config, folder):
    built, _ = _build(problem, config, folder)
    frame = re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", built.log)
    assert frame.groups() == ("0", "0", "0"), f"{config}: {frame[0]}"
    # C7510 to C7519 are about products that the compiler serialises.
    assert not re.search(r"C75\d\d", built.log), f"{config}: {built.log}"


@pytest.mark.parametrize(("head_dim", "head_dim_v"), _HEAD_DIMS)
@pytest.mark.parametrize("warpgroups", [2, 3])
@pytest.mark.parametrize("persistent", [False, True])
def test_no_spills_and_no_serialised_products(head_dim, head_dim_v, warpgroups, persistent, tmp_path):
    """For the config of each width that needs most registers, of all that the planner can choose."""
    problem = Problem((64, 64), 2, head_dim, 9, 2, 2, (True, False), 1, head_dim_v, dtype="bfloat16")
    config = most_registers(problem, warpgroups, persistent)
    if config is None:
        pytest.skip(f"the planner gives {warpgroups} warpgroups no tile of keys with head_dim {head_dim_v}")
    _check_registers(problem, config, tmp_path)


@pytest.mark.full
@pytest.mark.parametrize(("head_dim", "head_dim_v"), _HEAD_DIMS + _MORE)
@pytest.mark.parametrize("warpgroups", [2, 3])
@pytest.mark.parametrize("persistent", [False, True])
@pytest.mark.parametrize("layout", [(4096,), (64, 64), (16, 16, 16)])
def test_no_spills_in_any_rank(layout, persistent, head_dim, head_dim_v, warpgroups, tmp_path):
    causal = tuple(axis != 1 for axis in range(len(layout)))
    problem = Problem(layout, 4, head_dim, 5, 3, 2, causal, 2, head_dim_v, additional_kv=True, dtype="float16")
    if len(layout) == 3 and (head_dim % 16 or head_dim_v % 16):
        pytest.skip("the schedule takes no such head_dim in 3-D")
    config = most_registers(problem, warpgroups, persistent)
    if config is not None:
        _check_registers(problem, config, tmp_path)


@pytest.mark.parametrize(("overlap", "threshold"), [(False, 8), (False, 0), (True, 0)])
def test_order_of_the_main_loop(overlap, threshold, tmp_path):
    """Scores of the next tile and weighted sum of the last are both issued before anything is waited for.

    With ``overlap`` the exponentials come before the wait for the weighted sum; without, the compiler moves that wait
    up over most of them, and it is the other warpgroup's products that they run beside.
    """
    problem = Problem((256, 256), 24, 128, 80, dtype="bfloat16")
    config = Sm90((4, 16), (8, 16), overlap=overlap, threshold=threshold)
    _build(problem, config, tmp_path)
    text = disassemble(tmp_path / "kernel.so")
    names = {"HGMMA": "H", "MUFU.EX2": "E", "LDL": "L", "STL": "L"}
    order = []
    for line in text.splitlines():
        found = re.search(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\d+\s+)?([A-Z][\w.]+)([^;]*)", line)
        if not found:
            continue
        name, operands = found.groups()
        if name.startswith("WARPGROUP.DEPBAR"):
            order.append(operands.strip()[-1])  # how many groups may be pending
        else:
            order += [short for long, short in names.items() if name.startswith(long)]
    sequence = "".join(order)
    assert "L" not in sequence, "something is kept in local memory"
    loop = re.search(r"H{16}1(E*)0(E*)", sequence)
    assert loop, f"the products are not in one go: {sequence}"
    before, after = map(len, loop.groups())
    keys_of_thread = 64
    if overlap:
        assert before >= keys_of_thread, f"the softmax waits for the weighted sum: {loop[0]}"
    else:
        assert before + after >= keys_of_thread
        assert after > before


def test_planned_kernel_is_machine_code(tmp_path):
    problem = Problem((30, 48, 80), 24, 128, (18, 24, 24), dtype="bfloat16")
    _, library = _build(problem, candidates(problem)[0].config, tmp_path)
    assert b"__global__" not in library
