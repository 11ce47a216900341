"""The descriptions of `na_compiler.schedules.simt`, compiled for the CPU as they are, without a schedule, and right.

What the schedule makes of them is checked in the emulator by ``tests/test_simt.py``, and on a GPU by
``tests/gpu/check.py``.
"""

import pytest
import torch
from oracle import check_backward, check_forward, draw, poisoned

from na_compiler.compiler.spec import KernelSpec
from na_compiler.problem import Problem
from na_compiler.schedules.simt.family import FAMILY
from na_compiler.schedules.simt.plan import DirectPlan
from na_compiler.target import Target
from na_compiler.window import query_bounds, window_bounds

PROBLEMS = [
    Problem(37, 1, 3, 7, 3, 3, head_dim_v=5),
    Problem((9, 11), 4, 8, (3, 5), (1, 2), (2, 1), (False, True), 2, 6, additional_kv=True),
    Problem((5, 6, 7), 2, 4, (3, 2, 5), (2, 1, 3), (1, 2, 1), (True, False, False), dtype="bfloat16"),
]


def plans(problem):
    vector = 1 if problem.head_dim % 2 or problem.head_dim_v % 2 else 2
    yield DirectPlan(problem)
    yield DirectPlan(problem, lanes=2, rows=4, keys=(1, 2, 3), queries=(1, 2, 2), vector=vector, strip=7)


@pytest.mark.parametrize("cut", [0, 1])
@pytest.mark.parametrize("problem", PROBLEMS, ids=str)
def test_direct_descriptions_are_right_as_they_are(problem, cut, seed):
    tvm = pytest.importorskip("tvm")
    from na_compiler.schedules.simt.backward import direct_backward
    from na_compiler.schedules.simt.forward import direct_forward

    plan = list(plans(problem))[cut]
    example = draw(problem, batch=2)
    dtype = example.inputs[0].dtype
    scale = problem.head_dim**-0.5
    output, lse = poisoned(example.output.to(dtype), example.lse.float())
    tvm.compile(direct_forward(plan), target="llvm")["main"](*example.inputs, scale, output, lse)
    check_forward(example, output, lse)
    shapes = [(2, problem.heads, problem.tokens)]
    if problem.additional_kv:
        parts = (2, problem.heads_kv, plan.strips, 5)
        shapes += [(*parts, plan.head_dim), (*parts, plan.head_dim_v)]
    grads = poisoned(*example.inputs)
    spaces = poisoned(*map(torch.empty, shapes))
    tvm.compile(direct_backward(plan), target="llvm")["main"](
        *example.inputs, output, example.grad_output, lse, example.grad_lse, scale, *grads, *spaces
    )
    check_backward(example, grads)


def test_query_bounds_are_the_window_rule_the_other_way_round():
    for length in range(1, 15):
        for kernel_size in range(1, length + 1):
            for stride in range(1, kernel_size + 1):
                for is_causal in (False, True):
                    rule = (length, kernel_size, stride, is_causal)
                    bounds = [window_bounds(query, *rule) for query in range(length)]
                    for key in range(length):
                        seeing = [query for query, (first, end) in enumerate(bounds) if first <= key < end]
                        assert seeing == list(range(*query_bounds(key, *rule))), (rule, key)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("head_dim", [1, 7, 8, 20, 64, 128, 256, 1000])
def test_plans_divide_rows_evenly(head_dim, dtype):
    for direction in ("forward", "backward"):
        problem, target = Problem((30, 30), 2, head_dim, 5, dtype=dtype), Target.parse("cuda:sm_80")
        config = FAMILY.choose(problem, target, direction)
        spec = KernelSpec(problem, direction, target, config)
        assert head_dim % config.vector == 0
        assert config.lanes * config.rows <= 1024
        assert spec.plan.head_dim % (config.lanes * config.vector) == 0
        assert spec.info.alignment <= 16
