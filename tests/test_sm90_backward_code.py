"""What the compiler makes of `na_compiler.schedules.sm90.backward`: registers, order of instructions. Needs nvcc."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest
from nvcc import disassemble, needs_nvcc

from na_compiler.compiler import cuda
from na_compiler.compiler.spec import KernelSpec
from na_compiler.problem import Problem
from na_compiler.schedules.sm90.backward.config import Sm90Backward, Sweep
from na_compiler.schedules.sm90.backward.planner import candidates, sweeps
from na_compiler.target import Target

TARGET = Target.parse("cuda:sm_90a")
pytestmark = needs_nvcc

_HEAD_DIMS = [(128, 128), (64, 64)]
_MORE = [(32, 32), (16, 8), (80, 96), (72, 40), (136, 136), (64, 256), (192, 192), (224, 224), (256, 256), (128, 64)]
# A problem whose windows have everything: it keeps most in registers.
_PROBLEM = Problem((64, 64), 2, 64, 9, 2, 2, (True, False), heads_kv=1, additional_kv=True, dtype="bfloat16")


def _fullest(problem, side, results):
    """The choices that need most registers, of each kind of block that the planner can choose."""
    found = {}
    for candidate in sweeps(problem, side, results, 1 << 20):
        sweep = candidate.sweep
        kind = (sweep.warpgroups, sweep.blocks, sweep.defer)
        streamed = math.prod(sweep.stream_tile)
        if streamed > found.get(kind, (0, None))[0]:
            found[kind] = (streamed, sweep)
    return [sweep for _, sweep in found.values()]


def _pairs(problem):
    """Configs in which each of the fullest choices for queries, and for keys, is met once."""
    queries = _fullest(problem, "queries", ("grad_query",))
    keys, split = _fullest(problem, "keys", ("grad_key", "grad_value")), False
    if not keys:
        keys, split = _fullest(problem, "keys", ("grad_key",)), True
    for number in range(max(len(queries), len(keys))):
        yield Sm90Backward(queries[number % len(queries)], keys[number % len(keys)], split)


def _build(problem, config, folder):
    library = folder / "kernel.so"
    return cuda.build_library(KernelSpec(problem, "backward", TARGET, config), library), library


def _check_registers(problem, config, folder):
    built, _ = _build(problem, config, folder)
    frames = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", built.log)
    assert frames
    assert set(frames) == {("0", "0", "0")}, f"{config}: {frames}"
    # C7510 to C7519 are about products that the compiler serialises.
    assert not re.search(r"C75\d\d", built.log), f"{config}: {built.log}"


@pytest.mark.parametrize(("head_dim", "head_dim_v"), _HEAD_DIMS)
def test_no_spills_and_no_serialised_products(head_dim, head_dim_v, session_seed, tmp_path):
    """For one of the fullest configs, another one in each run."""
    problem = _PROBLEM.replace(head_dim=head_dim, head_dim_v=head_dim_v)
    configs = list(_pairs(problem))
    _check_registers(problem, configs[session_seed % len(configs)], tmp_path)


@pytest.mark.full
@pytest.mark.parametrize(("head_dim", "head_dim_v"), _HEAD_DIMS + _MORE)
@pytest.mark.parametrize("layout", [(4096,), (64, 64), (16, 16, 16)])
def test_no_spills_in_any_rank(layout, head_dim, head_dim_v, tmp_path):
    causal = tuple(axis != 1 for axis in range(len(layout)))
    if len(layout) == 3 and (head_dim % 16 or head_dim_v % 16):
        pytest.skip("the family takes no such head_dim in 3-D")
    problem = Problem(layout, 4, head_dim, 5, 3, 2, causal, 2, head_dim_v, additional_kv=True, dtype="float16")
    for config in _pairs(problem):
        _check_registers(problem, config, tmp_path)


def _sequences(library: Path) -> dict[str, str]:
    """Products (H), exponentials (E), local memory (L) and waits (how many groups may be pending) of each kernel."""
    names = {"HGMMA": "H", "MUFU.EX2": "E", "LDL": "L", "STL": "L"}
    found: dict[str, str] = {}
    kernel = ""
    for line in disassemble(library).splitlines():
        begins = re.match(r"\s*\.section\s+\.text\.(\w+)", line)
        if begins:
            kernel = begins[1]
            found[kernel] = ""
        match = re.search(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\d+\s+)?([A-Z][\w.]+)([^;]*)", line)
        if not match or not kernel:
            continue
        name, operands = match.groups()
        if name.startswith("WARPGROUP.DEPBAR"):
            found[kernel] += operands.strip()[-1]
        else:
            found[kernel] += "".join(short for long, short in names.items() if name.startswith(long))
    return found


def test_order_of_the_loops(tmp_path):
    """Both products of a tile are issued before a wait, and exponentials come before the second one."""
    problem = Problem((256, 256), 24, 128, 80, dtype="bfloat16")
    config = Sm90Backward(Sweep((8, 8), (8, 8), stages=3, defer=True), Sweep((8, 8), (8, 8), stages=3))
    _, library = _build(problem, config, tmp_path)
    sequences = _sequences(library)
    assert not any("L" in sequence for sequence in sequences.values()), "something is kept in local memory"
    elements = 32
    queries, keys = sequences["main_kernel_1"], sequences["main_kernel_2"]
    # S and dP; exponentials beside dP and the sums of the tile before; then dQ, which nothing waits for.
    loop = re.search(r"H{16}1(E*)0(H*)", queries)
    assert loop, queries
    assert len(loop[1]) == elements, loop[0]
    assert len(loop[2]) == 4, loop[0]
    # S and dP; dV and dK, both under way at the end.
    loop = re.search(r"H{16}1(E*)0(H*)0", keys)
    assert loop, keys
    assert len(loop[1]) == elements, loop[0]
    assert len(loop[2]) == 8, loop[0]


def test_planned_kernel_is_machine_code(tmp_path):
    problem = Problem((56, 56), 4, 32, 7, dtype="float16")
    _, library = _build(problem, candidates(problem)[0].config, tmp_path)
    assert b"__global__" not in library.read_bytes()
