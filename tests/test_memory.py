"""What kernels take beside their inputs and outputs: forward a little a thread, backward a multiple of the inputs.

Nothing of tokens x tokens or tokens x window.
"""

import json
import math
import random
from pathlib import Path

import pytest
from processes import run_python

from na_compiler import KernelSpec, Problem

# Bytes a thread: staged keys and values, scores of a tile, and pages of stack. As `ForwardKernel` states.
FORWARD_BYTES = 3 << 20
# Times the bytes that query, key and value have in float32, in whole vectors. As `BackwardKernel` states.
BACKWARD_MULTIPLE = 9.0
# Everything else that a process may touch for the first time: allocator's arenas, a thread's stack.
SLACK = 4 << 20

MEASURE = """
import gc, re, sys
from pathlib import Path
import torch
import na_compiler
from na_compiler import Problem

torch.set_num_threads(2)
problem = eval(sys.argv[1])
tensors = torch.randn(3, 1, *problem.layout, problem.heads, problem.head_dim).unbind()
forward = na_compiler.compile(problem)
backward = na_compiler.compile(problem, direction="backward")
# A first call elsewhere: threads start, libraries are loaded.
small = Problem((4, 4), 1, 8, 3)
some = torch.randn(3, 1, 4, 4, 1, 8).unbind()
results = na_compiler.compile(small)(*some)
na_compiler.compile(small, direction="backward")(*some, *results, some[0])

def resident(field):
    return 1024 * int(re.search(rf"{field}:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])

def peak(run):
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # Resets the peak.
    before = resident("VmRSS")
    run()
    return resident("VmHWM") - before

results = []
print(peak(lambda: results.extend(forward(*tensors))))
output, lse = results
grads = []
print(peak(lambda: grads.append(backward(*tensors, output, lse, output))))
"""

PROBLEMS = [
    # With tokens x window scores of 60, 256, 50 and 51 MiB.
    Problem((112, 112), 2, 32, 25),
    Problem(8192, 1, 32, 8192, is_causal=True),
    pytest.param(Problem(16384, 1, 32, 801), marks=pytest.mark.full),
    pytest.param(Problem((24, 24, 24), 2, 32, 9, dilation=2), marks=pytest.mark.full),
]


def multiple(problem, target="llvm"):
    """Return workspace of a backward over query, key and value, both in float32."""
    workspace = KernelSpec.make(problem, target, "backward").info.workspace
    width, width_v = (-(-extent // 16) * 16 for extent in (problem.head_dim, problem.head_dim_v))
    elements = problem.heads * width + problem.heads_kv * (width + width_v)
    return sum(map(math.prod, workspace.shapes(1, 8))) / (problem.tokens * elements)


@pytest.mark.parametrize("problem", PROBLEMS, ids=str)
def test_peak_of_resident_memory(problem):
    forward, backward = map(int, run_python(MEASURE, repr(problem)).split())
    tokens = 4 * problem.tokens * problem.heads
    outputs = tokens * (problem.head_dim_v + 1)
    assert forward - outputs < 2 * FORWARD_BYTES + SLACK
    inputs = tokens * 3 * problem.head_dim
    assert backward - inputs < multiple(problem) * inputs + 2 * FORWARD_BYTES + SLACK


SMALL_WINDOWS = [
    Problem((56, 56), 4, 32, 7),
    Problem((64, 64), 8, 64, 13),
    Problem(4096, 4, 64, 255),
    Problem((16, 16, 16), 4, 32, 5),
    Problem((32, 32), 4, 64, 32),
    Problem((64, 64), 4, 32, 7, dilation=8),
    Problem((64, 64), 4, 32, 8, 8),
    Problem((20, 30), 4, 16, 5, heads_kv=1, head_dim_v=64, additional_kv=True),
]
LARGE_WINDOWS = [
    Problem(16384, 4, 64, 4097),
    Problem((128, 128), 2, 64, 65),
    Problem((24, 64, 64), 2, 128, (12, 24, 24)),
    Problem(8192, 2, 128, 8192),
]


def test_workspace_of_backward_for_anything(seed):
    cases = json.loads((Path(__file__).parent / "data" / "na_cases.json").read_text())["cases"]
    for case in random.sample(cases, 25):
        heads, heads_kv = case["heads"], case["heads_kv"]
        window = (case["kernel_size"], case["stride"], case["dilation"])
        problem = Problem(case["shape"], heads, random.choice([1, 24, case["head_dim"]]), *window, heads_kv=heads_kv)
        assert multiple(problem) <= BACKWARD_MULTIPLE, problem


@pytest.mark.parametrize("target", ["llvm:x86-64-v3", "llvm:x86-64-v4"])
@pytest.mark.parametrize("problem", SMALL_WINDOWS + LARGE_WINDOWS, ids=str)
def test_workspace_of_backward(problem, target):
    assert multiple(problem, target) <= BACKWARD_MULTIPLE
